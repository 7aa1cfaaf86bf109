"""What only a GPU shows (T6): streams, CUDA graphs, compiled graphs, checkpointing, devices, memory, large offsets."""

import pytest
import torch
from experts_reference import check as check_experts
from gathered_reference import Gated, GatedCase, Gradients, Operands, Ranks, same
from group_reference import Case, linears, make, mlp
from group_reference import results as group_results
from torch.utils.checkpoint import checkpoint

from lorafuse import cli
from lorafuse.activation import ACTIVATIONS, GATES, gate_forward
from lorafuse.backends import base
from lorafuse.functional import lora_linear, plan_linear
from lorafuse.plan import clear_cache, override
from lorafuse.testing.check_linear import LinearCase, gradients, make_operands
from lorafuse.testing.numerics import relative_l2, tolerance

pytestmark = [pytest.mark.gpu, pytest.mark.no_poison]


def able(name):
    """The name of a backend that can run here; skips the test otherwise, with the reason."""
    state = base.availability(name)
    if not state.ok:
        pytest.skip(f"backend {name}: {state.reason}")
    return name


@pytest.fixture(params=["eager", "triton", "cuda"])
def backend(request):
    return able(request.param)


@pytest.fixture(params=["triton", "cuda"])
def kernels(request):
    return able(request.param)


# several tiles on every SM in forward, and several splits of the rows in backward
CASE = LinearCase(leading=(1000,), N=1536, K=1024, R=16, dtype=torch.bfloat16, adapter_dtype=torch.float32)


def operands(case=CASE, device="cuda", seed=0):
    actual = make_operands(case, seed).to(torch.device(device))
    for tensor in (actual.x, actual.a, actual.b, actual.bias):
        if tensor is not None:
            tensor.requires_grad_()
    return actual


def run(o, backend, dropout_p=0.0, seed=3):
    return lora_linear(
        o.x, o.w, o.a, o.b, bias=o.bias, scale=1.7, dropout_p=dropout_p, seed=seed if dropout_p else None,
        backend=backend,
    )  # fmt: skip


def results(o, backend, dropout_p=0.0):
    return gradients(run(o, backend, dropout_p), o)


def assert_near(actual, expected, dtype=torch.bfloat16):
    for name, tensor in actual.items():
        assert relative_l2(tensor, expected[name]) < tolerance(dtype), name


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_kernels_agree_with_eager(kernels, dtype, dropout_p):
    if kernels == "cuda" and dtype is torch.float32:
        pytest.skip("the CUDA kernels run bfloat16 and float16")
    case = LinearCase(leading=(1000,), N=1536, K=1024, R=16, dtype=dtype, adapter_dtype=torch.float32)
    o = operands(case)
    eager = results(o, "eager", dropout_p)
    assert_near(results(o, kernels, dropout_p), eager, dtype)


@pytest.mark.parametrize("R", [1, 8, 24, 64, 100, 128])
@pytest.mark.parametrize("leading", [(1,), (7, 13), (129,), (4096,)])
def test_every_rank_of_the_cuda_kernels(leading, R):
    able("cuda")
    o = operands(LinearCase(leading=leading, N=1032, K=776, R=R, dtype=torch.bfloat16, adapter_dtype=torch.float32))
    eager = results(o, "eager")
    assert_near(results(o, "cuda"), eager)


@pytest.mark.parametrize("M", [1, 1000, 8192])
@pytest.mark.parametrize(
    ("kernel", "N"),
    [("cuda xa_in_tiles", 1024), ("cuda split_k", 1024), ("cuda fused_forward", 4096)],
)
def test_xa_and_y_in_one_cuda_launch(kernel, N, M):
    able("cuda")
    o = operands(LinearCase(leading=(M,), N=N, K=1024, R=16, dtype=torch.bfloat16, adapter_dtype=torch.float32))
    eager = results(o, "eager")
    with override(force_kernel=kernel):
        first = results(o, "cuda")
        assert_near(first, eager)
        for _ in range(100):
            assert torch.equal(run(o, "cuda"), first["y"])


