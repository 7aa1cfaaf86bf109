"""Where quantized weights are decoded to: one buffer that every product uses in turn, in parts of a budget."""

import math
import threading

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import lorafuse
from lorafuse import functional as LF
from lorafuse.backends import aten, triton, workspace
from lorafuse.backends.protocol import Backend
from lorafuse.operands import Weight
from lorafuse.testing.memory import changes
from lorafuse.testing.numerics import relative_l2

pytest_plugins = "backend_fixtures"
by_backend = pytest.mark.parametrize("backend", ["eager", "triton"])
NF4 = torch.tensor(
    [-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0, 0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626]
    + [0.7230, 1.0]
)  # fmt: skip


@pytest.fixture(autouse=True)
def empty_workspace():
    lorafuse.clear_workspace()


def nf4(*sizes, is_transposed=False):
    count = math.prod(sizes)
    data = torch.randint(0, 256, (-(-count // 2),), dtype=torch.uint8)
    statistics = torch.rand(-(-count // 64)) / 4 + 0.1, NF4
    return Weight(data, is_transposed, statistics, f"nf4:{','.join(map(str, sizes))};block=64;dtype=float32")


def int8(*sizes):
    return Weight(
        torch.randint(-128, 128, sizes, dtype=torch.int8), False, (torch.rand(*sizes[:-1], 1) * 0.02,), "int8"
    )


def leaf(*sizes, dtype=torch.float32):
    return torch.randn(sizes, dtype=dtype).requires_grad_()


class Call:
    """An operator on weights in any format: `results(weights)` are y and every gradient, by name."""

    def __init__(self, run, weights, **tensors):
        self.run, self.weights, self.tensors = run, weights, tensors

    def results(self, weights=None, dtype=None, needed=None):
        given = {
            name: t.detach().to(dtype or t.dtype).requires_grad_(needed is None or name in needed)
            for name, t in self.tensors.items()
        }
        y = self.run(self.weights if weights is None else weights, **given)
        y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape))
        return {"y": y.detach()} | {name: t.grad for name, t in given.items() if t.requires_grad}

    def dense(self, dtype=torch.float32):
        return [w.decoded(dtype) for w in self.weights]


def linear(N=24, K=40, M=6, R=3, p=0.0, backend="eager"):
    def run(weights, x, a, b, bias):
        return LF.lora_linear(x, *weights, a, b, scale=1.5, bias=bias, dropout_p=p, seed=5, backend=backend)

    return Call(run, [nf4(N, K)], x=leaf(M, K), a=leaf(R, K), b=leaf(N, R), bias=leaf(N))


def grouped(E=5, N=24, K=40, R=3, backend="eager", is_transposed=False, ends=(4, 4, 9, 9, 12)):
    ends = torch.tensor(ends)
    bias = torch.randn(E, N)

    def run(weights, x, a, b):
        return LF.lora_grouped_linear(x, ends, *weights, a, b, scale=1.5, bias=bias, backend=backend)

    sizes = (K, N) if is_transposed else (N, K)
    weights = [nf4(E, *sizes, is_transposed=is_transposed)]
    return Call(run, weights, x=leaf(int(ends[-1]) + 2, K), a=leaf(E, R, K), b=leaf(E, N, R))


def experts(
    E=5, H=24, I=16, T=9, R=3, backend="eager", activation="silu", index=None, weights=None, adapters=True
):  # fmt: skip
    if index is None:
        # an expert without rows, and sentinels
        index = torch.tensor([0, 1, 3, 4, 5]).repeat(2 * T)[: 2 * T].view(T, 2)

    def run(weights, x, topk_weight, **factors):
        low = {"gate_up_scale": 1.5, "down_scale": 0.7, "activation": activation, "backend": backend}
        return LF.lora_experts(x, index, topk_weight, *weights, **factors, **low)

    factors = {
        "gate_up_a": leaf(E, R, H), "gate_up_b": leaf(E, 2 * I, R), "down_a": leaf(E, R, I), "down_b": leaf(E, H, R)
    } if adapters else {}  # fmt: skip
    weights = weights or [nf4(E, 2 * I, H), nf4(E, H, I)]
    return Call(run, weights, x=leaf(T, H), topk_weight=torch.rand(T, 2), **factors)


CALLS = {"linear": linear, "grouped": grouped, "experts": experts}
by_call = pytest.mark.parametrize("call", CALLS)


def check_same(call):
    """What a call computes is bit for bit what it computes of the decoded weights."""
    found, expected = call.results(), call.results(call.dense())
    for name, t in expected.items():
        assert t.abs().max() > 0, name
        assert torch.equal(found[name], t), name


@pytest.fixture
def decoded(monkeypatch):
    """The sizes of every decoded weight, in order."""
    sizes = []
    for backend in (aten.BACKEND, triton.BACKEND):

        def recorded(w, dtype, out, decode=backend.decode):
            sizes.append(w.stored)
            return decode(w, dtype, out)

        monkeypatch.setattr(backend, "decode", recorded)
    return sizes


@pytest.fixture
def parts_of_two(monkeypatch):
    """A budget of two matrices of those that are decoded."""
    of_stack, count = Backend.parts, []

    def parts(self, w, dtype, *rest):
        monkeypatch.setattr(workspace, "budget", lambda: 2 * math.prod(w.stored[1:]) * dtype.itemsize + 3)
        for part in of_stack(self, w, dtype, *rest):
            count.append(part[0])
            yield part

    monkeypatch.setattr(Backend, "parts", parts)
    return count


class TestMemory:
    @pytest.mark.no_poison
    @by_call
    def test_nothing_of_a_weights_size_is_allocated_but_the_workspace(self, call):
        sizes = {"N": 1024, "K": 1024} if call != "experts" else {"H": 1024, "I": 512}
        made = CALLS[call](**sizes)
        of_matrix = 4 * 1024 * 1024
        first, later = changes(made.results), changes(made.results)
        assert [n for n in first if n >= of_matrix] == [of_matrix]
        assert [n for n in later if abs(n) >= of_matrix] == []
        # adapters of 1024 x 3, and chunks of fp32 that a codec decodes
        assert max(map(abs, later)) <= of_matrix // 2

    def test_it_grows_to_the_largest_weight_of_any_dtype(self):
        small, large = linear(), linear(N=64)
        for call, dtype, size in ((small, torch.float32, 3840), (large, torch.float64, 20480), (small, None, 20480)):
            call.results(dtype=dtype)
            assert [t.numel() for t in workspace._free] == [size]
        lorafuse.clear_workspace()
        assert not workspace._free
        check_same(small)

    @by_backend
    @by_call
    def test_no_result_aliases_it(self, call, backend):
        made = CALLS[call](backend=backend)
        expected = made.results(made.dense())

        def overwrite():
            for t in workspace._free:
                t.fill_(255)

        leaves = {name: t.detach().clone().requires_grad_() for name, t in made.tensors.items()}
        y = made.run(made.weights, **leaves)
        assert workspace._free
        overwrite()
        y.backward(torch.linspace(-1, 1, y.numel()).view(y.shape))
        overwrite()
        found = {"y": y.detach()} | {name: t.grad for name, t in leaves.items()}
        assert all(torch.equal(found[name], expected[name]) for name in expected)

    def test_it_outlives_inference_mode(self):
        made = linear()
        with torch.inference_mode():
            made.run(made.weights, **{name: t.detach() for name, t in made.tensors.items()})
        check_same(made)

    @pytest.mark.parametrize("value", ["0", "many", "-1", "1.5"])
    def test_a_budget_that_is_no_number(self, value, monkeypatch):
        monkeypatch.setenv("LORAFUSE_WORKSPACE_MIB", value)
        with pytest.raises(ValueError, match=f"LORAFUSE_WORKSPACE_MIB='{value}' is no positive integer"):
            workspace.budget()
        monkeypatch.setenv("LORAFUSE_WORKSPACE_MIB", "3")
        assert workspace.budget() == 3 << 20

    def test_a_failed_product_gives_it_back(self):
        backend = aten.BACKEND
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            backend.matmul(torch.randn(2, 7), nf4(8, 64), None, None)
        assert len(workspace._free) == 1


class TestUsers:
    def test_two_at_a_time(self):
        one, two = nf4(8, 64), nf4(8, 64)
        for _ in range(2):
            with aten.BACKEND.dense(one, torch.float32) as first, aten.BACKEND.dense(two, torch.float32) as second:
                assert torch.equal(first.data, one.decoded(torch.float32).data)
                assert torch.equal(second.data, two.decoded(torch.float32).data)
        assert len(workspace._free) == 2

    def test_threads(self, monkeypatch):
        """Each has decoded before any multiplies, in forward and in backward."""
        calls, found = [linear(), linear(), linear()], {}
        expected = [call.results(call.dense()) for call in calls]
        barrier, decode = threading.Barrier(len(calls), timeout=60), Backend.decode

        def together(self, w, dtype, out):
            result = decode(self, w, dtype, out)
            barrier.wait()
            return result

        monkeypatch.setattr(Backend, "decode", together)
        threads = [threading.Thread(target=lambda i=i: found.update({i: calls[i].results()})) for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for i, right in enumerate(expected):
            assert all(torch.equal(found[i][name], right[name]) for name in right)
        assert len(workspace._free) == 3

    @by_backend
    def test_a_layer_within_an_activation(self, backend):
        inner = linear(N=16, K=32, M=18, backend=backend)
        given = {name: t.detach() for name, t in inner.tensors.items() if name != "x"}

        def activation(weights):
            return lambda u: inner.run(weights, x=u, **given)

        index = torch.arange(18).remainder(5).view(9, 2)
        torch.manual_seed(1)
        made = experts(backend=backend, activation=activation(inner.weights), index=index)
        torch.manual_seed(1)
        of_dense = experts(backend=backend, activation=activation(inner.dense()), index=index)
        found, expected = made.results(), of_dense.results(made.dense())
        assert all(torch.equal(found[name], expected[name]) for name in expected)


class TestParts:
    def run(self, call, parts):
        check_same(call)
        # of quantized stacks
        assert slice(4, 5) in parts
        assert slice(2, 4) in parts

    @pytest.mark.parametrize("is_transposed", [False, True])
    @pytest.mark.parametrize(
        "ends", [(4, 4, 9, 9, 12), (0, 0, 9, 9, 12), (4, 7, 7, 7, 9), (3, 5, 6, 7, 7), (0, 0, 0, 0, 0)]
    )
    def test_grouped(self, ends, is_transposed, parts_of_two):
        made = grouped(backend="triton", is_transposed=is_transposed, ends=ends)
        if ends[-1]:
            self.run(made, parts_of_two)
        else:
            assert not made.results()["y"].any()

    def test_experts(self, parts_of_two):
        self.run(experts(backend="triton"), parts_of_two)

    def test_experts_whose_activation_is_a_function(self, parts_of_two):
        self.run(experts(backend="triton", activation=lambda u: u[:, :16] * u[:, 16:]), parts_of_two)

    @pytest.mark.parametrize("is_transposed", [False, True])
    @pytest.mark.parametrize("ends", [(4, 4, 9, 9, 12), (0, 0, 9, 9, 12), (4, 7, 7, 7, 9)])
    def test_grouped_mm(self, ends, is_transposed, parts_of_two, by_grouped_mm):
        self.run(grouped(is_transposed=is_transposed, ends=ends), parts_of_two)

    def test_experts_by_grouped_mm(self, parts_of_two, by_grouped_mm):
        self.run(experts(), parts_of_two)

    def test_a_matrix_larger_than_the_budget(self, monkeypatch, decoded):
        monkeypatch.setattr(workspace, "budget", lambda: 1)
        made = grouped(backend="triton")
        check_same(made)
        assert set(decoded) == {(1, 24, 40)}
        assert [t.numel() for t in workspace._free] == [24 * 40 * 4]

    def test_all_at_once_within_the_budget(self, decoded):
        check_same(grouped(backend="triton"))
        assert set(decoded) == {(5, 24, 40)}


class TestWhatIsDecoded:
    def test_groups_with_rows_alone(self, decoded):
        made = grouped()
        check_same(made)
        # of five groups three have rows, forward and backward
        assert decoded == [(1, 24, 40)] * 6

    @pytest.mark.parametrize(
        ("needed", "expected"),
        [
            (("x",), [(5, 32, 24), (5, 24, 16)] + [(5, 24, 16), (5, 32, 24)]),
            (("gate_up_a", "down_b"), [(5, 32, 24), (5, 24, 16)] + [(5, 24, 16)]),
            (("topk_weight",), [(5, 32, 24), (5, 24, 16)] + [(5, 24, 16)]),
            (("down_a", "down_b"), [(5, 32, 24), (5, 24, 16)]),
        ],
        ids=lambda value: "-".join(value) if isinstance(value[0], str) else "",
    )
    def test_what_backward_needs(self, needed, expected, decoded):
        experts(backend="triton").results(needed=needed)
        assert decoded == expected

    @by_backend
    def test_a_layer_whose_input_needs_no_gradient(self, backend, decoded):
        linear(backend=backend).results(needed=("a", "b", "bias"))
        assert decoded == [(24, 40)]


class TestFeatures:
    """Gradients against fp64 of the decoded weight, and what the dense layers can do."""

    @by_backend
    @pytest.mark.parametrize(
        ("make", "given"),
        [
            (linear, {"N": 96, "K": 80, "M": 33, "R": 8}),
            (linear, {"N": 96, "K": 80, "M": 33, "R": 8, "p": 0.4}),
            (experts, {"H": 48, "I": 40, "T": 21}),
        ],
        ids=["linear", "dropout", "experts"],
    )
    def test_against_fp64(self, backend, make, given):
        made = make(**given, backend=backend)
        wide = [Weight(w.data.double()) for w in made.dense()]
        expected = Call(make(**given).run, wide, **made.tensors).results(dtype=torch.float64)
        for name, t in made.results().items():
            assert relative_l2(t, expected[name]) <= 1e-5, name

    @pytest.mark.parametrize("reentrant", [False, True])
    @by_call
    def test_checkpoints(self, call, reentrant):
        made = CALLS[call]()
        plain, run = made.results(), made.run

        def kept(weights, **tensors):
            names = list(tensors)
            given = [tensors[name] for name in names]
            return checkpoint(lambda *t: run(weights, **dict(zip(names, t))), *given, use_reentrant=reentrant)  # noqa: B905

        found = Call(kept, made.weights, **made.tensors).results()
        assert all(torch.equal(found[name], plain[name]) for name in plain)

    @by_call
    def test_compile(self, call):
        made = CALLS[call]()
        plain = made.results()
        compiled = torch.compile(made.run, fullgraph=True, backend="aot_eager")
        found = Call(compiled, made.weights, **made.tensors).results()
        assert all(torch.equal(found[name], plain[name]) for name in plain)

    @by_backend
    def test_stacks_in_different_formats(self, backend):
        for weights in ([nf4(5, 32, 24), int8(5, 24, 16)], [nf4(5, 32, 24), Weight(torch.randn(5, 24, 16))]):
            check_same(experts(backend=backend, weights=weights))

    def test_experts_without_adapters(self):
        check_same(experts(adapters=False))
