"""`lorafuse.status`: what the layers of a patched model ran (T1), counted, under every wrapper and compiler."""

import copy
import pickle

import moe_models
import peft
import pytest
import torch
import torch._dynamo
import torch.distributed as dist
from tiny_models import adapted, counting_fused, inputs_of, lora_config, run, token_ids, train_away_from_zero
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.utils.checkpoint import checkpoint

import lorafuse
from lorafuse.integrations import calls
from lorafuse.integrations.status import NOT_PATCHED

DOWN = "base_model.model.model.layers.1.mlp.down_proj"


def patched(**options):
    model = adapted()
    lorafuse.patch(model, strict=True, **options)
    return model


def by_name(model):
    return {layer.name: layer for layer in lorafuse.status(model).layers}


def test_before_patch():
    status = lorafuse.status(adapted())
    assert {layer.reason for layer in status.layers} == {NOT_PATCHED}
    assert (len(status.layers), status.fused, status.fallbacks) == (14, 0, 14)


def test_before_the_first_step():
    status = lorafuse.status(patched())
    assert (len(status.layers), status.fused, status.fallbacks) == (14, 0, 0)
    assert "never called" in str(status)


def test_counts_are_those_of_the_calls():
    model = patched()
    with counting_fused() as fused:
        for _ in range(3):
            run(model)
    rows = by_name(model)
    assert sum(sum(row.fused.values()) for row in rows.values()) == fused.call_count == 42
    assert {tuple(row.fused.items()) for row in rows.values()} == {(("eager", 3),)}
    assert "14 of 14 adapted layers ran fused (42 calls counted)" in str(lorafuse.status(model))


@pytest.mark.filterwarnings("ignore:lorafuse")
def test_a_layer_that_falls_back_says_why():
    model = patched()
    run(model)
    handle = model.get_submodule(DOWN).base_layer.register_forward_hook(lambda module, args, y: None)
    run(model)
    handle.remove()
    row = by_name(model)[DOWN]
    assert row.fused == {"eager": 1}
    assert row.fallbacks == {"its base layer has hooks or a replaced forward": 1}
    text = str(lorafuse.status(model))
    assert "1 ran as they were shipped, always or at times (1 calls)" in text
    assert f"{'':21}{DOWN}\n" in text + "\n"


def test_pefts_own_paths_are_counted_as_such():
    model = patched()
    with model.disable_adapter(), torch.no_grad():
        model(**inputs_of(model))
    assert all(row.fallbacks == {calls.OFF: 1} and not row.fused for row in by_name(model).values())


def test_layers_that_were_not_patched_are_listed():
    model = patched()
    model.add_adapter("late", lora_config(target_modules=["lm_head"]))
    train_away_from_zero(model, "late")
    run(model)
    rows = by_name(model)
    assert (len(rows), rows["base_model.model.lm_head"].reason) == (15, NOT_PATCHED)


@pytest.mark.usefixtures("small_groups")
def test_groups():
    model = patched(groups=True)
    run(model)
    rows = by_name(model)
    parent = DOWN.removesuffix(".down_proj")
    assert {row.name: (row.grouped, row.group) for row in rows.values() if row.name.startswith(parent)} == {
        f"{parent}.gate_proj": (1, parent),
        f"{parent}.up_proj": (1, parent),
        DOWN: (1, parent),
    }
    assert "fused, eager (all with its group)" in str(lorafuse.status(model))


def test_experts():
    model = moe_models.adapted("qwen3_moe")
    lorafuse.patch(model, strict=True)
    model(input_ids=moe_models.token_ids()).logits.sum().backward()
    assert {(row.kind, *row.fused.items()) for row in lorafuse.status(model).layers} == {("experts", ("eager", 1))}


def test_the_backend_that_ran_is_named():
    model = adapted()
    lorafuse.patch(model, backend="triton")
    run(model)
    assert {tuple(row.fused.items()) for row in lorafuse.status(model).layers} == {(("triton", 1),)}


