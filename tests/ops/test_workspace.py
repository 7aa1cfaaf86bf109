"""Where quantized weights are decoded to: one buffer that every product uses in turn, in parts of a budget."""

import threading

import pytest
import torch
from quantized_calls import CALLS, Call, check_same, experts, gated_mlp, grouped, int8, linear, nf4, two_at_a_time
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import lorafuse
from lorafuse.backends import aten, workspace
from lorafuse.backends.protocol import Backend
from lorafuse.operands import Weight
from lorafuse.plan import override
from lorafuse.testing.memory import changes
from lorafuse.testing.numerics import relative_l2

pytest_plugins = "backend_fixtures"
pytestmark = pytest.mark.usefixtures("empty_workspace")
by_backend = pytest.mark.parametrize("backend", ["eager", "triton"])
by_call = pytest.mark.parametrize("call", CALLS)


class TestMemory:
    @pytest.mark.no_poison
    @by_call
    def test_nothing_of_a_weights_size_is_allocated_but_the_workspace(self, call):
        # gate_up of experts has two matrices
        sizes = {"experts": {"H": 1024, "I": 512}, "gated_mlp": {"H": 1024, "I": 1024}}.get(
            call, {"N": 1024, "K": 1024}
        )
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
            assert [t.numel() for t in workspace.FREE] == [size]
        lorafuse.clear_workspace()
        assert not workspace.FREE
        check_same(small)

    @by_backend
    @by_call
    def test_no_result_aliases_it(self, call, backend):
        made = CALLS[call](backend=backend)
        expected = made.results(made.dense())

        def overwrite():
            for t in workspace.FREE:
                t.fill_(255)

        leaves = {name: t.detach().clone().requires_grad_() for name, t in made.tensors.items()}
        y = made.run(made.weights, **leaves)
        assert workspace.FREE
        overwrite()
        y.backward(torch.linspace(-1, 1, y.numel()).view(y.shape))
        overwrite()
        actual = {"y": y.detach()} | {name: t.grad for name, t in leaves.items()}
        assert all(torch.equal(actual[name], expected[name]) for name in expected)

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
        assert len(workspace.FREE) == 1


@by_backend
@by_call
def test_flops_are_those_of_dense_weights(call, backend):
    made, counted = CALLS[call](backend=backend), []
    for weights in (made.weights, made.dense()):
        with FlopCounterMode(display=False) as counter:
            made.results(weights)
        counted.append(counter.get_total_flops())
    assert counted[0] == counted[1] > 0


class TestUsers:
    def test_two_at_a_time(self):
        two_at_a_time()

    def test_threads(self, monkeypatch):
        """Each has decoded before any multiplies, in forward and in backward."""
        calls, actual = [linear(), linear(), linear()], {}
        expected = [call.results(call.dense()) for call in calls]
        barrier, decode = threading.Barrier(len(calls), timeout=60), Backend.decode

        def together(self, w, dtype, out):
            result = decode(self, w, dtype, out)
            barrier.wait()
            return result

        monkeypatch.setattr(Backend, "decode", together)
        threads = [
            threading.Thread(target=lambda i=i: actual.update({i: calls[i].results()}), daemon=True) for i in range(3)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
            assert not thread.is_alive()
        for i, right in enumerate(expected):
            assert all(torch.equal(actual[i][name], right[name]) for name in right)
        assert len(workspace.FREE) == 3

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
        actual, expected = made.results(), of_dense.results(made.dense())
        assert all(torch.equal(actual[name], expected[name]) for name in expected)


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


class TestComposites:
    """Kernels of several primitives, which a backend may offer, get a dense weight."""

    @pytest.fixture
    def formats(self, spy, monkeypatch):
        seen = []
        for name, run in (("linear_forward", spy.linear_forward), ("linear_backward", spy.linear_backward)):

            def recorded(*args, run=run):
                seen.append(next(one for one in args if isinstance(one, Weight)).format_name)
                return run(*args)

            monkeypatch.setattr(spy, name, recorded)
        monkeypatch.setattr(spy, "plan", lambda operator, device: None)
        return seen

    def test_a_layer(self, formats):
        check_same(linear(backend="triton"))
        assert formats == ["dense"] * 4

    def test_a_layer_whose_input_needs_no_gradient(self, formats):
        linear(backend="triton").results(needed=("a", "b"))
        assert formats == ["dense", "nf4"]


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

        actual = Call(kept, made.weights, **made.tensors).results()
        assert all(torch.equal(actual[name], plain[name]) for name in plain)

    @by_call
    def test_compile(self, call):
        made = CALLS[call]()
        plain = made.results()
        compiled = torch.compile(made.run, fullgraph=True, backend="aot_eager")
        actual = Call(compiled, made.weights, **made.tensors).results()
        assert all(torch.equal(actual[name], plain[name]) for name in plain)

    @by_backend
    def test_stacks_in_different_formats(self, backend):
        for weights in ([nf4(5, 32, 24), int8(5, 24, 16)], [nf4(5, 32, 24), Weight(torch.randn(5, 24, 16))]):
            check_same(experts(backend=backend, weights=weights))

    def test_a_gated_mlp_whose_down_alone_is_quantized(self):
        """One launch for gate and up reads dense weights; down is planned by itself."""
        made = gated_mlp(backend="triton")
        call = Call(made.run, [*made.dense()[:2], int8(24, 40)], **made.tensors)
        with override(force_kernel="siblings"):
            actual = call.results()
        expected = call.results(call.dense())
        assert {name: t.shape for name, t in actual.items() if relative_l2(t, expected[name]) > 1e-5} == {}

    def test_experts_without_adapters(self):
        check_same(experts(adapters=False))
