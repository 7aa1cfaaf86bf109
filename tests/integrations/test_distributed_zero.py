"""Patched models under DeepSpeed's ZeRO (T1): two processes where DeepSpeed is installed, its interface imitated else.

`make test-deepspeed` installs it. What is imitated: the mark of a leaf module, and weights that are freed after forward
and, where DeepSpeed gathers a module, whole again in its backward.
"""

import importlib.util
import os
import sys
from types import SimpleNamespace

import pytest
import tiny_models
import torch
from two_processes import STEPS, WORLD, alone, joined, measure, model, spawn, token_ids

import lorafuse
from lorafuse import functional as LF
from lorafuse.errors import MissingDependency
from lorafuse.integrations import prepare_zero3

pytestmark = pytest.mark.no_poison
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed: make test-deepspeed"
)
# layers and experts of each model that have an adapter
LAYERS = {"llama": 14, "qwen3_moe": 10}
# of these, siblings and gated MLPs
GROUPED = {"llama": 12, "qwen3_moe": 6}
# stage, model, reentrant checkpointing, the call that is missing
CASES = [
    (1, "llama", False, ""),
    (2, "llama", False, ""),
    (3, "llama", False, ""),
    (3, "llama", True, ""),
    (3, "qwen3_moe", True, ""),
    (3, "llama", False, "prepare_zero3"),
]


def engine_of(one, stage):
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 2,
        # the default clips gradients to norm 1
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "optimizer": {"type": "SGD", "params": {"lr": 0.05}},
    }
    trained = [p for p in one.parameters() if p.requires_grad]
    return deepspeed.initialize(model=one, model_parameters=trained, config=config)[0]


def train(engine, rank):
    losses = []
    for step in range(STEPS):
        ids = token_ids(step, rank)
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def run_all(rank, folder):
    os.environ.update(DS_ACCELERATOR="cpu", RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD))
    import deepspeed

    # an operator in C++ for shared memory, which would compile for minutes and is not needed
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    results = {name: alone(name) for name in LAYERS}
    for case in CASES:
        stage, name, is_checkpointed, missing = case
        one = model(name)
        lorafuse.patch(one, strict=True)
        if is_checkpointed:
            one.enable_input_require_grads()
            one.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        if stage == 3 and not missing:
            assert prepare_zero3(one) == LAYERS[name]
        with measure() as counted:
            counted["losses"] = train(engine_of(one, stage), rank)
        results[case] = counted
    torch.save(results, f"{folder}/{rank}.pt")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zero")
    spawn(joined, str(folder), run_all)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


@needs_deepspeed
@pytest.mark.parametrize("case", CASES)
def test_deepspeed_trains_as_one_process(results, case):
    stage, name, is_checkpointed, missing = case
    for rank, of_rank in enumerate(results):
        counted = of_rank[case]
        assert counted["losses"] == pytest.approx([step[rank] for step in of_rank[name]], rel=1e-6)
        if missing:
            (message,) = counted["warned"]
            assert "call lorafuse.integrations.prepare_zero3 after lorafuse.patch" in message
            assert counted["calls"] == 0
        else:
            assert counted["warned"] == []
            assert counted["calls"] == STEPS * LAYERS[name] * (2 if is_checkpointed else 1)
            # stages 1 and 2 hold whole weights
            assert counted["grouped"] == (STEPS * GROUPED[name] if stage < 3 else 0)


@pytest.fixture
def imitated(monkeypatch):
    def mark(module, flag):
        module._z3_leaf = flag

    utils = SimpleNamespace(set_z3_leaf_module=mark)
    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace(utils=utils))
    monkeypatch.setitem(sys.modules, "deepspeed.utils", utils)


def test_every_patched_layer_is_gathered_as_a_whole(imitated):
    one = tiny_models.adapted()
    lorafuse.patch(one, strict=True)
    assert prepare_zero3(one) == 14
    marked = [name for name, module in one.named_modules() if getattr(module, "_z3_leaf", False)]
    assert len(marked) == 14
    assert all(name.endswith("_proj") for name in marked)
    assert one.get_input_embeddings()(tiny_models.token_ids()).requires_grad


