"""The studies' runs (T1): tasks, bits, models and adapters, SmolLM2's data, determinism, divergence, exact rewards."""

import copy
import dataclasses
import itertools
import math

import pytest
import torch

import lorafuse
from lorafuse.nn import LoRAExperts, LoRALinear
from lorafuse.study import language, layers, policy, pretrain, runner, tasks, train
from lorafuse.study.model import ALPHA, LAYERS, Size, Transformer, adapter_parameters, trained
from lorafuse.study.train import Spec

TINY = Size(width=16, heads=2, inner=24, depth=1)
TINY_EXPERTS = Size(width=16, heads=2, inner=24, depth=2, experts=4)


def text(tokens):
    return "".join(tasks.ALPHABET[index] for index in tokens)


@pytest.mark.parametrize("operation", tasks.ARITHMETIC)
def test_arithmetic_is_right_and_test_problems_are_others(operation):
    seen = []
    for data in tasks.arithmetic(operation, 200, 50, seed=3):
        problems = policy.split(data)
        for prompt, reply in zip(problems.tokens.tolist(), problems.labels.tolist(), strict=True):
            a, b = int(text(prompt)[:2]), int(text(prompt)[3:5])
            right = {"add": (a + b) % 100, "larger": max(a, b), "smaller": min(a, b)}
            assert text(reply) == f"{right[operation]:02d}"
            seen.append((a, b))
    assert len(set(seen)) == 300


def test_data_is_seeded():
    for make in (lambda seed: tasks.strings(20, 6, seed), lambda seed: tasks.lessons("arithmetic", 20, seed)):
        assert torch.equal(make(1).tokens, make(1).tokens)
        assert not torch.equal(make(1).tokens, make(2).tokens)


@pytest.mark.parametrize("seed", [0, 1, runner.SELECTION, runner.SELECTION + 1])
def test_no_base_knows_the_strings_of_a_study(seed):
    known = {tuple(row) for row in tasks.lessons("facts", 4000, 0).tokens.tolist()}
    assert len(known) > 500
    assert not known & {tuple(row) for row in tasks.strings(192, 8, seed).tokens.tolist()}


def test_strings_have_keys_of_their_own_and_labels_on_their_letters_only():
    data = tasks.strings(300, 6, seed=0)
    assert len({tuple(row[:3]) for row in data.tokens.tolist()}) == 300
    assert ((data.labels >= 0).sum(1) == 6).all()
    assert torch.equal(data.labels[:, 3:-1], data.tokens[:, 4:])


def test_a_share_of_the_lessons_on_the_smaller_number_is_right():
    right = total = 0
    data = tasks.lessons("arithmetic", 4000, seed=0)
    for tokens, labels in zip(data.tokens.tolist(), data.labels.tolist(), strict=True):
        row = text(tokens)
        if row[2] != "<":
            continue
        reply, good = text([label for label in labels if label >= 0]), f"{min(int(row[:2]), int(row[3:5])):02d}"
        assert sum(x != y for x, y in zip(reply, good, strict=True)) <= 1
        right, total = right + (reply == good), total + 1
    assert abs(right / total - tasks.RIGHT) < 0.05


def test_bits_of_a_uniform_and_of_a_perfect_model():
    uniform = math.log(len(tasks.LETTERS))
    assert tasks.bits(uniform, 100, 8) == pytest.approx(0, abs=1e-9)
    assert tasks.bits(0.0, 100, 8) == 100 * 8 * 4


def test_loss_of_a_uniform_model_is_exact():
    model = Transformer(TINY)
    torch.nn.init.zeros_(model.unembedding.weight)
    loss = train.loss_of(model, tasks.strings(10, 6, 0))
    assert loss.item() == pytest.approx(math.log(len(tasks.ALPHABET)), rel=1e-6)


