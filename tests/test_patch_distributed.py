"""A patched model under DDP and FSDP2 (T1): two gloo processes on the CPU, the script that trains PEFT unchanged."""

import time
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tiny_models import adapted, token_ids
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

import lorafuse
from lorafuse.integrations import hf_peft
from lorafuse.testing.numerics import relative_l2, tolerance

WORLD, STEPS, LIMIT_S = 2, 3, 100
pytestmark = pytest.mark.no_poison
# one process imports what a dozen would, and each of them is its fork
mp.get_context("forkserver").set_forkserver_preload(
    ["lorafuse.integrations.hf_peft", "transformers.models.llama.modeling_llama"]
)


def spawn(worker, *args, limit_s=LIMIT_S):
    """Run `worker(rank, *args)` in two processes; AssertionError, with both ended, when they take too long."""
    context = mp.start_processes(worker, args=args, nprocs=WORLD, join=False, start_method="forkserver")
    deadline = time.monotonic() + limit_s
    try:
        while not context.join(timeout=1):
            assert time.monotonic() < deadline, f"{worker.__name__} did not end in {limit_s} s: a deadlock"
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
    patched = adapted()
    lorafuse.patch(patched, strict=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="a patched layer runs as PEFT ships it")
        results["patched"] = train(patched, wrapper, rank)
    assert all(isinstance(m, hf_peft.FusedLinear) for m in patched.modules() if isinstance(m, hf_peft.PeftLinear))
    assert lorafuse.unpatch(patched) == 14
    torch.save(results, f"{folder}/{rank}.pt")


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_trains_as_peft_does(wrapper, tmp_path):
    spawn(joined, str(tmp_path), train_both, wrapper)
    of_rank = [torch.load(tmp_path / f"{rank}.pt") for rank in range(WORLD)]
    for results in of_rank:
        (_, start), (expected, stock), (losses, patched) = (results[k] for k in ("start", "stock", "patched"))
        assert losses == pytest.approx(expected, rel=1e-5)
        assert len(set(losses)) == STEPS
        assert patched.keys() == stock.keys() == start.keys()
        assert len(stock) == 28
        for name, weight in stock.items():
            assert relative_l2(patched[name], weight) <= 10 * tolerance(torch.float32), name
            assert relative_l2(weight, start[name]) > 1e-3, f"{name} was not trained"
    # the ranks saw other data, and agree on the weights
    assert of_rank[0]["patched"][0] != of_rank[1]["patched"][0]
    for name, weight in of_rank[0]["patched"][1].items():
        assert torch.equal(weight, of_rank[1]["patched"][1][name]), name


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
    with pytest.raises(RuntimeError, match="FSDPFusedLinear.*unpatch before it, or shard whole blocks"):
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


def test_a_deadlock_fails_the_test():
    with pytest.raises(AssertionError, match="wait_for_the_other did not end in 1 s"):
        spawn(wait_for_the_other, limit_s=1)


def test_a_failing_process_fails_the_test():
    with pytest.raises(mp.ProcessRaisedException, match="told so"):
        spawn(fail)
