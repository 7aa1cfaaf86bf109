"""Tensor, sequence, expert and pipeline parallel layers (T1): two gloo processes give what one process gives."""

from unittest import mock

import peft
import pytest
import tiny_models
import torch
import torch.distributed as dist
import transformers
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleavedZeroBubble
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.functional import silu
from transformers.distributed import DistributedConfig
from two_processes import STEPS, WORLD, alone, base, joined, measure, model, spawn, train

import lorafuse
from lorafuse.functional import lora_experts
from lorafuse.parallel import column_parallel_linear, expert_parallel_experts, row_parallel_linear, tp

pytestmark = pytest.mark.no_poison
# features, rank, experts of a token
K, N, R, TOP = 12, 16, 3, 2
SCALE = 1.7


def leaf(*sizes):
    return torch.randn(*sizes, dtype=torch.float64, requires_grad=True)


def mlp_tensors():
    """x, a column-parallel layer of N features, a row-parallel one, and the gradient of y; equal on every rank."""
    torch.manual_seed(7)
    names = {"x": (2, 6, K), "w1": (N, K), "b1": (N, R), "a1": (R, K), "bias1": (N,)}
    names |= {"w2": (K, N), "b2": (K, R), "a2": (R, N), "bias2": (K,), "dy": (2, 6, K)}
    tensors = {name: leaf(*sizes) for name, sizes in names.items()}
    for name in ("w1", "w2", "dy"):
        tensors[name].requires_grad_(False)
    return tensors


def gradients(y, tensors, dy):
    trained = {name: t for name, t in tensors.items() if t.requires_grad}
    return {"y": y.detach()} | dict(zip(trained, torch.autograd.grad((y * dy).sum(), trained.values()), strict=True))


def mlp_alone(sequence_dim=None):
    """By the formula, and of each result what this rank has."""
    t = mlp_tensors()
    h = silu(t["x"] @ t["w1"].mT + t["bias1"] + SCALE * (t["x"] @ t["a1"].mT) @ t["b1"].mT)
    y = h @ t["w2"].mT + t["bias2"] + SCALE * (h @ t["a2"].mT) @ t["b2"].mT
    grads = gradients(y, t, t["dy"])
    return {name: part(name, grad, sequence_dim) for name, grad in grads.items()}


def part(name, tensor, sequence_dim):
    """This rank's part of a tensor of the layers."""
    dims = {"w1": 0, "b1": 0, "bias1": 0, "w2": 1, "a2": 1}
    if sequence_dim is not None:
        dims |= dict.fromkeys(("x", "y", "dy"), sequence_dim)
    return tensor.chunk(WORLD, dims[name])[dist.get_rank()] if name in dims else tensor


def mlp_of_ranks(sequence_dim=None):
    whole = mlp_tensors()
    t = {n: part(n, t, sequence_dim).detach().clone().requires_grad_(t.requires_grad) for n, t in whole.items()}
    options = {"scale": SCALE, "sequence_dim": sequence_dim}
    h = silu(column_parallel_linear(t["x"], t["w1"], t["a1"], t["b1"], dist.group.WORLD, bias=t["bias1"], **options))
    y = row_parallel_linear(h, t["w2"], t["a2"], t["b2"], dist.group.WORLD, bias=t["bias2"], **options)
    return gradients(y, t, t["dy"])


def differing(actual, expected):
    """Names of what is not equal."""
    assert actual.keys() == expected.keys()
    return [name for name in expected if not torch.allclose(actual[name], expected[name], rtol=1e-9, atol=1e-12)]


def dropout_masks():
    """Whether ranks that draw other numbers draw one mask for a column-parallel layer: y of w = 0 shows it."""
    torch.manual_seed(dist.get_rank())
    x, ones = torch.ones(4, 50), torch.ones(3, 50)
    y = column_parallel_linear(x, torch.zeros(2, 50), ones, torch.ones(2, 3), dist.group.WORLD, dropout_p=0.5)
    every = [torch.empty_like(y) for _ in range(WORLD)]
    dist.all_gather(every, y)
    return torch.equal(*every) and len(y.unique()) > 1


