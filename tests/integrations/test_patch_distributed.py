"""A patched model under DDP and FSDP2 (T1): two gloo processes on the CPU, the script that trains PEFT unchanged."""

import os
import time
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tiny_models import adapted, counting_groups, counting_mlps, token_ids
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

import lorafuse
from lorafuse.integrations import hf_peft
from lorafuse.testing.numerics import relative_l2, tolerance

WORLD, STEPS = 2, 3
# seconds in which processes that do not wait for each other compute something, however many others share the cores
LIMIT_S = 100
# of a processor's time; a process that waits takes less, one that has to share its core with 50 others more
IDLE = 0.01
# seconds after which a loop without end is one
MOST_S = 3600
pytestmark = pytest.mark.no_poison
# one process imports what a dozen would, and each of them is its fork
mp.get_context("forkserver").set_forkserver_preload(
    ["lorafuse.integrations.hf_peft", "transformers.models.llama.modeling_llama"]
)


def cpu_seconds(pid):
    """What a process and all of its threads have used of processors; 0 once it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def spawn(worker, *args, limit_s=LIMIT_S):
    """Run `worker(rank, *args)` in two processes; AssertionError, with both ended, when for `limit_s` seconds neither
    computes, or it takes an hour: what counts is their own time, which a machine with other work gives slowly.
    """
    context = mp.start_processes(worker, args=args, nprocs=WORLD, join=False, start_method="forkserver")
    start = since = time.monotonic()
    used = 0.0
    try:
        while not context.join(timeout=min(1, limit_s / 10)):
            now, measured = time.monotonic(), sum(cpu_seconds(process.pid) for process in context.processes)
            if measured < used or measured - used > IDLE * limit_s:
                since, used = now, measured
            assert now - since < limit_s, f"{worker.__name__} did nothing for {limit_s} s: a deadlock"
            assert now - start < MOST_S, f"{worker.__name__} did not end in {MOST_S} s"
    finally:
        for process in context.processes:
            process.kill()
            process.join()


def joined(rank, folder, worker, *args):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    worker(rank, folder, *args)
    dist.barrier()
    dist.destroy_process_group()


def ddp(model):
    return DistributedDataParallel(model)


def fsdp2(model):
    for block in model.base_model.model.model.layers:
        fully_shard(block)
    return fully_shard(model)


def fsdp2_checkpointed(model):
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return fsdp2(model)


WRAPPERS = {"ddp": ddp, "fsdp2": fsdp2, "fsdp2, checkpointed": fsdp2_checkpointed}


def train(model, wrapper, rank):
    """The user's script: losses of this rank, and the adapter as it ends, whole."""
    wrapped = WRAPPERS[wrapper](model).train()
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for step in range(STEPS):
        ids = token_ids(seed=10 * step + rank)
        loss = wrapped(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    whole = {n: getattr(p, "full_tensor", lambda p=p: p)() for n, p in model.named_parameters() if p.requires_grad}
    return losses, {name: tensor.detach().clone() for name, tensor in whole.items()}


def train_both(rank, folder, wrapper):
    results = {"start": ([], {n: p.detach().clone() for n, p in adapted().named_parameters() if p.requires_grad})}
    results["stock"] = train(adapted(), wrapper, rank)
    for name in ("patched", "groups"):
        patched = adapted()
        lorafuse.patch(patched, strict=True, groups=name == "groups")
        with warnings.catch_warnings(record=True) as caught, counting_groups() as siblings, counting_mlps() as mlps:
            warnings.simplefilter("always")
            results[name] = train(patched, wrapper, rank)
        assert [str(w.message) for w in caught if "runs as PEFT ships it" in str(w.message)] == []
        # of two layers, in forward and where it is computed again
        forwards = 0 if name == "patched" else 2 * STEPS * (2 if "checkpointed" in wrapper else 1)
        assert (siblings.call_count, mlps.call_count) == (forwards, forwards)
        assert all(isinstance(m, hf_peft.FusedLinear) for m in patched.modules() if isinstance(m, hf_peft.PeftLinear))
        assert lorafuse.unpatch(patched) == 14
    torch.save(results, f"{folder}/{rank}.pt")


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_trains_as_peft_does(wrapper, tmp_path):
    spawn(joined, str(tmp_path), train_both, wrapper)
    of_rank = [torch.load(tmp_path / f"{rank}.pt") for rank in range(WORLD)]
    for results in of_rank:
        (_, start), (expected, stock) = results["start"], results["stock"]
        for losses, patched in (results["patched"], results["groups"]):
            assert losses == pytest.approx(expected, rel=1e-5)
            assert len(set(losses)) == STEPS
            assert patched.keys() == stock.keys() == start.keys()
            assert len(stock) == 28
            for name, weight in stock.items():
                assert relative_l2(patched[name], weight) <= 10 * tolerance(torch.float32), name
                assert relative_l2(weight, start[name]) > 1e-3, f"{name} was not trained"
    # the ranks saw other data, and agree on the weights
    for kind in ("patched", "groups"):
        assert of_rank[0][kind][0] != of_rank[1][kind][0]
        for name, weight in of_rank[0][kind][1].items():
            assert torch.equal(weight, of_rank[1][kind][1][name]), name


def shard_layers(rank, folder):
    """What `fully_shard` on an adapted layer itself, and `patch` on a sharded model, come to."""
    ids = token_ids(seed=rank)
    expected = adapted()(input_ids=ids, labels=ids).loss.item()

    model = adapted()
    lorafuse.patch(model, strict=True)
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    fully_shard(layer)
    assert model(input_ids=ids, labels=ids).loss.item() == pytest.approx(expected, rel=1e-5)
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(RuntimeError, match="FSDPLinear.*unpatch before it, or shard whole blocks"):
        lorafuse.unpatch(model)
    assert {name: type(module) for name, module in model.named_modules()} == before

    model = fsdp2(adapted())
    with pytest.warns(UserWarning, match="(?s)patched nothing.*DTensor"):
        report = lorafuse.patch(model)
    assert (len(report.patched), len(report.skipped)) == (0, 14)
    assert isinstance(model, FSDPModule)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_sharded_layers(tmp_path):
    spawn(joined, str(tmp_path), shard_layers)


def wait_for_the_other(rank):
    if rank == 0:
        time.sleep(600)


def fail(rank):
    assert rank == 5, "told so"


def compute(rank):
    end = time.monotonic() + 7
    while time.monotonic() < end:
        sum(range(1000))


def test_who_computes_is_not_in_a_deadlock():
    """For longer than the limit, as on a machine with much other work."""
    spawn(compute, limit_s=5)


def test_a_deadlock_fails_the_test():
    with pytest.raises(AssertionError, match="wait_for_the_other did nothing for 1 s: a deadlock"):
        spawn(wait_for_the_other, limit_s=1)


def test_a_failing_process_fails_the_test():
    with pytest.raises(mp.ProcessRaisedException, match="told so"):
        spawn(fail)


def shard_by_fsdp1(rank, folder):
    """What FSDP1 does to a patched model and `patch` to a sharded one: PEFT's losses, and FSDP1 as the reason."""
    ids = token_ids(seed=rank)
    expected = adapted()(input_ids=ids, labels=ids).loss.item()
    for order in ("before", "after"):
        model = adapted()
        if order == "before":
            lorafuse.patch(model, strict=True)
        sharded = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if order == "after":
                lorafuse.patch(sharded)
            loss = sharded(input_ids=ids, labels=ids).loss
            loss.backward()
        assert loss.item() == pytest.approx(expected, rel=1e-5)
        (message,) = {str(w.message) for w in caught if "lorafuse" in str(w.message)}
        assert "FSDP1 (FullyShardedDataParallel) holds its weights: shard by FSDP2" in message


def test_fsdp1(tmp_path):
    spawn(joined, str(tmp_path), shard_by_fsdp1)
