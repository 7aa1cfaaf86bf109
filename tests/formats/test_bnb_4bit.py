"""bitsandbytes' NF4 and FP4: decoded bit for bit as bitsandbytes does, and held by reference."""

import math
import sys
from types import SimpleNamespace

import pytest
import torch

from lorafuse import formats
from lorafuse.formats import bnb_4bit, codec
from lorafuse.formats.weight import Weight

bnb = pytest.importorskip("bitsandbytes")
F = bnb.functional
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
by_kind = pytest.mark.parametrize("kind", ["nf4", "fp4"])
by_nested = pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])


@pytest.fixture(autouse=True)
def eager():
    """bitsandbytes compiles its plain kernels, for half a minute."""
    with torch.compiler.set_stance("force_eager"):
        yield


def params(w, kind="nf4", nested=False, block=64, storage=torch.uint8):
    packed, state = F.quantize_4bit(
        w, blocksize=block, compress_statistics=nested, quant_type=kind, quant_storage=storage
    )
    return bnb.nn.Params4bit(
        packed, quant_state=state, blocksize=block, quant_type=kind, quant_storage=storage, bnb_quantized=True
    )


def library_decodes(p, state):
    """What bitsandbytes' plain kernel decodes.

    Its AVX512 kernel reads other blocks' scales where K is no multiple of the block (0.50.2), and flushes subnormal
    bf16. It is chosen for even K alone: the same elements as `[N·K, 1]` are decoded by the plain one.
    """
    sizes, state.shape = state.shape, (math.prod(state.shape), 1)
    try:
        return F.dequantize_4bit(p.data, state).view(sizes)
    finally:
        state.shape = sizes


def adversarial(sizes, dtype):
    w = torch.randn(sizes, dtype=dtype).view(-1)
    w[:64] = 0
    w[64:96] = torch.finfo(dtype).smallest_normal / 8
    w[100] = torch.finfo(dtype).max / 2
    w[-1] = -torch.finfo(dtype).tiny
    return w.view(sizes)


@by_kind
@by_nested
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("sizes", "block"),
    [
        ((64, 128), 64),
        ((128, 192), 32),
        ((4, 8192), 4096),
        # blocks across rows, a short last block, an odd number of elements
        ((40, 96), 64),
        ((40, 96), 256),
        ((33, 65), 64),
        ((3, 24, 20), 128),
    ],
    ids=str,
)
@pytest.mark.parametrize("make", [torch.randn, adversarial], ids=["random", "adversarial"])
def test_bit_exact(make, sizes, block, dtype, nested, kind):
    p = params(make(sizes, dtype=dtype), kind, nested, block)
    w = formats.adopt(p)
    assert w.stored == sizes
    expected = library_decodes(p, p.quant_state)
    assert expected.abs().max() > 0
    assert torch.equal(w.decoded(dtype).data, expected)
    if sizes[-1] % block == 0 and make is torch.randn:
        assert torch.equal(F.dequantize_4bit(p.data, p.quant_state), expected)


@by_nested
def test_nested_statistics_with_a_short_last_block(nested):
    p = params(torch.randn(300, 64), nested=nested)
    assert p.quant_state.absmax.numel() % 256
    assert torch.equal(formats.adopt(p).decoded(torch.float32).data, F.dequantize_4bit(p.data, p.quant_state))


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_any_storage_by_reference(storage):
    p = params(torch.randn(64, 64), storage=storage, nested=True)
    w = formats.adopt(p)
    assert p.dtype is storage
    assert w.data.dtype is torch.uint8
    assert w.data.data_ptr() == p.data_ptr()
    state = p.quant_state
    held = state.absmax, state.code, state.state2.absmax, state.state2.code, state.offset
    assert [t.data_ptr() for t in w.statistics] == [t.data_ptr() for t in held]
    assert torch.equal(w.decoded(torch.float32).data, F.dequantize_4bit(p.data, state))


def test_the_weights_dtype_is_rounded_to_first():
    p = params(torch.randn(64, 64, dtype=torch.bfloat16))
    expected = F.dequantize_4bit(p.data, p.quant_state)
    assert expected.dtype is torch.bfloat16
    assert torch.equal(formats.adopt(p).decoded(torch.float32).data, expected.float())