def experts_tensors(tokens, seed=3):
    """The tokens of one rank, and the stacks of 4 experts of 8 features."""
    torch.manual_seed(seed)
    index = torch.rand(tokens, 4).argsort(1)[:, :TOP]
    if tokens:
        # a choice of no expert
        index[0, 0] = 4
    given = {"x": leaf(tokens, K), "weight": leaf(tokens, TOP)}
    dy = torch.randn(tokens, K, dtype=torch.float64)
    torch.manual_seed(5)
    stacks = {"gate_up": torch.randn(4, 16, K).double(), "down": torch.randn(4, K, 8).double()}
    adapters = {"gate_up_a": leaf(4, R, K), "gate_up_b": leaf(4, 16, R)}
    adapters |= {"down_a": leaf(4, R, 8), "down_b": leaf(4, K, R)}
    return given, index, dy, stacks, adapters


def experts_alone(counts, seeds):
    """Of each rank's tokens out, dx and the router gradient, and the adapters' gradients of the mean loss."""
    results, total = [], {}
    for tokens, seed in zip(counts, seeds, strict=True):
        given, index, dy, stacks, adapters = experts_tensors(tokens, seed)
        options = {"gate_up_scale": SCALE, "down_scale": SCALE}
        out = lora_experts(given["x"], index, given["weight"], **stacks, **adapters, **options)
        grads = gradients(out, given | adapters, dy)
        for name in adapters:
            total[name] = total.get(name, 0) + grads.pop(name) / len(counts)
        results.append(grads)
    return [each | total for each in results]


def experts_of_ranks(tokens, seed, group, shares_tokens=False):
    rank = dist.get_rank(group)
    given, index, dy, stacks, adapters = experts_tensors(tokens, seed)
    size = 4 // group.size()
    here = slice(rank * size, rank * size + size)
    stacks = {name: t[here] for name, t in stacks.items()}
    adapters = {name: t[here].detach().clone().requires_grad_() for name, t in adapters.items()}
    options = {"gate_up_scale": SCALE, "down_scale": SCALE, "shares_tokens": shares_tokens}
    out = expert_parallel_experts(given["x"], index, given["weight"], **stacks, group=group, **adapters, **options)
    return gradients(out, given | adapters, dy)


def of_this_rank(results, rank):
    return {name: t[2 * rank : 2 * rank + 2] if name[-2:] in ("_a", "_b") else t for name, t in results.items()}


def stage(number):
    torch.manual_seed(number)
    layers = nn.Sequential(nn.Linear(K, K), nn.Tanh(), nn.Linear(K, K))
    one = peft.get_peft_model(layers, peft.LoraConfig(r=R, target_modules=["0", "2"]))
    return tiny_models.train_away_from_zero(one).train()


def pipeline(rank, schedule=Schedule1F1B, stages_of_rank=1):
    """The largest difference of a gradient from one process without lorafuse, and the fused calls."""
    x, target = torch.randn(8, K, generator=torch.Generator().manual_seed(1)), torch.ones(8, K)
    stages = [stage(number) for number in range(WORLD * stages_of_rank)]
    # schedules average the losses of their micro-batches
    nn.functional.mse_loss(nn.Sequential(*stages)(x), target).backward()
    own = range(rank, len(stages), WORLD)
    ours = [stage(number) for number in own]
    for one in ours:
        lorafuse.patch(one, strict=True)
    device = torch.device("cpu")
    parts = [PipelineStage(one, i, len(stages), device) for i, one in zip(own, ours, strict=True)]
    runs = schedule(parts if stages_of_rank > 1 else parts[0], 4, loss_fn=nn.functional.mse_loss)
    with measure() as counted:
        runs.step(x) if rank == 0 else runs.step(target=target)
    pairs = [
        (p.grad, q.grad)
        for i, one in zip(own, ours, strict=True)
        for (_, p), (_, q) in zip(one.named_parameters(), stages[i].named_parameters(), strict=True)
        if p.requires_grad
    ]
    assert all(grad.any() for grad, _ in pairs)
    return max((actual - grad).abs().max().item() for actual, grad in pairs), counted["calls"]