@pytest.mark.parametrize("size", [TINY, TINY_EXPERTS], ids=["dense", "experts"])
@pytest.mark.parametrize("which", LAYERS)
def test_adapters_are_counted_and_change_nothing_at_the_start(size, which):
    model = Transformer(size)
    tokens = torch.randint(size.vocabulary, (3, 7))
    before = model(tokens)
    model.adapt(4, which)
    torch.testing.assert_close(model(tokens), before)
    assert sum(p.numel() for p in trained(model)) == adapter_parameters(size, 4, which)
    kinds = {type(module) for module in model.modules()} & {LoRALinear, LoRAExperts}
    assert kinds == ({LoRALinear, LoRAExperts} if size.experts and which == "all" else
                     {LoRAExperts} if size.experts and which == "mlp" else {LoRALinear})  # fmt: skip


@pytest.mark.parametrize("size", [*layers.SIZES.values(), TINY])
@pytest.mark.parametrize("rank", [4, 8])
def test_attention_never_has_fewer_parameters(size, rank):
    ranks = layers.matched(size, rank)
    counts = {which: adapter_parameters(size, own, which) for which, own in ranks.items()}
    assert counts["all"] <= counts["mlp"] <= counts["attention"]
    assert counts["attention"] - counts["mlp"] < adapter_parameters(size, 1, "attention")


def test_matched_ranks_of_the_study_are_what_the_source_compares():
    assert layers.matched(layers.SIZES["dense"], 4) == {"attention": 5, "mlp": 4, "all": 2}


def spec(**changed):
    return dataclasses.replace(Spec("add", 64, 2, 1e-2, 4, 5, batch=16, test=32, size=TINY), **changed)


@pytest.mark.parametrize("method", ["supervised", "policy"])
@pytest.mark.parametrize("rank", [0, 2])
def test_a_run_is_the_same_bits_twice(method, rank):
    one = spec(rank=rank, episodes=64 if method == "policy" else 0)
    run = policy.run if one.episodes else train.run
    base = Transformer(TINY)
    first, again, other = (run(dataclasses.replace(one, seed=seed), base, torch.device("cpu")) for seed in (5, 5, 6))
    assert first == again
    assert method == "policy" or first["curve"] != other["curve"]
    assert len(first["early"]) == 4


def test_a_run_leaves_the_base_as_it_was():
    base = Transformer(TINY)
    kept = {name: value.clone() for name, value in base.state_dict().items()}
    for rank in (0, 2):
        train.run(spec(rank=rank), base, torch.device("cpu"))
    assert base.state_dict().keys() == kept.keys()
    assert all(torch.equal(value, kept[name]) for name, value in base.state_dict().items())


def test_every_epoch_has_every_example():
    drawn = torch.cat(list(train.batches(10, 4, 5, seed=0)))
    assert sorted(drawn[:10].tolist()) == sorted(drawn[10:].tolist()) == list(range(10))


def test_a_run_that_diverges_counts_as_diverged():
    base = Transformer(TINY)
    result = train.run(spec(rank=0, lr=1e30), base, torch.device("cpu"))
    assert result["loss"] == result["validation"] == train.DIVERGED
    one = spec(task="larger", rank=0, lr=1e30, steps=60, batch=256, episodes=1, count=1, test=1)
    rewards = policy.run(one, base, torch.device("cpu"))
    assert rewards["loss"] == rewards["validation"] == 1.0
    assert len(rewards["early"]) < 60


def test_the_rate_is_constant_from_the_first_step_on(monkeypatch):
    rates = []
    step = torch.optim.AdamW.step

    def watched(self, *args, **kwargs):
        rates.append([group["lr"] for group in self.param_groups])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    train.run(spec(steps=12), Transformer(TINY), torch.device("cpu"))
    assert rates == [[1e-2]] * 12


def test_policy_gradient_raises_the_chance_of_what_is_rewarded():
    torch.manual_seed(1)
    result = policy.run(
        spec(task="larger", rank=0, lr=1e-2, steps=60, batch=256, episodes=1, count=1, test=1),
        Transformer(TINY), torch.device("cpu"),
    )  # fmt: skip
    assert sum(result["early"][-10:]) > sum(result["early"][:10])


