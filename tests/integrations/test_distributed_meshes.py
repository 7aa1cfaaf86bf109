"""Meshes of two dimensions (T1): four gloo processes, two along each, give what one process gives."""

import pytest
import torch
import torch.distributed as dist
import transformers
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.functional import silu
from torch.nn.parallel import DistributedDataParallel
from transformers.distributed import DistributedConfig
from two_processes import STEPS, alone, base, joined_by, measure, model, spawn, train

import lorafuse
from lorafuse.parallel import column_parallel_linear, row_parallel_linear

pytestmark = pytest.mark.no_poison
WORLD = 4
LAYERS = {"llama": 14, "qwen3_moe": 10}
# features, rank
K, N, R = 6, 8, 3
SCALE = 1.7
FACTORS = {"a1": (R, K), "b1": (N, R), "a2": (R, N), "b2": (K, R)}


def load(name, folder, **layout):
    config = DistributedConfig(**layout)
    return transformers.AutoModelForCausalLM.from_pretrained(f"{folder}/{name}", distributed_config=config)


def experts_inside_fsdp2(rank, folder):
    with measure() as counted:
        one = model("qwen3_moe", load("qwen3_moe", folder, fsdp_size=WORLD, ep_size=2))
        counted["patched"] = len(lorafuse.patch(one, strict=True).patched)
        counted["losses"] = train(one, rank, averages=True)
    counted["alone"] = [step[rank] for step in alone("qwen3_moe", range(WORLD))]
    return counted


def two_shardings(folder):
    """Why layers that transformers shards twice are left to PEFT, and what PEFT does with them."""
    one = model("llama", load("llama", folder, fsdp_size=2, tp_size=2), is_filled=False)
    reasons = {skipped.reason for skipped in lorafuse.patch(one).skipped}
    ids = torch.ones(1, 3, dtype=torch.int64)
    try:
        one(input_ids=ids)
    except RuntimeError as error:
        return reasons, str(error)
    return reasons, ""


def tensors(batch):
    """x of a batch and, equal for all, the weights and adapters of two layers."""
    torch.manual_seed(7)
    weights = {name: torch.randn(*sizes).double() for name, sizes in (FACTORS | {"w1": (N, K), "w2": (K, N)}).items()}
    return torch.randn(5, K, generator=torch.Generator().manual_seed(batch)).double(), weights


class Mlp(nn.Module):
    """Two layers whose N features lie on the ranks of a group."""

    def __init__(self, weights, group):
        super().__init__()
        rank, dims = dist.get_rank(group), {"w1": 0, "b1": 0, "w2": 1, "a2": 1}
        parts = {name: t.chunk(2, dims[name])[rank].clone() if name in dims else t for name, t in weights.items()}
        for name, t in parts.items():
            self.register_parameter(name, nn.Parameter(t, requires_grad=name in FACTORS))
        self.group = group

    def forward(self, x):
        h = silu(column_parallel_linear(x, self.w1, self.a1, self.b1, self.group, scale=SCALE))
        return row_parallel_linear(h, self.w2, self.a2, self.b2, self.group, scale=SCALE)


def data_and_tensor_parallel(rank, mesh):
    """The largest difference of a gradient from that of the mean loss of both batches by the formula."""
    x, weights = tensors(rank // 2)
    one = Mlp(weights, mesh["tensor"].get_group())
    replicas = DistributedDataParallel(one, process_group=mesh["data"].get_group())
    replicas(x).square().sum().backward()
    whole = {name: t.clone().requires_grad_(name in FACTORS) for name, t in weights.items()}
    for batch in range(2):
        x, t = tensors(batch)[0], whole
        h = silu(x @ t["w1"].T + SCALE * x @ t["a1"].T @ t["b1"].T)
        y = h @ t["w2"].T + SCALE * h @ t["a2"].T @ t["b2"].T
        (y.square().sum() / 2).backward()
    expected = Mlp({name: t.grad if name in FACTORS else t.detach() for name, t in whole.items()}, one.group)
    pairs = [(getattr(one, name).grad, getattr(expected, name)) for name in FACTORS]
    assert all(grad.any() for grad, _ in pairs)
    return max(((grad - other).abs().max() / other.abs().max()).item() for grad, other in pairs)


def run_all(rank, folder):
    if rank == 0:
        for name in LAYERS:
            base(name).save_pretrained(f"{folder}/{name}")
    dist.barrier()
    results = {
        "experts": experts_inside_fsdp2(rank, folder),
        "two": two_shardings(folder),
        "own": data_and_tensor_parallel(rank, init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))),
    }
    torch.save(results, f"{folder}/{rank}.pt")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("meshes")
    spawn(joined_by, WORLD, str(folder), run_all, world=WORLD)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


def test_experts_inside_fsdp2(results):
    """Of four ranks with batches of their own two and two hold all experts."""
    for of_rank in results:
        counted = of_rank["experts"]
        assert counted["warned"] == []
        assert counted["patched"] == LAYERS["qwen3_moe"]
        assert counted["calls"] == STEPS * LAYERS["qwen3_moe"]
        assert counted["losses"] == pytest.approx(counted["alone"], rel=1e-6)
        assert len(set(counted["losses"])) == STEPS


def test_fsdp2_with_tensor_parallelism_has_a_reason(results):
    for reasons, error in (of_rank["two"] for of_rank in results):
        (reason,) = reasons
        assert "sharded by FSDP2 and tensor parallelism at once, where PEFT makes adapters of wrong sizes" in reason
        # PEFT's own forward, unpatched
        assert "is invalid for input of size" in error


def test_data_and_tensor_parallel_layers_are_one_layer(results):
    assert max(of_rank["own"] for of_rank in results) < 1e-9