def load(name, folder, experts_implementation=None, **layout):
    return transformers.AutoModelForCausalLM.from_pretrained(
        f"{folder}/{name}",
        distributed_config=DistributedConfig(**layout),
        experts_implementation=experts_implementation,
    )


def train_models(rank, folder):
    """Models that transformers spreads: what `measure` counts, the losses and those of one process."""
    results = {}
    for name in ("llama", "qwen3_moe"):
        if rank == 0:
            base(name).save_pretrained(f"{folder}/{name}")
    dist.barrier()
    with measure() as counted:
        one = model("llama", load("llama", folder, tp_size=WORLD))
        lorafuse.patch(one, strict=True)
        counted["losses"] = train(one, 0)
    counted["alone"] = [step[0] for step in alone("llama", [0])]
    results["tensor parallel"] = counted
    name = "qwen3_moe, frozen experts"
    with measure() as counted:
        one = model(name, load("qwen3_moe", folder, tp_size=WORLD))
        lorafuse.patch(one, strict=True)
        counted["losses"] = train(one, 0)
    counted["alone"] = [step[0] for step in alone(name, [0])]
    results["tensor parallel, frozen experts"] = counted
    try:
        model("qwen3_moe", load("qwen3_moe", folder, tp_size=WORLD))
    except AttributeError as error:
        results["tensor parallel, experts"] = str(error)
    with measure() as counted:
        one = model("qwen3_moe", load("qwen3_moe", folder, fsdp_size=WORLD, ep_size=WORLD))
        lorafuse.patch(one, strict=True)
        counted["losses"] = train(one, rank, averages=True)
    counted["alone"] = [step[rank] for step in alone("qwen3_moe")]
    results["expert parallel"] = counted
    lorafuse.integrations.register_experts()
    layout = {"fsdp_size": WORLD, "ep_size": WORLD, "experts_implementation": "lorafuse"}
    with measure() as counted:
        one = model(name, load("qwen3_moe", folder, **layout))
        lorafuse.patch(one, strict=True)
        counted["losses"] = train(one, rank, averages=True)
    counted["alone"] = [step[rank] for step in alone(name)]
    results["expert parallel, frozen experts"] = counted
    return results


def reason_for_another_dtensor():
    """Of a layer whose weight somebody else made a DTensor."""
    one = tiny_models.adapted()
    layer = one.base_model.model.model.layers[0].mlp.up_proj.base_layer
    mesh = init_device_mesh("cpu", (WORLD,))
    layer.weight = nn.Parameter(distribute_tensor(layer.weight, mesh, [Shard(0)]), requires_grad=False)
    (skipped,) = lorafuse.patch(one).skipped
    return skipped.reason


def run_all(rank, folder):
    results = train_models(rank, folder)
    results["1F1B"] = pipeline(rank)
    results["zero bubble"] = pipeline(rank, ScheduleInterleavedZeroBubble, 2)
    for dim in (None, 1):
        results["tp", dim] = differing(mlp_of_ranks(dim), mlp_alone(dim))
    # what peers did wrong: gradients of what every rank holds left partial; deltas and biases added by every rank
    with mock.patch.object(tp, "replicated", lambda x, group: x):
        results["tp", "partial"] = differing(mlp_of_ranks(), mlp_alone())
    own = tp.lora_linear
    with mock.patch.object(tp, "lora_linear", lambda *args, scale, **more: own(*args, scale=WORLD * scale, **more)):
        results["tp", "twice"] = differing(mlp_of_ranks(), mlp_alone())
    results["masks"] = dropout_masks()
    results["another"] = reason_for_another_dtensor()
    for counts in ((5, 3), (4, 0)):
        expected = experts_alone(counts, (3, 4))[rank]
        actual = experts_of_ranks(counts[rank], (3, 4)[rank], dist.group.WORLD)
        results["ep", counts] = differing(actual, of_this_rank(expected, rank))
        # a group of one rank holds all experts: what data parallelism then averages is the same
        groups = [dist.new_group([r]) for r in range(WORLD)]
        actual = experts_of_ranks(counts[rank], (3, 4)[rank], groups[rank])
        for name in ("gate_up_a", "gate_up_b", "down_a", "down_b"):
            dist.all_reduce(actual[name])
            actual[name] /= WORLD
        results["ep of one", counts] = differing(actual, expected)
    (expected,) = experts_alone((5,), (3,))
    actual = experts_of_ranks(5, 3, dist.group.WORLD, shares_tokens=True)
    results["ep", "shared"] = differing(actual, of_this_rank(expected, rank))
    torch.save(results, f"{folder}/{rank}.pt")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parallel")
    spawn(joined, str(folder), run_all)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("tensor parallel", 14),
        ("tensor parallel, frozen experts", 8),
        ("expert parallel", 10),
        ("expert parallel, frozen experts", 10),
    ],
)
def test_models_that_transformers_spreads_run_fused_and_equal(results, name, layers):
    for of_rank in results:
        counted = of_rank[name]
        assert counted["warned"] == []
        assert counted["calls"] == STEPS * layers
        assert counted["losses"] == pytest.approx(counted["alone"], rel=1e-6)
        assert len(set(counted["losses"])) == STEPS