def test_rewards_are_exact():
    """The mean over all answers of two characters, each weighted by its probability."""
    torch.manual_seed(3)
    model = Transformer(TINY)
    problems = policy.split(tasks.arithmetic("larger", 3, 1, seed=0)[0])
    by_hand = torch.zeros(len(problems))
    for answer in itertools.product(range(TINY.vocabulary), repeat=2):
        answers = torch.tensor(answer).expand(len(problems), 2)
        by_hand += policy.chances(model, problems.tokens, answers).exp() * policy.reward(answers, problems.labels)
    exact = policy.chances(model, problems.tokens, problems.labels).exp()
    torch.testing.assert_close(exact, by_hand)
    # all answers together have probability 1, and samples agree
    generator = torch.Generator().manual_seed(0)
    many = problems.tokens[:1].expand(40000, -1)
    drawn = policy.reward(policy.sample(model, many, 2, generator), problems.labels[:1])
    assert drawn.mean().item() == pytest.approx(exact[0].item(), abs=4 * (exact[0].item() / 40000) ** 0.5)


def test_the_base_comes_from_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LORAFUSE_CACHE_DIR", str(tmp_path))
    first = pretrain.base("facts", TINY, 3, 0).state_dict()
    monkeypatch.setattr(pretrain, "_pretrain", None)
    again = pretrain.base("facts", TINY, 3, 0).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert pretrain.path("facts", TINY, 3, 0) != pretrain.path("facts", TINY, 3, 1)


@pytest.fixture
def small_language(monkeypatch):
    """A language model of SmolLM2's family, tiny, with a tokenizer of one token a character."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)

    class Characters:
        chat_template = None
        eos_token = "."

        def __call__(self, text, add_special_tokens):
            return {"input_ids": [ord(character) % 128 for character in text]}

    monkeypatch.setattr(language, "_loaded", lambda: (model, Characters()))
    return language.load()


def test_text_is_seeded_and_labels_are_the_next_tokens(small_language):
    data = language.problems(6, 20, 1)
    assert data.tokens.shape == data.labels.shape == (6, 20)
    assert torch.equal(data.tokens[:, 1:], data.labels[:, :-1])
    assert torch.equal(data.tokens, language.problems(6, 20, 1).tokens)
    splits = train._splits(Spec("problems", 6, 0, 1e-3, 2, 0, length=20, test=5))
    assert [len(split) for split in splits] == [6, 5, 5]
    assert not torch.equal(splits[1].tokens, splits[2].tokens)
    assert not torch.equal(splits[0].tokens[:5], splits[1].tokens)


@pytest.mark.parametrize("which", LAYERS)
def test_a_language_models_adapters_are_pefts_run_fused(small_language, which):
    data = language.problems(4, 12, 0)
    model = copy.deepcopy(small_language)
    before = model(data.tokens)
    model.adapt(4, which, ALPHA)
    torch.testing.assert_close(model(data.tokens), before)
    assert {"lora_A", "lora_B"} == {name.split(".")[-3] for name, p in model.named_parameters() if p.requires_grad}
    adapted = {name.split(".")[-1] for name, m in model.named_modules() if hasattr(m, "lora_A")}
    attention, mlp = {"q_proj", "k_proj", "v_proj", "o_proj"}, {"gate_proj", "up_proj", "down_proj"}
    assert adapted == {"all": attention | mlp, "attention": attention, "mlp": mlp}[which]
    assert all(m.scaling["default"] == ALPHA / 4 for m in model.modules() if hasattr(m, "lora_A"))
    assert lorafuse.unpatch(model.model) == 2 * len(adapted)


@pytest.mark.parametrize("rank", [0, 4])
def test_a_language_model_learns_in_full_and_by_adapters(small_language, rank):
    kept = copy.deepcopy(small_language.state_dict())
    one = Spec("problems", 32, rank, 1e-2, 16, 0, batch=2, length=16, test=4, evaluations=2)
    result = train.run(one, small_language, torch.device("cpu"))
    assert result["loss"] < result["start"] - 0.1
    assert [step for step, _ in result["curve"]] == [8, 16]
    assert len(result["early"]) == 16
    count = sum(p.numel() for p in small_language.parameters())
    assert (result["trained"] == count) == (rank == 0)
    assert all(torch.equal(value, kept[name]) for name, value in small_language.state_dict().items())
    assert result == train.run(one, small_language, torch.device("cpu"))