@by_nested
@pytest.mark.parametrize("sizes", [(5, 64, 64), (5, 24, 20), (5, 9, 7)], ids=str)
def test_matrices_of_a_stack(sizes, nested):
    w = formats.adopt(params(torch.randn(sizes), nested=nested))
    every = w.decoded(torch.float32).data
    part = w.select(1, 4)
    assert part.stored == (3, *sizes[1:])
    assert part.data.data_ptr() == w.data.data_ptr()
    assert torch.equal(part.decoded(torch.float32).data, every[1:4])
    assert torch.equal(part.select(2, 3).t.decoded(torch.float32).right(), every[3:4])
    assert part.select(1, 1).decoded(torch.float32).data.shape == (0, *sizes[1:])
    with pytest.raises(ValueError, match=r"matrices 2 … 4 of a weight \[3, "):
        part.select(2, 4)


@pytest.mark.parametrize("chunk", [64, 192])
def test_chunks_give_the_same(chunk, monkeypatch):
    w = formats.adopt(params(torch.randn(3, 33, 65), nested=True))
    expected = w.decoded(torch.float32).data, w.select(1, 3).decoded(torch.float32).data
    monkeypatch.setitem(codec.CHUNK, "cpu", chunk)
    assert torch.equal(w.decoded(torch.float32).data, expected[0])
    assert torch.equal(w.select(1, 3).decoded(torch.float32).data, expected[1])


def test_a_given_tensor_is_written():
    w = formats.adopt(params(torch.randn(64, 64)))
    out = torch.full((64, 64), math.nan)
    assert w.decoded(torch.float32, out).data is out
    assert torch.equal(out, w.decoded(torch.float32).data)
    for wrong in (out[:32], out.half(), out.t()):
        with pytest.raises(
            ValueError, match=r"out is torch.*the decoded weight is contiguous torch.float32 \[64, 64\]"
        ):
            w.decoded(torch.float32, wrong)


class TestAdoption:
    @pytest.fixture
    def linear(self):
        linear = bnb.nn.Linear4bit(64, 24, bias=False, quant_type="nf4")
        return linear.to("cpu")

    def test_layer(self, linear):
        w = formats.adopt(linear)
        assert w.format == "nf4:24,64;block=64;dtype=float32"
        assert w.data.data_ptr() == linear.weight.data_ptr()

    def test_a_parameter_that_lost_its_state(self, linear):
        """As sharding leaves it; the layer still has it."""
        expected = formats.adopt(linear).decoded(torch.float32).data
        linear.weight = torch.nn.Parameter(linear.weight.data, requires_grad=False)
        assert torch.equal(formats.adopt(linear).decoded(torch.float32).data, expected)

    def test_parametrized_stack(self):
        from bitsandbytes.nn.parametrize import replace_parameter_4bit

        module = torch.nn.Module()
        module.up = torch.nn.Parameter(torch.randn(3, 24, 64))
        replace_parameter_4bit(module, "up", compress_statistics=True)
        w = formats.adopt(module.parametrizations.up)
        assert w.stored == (3, 24, 64)
        assert w.data.data_ptr() == module.parametrizations.up.original.data_ptr()
        assert torch.equal(w.decoded(torch.float32).data, module.up)
        torch.nn.utils.parametrize.register_parametrization(module, "up", torch.nn.Identity(), unsafe=True)
        with pytest.raises(ValueError, match="parametrized by Bnb4bitParametrization, Identity; .*remove the others"):
            formats.adopt(module.parametrizations.up)

    def test_others_are_left_alone(self):
        module = torch.nn.Linear(4, 4)
        torch.nn.utils.parametrizations.orthogonal(module)
        for other in (module, module.parametrizations.weight, object()):
            assert bnb_4bit.adopt(other) is None

    def test_not_quantized_yet(self):
        linear = bnb.nn.Linear4bit(64, 24)
        for storage in (linear, linear.weight):
            with pytest.raises(ValueError, match=r"4bit torch.float32 \[24, 64\] on cpu is not quantized yet: move"):
                formats.adopt(storage)

    def test_repacked_for_a_cpu(self, linear):
        packed, state = F._convert_weight_packed_for_cpu(
            torch.zeros(32 * 64 // 2, 1, dtype=torch.uint8), params(torch.randn(32, 64)).quant_state
        )
        with pytest.raises(
            ValueError, match="was repacked by bitsandbytes for inference on this CPU, .* load the model"
        ):
            formats.adopt(bnb.nn.Params4bit(packed, quant_state=state, bnb_quantized=True))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"quant_type": "int4"}, r"quant_type 'int4'; bitsandbytes decodes one of nf4, fp4: quantize the weight"),
            ({"blocksize": 48}, r"blocksize 48; bitsandbytes decodes one of 32, .*, 4096"),
            ({"dtype": torch.float64}, r"dtype torch.float64; bitsandbytes decodes bfloat16, float16 or float32"),
            ({"shape": (24 * 64,)}, r"shape \[1536\]; bitsandbytes decodes a matrix \[N, K\] or a stack"),
            ({"shape": (48, 64)}, r"\[48, 64\] holds 768 bytes with strides \[1, 1\]; it must be 1536 contiguous ones"),
            ({"shape": (64, 24)}, r"quantized as \[64, 24\]; \[N, K\] is \[24, 64\]: quantize it anew"),
        ],
        ids=["type", "block", "dtype", "shape", "shard", "transposed"],
    )
    def test_what_cannot_be_held(self, linear, change, message):
        for key, value in change.items():
            setattr(linear.weight.quant_state, key, value)
        with pytest.raises(ValueError, match=message):
            formats.adopt(linear)

    def test_nested_blocks_of_another_size(self, linear):
        linear.weight.quant_state.state2.blocksize = 128
        with pytest.raises(ValueError, match="nested blocksize 128; bitsandbytes decodes 256"):
            formats.adopt(linear)


