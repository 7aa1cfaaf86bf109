"""What only a GPU shows of quantized weights (T6): bf16, memory, streams, CUDA graphs, compiled graphs, parts."""

import pytest
import torch
from quantized_calls import CALLS, experts, grouped, linear

from lorafuse.backends import base, workspace
from lorafuse.testing.memory import peak_bytes
from lorafuse.testing.numerics import relative_l2, tolerance

pytestmark = [pytest.mark.gpu, pytest.mark.no_poison]

SIZES = {
    "linear": {"N": 1536, "K": 1024, "M": 500, "R": 16},
    "grouped": {"N": 256, "K": 512, "R": 16},
    "experts": {"H": 256, "I": 128, "T": 300, "R": 16},
    "siblings": {"N": 512, "K": 1024, "R": 16},
    "gated_mlp": {"H": 512, "I": 1024, "R": 16},
}


@pytest.fixture(params=["eager", "triton", "cuda"])
def backend(request):
    state = base.availability(request.param)
    if not state.ok:
        pytest.skip(f"backend {request.param}: {state.reason}")
    return request.param


def on_gpu(make, **given):
    return make(**given).to("cuda", torch.bfloat16)


def check_equal(actual, expected):
    for name, t in expected.items():
        assert t.abs().max() > 0, name
        assert torch.equal(actual[name], t), name


@pytest.mark.parametrize("call", CALLS)
def test_as_of_the_decoded_weight(call, backend):
    made = on_gpu(CALLS[call], **SIZES[call], backend=backend)
    check_equal(made.results(), made.results(made.dense(torch.bfloat16)))


@pytest.mark.parametrize("make", [grouped, experts])
def test_in_parts(make, backend, monkeypatch):
    made = on_gpu(make, **SIZES[make.__name__], backend=backend)
    expected = made.results(made.dense(torch.bfloat16))
    monkeypatch.setattr(workspace, "budget", lambda: 2 * 256 * 512 * 2)
    actual = made.results()
    for name, t in expected.items():
        # torch's grouped products may take other tiles for other sizes
        assert relative_l2(actual[name], t) < tolerance(torch.bfloat16), name


def test_memory_of_one_decoded_weight(backend):
    made, device = on_gpu(linear, N=4096, K=4096, M=64, R=16, backend=backend), torch.device("cuda")
    dense = made.dense(torch.bfloat16)
    made.results(), made.results(dense)
    beyond = peak_bytes(made.results, device) - peak_bytes(lambda: made.results(dense), device)
    # torch's allocator rounds to 2 MiB
    assert 0 < beyond <= 4096 * 4096 * 2 + (2 << 20)


def test_two_streams_at_once(backend):
    streams = torch.cuda.Stream(), torch.cuda.Stream()
    calls = [on_gpu(linear, **SIZES["linear"], backend=backend) for _ in streams]
    expected, actual = [made.results() for made in calls], [[], []]
    torch.cuda.synchronize()
    for _ in range(20):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                actual[i].append(calls[i].results())
    torch.cuda.synchronize()
    for i in range(2):
        for one in actual[i]:
            check_equal(one, expected[i])


def test_a_cuda_graph_replays_with_new_data(backend):
    calls = [on_gpu(linear, **SIZES["linear"], backend=backend) for _ in range(2)]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            for made in calls:
                made.results()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = [made.results() for made in calls]
    for made in calls:
        for t in (*made.tensors.values(), made.weights[0].statistics[0]):
            t.mul_(0.5)
        made.weights[0].data.bitwise_xor_(0x35)
    for _ in range(3):
        graph.replay()
    for actual, made in zip(captured, calls, strict=True):
        check_equal(actual, made.results())


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled(mode):
    """CUDA graphs of the compiler refuse memory that outlives a graph."""
    made = on_gpu(linear, **SIZES["linear"], backend="triton")
    expected = made.results()
    made.run = torch.compile(made.run, fullgraph=True, mode=mode)
    for _ in range(4):
        actual = {name: t.clone() for name, t in made.results().items()}
    check_equal(actual, expected)


@pytest.mark.parametrize("make", [linear, experts])
def test_nothing_waits_for_the_gpu(make, monkeypatch):
    given = {"index": torch.randint(0, 6, (300, 2), device="cuda")} if make is experts else {}
    made = on_gpu(make, **SIZES[make.__name__], **given, backend="triton")
    monkeypatch.setattr(workspace, "budget", lambda: 2 * 256 * 256 * 2)
    made.results()
    torch.cuda.synchronize()
    tensors = {name: t.clone().requires_grad_() for name, t in made.tensors.items()}
    torch.cuda.set_sync_debug_mode("error")
    try:
        made.run(made.weights, **tensors).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
