"""PEFT's experts, patched (T1): outputs and every gradient equal to what PEFT ships, in every state of the adapters."""

import copy
import itertools
from unittest import mock

import moe_models
import peft
import pytest
import torch
import transformers
from moe_models import FAMILIES, adapted, token_ids
from tiny_models import reason_to_patch_nothing
from torch.utils.checkpoint import checkpoint

import lorafuse
from lorafuse.integrations import hf_common, hf_experts
from lorafuse.testing.numerics import relative_l2, tolerance

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning:peft", "ignore::UserWarning:torch.jit", "ignore::RuntimeWarning:peft"
)


def routers(model):
    ends = "gate.weight", "router.weight", "router.layer.weight"
    return [p for name, p in model.named_parameters() if name.endswith(ends)]


def outermost(model):
    """The first experts module of the model, with its adapters."""
    return next(module for module in model.modules() if isinstance(module, peft.tuners.lora.ParamWrapper))


def step(model, ids=None):
    """Logits and the gradient of every trained parameter, the routers' and the embeddings' included."""
    for parameter in routers(model):
        parameter.requires_grad_()
    embeddings = model.get_input_embeddings().weight.requires_grad_()
    model.zero_grad()
    ids = token_ids() if ids is None else ids
    logits = model(input_ids=ids).logits
    dout = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2)).to(logits.dtype)
    logits.backward(dout)
    actual = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert embeddings.grad is not None
    return {"logits": logits.detach(), **actual}


def fused_calls(run):
    """What `run()` returns, and how often experts ran fused in it."""
    with mock.patch.object(hf_experts, "lora_experts", wraps=hf_experts.lora_experts) as calls:
        return run(), calls.call_count


def check(model, fused=True, **more):
    """The model as PEFT ships it against a patched copy of it; returns the copy."""
    patched = copy.deepcopy(model)
    report = lorafuse.patch(patched)
    expected = step(model, **more)
    actual, calls = fused_calls(lambda: step(patched, **more))
    assert bool(calls) is fused
    assert actual.keys() == expected.keys()
    dtype = expected["logits"].dtype
    for name, tensor in expected.items():
        assert actual[name].dtype is tensor.dtype
        assert relative_l2(actual[name], tensor) <= tolerance(dtype), name
        if "lora_" in name and fused:
            assert actual[name].count_nonzero() > 0, name
    assert report.patched or not fused
    return patched


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(name):
    model = adapted(name)
    patched = check(model)
    kinds = {p.kind for p in lorafuse.patch(patched).patched}
    assert kinds == {"experts"}
    assert lorafuse.unpatch(patched) > 0
    assert all(type(module) is not hf_experts.FusedExperts for module in patched.modules())


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("R", [1, 2, 3, 4, 6, 8, 16])
def test_every_rank(name, R):
    check(adapted(name, R=R))


SIZES = [
    {"moe_intermediate_size": 16},
    {"moe_intermediate_size": 8},
    {"num_experts_per_tok": 1},
    {"num_experts": 1, "num_experts_per_tok": 1},
    {"num_experts": 7, "num_experts_per_tok": 7},
]


@pytest.mark.parametrize("changes", SIZES, ids=["H = I", "H = 2I", "k = 1", "E = 1", "k = E"])
def test_every_size(changes):
    check(adapted("qwen3_moe", **changes))


@pytest.mark.parametrize("size", [16, 8])
def test_sizes_from_which_a_transposed_layout_could_be_guessed(size):
    check(adapted("gpt_oss", intermediate_size=size))


@pytest.mark.parametrize(("able", "shown"), [(("triton", "eager"), "auto"), (("eager",), "eager")])
def test_the_report_says_the_same_of_experts_and_of_linear_layers(able, shown, monkeypatch):
    """Where several backends can run, each call follows its plan."""
    monkeypatch.setattr("lorafuse.backends.base.candidates", lambda device: able)
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], target_parameters=moe_models.targets("qwen3_moe"))
    report = lorafuse.patch(peft.get_peft_model(moe_models.base("qwen3_moe"), config))
    assert {(p.kind, p.backend) for p in report.patched} == {("experts", shown), ("linear", shown)}


def test_one_token():
    check(adapted("mixtral"), ids=torch.tensor([[5]]))


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "nemotron_h"])
def test_no_token_reaches_the_experts(name):
    """T = 0, as when every token of a device went elsewhere."""
    model = adapted(name)
    lorafuse.patch(model)
    experts = outermost(model)
    x = torch.zeros(0, moe_models.HIDDEN, requires_grad=True)
    y = experts(x, torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2))
    assert y.shape == x.shape
    y.sum().backward()
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("name", ["olmoe", "gpt_oss", "nemotron_h"])
def test_one_projection_adapted(name, which):
    check(adapted(name, parameters=moe_models.targets(name)[which : which + 1]))


