"""The studies' parts (T1): tasks, bits, matched parameters, verdicts, determinism of a run."""

import dataclasses
import math

import pytest
import torch

from lorafuse.nn import LoRAExperts, LoRALinear
from lorafuse.study import layers, policy, tasks, train, verdict
from lorafuse.study.model import LAYERS, Size, Transformer, adapt, adapter_parameters, trained
from lorafuse.study.rate import vertex
from lorafuse.study.train import Spec
from lorafuse.study.verdict import FAILED, HELD, INCONCLUSIVE

TINY = Size(width=16, heads=2, inner=24, depth=1)
TINY_EXPERTS = Size(width=16, heads=2, inner=24, depth=2, experts=4)


def text(tokens):
    return "".join(tasks.ALPHABET[index] for index in tokens)


@pytest.mark.parametrize("operation", tasks.ARITHMETIC)
def test_arithmetic_is_right_and_test_problems_are_others(operation):
    seen = []
    for data in tasks.arithmetic(operation, 200, 50, seed=3):
        prompts, answers = policy.split(data)
        for prompt, reply in zip(prompts.tolist(), answers.tolist(), strict=True):
            a, b = int(text(prompt)[:2]), int(text(prompt)[3:5])
            right = {"add": (a + b) % 100, "subtract": (a - b) % 100, "larger": max(a, b), "smaller": min(a, b)}
            right["mirrored"] = int(f"{(a + b) % 100:02d}"[::-1])
            assert text(reply) == f"{right[operation]:02d}"
            seen.append((a, b))
    assert len(set(seen)) == 250


def test_data_is_seeded():
    for make in (lambda seed: tasks.strings(20, 6, seed), lambda seed: tasks.lessons("arithmetic", 20, seed)):
        assert torch.equal(make(1).tokens, make(1).tokens)
        assert not torch.equal(make(1).tokens, make(2).tokens)


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
    adapt(model, 4, which)
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


def test_verdicts_of_planted_values():
    assert verdict.above([2.0, 2.1], [1.0, 1.9]) == HELD
    assert verdict.above([1.8, 2.1], [1.0, 1.9]) == INCONCLUSIVE
    assert verdict.above([1.0, 1.1], [1.2, 1.9]) == FAILED
    assert verdict.at_most([-1.0, 0.05], 0.05) == HELD
    assert verdict.at_most([0.01, 0.06], 0.05) == INCONCLUSIVE
    assert verdict.at_most([0.06, 0.07], 0.05) == FAILED
    assert verdict.inside([5.0, 20.0], 5, 20) == HELD
    assert verdict.inside([4.9, 6.0], 5, 20) == INCONCLUSIVE
    assert verdict.inside([4.0, 30.0], 5, 20) == INCONCLUSIVE
    assert verdict.inside([1.0, 2.0], 5, 20) == verdict.inside([21.0, 22.0], 5, 20) == FAILED


def test_nan_never_holds():
    nan = float("nan")
    for values in ([nan, nan], [nan, 0.0], [0.0, nan]):
        assert verdict.at_most(values, 1.0) != HELD
        assert verdict.inside(values, -1, 1) != HELD
        assert verdict.above(values, [-1.0]) != HELD


def test_an_edge_is_inconclusive_whatever_was_found():
    for outcome in (HELD, FAILED):
        found = verdict.claim("x", outcome, [1.0, 3.0], margin="m", source="s", at_edge=True)
        assert (found.outcome, found.value, found.low, found.high) == (INCONCLUSIVE, 2.0, 1.0, 3.0)
        assert verdict.EDGE in found.margin


def test_a_study_holds_only_when_all_of_it_does():
    assert verdict.both([HELD, HELD]) == HELD
    assert verdict.both([HELD, INCONCLUSIVE]) == INCONCLUSIVE
    assert verdict.both([HELD, INCONCLUSIVE, FAILED]) == FAILED
    assert verdict.both([]) == INCONCLUSIVE


def test_the_vertex_of_a_parabola_is_found():
    rates = [2.0**k for k in range(5)]
    assert vertex(rates, [(math.log2(rate) - 1.7) ** 2 for rate in rates]) == pytest.approx(2**1.7)
    assert vertex(rates, [0.0, 1.0, 2.0, 3.0, 4.0]) == 1.0


def spec(**changed):
    return dataclasses.replace(Spec("add", 64, 2, 1e-2, 4, 5, batch=16, test=32, size=TINY), **changed)


@pytest.mark.parametrize("method", ["supervised", "policy"])
@pytest.mark.parametrize("rank", [0, 2])
def test_a_run_is_the_same_bits_twice(method, rank):
    one = spec(rank=rank, episodes=64 if method == "policy" else 0)
    run = policy.run if one.episodes else train.run
    base = Transformer(TINY).state_dict()
    first, again, other = (run(dataclasses.replace(one, seed=seed), base, torch.device("cpu")) for seed in (5, 5, 6))
    assert first == again
    assert method == "policy" or first["curve"] != other["curve"]
    assert len(first["early"]) == 4


@pytest.mark.parametrize(("rank", "rest"), [(0, False), (4, True)])
def test_controls_train_what_they_say(rank, rest):
    """Full fine-tuning without the rest trains the adapted layers alone, adapters with it train both."""
    base = Transformer(TINY_EXPERTS).state_dict()
    spec = Spec("strings", 8, rank, 1e-3, 1, 0, size=TINY_EXPERTS, rest=rest)
    model = train.prepared(spec, base, torch.device("cpu"))
    named = {name for name, p in model.named_parameters() if p.requires_grad}
    inside = {name for name in named if ".attention." in name or ".mlp." in name}
    outside = {name for name, _ in model.named_parameters() if ".attention." not in name and ".mlp." not in name}
    assert named - inside == (outside if rest else set())
    assert inside
    assert all(("lora_" in name) == bool(rank) for name in inside)


def test_a_run_leaves_the_base_as_it_was():
    base = Transformer(TINY).state_dict()
    kept = {name: value.clone() for name, value in base.items()}
    for rank in (0, 2):
        train.run(spec(rank=rank), base, torch.device("cpu"))
    assert all(torch.equal(base[name], kept[name]) for name in base)


def test_every_epoch_has_every_example():
    drawn = torch.cat(list(train.batches(10, 4, 5, seed=0)))
    assert sorted(drawn[:10].tolist()) == sorted(drawn[10:].tolist()) == list(range(10))


def test_a_run_that_diverges_counts_as_diverged():
    base = Transformer(TINY).state_dict()
    result = train.run(spec(rank=0, lr=1e30), base, torch.device("cpu"))
    assert result["loss"] == train.DIVERGED


def test_policy_gradient_raises_the_chance_of_what_is_rewarded():
    torch.manual_seed(1)
    result = policy.run(
        spec(task="larger", rank=0, lr=1e-2, steps=60, batch=256, episodes=1, count=1, test=1),
        Transformer(TINY).state_dict(), torch.device("cpu"),
    )  # fmt: skip
    assert sum(result["early"][-10:]) > sum(result["early"][:10])