@pytest.mark.parametrize("M", [1, 1000, 8192])
@pytest.mark.parametrize(
    ("N", "p"), [((4096, 1024, 1024), 0.0), ((1032, 264), 0.0), ((1032, 264), 0.1), ((256, 512, 776, 8), 0.0)]
)
def test_siblings_in_one_cuda_launch(N, p, M):
    """Every y and every gradient as eager has them, and the same bits each time."""
    able("cuda")
    R, drops = (16, 24, 0, 64)[: len(N)], (p,) * len(N)
    case = Case(N, R, drops, (True, False, True, False)[: len(N)], (M,), 1024, torch.bfloat16, torch.float32)
    o = make(case)
    o = o.with_leaves({name: t.cuda() for name, t in o.leaves().items()})
    o.projections = [one._replace(weight=one.weight.cuda()) for one in o.projections]
    o.dys = [dy.cuda() for dy in o.dys]
    eager = group_results(lambda o: linears(o, backend="eager"), o)
    with override(force_kernel="cuda siblings"):
        first = group_results(lambda o: linears(o, backend="cuda"), o)
        assert_near({name: t for name, t in first.items() if name != "differentiable"}, eager)
        for _ in range(100):
            again = group_results(lambda o: linears(o, backend="cuda"), o)
            assert all(torch.equal(t, first[name]) for name, t in again.items())


@pytest.mark.parametrize(
    ("activation", "M", "p"),
    [
        *((name, 1000, 0.0) for name in (*ACTIVATIONS, *GATES)),
        *(("silu", M, p) for M, p in ((1, 0.0), (8192, 0.0), (1, 0.3), (1000, 0.3), (8192, 0.1))),
    ],
)
@pytest.mark.parametrize("kernel", ["cuda siblings", "cuda siblings_ha"])
def test_gated_mlp_in_one_cuda_launch_each_way(activation, M, p, kernel):
    """Gate, up and h, with ha too; dgate, dup and h: as eager has them, and the same bits each time."""
    able("cuda")
    N, R, bias = (1032, 1032, 264), (16, 24, 24), (True, False, True)
    o = make(Case(N, R, (p,) * 3, bias, (M,), 1024, torch.bfloat16, torch.float32), of_mlp=True)
    o = o.with_leaves({name: t.cuda() for name, t in o.leaves().items()})
    o.projections = [one._replace(weight=one.weight.cuda()) for one in o.projections]
    o.dys = [dy.cuda() for dy in o.dys]
    eager = group_results(lambda o: mlp(o, activation, backend="eager"), o)
    with override(force_kernel=kernel):
        first = group_results(lambda o: mlp(o, activation, backend="cuda"), o)
        assert_near({name: t for name, t in first.items() if name != "differentiable"}, eager)
        for _ in range(20):
            again = group_results(lambda o: mlp(o, activation, backend="cuda"), o)
            assert all(torch.equal(t, first[name]) for name, t in again.items())


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("ends", [(0, 700, 700, 701, 3000, 4096), (0, 8192, 8192), tuple(range(64, 8193, 64))])
def test_gathered_rows_by_ticket_in_the_cuda_kernel(ends, transposed):
    """y as in fp64, with gate, up and h too, and the same bits each time, as of a gathered copy."""
    able("cuda")
    native = base.load("cuda").native
    case = GatedCase(ends=ends, rows=ends[-1] + 8, choices=8, N=1552, K=1032, R=24, transposed=transposed)
    plain, gated = Operands(case, "cuda"), Gated(case, "cuda")
    y, both = plain.through_order(native), gated.through_order(native)
    assert relative_l2(y[: ends[-1]], plain.expected()[: ends[-1]]) < tolerance(torch.bfloat16)
    gate, up = y[: ends[-1]].double().chunk(2, 1)
    assert relative_l2(both[: ends[-1], case.N :], gate_forward("silu", gate, up)) < tolerance(torch.bfloat16)
    assert same(both[:, : case.N], y)
    assert same(plain.in_order(native), y)
    assert same(plain.grouped(native), y)
    for _ in range(100):
        assert same(plain.through_order(native), y)
        assert same(gated.through_order(native), both)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("ends", [(0, 700, 700, 701, 3000, 4096), tuple(range(64, 8193, 64))])