def test_together_with_linear_layers():
    model = moe_models.base("qwen3_moe")
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], target_parameters=moe_models.targets("qwen3_moe"),
        init_lora_weights=False, rank_pattern={"experts.down_proj": 2}, alpha_pattern={"experts.down_proj": 7},
    )  # fmt: skip
    patched = check(peft.get_peft_model(model, config))
    assert {p.kind for p in lorafuse.patch(patched).patched} == {"experts", "linear"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_half_precision_experts(name, dtype):
    """The experts module alone: elsewhere a half-precision model rounds more than the two ways differ."""
    model = adapted(name).to(dtype)
    patched = copy.deepcopy(model)
    lorafuse.patch(patched)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(40, moe_models.HIDDEN, generator=generator).to(dtype)
    index = torch.rand(40, 4, generator=generator).topk(2).indices
    weight = torch.rand(40, 2, generator=generator).to(dtype)
    actual = []
    for one in (model, patched):
        outer = outermost(one)
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        outer(leaves[0], index, leaves[1]).backward(torch.ones_like(x))
        actual.append([t.grad for t in leaves] + [p.grad for p in outer.parameters() if p.grad is not None])
    assert len(actual[0]) == len(actual[1]) == 6
    for one, other in zip(*actual, strict=True):
        assert relative_l2(other, one) <= tolerance(dtype)


class TestStates:
    @pytest.fixture(params=["qwen3_moe", "gpt_oss"])
    def model(self, request):
        return adapted(request.param)

    def test_disabled(self, model):
        patched = check(model)
        expected, (actual, calls) = None, (None, None)
        with model.disable_adapter(), patched.disable_adapter(), torch.no_grad():
            expected = model(input_ids=token_ids()).logits
            actual, calls = fused_calls(lambda: patched(input_ids=token_ids()).logits)
        assert calls == 0
        assert relative_l2(actual, expected) <= tolerance(torch.float32)
        assert fused_calls(lambda: step(patched))[1] > 0

    def test_merged_and_unmerged(self, model):
        patched = check(model)
        with torch.no_grad():
            expected = model(input_ids=token_ids()).logits
            patched.merge_adapter()
            actual, calls = fused_calls(lambda: patched(input_ids=token_ids()).logits)
            assert calls == 0
            assert relative_l2(actual, expected) <= tolerance(torch.float32)
            patched.unmerge_adapter()
            actual, calls = fused_calls(lambda: patched(input_ids=token_ids()).logits)
        assert calls > 0
        assert relative_l2(actual, expected) <= tolerance(torch.float32)

    def test_several_adapters(self, model):
        config = copy.deepcopy(model.peft_config["default"])
        config.r, config.lora_alpha, config.use_rslora = 3, 5, True
        model.add_adapter("other", config)
        for names in ("default", "other", ["default", "other"]):
            model.base_model.set_adapter(names)
            check(model)

    def test_unload(self, model):
        patched = check(model)
        expected = model.merge_and_unload()(input_ids=token_ids()).logits
        actual = patched.merge_and_unload()(input_ids=token_ids()).logits
        assert relative_l2(actual, expected) <= tolerance(torch.float32)

    def test_saved_and_loaded(self, model, tmp_path):
        patched = check(model)
        patched.save_pretrained(tmp_path)
        name = "qwen3_moe" if "Qwen3" in type(model.base_model.model).__name__ else "gpt_oss"
        loaded = peft.PeftModel.from_pretrained(moe_models.base(name), tmp_path, is_trainable=True)
        expected = step(model)
        for actual in (step(loaded), step(check(loaded))):
            for key, tensor in expected.items():
                assert relative_l2(actual[key], tensor) <= tolerance(torch.float32), key

    def test_the_state_dict_is_pefts(self, model):
        keys = list(model.state_dict())
        lorafuse.patch(model)
        assert list(model.state_dict()) == keys

    def test_checkpointed(self, model):
        expected = step(model)
        lorafuse.patch(model)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        actual, calls = fused_calls(lambda: step(model))
        assert calls > 2
        for name, tensor in expected.items():
            assert relative_l2(actual[name], tensor) <= tolerance(torch.float32), name

    def test_autocast(self, model):
        x, index = torch.randn(9, moe_models.HIDDEN), torch.tensor([[0, 1]] * 9)
        weight = torch.rand(9, 2)
        patched = copy.deepcopy(model)
        lorafuse.patch(patched)
        outer = [
            next(m for m in one.modules() if isinstance(m, peft.tuners.lora.ParamWrapper)) for one in (model, patched)
        ]
        with torch.autocast("cpu", torch.bfloat16):
            expected, actual = (experts(x, index, weight) for experts in outer)
        assert actual.dtype is expected.dtype
        assert relative_l2(actual, expected) <= tolerance(torch.bfloat16)


def test_a_sentinel_of_expert_parallelism():
    """With `_is_expert_parallel`, an index of E is a choice that belongs to another device."""
    model = adapted("qwen3_moe")
    patched = copy.deepcopy(model)
    lorafuse.patch(patched)
    x = torch.randn(6, moe_models.HIDDEN)
    index = torch.tensor([[0, 4], [4, 4], [1, 2], [4, 3], [3, 0], [4, 1]])
    weight = torch.rand(6, 2).masked_fill(index == 4, 0.0)
    actual = []
    for one in (model, patched):
        outer = outermost(one)
        outer.get_base_layer()._is_expert_parallel = True
        leaf = x.clone().requires_grad_()
        y = outer(leaf, index, weight)
        y.sum().backward()
        actual.append([y.detach(), leaf.grad])
    for one, other in zip(*actual, strict=True):
        assert relative_l2(other, one) <= tolerance(torch.float32)


class TestLeftToPeft:
    report = staticmethod(reason_to_patch_nothing)

    def test_a_trained_base(self):
        model = adapted("qwen3_moe")
        for parameter in model.parameters():
            parameter.requires_grad_()
        assert "gate_up_proj is trainable" in self.report(model)

    def test_hooks_on_the_base(self):
        model = adapted("qwen3_moe")
        for module in model.modules():
            if isinstance(module, peft.tuners.lora.ParamWrapper):
                module.get_base_layer().register_forward_hook(lambda *args: None)
        assert "hooks" in self.report(model)

    def test_a_single_expert_stored_transposed(self):
        model = adapted("gpt_oss", num_local_experts=1, num_experts_per_tok=1)
        assert "single expert" in self.report(model)

    def test_dropout_is_refused_by_peft(self):
        """So that there is no such layer to patch, and to report."""
        config = peft.LoraConfig(
            r=4, lora_dropout=0.1, target_modules=[], target_parameters=moe_models.targets("qwen3_moe")
        )
        with pytest.raises(ValueError, match="lora_dropout"):
            peft.get_peft_model(moe_models.base("qwen3_moe"), config)

    def test_a_state_that_came_later_is_said_once(self):
        model = adapted("qwen3_moe")
        lorafuse.patch(model)
        experts = outermost(model)
        experts.get_base_layer().register_forward_hook(lambda *args: None)
        hf_common.warn_once.cache_clear()
        with pytest.warns(UserWarning, match="runs as PEFT ships it: an inner wrapper or its base has hooks"):
            step(model)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_block(reentrant):
    model = adapted("mixtral")
    lorafuse.patch(model)
    experts = outermost(model)
    x = torch.randn(9, moe_models.HIDDEN, requires_grad=True)
    index, weight = torch.tensor([[0, 1]] * 9), torch.rand(9, 2)
    (expected,) = torch.autograd.grad(experts(x, index, weight).sum(), x)
    checkpoint(experts, x, index, weight, use_reentrant=reentrant).sum().backward()
    assert torch.equal(x.grad, expected)


def test_the_trainer_learns_the_same_in_200_steps(tmp_path):
    examples = [{"input_ids": ids, "labels": ids} for ids in token_ids(8, 8)]
    losses = []
    for patch in (False, True):
        model = adapted("qwen3_moe", R=8, num_experts=6)
        if patch:
            lorafuse.patch(model, strict=True)
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path), max_steps=200, per_device_train_batch_size=4, learning_rate=5e-3, logging_steps=1,
            save_strategy="no", use_cpu=True, report_to=[], disable_tqdm=True, seed=3,
        )  # fmt: skip
        trainer = transformers.Trainer(model=model, args=arguments, train_dataset=examples)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert [len(run) for run in losses] == [200, 200]
    assert losses[0][-1] < 0.8 * losses[0][0]
    assert max(abs(a - b) for a, b in zip(*losses, strict=True)) < 1e-3


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter runs where there is no GPU")
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "nemotron_h"])
def test_the_kernels_give_what_peft_gives(family):
    """In Triton's interpreter: an activation in the epilogue, one that runs between the kernels, none gated."""
    model = adapted(family)
    expected = step(model)
    report = lorafuse.patch(model, backend="triton", strict=True)
    assert {p.backend for p in report.patched} == {"triton"}
    actual = step(model)
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        assert relative_l2(tensor, expected[name]) <= tolerance(torch.float32), name


def test_wrappers_are_listed_outermost_first():
    model = adapted("qwen3_moe")
    outer = outermost(model)
    chain = hf_experts.wrappers(outer)
    assert [w.parameter_name for w in chain] == ["down_proj", "gate_up_proj"]
    assert list(itertools.pairwise(chain))[0][0].base_layer is chain[1]
