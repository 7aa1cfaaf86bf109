"""What only a GPU shows of experts (T6): bf16, streams, CUDA graphs of other routings, compiled graphs, no waits."""

import pytest
import torch
from experts_reference import block, differentiated, fused

from lorafuse.testing.numerics import relative_l2, tolerance

pytestmark = [pytest.mark.gpu, pytest.mark.no_poison]
# several tiles for most experts, none for some
CASE = {"T": 700, "E": 24, "k": 4, "H": 512, "I": 320, "R": 16, "dtype": torch.bfloat16, "adapter_dtype": torch.float32}


@pytest.fixture(params=["triton", "eager"])
def backend(request):
    """Those that wait for nothing; eager where torch's grouped_mm has a fast kernel."""
    if request.param == "eager" and torch.cuda.get_device_capability()[0] not in (9, 10):
        pytest.skip("torch's grouped_mm has no fast kernel on this GPU")
    return request.param


def operands(seed=0, **case):
    o, settings = block(**(CASE | case), device="cuda")
    generator = torch.Generator(device="cuda").manual_seed(seed)
    o["x"] = torch.randn(o["x"].shape, generator=generator, device="cuda").to(o["x"])
    scores = torch.rand(CASE["T"], CASE["E"], generator=generator, device="cuda")
    # no token of experts 0 to 3
    scores[:, :4] = 0
    o["topk_index"] = scores.topk(CASE["k"], 1).indices
    return o, settings


def run(o, settings, backend="triton"):
    return differentiated(lambda o, s: fused(o, s, backend), o, settings)


def assert_equal(actual, expected):
    for name, tensor in actual.items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_triton_agrees_with_eager(dtype, transposed, gate):
    given = operands(dtype=dtype, transposed=transposed, gate=gate, bias=True)
    eager = run(*given, "eager")
    for name, tensor in run(*given).items():
        assert relative_l2(tensor, eager[name]) < tolerance(dtype), name
        assert tensor.count_nonzero() > 0, name


def test_a_hundred_runs_are_bitwise_equal(backend):
    given = operands()
    first = run(*given, backend)
    for _ in range(100):
        assert_equal(run(*given, backend), first)


def test_two_streams_at_once(backend):
    streams = torch.cuda.Stream(), torch.cuda.Stream()
    given = [operands(seed) for seed in range(2)]
    expected = [run(*one, backend) for one in given]
    torch.cuda.synchronize()
    actual = [[], []]
    for _ in range(20):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                actual[i].append(run(*given[i], backend))
    torch.cuda.synchronize()
    for i in range(2):
        for one in actual[i]:
            assert_equal(one, expected[i])


def test_a_cuda_graph_replays_with_another_routing(backend):
    o, settings = operands()
    other, _ = operands(seed=1)
    o["dout"] = torch.randn(o["x"].shape, device="cuda").to(o["x"])

    def step(o):
        leaves = {n: t.detach().requires_grad_() for n, t in o.items() if n in ("x", "topk_weight", "gate_up_a")}
        dout = o["dout"]
        out = fused({n: t for n, t in (o | leaves).items() if n != "dout"}, settings, backend)
        grads = torch.autograd.grad(out, list(leaves.values()), dout)
        return {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(o)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(o)
    for name, tensor in other.items():
        o[name].copy_(tensor)
    for _ in range(3):
        graph.replay()
    assert_equal(captured, step(o))


def test_nothing_waits_for_the_gpu(backend):
    o, settings = operands()
    leaf = o | {"x": o["x"].requires_grad_()}
    dout = torch.randn_like(o["x"])
    torch.autograd.grad(fused(leaf, settings, backend), leaf["x"], dout)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.autograd.grad(fused(leaf, settings, backend), leaf["x"], dout)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("backend", ["triton", "auto"])
def test_compiled(backend):
    given = operands()
    expected = run(*given, "triton")
    compiled = torch.compile(lambda o, s: fused(o, s, backend), fullgraph=True)
    for name, tensor in differentiated(compiled, *given).items():
        assert relative_l2(tensor, expected[name]) < tolerance(torch.bfloat16), name