def test_gathered_gradients_in_the_cuda_kernels(ends, transposed):
    """du, h and the router's gradient of dh, dyb and db as in fp64, and the same bits each time."""
    able("cuda")
    native = base.load("cuda").native
    case = GatedCase(
        ends=ends, rows=ends[-1] + 8, choices=8, N=776, K=1032, R=24, transposed=transposed, bias=False
    )  # fmt: skip
    gates, ranks = Gradients(case, "cuda"), Ranks(case, "cuda")
    launched, (projected, outer) = gates.through_order(native), ranks.launch(native)
    exact, exact_outer = ranks.expected()
    pairs = *zip(gates.results(launched), gates.expected_results(), strict=True), (outer, exact_outer)
    for actual, expected in (*pairs, (projected[: ends[-1]], exact[: ends[-1]])):
        assert relative_l2(actual, expected) < tolerance(torch.bfloat16)
    for _ in range(100):
        assert same(gates.through_order(native), launched)
        again, again_outer = ranks.launch(native)
        assert same(again[: ends[-1]], projected[: ends[-1]])
        assert torch.equal(again_outer, outer)


@pytest.mark.parametrize("activation", ["silu", "clamped_swiglu"])
@pytest.mark.parametrize("transposed", [False, True])
def test_experts_in_the_gathered_cuda_kernels(activation, transposed):
    able("cuda")
    sizes = {"T": 40, "E": 6, "k": 3, "H": 136, "I": 264, "R": 12, "transposed": transposed, "bias": "levels"}
    with override(force_kernel="cuda gathered"):
        check_experts(
            "cuda", dtype=torch.bfloat16, activation=activation, adapter_dtype=torch.float32, size=0.1, device="cuda",
            **sizes,
        )  # fmt: skip


@pytest.mark.parametrize("M", [1, 512, 1000, 8192])
@pytest.mark.parametrize("kernel", ["concurrent_backward", "fused_backward"])
def test_da_and_db_beside_dx_in_one_cuda_launch(kernel, M):
    able("cuda")
    case = LinearCase(leading=(M,), N=4096, K=1024, R=16, dtype=torch.bfloat16, adapter_dtype=torch.float32, bias=False)
    o = operands(case)
    eager = results(o, "eager")
    with override(force_kernel=f"cuda {kernel}"):
        first = results(o, "cuda")
        assert_near(first, eager)
        for _ in range(100):
            for name, tensor in results(o, "cuda").items():
                assert torch.equal(tensor, first[name]), name


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_a_hundred_runs_are_bitwise_equal(kernels, dropout_p):
    o = operands()
    first = results(o, kernels, dropout_p)
    for _ in range(100):
        for name, tensor in results(o, kernels, dropout_p).items():
            assert torch.equal(tensor, first[name]), name


