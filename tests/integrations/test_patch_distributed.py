"""A patched model under DDP and FSDP2 (T1): two gloo processes on the CPU, the script that trains PEFT unchanged."""

import time
import warnings

import pytest
import torch
import torch.multiprocessing as mp
from tiny_models import adapted, counting_groups, counting_mlps, token_ids
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from two_processes import WORLD, joined, spawn

import lorafuse
from lorafuse.integrations import hf_peft
from lorafuse.testing.numerics import relative_l2, tolerance

STEPS = 3
pytestmark = pytest.mark.no_poison


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
    """What `fully_shard` on an adapted layer itself comes to."""
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

    model = adapted()
    lorafuse.patch(model, strict=True, groups=True)
    fully_shard(model.base_model.model.model.layers[0].mlp)
    with counting_mlps() as mlps:
        assert model(input_ids=ids, labels=ids).loss.item() == pytest.approx(expected, rel=1e-5)
    assert mlps.call_count == 2
    with pytest.raises(RuntimeError, match="FSDPLlamaMLP.*unpatch before it, or shard whole blocks"):
        lorafuse.unpatch(model)


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
    with pytest.raises(AssertionError, match=r"(?s)did nothing for 1 s: a deadlock.*process 0:.*in wait_for_the_other"):
        spawn(wait_for_the_other, limit_s=1)


def test_a_failing_process_fails_the_test():
    with pytest.raises(mp.ProcessRaisedException, match="told so"):
        spawn(fail)