def test_groups_are_taken_apart(imitated):
    """And stay so when a trainer patches again: one operator would read weights that are not there."""
    one = tiny_models.adapted()
    assert len(lorafuse.patch(one).groups) == 4
    prepare_zero3(one)
    report = lorafuse.patch(one)
    assert (report.groups, len(report.patched)) == ([], 14)
    assert {apart.reason for apart in report.apart} == {
        "DeepSpeed's ZeRO-3 gathers one of them at a time (q_proj, k_proj, v_proj, o_proj)",
        "DeepSpeed's ZeRO-3 gathers one of them at a time (gate_proj, up_proj)",
        "DeepSpeed's ZeRO-3 gathers gate_proj by itself (gate_proj, up_proj, down_proj)",
    }
    with tiny_models.counting_groups() as siblings, tiny_models.counting_mlps() as mlps:
        tiny_models.run(one)
    assert siblings.call_count == mlps.call_count == 0


def test_what_it_refuses(imitated, monkeypatch):
    with pytest.raises(ValueError, match="without a patched layer: call lorafuse.patch"):
        prepare_zero3(tiny_models.adapted())
    with pytest.raises(TypeError, match="prepare_zero3 got a str"):
        prepare_zero3("model")
    one = tiny_models.adapted()
    lorafuse.patch(one)
    one.base_model.model.model.layers[0].mlp.up_proj.ds_id = 5
    with pytest.raises(RuntimeError, match="came after deepspeed.initialize"):
        prepare_zero3(one)
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    monkeypatch.setitem(sys.modules, "deepspeed.utils", None)
    with pytest.raises(MissingDependency, match="pip install deepspeed"):
        prepare_zero3(one)


def test_hooks_of_deepspeed_are_named_as_the_reason():
    one = tiny_models.adapted()
    for module in one.modules():
        if type(module) is torch.nn.Linear:
            module.pre_bwd_fn = None
            module.register_forward_pre_hook(lambda *args: None)
    reason = tiny_models.reason_to_patch_nothing(one)
    assert "DeepSpeed's ZeRO-3 gathers its weights for the modules inside it: call" in reason


def tensors(*sizes, frozen=()):
    return [torch.randn(s).requires_grad_(i not in frozen) for i, s in enumerate(sizes)]


def linear():
    x, w, a, b = tensors((3, 6), (5, 6), (2, 6), (5, 2), frozen=[1])
    return LF.lora_linear(x, w, a, b), [w], [x, a, b]


def group():
    x, w, v, a, b, c, d = tensors((3, 6), (5, 6), (4, 6), (2, 6), (5, 2), (2, 6), (4, 2), frozen=[1, 2])
    ys = LF.lora_linears(x, [LF.Projection(w, a, b), LF.Projection(v, c, d)])
    return torch.cat(list(ys), 1), [w, v], [x, a, b, c, d]


def experts():
    sizes = (3, 6), (3, 2), (4, 10, 6), (4, 6, 5), (4, 2, 6), (4, 10, 2), (4, 2, 5), (4, 6, 2)
    x, weight, up, down, *factors = tensors(*sizes, frozen=[2, 3])
    names = ("gate_up_a", "gate_up_b", "down_a", "down_b")
    index = torch.tensor([[0, 1], [3, 2], [1, 0]])
    out = LF.lora_experts(x, index, weight, up, down, **dict(zip(names, factors, strict=True)))
    return out, [up, down], [x, weight, *factors]


@pytest.mark.parametrize("operator", [linear, group, experts])
def test_backward_reads_what_is_gathered_then(operator):
    """ZeRO-3 frees weights after forward: whole again they give the same gradients, empty ones a sentence."""
    torch.manual_seed(0)
    y, weights, inputs = operator()
    expected = torch.autograd.grad(y.sum(), inputs, retain_graph=True)
    whole = [w.data for w in weights]
    for w in weights:
        w.data = torch.empty(0)
    with pytest.raises(RuntimeError, match="finds a weight empty in backward: DeepSpeed's ZeRO-3 freed it"):
        torch.autograd.grad(y.sum(), inputs, retain_graph=True)
    for w, data in zip(weights, whole, strict=True):
        w.data = data.clone()
    actual = torch.autograd.grad(y.sum(), inputs)
    assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))