def tiny(sizes, dtype):
    return torch.randn(sizes, dtype=dtype) * 1e-36


class Called:
    """A loaded library, and the names of its functions that were called."""

    def __init__(self, library):
        self.library, self.names = library, []

    def __getattr__(self, name):
        def call(*arguments):
            self.names.append(name)
            return getattr(self.library, name)(*arguments)

        return call


@by_kind
@by_nested
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("make", "sizes", "block", "is_used"),
    [
        (torch.randn, (1030, 512), 64, True),
        (torch.zeros, (4, 128), 64, True),
        (adversarial, (64, 128), 64, True),
        # blocks across rows, subnormal products, blocks of which its kernel is not sure
        (torch.randn, (40, 96), 64, False),
        (tiny, (64, 128), 64, False),
        (torch.randn, (4, 8192), 4096, False),
    ],
)
def test_the_librarys_kernel_decodes_where_it_is_exact(make, sizes, block, is_used, dtype, nested, kind, monkeypatch):
    monkeypatch.setattr(bnb_4bit.cpu, "library", lambda: None)
    weight = formats.adopt(params(make(sizes, dtype=dtype), kind, nested, block))
    operators = sys.modules["bitsandbytes.backends.cpu.ops"]
    called = Called(operators.lib._lib)
    monkeypatch.setattr(operators, "lib", SimpleNamespace(_lib=called))
    decoded = [weight.decoded(to).data for to in (torch.bfloat16, torch.float16, torch.float32)]
    assert set(called.names) == ({f"cdequantize_blockwise_cpu_{kind}_fp32"} if is_used else set())
    called.names.clear()
    monkeypatch.delitem(sys.modules, "bitsandbytes.backends.cpu.ops")
    expected = [weight.decoded(actual.dtype).data for actual in decoded]
    assert called.names == []
    assert all(map(torch.equal, decoded, expected))


@by_nested
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_librarys_kernel_reads_a_part_of_a_stack(nested, dtype):
    stack = torch.randn(5, 24, 128, dtype=dtype)
    p = params(stack, nested=nested)
    weight, whole = formats.adopt(p), F.dequantize_4bit(p.data, p.quant_state)
    for rounded in (torch.bfloat16, torch.float32):
        assert torch.equal(weight.select(1, 4).decoded(rounded).data, whole[1:4].to(rounded))


def test_a_table_of_its_own_is_decoded_by_it():
    """The library's CPU kernel has tables of its own, which are not those of every weight."""
    w = formats.adopt(params(torch.randn(64, 128)))
    scale, table = w.statistics
    own = Weight(w.data, statistics=(scale, 2 * table), format=w.format)
    assert torch.equal(own.decoded(torch.float32).data, 2 * w.decoded(torch.float32).data)