def test_two_streams_at_once(backend):
    """The same layer on two streams, many times, while both are busy: nothing is shared between the calls."""
    streams = torch.cuda.Stream(), torch.cuda.Stream()
    given = [operands(seed=s) for s in range(2)]
    expected = [results(o, backend) for o in given]
    torch.cuda.synchronize()
    actual = [[], []]
    for _ in range(20):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                actual[i].append(results(given[i], backend))
    torch.cuda.synchronize()
    for i in range(2):
        for one in actual[i]:
            for name, tensor in one.items():
                assert torch.equal(tensor, expected[i][name]), name


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_a_cuda_graph_replays_with_new_data(backend, dropout_p):
    o = operands()
    seed = torch.tensor([3], device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            gradients(run(o, backend, dropout_p, seed), o)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradients(run(o, backend, dropout_p, seed), o)
    other = operands(seed=1)
    with torch.no_grad():
        for name in ("x", "a", "b", "bias", "dy", "w"):
            getattr(o, name).copy_(getattr(other, name))
        seed.fill_(4)
    for _ in range(3):
        graph.replay()
    expected = gradients(run(o, backend, dropout_p, torch.tensor([4], device="cuda")), o)
    for name, tensor in captured.items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("backend", ["triton", "auto"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(backend, dynamic):
    compiled = torch.compile(lambda o: run(o, backend).square(), fullgraph=True, dynamic=dynamic)
    o = operands()
    expected = gradients(run(o, backend).square(), o)
    assert_near(gradients(compiled(o), o), expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_with_dropout(reentrant):
    o = operands()
    torch.manual_seed(0)
    plain = gradients(lora_linear(o.x, o.w, o.a, o.b, bias=o.bias, dropout_p=0.1, backend="triton"), o)
    torch.manual_seed(0)

    def layer(x):
        return lora_linear(x, o.w, o.a, o.b, bias=o.bias, dropout_p=0.1, backend="triton")

    again = checkpoint(layer, o.x, use_reentrant=reentrant)
    if reentrant:
        again.backward(o.dy)
        actual = {"y": again.detach(), "dx": o.x.grad, "da": o.a.grad, "db": o.b.grad, "dbias": o.bias.grad}
    else:
        actual = gradients(again, o)
    for name, tensor in actual.items():
        assert torch.equal(tensor, plain[name]), name


def test_nothing_waits_for_the_gpu(backend):
    o = operands()
    results(o, backend, 0.1)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradients(lora_linear(o.x, o.w, o.a, o.b, bias=o.bias, dropout_p=0.1, backend=backend), o)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_another_device_than_the_current_one(backend):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    first, second = results(operands(), backend), results(operands(device="cuda:1"), backend)
    for name, tensor in second.items():
        assert tensor.device.index == 1
        assert torch.equal(tensor.cpu(), first[name].cpu()), name


def test_offsets_beyond_2_to_the_31(backend):
    """Rows of x and dx past 2³¹ elements, read and written at the end as at the start."""
    M, K, N, R = 2**31 // 4096 + 300, 4096, 64, 8
    free, _ = torch.cuda.mem_get_info()
    if free < 30 * 2**30:
        pytest.skip(f"needs 30 GiB of free GPU memory, {free / 2**30:.0f} are free")
    x = torch.zeros(M, K, dtype=torch.bfloat16, device="cuda")
    x[-300:] = torch.randn(300, K, device="cuda")
    x[:300] = x[-300:]
    w, a, b = (torch.randn(s, device="cuda").bfloat16() / 8 for s in ((N, K), (R, K), (N, R)))
    x.requires_grad_()
    y = lora_linear(x, w, a.requires_grad_(), b.requires_grad_(), backend=backend)
    assert torch.equal(y[-300:], y[:300])
    assert y[-300:].count_nonzero() > 0
    dy = torch.randn(300, N, device="cuda").bfloat16()
    full = torch.zeros_like(y)
    full[-300:] = full[:300] = dy
    dx, da, _ = torch.autograd.grad(y, (x, a, b), full)
    assert torch.equal(dx[-300:], dx[:300])
    assert dx[-300:].count_nonzero() > 0
    expected = 2 * (dy.double() @ b.double()).t() @ x[:300].detach().double()
    assert relative_l2(da, expected) < tolerance(torch.bfloat16)


def test_memory_beyond_the_frozen_layer(backend):
    """Forward keeps xa and nothing else; backward's partials are gone afterwards."""
    o = operands()
    results(o, backend)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    y = run(o, backend)
    kept = torch.cuda.memory_allocated() - before
    xa_bytes = o.x.shape[0] * o.a.shape[0] * 2
    assert kept <= y.numel() * 2 + xa_bytes + 2048


def test_the_plan_says_why():
    o = operands()
    plan = plan_linear(o.x, o.w, o.a)
    assert plan.backend in base.BACKENDS
    assert any("model" in reason or "measured" in reason for reason in plan.reasons)


def test_tune_measures_every_way_and_plans_follow(tmp_path, monkeypatch, capsys):
    able("triton")
    monkeypatch.setenv("LORAFUSE_CACHE_DIR", str(tmp_path))
    clear_cache()
    try:
        assert cli.main(["tune", "--shape", "512,1024", "--m", "512", "1024", "--rounds", "5"]) == 0
        out = capsys.readouterr().out
        assert "left out" not in out
        assert "before → after, measured:" in out
        x, w, a = (torch.zeros(size, device="cuda").bfloat16() for size in ((700, 1024), (512, 1024), (16, 1024)))
        for gradients in ((), ("dx", "da", "db")):
            assert "by lorafuse tune" in plan_linear(x, w, a, gradients=gradients).reasons[-1]
    finally:
        clear_cache()