def test_patching_again_keeps_counts_and_unpatching_drops_them():
    model = patched()
    run(model)
    lorafuse.patch(model)
    assert lorafuse.status(model).fused == 14
    lorafuse.unpatch(model)
    assert not any("_lorafuse_calls" in module.__dict__ for module in model.modules())
    assert {row.reason for row in lorafuse.status(model).layers} == {NOT_PATCHED}


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_counts_for_itself(copied):
    model = patched()
    run(model)
    twin = copied(model)
    run(twin)
    assert {sum(row.fused.values()) for row in lorafuse.status(model).layers} == {1}
    assert {sum(row.fused.values()) for row in lorafuse.status(twin).layers} == {2}


class TestCompile:
    @pytest.fixture(autouse=True)
    def _fresh(self):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()

    def graphs(self):
        counters = torch._dynamo.utils.counters
        return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())

    @pytest.mark.parametrize("checkpointed", [False, True])
    def test_a_graph_holds_nothing_of_it(self, checkpointed):
        model = patched()
        layer = model.get_submodule(DOWN)
        call = (lambda x: checkpoint(layer, x, use_reentrant=False)) if checkpointed else layer
        compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
        x = torch.randn(3, 40, requires_grad=True)
        for _ in range(2):
            compiled(x).sum().backward()
        assert self.graphs() == (1, 0)
        row = by_name(model)[DOWN]
        assert (row.compiled, row.compiled_reason, row.fused, row.fallbacks) == (True, "", {}, {})
        assert row.outcome() == "compiled"

    def test_of_blocks_compiled_one_by_one(self):
        """They run one graph, so one of them is traced; no guard tells them apart."""
        model = patched()
        for block in model.base_model.model.model.layers:
            block.mlp.compile(backend="aot_eager", fullgraph=True)
        run(model)
        assert self.graphs() == (1, 0)
        rows = by_name(model)
        assert {row.compiled for name, row in rows.items() if ".mlp." in name} == {True}
        assert {row.compiled for name, row in rows.items() if ".self_attn." in name} == {False}
        assert lorafuse.status(model).fused == 14

    def test_of_blocks_between_graph_breaks(self):
        """Calls that break the graph, as a test's counter does: each layer's frame is traced once for all blocks."""
        blocks = torch.nn.ModuleList(torch.nn.ModuleDict({"up": torch.nn.Linear(4, 4)}) for _ in range(3))
        model = peft.get_peft_model(torch.nn.Sequential(blocks), lora_config(target_modules=["up"]))
        lorafuse.patch(model, strict=True)

        def call(x):
            for block in model.base_model.model[0]:
                torch._dynamo.graph_break()
                x = block["up"](x)
            return x

        torch.compile(call, backend="eager")(torch.randn(2, 4, requires_grad=True)).sum().backward()
        status = lorafuse.status(model)
        assert [row.outcome() for row in status.layers] == ["compiled"] * 3
        assert status.fused == 3

    def test_a_fallback_in_a_graph_says_why(self):
        model = patched()
        layer = model.get_submodule(DOWN)
        layer.lora_dropout["default"] = torch.nn.Tanh()
        torch.compile(layer, backend="aot_eager", fullgraph=True)(torch.randn(3, 40))
        row = by_name(model)[DOWN]
        assert row.outcome() == "compiled, as shipped: its dropout is a Tanh, not nn.Dropout"
        assert (lorafuse.status(model).fused, lorafuse.status(model).fallbacks) == (0, 1)


@pytest.mark.no_poison
@pytest.mark.filterwarnings("ignore:lorafuse")
def test_fsdp1_after_patch_shows_that_nothing_ran_fused(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = patched().train()
        wrapped = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
        wrapped(input_ids=token_ids()).logits.sum().backward()
        status = lorafuse.status(wrapped)
    finally:
        dist.destroy_process_group()
    assert (len(status.layers), status.fused, status.fallbacks) == (14, 0, 14)
    assert all("FSDP1" in reason for row in status.layers for reason in row.fallbacks)


def test_what_is_no_module():
    with pytest.raises(TypeError, match="takes a torch.nn.Module"):
        lorafuse.status([])
