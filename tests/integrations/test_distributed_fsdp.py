"""Patched models under DDP and FSDP (T1): two gloo processes give the losses of stock PEFT in one."""

import pytest
import torch
import transformers
from peft.utils.other import fsdp_auto_wrap_policy
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel
from transformers.distributed import DistributedConfig
from two_processes import STEPS, WORLD, alone, base, joined, measure, model, spawn, train

import lorafuse

pytestmark = pytest.mark.no_poison
# layers and experts of each model that have an adapter, and those of them that are siblings or a gated MLP
LAYERS = {"llama": 14, "qwen3_moe": 10}
GROUPED = {"llama": 12, "qwen3_moe": 6}
BFLOAT16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16)


def fsdp2(one, **policy):
    for block in one.base_model.model.model.layers:
        fully_shard(block, **policy)
    return fully_shard(one, **policy)


def parts_of_blocks(one):
    """Attention and MLP in units of their own: fully_shard gives the parents of groups classes of its own."""
    for block in one.base_model.model.model.layers:
        fully_shard(block.self_attn)
        fully_shard(block.mlp)
    return fsdp2(one)


def checkpointed(one):
    one.enable_input_require_grads()
    one.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return fsdp2(one)


def compiled(one):
    # or the graph of another case would run, which says nothing of these layers
    torch._dynamo.reset()
    one = fsdp2(one)
    for block in one.base_model.model.model.layers:
        block.compile(backend="aot_eager")
    return one


# how a model is wrapped; each is patched before it and after it
WRAPPERS = {
    "DDP": DistributedDataParallel,
    "plain": fsdp2,
    "parts of blocks": parts_of_blocks,
    "kept after forward": lambda one: fsdp2(one, reshard_after_forward=False),
    "offloaded": lambda one: fsdp2(one, offload_policy=CPUOffloadPolicy(pin_memory=False)),
    "bfloat16": lambda one: fsdp2(one, mp_policy=BFLOAT16),
    "checkpointed": checkpointed,
    "compiled": compiled,
}
CASES = [
    *[("llama", order, how) for how in WRAPPERS for order in ("before", "after") if how != "parts of blocks"],
    # before, it cannot be unpatched (test_patch_distributed.py::test_sharded_layers)
    ("llama", "after", "parts of blocks"),
    *[("qwen3_moe", order, how) for how in ("DDP", "plain") for order in ("before", "after")],
    *[(name, "after", "transformers' own") for name in LAYERS],
]


def fsdp1(one, policy=None, original=True):
    return FullyShardedDataParallel(
        one, auto_wrap_policy=policy, use_orig_params=original, device_id=torch.device("cpu")
    )


FSDP1 = {
    "original parameters": fsdp1,
    "blocks": lambda one: fsdp1(one, ModuleWrapPolicy({type(one.base_model.model.model.layers[0])})),
    # without original parameters FSDP1 takes no module that trains a part of its weights
    "PEFT's policy, use_orig_params=False": lambda one: fsdp1(one, fsdp_auto_wrap_policy(one), original=False),
    "PEFT's policy, use_orig_params=True": lambda one: fsdp1(one, fsdp_auto_wrap_policy(one)),
}
FSDP1_CASES = [
    *[("llama", order, how) for how in FSDP1 for order in ("before", "after")],
    *[("qwen3_moe, frozen experts", order, "blocks") for order in ("before", "after")],
]


def own(name, folder):
    """The model as transformers loads it sharded, adapters added then."""
    config = DistributedConfig(fsdp_size=WORLD)
    return model(name, transformers.AutoModelForCausalLM.from_pretrained(f"{folder}/{name}", distributed_config=config))


def failure_of_experts_under_fsdp1(rank):
    """What PEFT's own experts raise there, unpatched."""
    try:
        train(FSDP1["blocks"](model("qwen3_moe")), rank)
    except RuntimeError as error:
        return str(error)
    return ""


def shard_and_train(rank, folder):
    results = {}
    for name in LAYERS:
        if rank == 0:
            base(name).save_pretrained(f"{folder}/{name}")
        results["alone", name] = alone(name)
    results["alone", "qwen3_moe, frozen experts"] = alone("qwen3_moe, frozen experts")
    torch.distributed.barrier()
    for case in CASES:
        name, order, how = case
        with measure(is_compiled=how == "compiled") as counted:
            if how == "transformers' own":
                one = own(name, folder)
                report = lorafuse.patch(one, strict=True)
            elif order == "before":
                one = model(name)
                report = lorafuse.patch(one, strict=True)
                one = WRAPPERS[how](one)
            else:
                one = WRAPPERS[how](model(name))
                report = lorafuse.patch(one, strict=True)
            # adapters that come after sharding are whole on every rank, and nothing averages them
            counted["losses"] = train(one, rank, averages=how == "transformers' own")
        counted["patched"] = len(report.patched)
        counted["compiled"] = sum(row.compiled and not row.compiled_reason for row in lorafuse.status(one).layers)
        counted["unpatched"] = lorafuse.unpatch(one)
        results[case] = counted
    for case in FSDP1_CASES:
        name, order, how = case
        with measure() as counted:
            one = model(name)
            if order == "before":
                lorafuse.patch(one, strict=True)
            one = FSDP1[how](one)
            if order == "after":
                counted["reasons"] = {skipped.reason for skipped in lorafuse.patch(one).skipped}
            counted["losses"] = train(one, rank)
        results[case] = counted
    results["experts under FSDP1"] = failure_of_experts_under_fsdp1(rank)
    torch.save(results, f"{folder}/{rank}.pt")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    spawn(joined, str(folder), shard_and_train)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


@pytest.mark.parametrize("case", CASES, ids=", ".join)
def test_data_parallel_models_run_fused_and_equal(results, case):
    name, _, how = case
    for rank, of_rank in enumerate(results):
        counted = of_rank[case]
        assert counted["warned"] == []
        assert counted["patched"] == counted["unpatched"] == LAYERS[name]
        # a checkpoint computes each layer twice, and calls in a graph are not counted
        factor = {"checkpointed": 2, "compiled": 0}.get(how, 1)
        assert counted["calls"] == factor * STEPS * LAYERS[name]
        assert counted["grouped"] == factor * STEPS * GROUPED[name]
        assert counted["compiled"] == (LAYERS[name] if how == "compiled" else 0)
        expected = [step[rank] for step in of_rank["alone", name]]
        assert counted["losses"] == pytest.approx(expected, rel=1e-2 if how == "bfloat16" else 1e-6)
        assert len(set(expected)) == STEPS


@pytest.mark.parametrize("case", FSDP1_CASES, ids=", ".join)
def test_fsdp1_has_one_reason(results, case):
    """It holds the adapters' weights in units of their own, or every weight in one that is trained."""
    name, _, _ = case
    for rank, of_rank in enumerate(results):
        counted = of_rank[case]
        (message,) = counted["warned"]
        assert "FSDP1 (FullyShardedDataParallel) holds its weights: shard by FSDP2" in message
        assert len(counted.get("reasons", {message})) == 1
        assert counted["calls"] == 0
        assert counted["losses"] == pytest.approx([step[rank] for step in of_rank["alone", name]], rel=1e-6)


def test_experts_under_fsdp1_fail_without_lorafuse(results):
    for of_rank in results:
        assert (
            "is a view and its base or another view of its base has been modified inplace"
            in (of_rank["experts under FSDP1"])
        )
