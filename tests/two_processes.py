"""Two gloo processes on this machine, or more, and tiny models that they train as one process does."""

import contextlib
import faulthandler
import os
import signal
import tempfile
import time
import warnings
from pathlib import Path
from unittest import mock

import moe_models
import peft
import tiny_families
import tiny_models
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.tensor import DTensor, distribute_tensor

from lorafuse.integrations import gated_mlp, groups, hf_experts, hf_peft, hf_transformers
from lorafuse.parallel import tp

__all__ = ["STEPS", "WORLD", "alone", "joined", "joined_by", "measure", "model", "spawn", "token_ids", "train"]

WORLD, STEPS = 2, 6
# seconds in which processes that do not wait for each other compute something, however many others share the cores
LIMIT_S = 100
# of a processor's time; a process that waits takes less, one that has to share its core with 50 others more
IDLE = 0.01
# seconds after which a loop without end is one
MOST_S = 1200
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


def _observed(rank, folder, worker, *args):
    """`worker(rank, *args)` in a process that writes where its threads are when it gets SIGUSR1."""
    # stays open: a process may also stop while it ends
    file = os.open(f"{folder}/{rank}", os.O_WRONLY | os.O_CREAT)
    faulthandler.register(signal.SIGUSR1, file, all_threads=True)
    worker(rank, *args)


def _stacks(processes, folder):
    """Where the threads of each process are."""
    for rank, process in enumerate(processes):
        # one that is not there yet would end of the signal
        if process.is_alive() and Path(f"{folder}/{rank}").exists():
            os.kill(process.pid, signal.SIGUSR1)
    time.sleep(1)
    return "".join(f"\nprocess {file.name}:\n{file.read_text()}" for file in sorted(Path(folder).iterdir()))


def spawn(worker, *args, limit_s=LIMIT_S, world=WORLD):
    """Run `worker(rank, *args)` in `world` processes; AssertionError, with all ended, when for `limit_s` seconds none
    computes, or it takes 20 minutes: what counts is their own time, which a machine with other work gives slowly.
    """
    with tempfile.TemporaryDirectory() as folder:
        context = mp.start_processes(
            _observed, args=(folder, worker, *args), nprocs=world, join=False, start_method="forkserver"
        )
        start = since = time.monotonic()
        used = 0.0
        try:
            while not context.join(timeout=min(1, limit_s / 10)):
                now, measured = time.monotonic(), sum(cpu_seconds(process.pid) for process in context.processes)
                if measured < used or measured - used > IDLE * limit_s:
                    since, used = now, measured
                if now - since >= limit_s:
                    why = f"{worker.__name__} did nothing for {limit_s} s: a deadlock"
                elif now - start >= MOST_S:
                    why = f"{worker.__name__} did not end in {MOST_S} s"
                else:
                    continue
                raise AssertionError(why + _stacks(context.processes, folder))
        finally:
            for process in context.processes:
                process.kill()
                process.join(60)


def joined(rank, folder, worker, *args):
    """`worker(rank, folder, *args)` in a process group."""
    joined_by(rank, WORLD, folder, worker, *args)


def joined_by(rank, world, folder, worker, *args):
    torch.set_num_threads(1)
    # layers run as groups however small x is: these models have no other
    groups.SMALL = 0
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    worker(rank, folder, *args)
    dist.barrier()
    dist.destroy_process_group()


def base(name):
    """The model of a name without an adapter."""
    if name == "llama":
        return tiny_models.tiny()
    return tiny_families.tiny_model(tiny_families.model_classes("qwen3_moe")[0])


def model(name, of=None, is_filled=True):
    """A PEFT model of "llama", adapters on every linear layer, or of "qwen3_moe", on attention and experts, or on
    attention alone ("qwen3_moe, frozen experts"); none of them zero, unless they stay as PEFT makes them.
    """
    settings = {} if name == "llama" else {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
    if name == "qwen3_moe":
        settings["target_parameters"] = moe_models.targets(name)
    config = tiny_models.lora_config(**settings)
    one = peft.get_peft_model(base(name) if of is None else of, config, autocast_adapter_dtype=False).train()
    if of is None:
        torch.manual_seed(3)
        return tiny_models.train_away_from_zero(one)
    if not is_filled:
        return one
    # the same numbers, whichever of them this rank holds
    with torch.no_grad():
        for key, whole in model(name).named_parameters():
            parameter = one.get_parameter(key)
            if "lora_" in key and isinstance(parameter, DTensor):
                whole = distribute_tensor(whole, parameter.device_mesh, parameter.placements)
            if "lora_" in key:
                parameter.copy_(whole)
    return one


def token_ids(step, rank):
    return tiny_models.token_ids(seed=10 * step + rank)


def _loss(one, step, rank):
    ids = token_ids(step, rank)
    return one(input_ids=ids, labels=ids).loss


def _optimizer(one):
    return torch.optim.SGD([p for p in one.parameters() if p.requires_grad], lr=0.05)


def alone(name, ranks=range(WORLD)):
    """The losses `[step][rank]` of stock PEFT in one process that sees the data of all `ranks`."""
    one = model(name)
    optimizer, losses = _optimizer(one), []
    for step in range(STEPS):
        of_ranks = [_loss(one, step, rank) for rank in ranks]
        (sum(of_ranks) / len(of_ranks)).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append([loss.item() for loss in of_ranks])
    return losses


def train(one, rank, averages=False, group=None):
    """The user's script: the losses of this rank; `averages` gradients over a group, where nothing wraps them."""
    optimizer, losses = _optimizer(one), []
    for step in range(STEPS):
        loss = _loss(one, step, rank)
        loss.backward()
        for parameter in one.parameters() if averages else ():
            if parameter.grad is not None:
                grad = parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad
                dist.all_reduce(grad, group=group)
                grad /= dist.get_world_size(group)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@contextlib.contextmanager
def measure(is_compiled=False):
    """What runs inside the block: `calls`, layers and experts that ran fused, of which `grouped` ran in one operator
    with others, and `warned`, why layers did not.

    A count in a graph of torch.compile would compile it anew for every call: where it `is_compiled`, none is made.
    """
    counted = {"calls": 0, "grouped": 0, "warned": []}

    def counting(module, name, layers=None):
        """`layers` are those of a single call, None where its second argument lists those of a group."""
        if is_compiled:
            return contextlib.nullcontext()
        own = getattr(module, name)

        def run(*args, **kwargs):
            counted["calls"] += layers or len(args[1])
            counted["grouped"] += 0 if layers else len(args[1])
            return own(*args, **kwargs)

        return mock.patch.object(module, name, run)

    hf_peft.warn_once.cache_clear()
    with (
        counting(hf_peft, "run_linear", 1),
        counting(tp, "lora_linear", 1),
        counting(gated_mlp, "run_gated_mlp"),
        counting(groups, "run_linears"),
        counting(hf_transformers, "lora_experts", 1),
        counting(hf_experts, "lora_experts", 1),
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("always")
        yield counted
    counted["warned"] = sorted({str(w.message) for w in caught if "lorafuse" in str(w.message)})
