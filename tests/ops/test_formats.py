"""Quantized weights: what an operator computes is what it computes of the decoded weight, on every backend.

The decoded weight itself is compared with the library's, bit for bit, and is the library's storage and no copy.
"""

import math

import pytest
import torch

import lorafuse.formats as formats
from lorafuse import functional as LF
from lorafuse.formats import int8
from lorafuse.operands import Weight

DTYPES = (torch.float32, torch.float16)
BACKENDS = ("eager", "triton")
by_backend = pytest.mark.parametrize("backend", BACKENDS)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
# how a library holds the scale of rows
LIBRARIES = ("torchao", "bitsandbytes")
# packed, so that sizes stand in the format: bitsandbytes' 4 bits, and with nested statistics
FLAT = ("nf4", "fp4")
by_layer_library = pytest.mark.parametrize("library", LIBRARIES + FLAT)
by_library = pytest.mark.parametrize("library", LIBRARIES)
E, T, K, R = 3, 20, 32, 4


def quantized(*sizes, library="torchao", is_transposed=False):
    if library in FLAT:
        count, sizes_text = math.prod(sizes), ",".join(map(str, sizes))
        data = torch.randint(0, 256, (count // 2,), dtype=torch.uint8)
        absmax, code = torch.rand(-(-count // 64)), torch.linspace(-1, 1, 16)
        if library == "nf4":
            return Weight(data, is_transposed, (absmax, code), f"nf4:{sizes_text};block=64;dtype=float32")
        nested = (absmax * 255).byte(), code, torch.rand(-(-len(absmax) // 256)), torch.linspace(-1, 1, 256)
        statistics = *nested, torch.tensor(1.5)
        return Weight(data, is_transposed, statistics, f"fp4:{sizes_text};block=64;dtype=float16")
    data = torch.randint(-128, 128, sizes, dtype=torch.int8)
    data[..., 0, 0] = -128
    scale = torch.rand(*sizes[:-1], 1) * 0.02 if library == "torchao" else torch.rand(sizes[:-1]) * 2
    return Weight(data, is_transposed, (scale,), "int8")


def adapters(*sizes):
    return [torch.randn(*size).mul_(0.3).requires_grad_() for size in sizes]


def results(run, weights, tensors):
    """y of `run(*weights, *tensors)` and the gradients of the tensors that need one."""
    for t in tensors:
        t.grad = None
    y = run(*weights, *tensors)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape))
    return [y.detach(), *(t.grad for t in tensors if t.requires_grad)]


def same(run, weights, tensors, dtype):
    decoded = [w.decoded(dtype) for w in weights]
    for of_format, of_dense in zip(results(run, weights, tensors), results(run, decoded, tensors), strict=True):
        assert of_dense.abs().max() > 0
        assert torch.equal(of_format, of_dense)


@by_layer_library
@by_dtype
@by_backend
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_linear(backend, dtype, library, p):
    x = torch.randn(2, T, K, dtype=dtype).requires_grad_()
    a, b = adapters((R, K), (24, R))
    bias = torch.randn(24, dtype=dtype).requires_grad_()

    def run(w, x, a, b, bias):
        return LF.lora_linear(x, w, a, b, scale=1.5, bias=bias, dropout_p=p, seed=7, backend=backend)

    same(run, [quantized(24, K, library=library)], [x, a, b, bias], dtype)


@by_layer_library
@by_dtype
@by_backend
@pytest.mark.parametrize("is_transposed", [False, True], ids=["rows", "transposed"])
def test_grouped(backend, dtype, library, is_transposed):
    x = torch.randn(T, K, dtype=dtype).requires_grad_()
    a, b = adapters((E, R, K), (E, 24, R))
    w = quantized(E, *((K, 24) if is_transposed else (24, K)), library=library, is_transposed=is_transposed)
    offsets = torch.tensor([7, 7, 18])

    def run(w, x, a, b):
        return LF.lora_grouped_linear(x, offsets, w, a, b, scale=1.5, backend=backend)

    same(run, [w], [x, a, b], dtype)


@by_layer_library
@by_dtype
@by_backend
@pytest.mark.parametrize("activation", ["silu", torch.sin], ids=["silu", "function"])
def test_experts(backend, dtype, library, activation):
    I, k = 16, 2
    x = torch.randn(T, K, dtype=dtype).requires_grad_()
    weight = torch.rand(T, k, dtype=dtype).requires_grad_()
    index = torch.randint(0, E + 1, (T, k))
    up_a, up_b, down_a, down_b = adapters((E, R, K), (E, 2 * I, R), (E, R, I), (E, K, R))
    act = activation if isinstance(activation, str) else lambda u: torch.sin(u[:, :I]) * u[:, I:]

    def run(up, down, x, weight, *factors):
        names = ("gate_up_a", "gate_up_b", "down_a", "down_b")
        given = dict(zip(names, factors, strict=True))
        return LF.lora_experts(x, index, weight, up, down, **given, activation=act, backend=backend)

    weights = quantized(E, 2 * I, K, library=library), quantized(E, K, I, library=library)
    same(run, weights, [x, weight, up_a, up_b, down_a, down_b], dtype)


@by_layer_library
def test_nothing_decoded_is_saved(library):
    """Backward decodes again: of a weight's size only the stored bytes are kept."""
    x, w = torch.randn(T, K, requires_grad=True), quantized(24, K, library=library)
    a, b = adapters((R, K), (24, R))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        LF.lora_linear(x, w, a, b)
    assert {t.dtype for t in kept if t.numel() == w.data.numel()} == {w.data.dtype}
    assert not any(t.numel() == 24 * K and t.is_floating_point() for t in kept)
    assert any(t is w.data or t.data_ptr() == w.data.data_ptr() for t in kept)


@by_layer_library
def test_second_order_and_transforms(library):
    x, w = torch.randn(3, K, dtype=torch.float64, requires_grad=True), quantized(8, K, library=library)
    a, b = (t.detach().double().requires_grad_() for t in adapters((R, K), (8, R)))
    assert torch.autograd.gradgradcheck(lambda *args: LF.lora_linear(args[0], w, *args[1:]), (x, a, b))

    def loss(x, w):
        return LF.lora_linear(x, w, a, b).square().sum()

    actual = torch.func.grad(loss)(x.detach(), w)
    torch.testing.assert_close(actual, torch.func.grad(loss)(x.detach(), w.decoded(torch.float64)))


@by_layer_library
def test_compile_and_autocast(library):
    w = quantized(24, K, library=library)
    a, b = adapters((R, K), (24, R))
    x = torch.randn(T, K, requires_grad=True)

    def step(x):
        with torch.autocast("cpu", torch.bfloat16):
            return LF.lora_linear(x, w, a, b)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    y = compiled(x)
    assert y.dtype is torch.bfloat16
    assert torch.equal(y, step(x))
    (actual,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(actual, torch.autograd.grad(step(x).sum(), x)[0])


class TestOpcheck:
    """Statistics are the last arguments of the schemas.

    A trace with symbolic sizes takes most of the time and asks for shapes alone: each operator is traced with two
    formats, and each format with one operator or two.
    """

    CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")

    def check(self, name, is_traced, *args):
        checks = (*self.CHECKS, "test_aot_dispatch_dynamic") if is_traced else self.CHECKS
        return torch.library.opcheck(getattr(torch.ops.lorafuse, name).default, args, test_utils=checks)

    @by_layer_library
    def test_linear(self, library):
        is_traced = library in ("torchao", "fp4")
        x, w = torch.randn(6, K, requires_grad=True), quantized(24, K, library=library)
        a, b = adapters((R, K), (24, R))
        settings = None, 0.7, 0.0
        stored = "eager", False, w.format, [*w.statistics]
        self.check("lora_linear", is_traced, x, w.data, None, a, b, *settings, *stored)
        given = (t.detach() for t in (torch.randn(6, 24), x, torch.randn(6, R)))
        self.check(
            "lora_linear_backward", is_traced, *given, w.data, a.detach(), b.detach(), *settings, [True] * 4, *stored
        )

    @by_layer_library
    def test_grouped(self, library):
        is_traced = library in ("bitsandbytes", "nf4")
        x, w = torch.randn(T, K, requires_grad=True), quantized(E, 24, K, library=library)
        offsets = torch.tensor([7, 7, 18])
        a, b = adapters((E, R, K), (E, 24, R))
        stored = "eager", w.format, [*w.statistics]
        self.check("lora_grouped_linear", is_traced, x, offsets, w.data, None, a, b, 0.7, False, *stored)
        given = (t.detach() for t in (torch.randn(T, 24), x, torch.randn(T, R)))
        self.check(
            "lora_grouped_linear_backward", is_traced, *given, offsets, w.data, a.detach(), b.detach(), 0.7, False,
            [True] * 3, *stored,
        )  # fmt: skip

    @by_layer_library
    def test_experts(self, library):
        is_traced = library in ("torchao", "fp4")
        x, weight = torch.randn(6, K, requires_grad=True), torch.rand(6, 2, requires_grad=True)
        # rows of no group hold anything, so that every row has one
        index = torch.randint(0, E, (6, 2))
        up, down = quantized(E, 32, K, library=library), quantized(E, K, 16, library=library)
        low = adapters((E, R, K), (E, 32, R), (E, R, 16), (E, K, R))
        settings = 0.7, 1.3, False, "silu", "concatenated"
        stored = "eager", up.format, down.format, [*up.statistics], [*down.statistics]
        stacks = up.data, down.data
        self.check("lora_experts", is_traced, x, index, weight, *stacks, None, None, *low, *settings, *stored)
        given = [t.detach() for t in (torch.randn(6, K), x, weight)]
        low = [t.detach() for t in low]
        _, *saved = torch.ops.lorafuse.lora_experts(
            *given[1:2], index, given[2], *stacks, None, None, *low, *settings, *stored
        )
        self.check(
            "lora_experts_backward", is_traced, *given, *stacks, None, *low, *settings, *saved, [True] * 6, *stored
        )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Weight(torch.zeros(8, K, dtype=torch.int8), format="int9"), "'int9' is not one of dense, int8, "),
        (
            lambda: Weight(torch.zeros(8, K, dtype=torch.int8), statistics=(torch.ones(K, 1),), format="int8"),
            r"\[32, 1\]; it must be \[8, 1\] \(torchao\) or \[8\]",
        ),
        (lambda: quantized(K, 8, is_transposed=True), "transposed weight"),
        (
            lambda: Weight(
                torch.zeros(8, K, dtype=torch.int8), statistics=(torch.ones(8, 1, device="meta"),), format="int8"
            ),
            "statistics of a int8 weight on meta",
        ),
    ],
    ids=["unknown", "scale", "transposed", "device"],
)
@by_backend
def test_bad_weights(make, message, backend):
    a, b = adapters((R, K), (8, R))
    with pytest.raises(ValueError, match=message):
        LF.lora_linear(torch.randn(3, K), make(), a, b, backend=backend)


def test_stacks_stored_apart():
    up, down = quantized(E, 16, K), quantized(E, 8, K, is_transposed=True)
    message = "gate_up is_transposed=False, down is_transposed=True; both stacks must be stored alike"
    with pytest.raises(ValueError, match=message):
        LF.lora_experts(torch.randn(2, K), torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1), up, down)


class TestTorchao:
    @pytest.fixture
    def linear(self):
        quantization = pytest.importorskip("torchao.quantization")
        linear = torch.nn.Linear(K, 24, bias=False, dtype=torch.bfloat16)
        quantization.quantize_(linear, quantization.Int8WeightOnlyConfig())
        return linear

    def test_bit_exact_by_reference(self, linear):
        w = formats.adopt(linear)
        assert w.data.data_ptr() == linear.weight.qdata.data_ptr()
        assert w.statistics[0].data_ptr() == linear.weight.scale.data_ptr()
        assert torch.equal(w.decoded(torch.bfloat16).data, linear.weight.dequantize())
        assert torch.equal(formats.adopt(linear.weight).data, w.data)

    def test_zero_points_are_left_to_another_format(self, linear, monkeypatch):
        linear.weight.zero_point[3] = 1
        monkeypatch.setattr(int8, "any_shifted", False)
        assert int8.adopt(linear) is None
        assert formats.adopt(linear).format_name == "intx"

    def test_zero_points_in_a_compiled_graph(self, linear, monkeypatch):
        """A compiler cannot look at them; that others had some is enough for the format that subtracts them."""
        monkeypatch.setattr(int8, "any_shifted", False)
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert formats.adopt(linear).format_name == "int8"
        with monkeypatch.context() as eager:
            eager.setattr(torch.compiler, "is_compiling", lambda: False)
            assert int8.adopt(linear) is not None
            linear.weight.zero_point = torch.ones_like(linear.weight.zero_point)
            assert int8.adopt(linear) is None
        assert formats.adopt(linear).format_name == "intx"
        linear.weight.zero_point.zero_()
        assert torch.equal(formats.adopt(linear).decoded(torch.bfloat16).data, linear.weight.dequantize())

    def test_other_tensors_are_left_alone(self):
        assert formats.adopt(torch.nn.Linear(4, 4)) is None
        assert int8.adopt(object()) is None


class TestBitsandbytes:
    @pytest.fixture
    def linear(self):
        bnb = pytest.importorskip("bitsandbytes")
        linear = bnb.nn.Linear8bitLt(K, 24, bias=False, has_fp16_weights=False)
        given = torch.randn(24, K, dtype=torch.float16)
        linear.weight = bnb.nn.Int8Params(given, requires_grad=False, has_fp16_weights=False)
        return linear.to("cpu")

    def test_bit_exact_by_reference_before_and_after_the_first_forward(self, linear):
        from bitsandbytes.functional import int8_vectorwise_dequant

        before = formats.adopt(linear)
        assert before.data.data_ptr() == linear.weight.data_ptr()
        expected = int8_vectorwise_dequant(before.data, before.statistics[0])
        assert torch.equal(before.decoded(torch.float32).data, expected)
        linear(torch.randn(2, K, dtype=torch.float16))
        after = formats.adopt(linear)
        assert after.data.data_ptr() == before.data.data_ptr()
        assert after.statistics[0].data_ptr() == before.statistics[0].data_ptr()

    def test_what_is_not_quantized_yet(self):
        bnb = pytest.importorskip("bitsandbytes")
        with pytest.raises(ValueError, match=r"Int8Params torch.float32 \[24, 32\] on cpu is not quantized yet: build"):
            formats.adopt(bnb.nn.Linear8bitLt(K, 24, has_fp16_weights=False))