def test_peft_adapts_no_experts_of_tensor_parallel_models(results):
    for of_rank in results:
        assert of_rank["tensor parallel, experts"] == "'ParamWrapper' object has no attribute 'weight'"


@pytest.mark.parametrize("sequence_dim", [None, 1])
def test_tensor_parallel_layers_are_one_layer(results, sequence_dim):
    """y, dx and every gradient, in fp64: xa is reduced once, the bias added once."""
    assert [of_rank["tp", sequence_dim] for of_rank in results] == [[], []]


def test_faults_of_peers_would_be_seen(results):
    """Deltas counted as often as there are ranks (Megatron-Bridge 5634), gradients that stay partial."""
    for of_rank in results:
        assert {"y", "a1", "b1", "a2", "b2"} <= set(of_rank["tp", "twice"])
        assert {"x", "a1", "b2"} <= set(of_rank["tp", "partial"])


def test_another_dtensor_is_the_reason(results):
    for of_rank in results:
        assert "a DTensor that neither FSDP2 nor transformers' tensor parallelism put there" in of_rank["another"]


def test_one_mask_on_all_ranks(results):
    assert [of_rank["masks"] for of_rank in results] == [True, True]


@pytest.mark.parametrize("tokens", [(5, 3), (4, 0), "shared"])
def test_expert_parallel_experts_are_one_block(results, tokens):
    """out, dx, the router gradient and each adapter's, in fp64, a rank without tokens included."""
    assert [of_rank["ep", tokens] for of_rank in results] == [[], []]


@pytest.mark.parametrize("tokens", [(5, 3), (4, 0)])
def test_no_gradient_depends_on_the_number_of_expert_ranks(results, tokens):
    """As adapters' did in Megatron-Bridge 5484."""
    assert [of_rank["ep of one", tokens] for of_rank in results] == [[], []]


# a backward in two halves adds in another order, over twice as many stages
@pytest.mark.parametrize(("schedule", "stages", "bound"), [("1F1B", 1, 1e-6), ("zero bubble", 2, 1e-5)])
def test_pipeline(results, schedule, stages, bound):
    """Two layers of each stage, four micro-batches, and one more call that tells the stage its shapes."""
    for of_rank in results:
        error, calls = of_rank[schedule]
        assert error < bound
        assert calls == 2 * stages * (4 + 1)


def test_shared_factors_are_refused():
    """Each rank would train one of its own."""
    stacks = {"gate_up": torch.zeros(2, 4, 3), "down": torch.zeros(2, 3, 2)}
    with pytest.raises(ValueError, match=r"gate_up_a \[1, 3\], shared by all experts"):
        expert_parallel_experts(
            torch.zeros(1, 3), torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1), group=None,
            gate_up_a=torch.zeros(1, 3), gate_up_b=torch.zeros(2, 4, 1), **stacks,
        )  # fmt: skip
