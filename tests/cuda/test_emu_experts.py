"""Experts and grouped layers with their base products in the emulated CUDA kernel over ragged rows (T5), against fp64.

Emulated, not run on hardware. The kernels' dtypes are bf16 and fp16; what holds of every backend is in test_experts.py.
"""

import pytest
import torch
from experts_reference import block, check, differentiated, fused
from native_build import emulator

from lorafuse.functional import lora_grouped_linear
from lorafuse.operands import Rows
from lorafuse.plan import override
from lorafuse.testing.numerics import relative_l2, tolerance

DTYPES = (torch.bfloat16, torch.float16)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


@pytest.fixture(scope="module", autouse=True)
def _built():
    emulator()


@pytest.fixture(autouse=True)
def emu():
    """The emulator, every test under a schedule of its own until it asks for another."""
    module = emulator()
    module.configure(seed=int(torch.randint(1, 2**31, ()).item()))
    yield module
    module.configure()


@by_dtype
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_every_layout(dtype, transposed, bias):
    check("emu", dtype=dtype, transposed=transposed, bias=bias, H=16, adapter_dtype=torch.float32)


@pytest.mark.parametrize("adapters", [(), ("gate_up",), ("down",)])
@pytest.mark.parametrize("bias", [True, False])
def test_projections_without_an_adapter(adapters, bias):
    check("emu", dtype=torch.bfloat16, adapters=adapters, bias=bias, H=16)


@pytest.mark.parametrize("R", [1, 3, 8, 16, 40])
def test_every_rank(R):
    check("emu", dtype=torch.bfloat16, R=R, H=16, adapter_dtype=torch.float32)


@pytest.mark.parametrize(("T", "E", "k"), [(0, 4, 2), (1, 4, 2), (9, 4, 1), (9, 4, 4), (40, 16, 3)])
def test_every_size(T, E, k):
    check("emu", T=T, E=E, k=k, dtype=torch.float16, H=16)


def grouped(ends, rows, dtype=torch.float16, transposed=False, N=136, K=72, R=8, bias=True):
    """Operands of a grouped layer, the adapters fp32."""
    generator = torch.Generator().manual_seed(rows)

    def normal(*shape, size=1.0):
        return torch.randn(shape, generator=generator).mul_(size)

    E = len(ends)
    w = normal(E, N, K, size=K**-0.5).to(dtype)
    a, b = normal(E, R, K, size=K**-0.5).requires_grad_(), normal(E, N, R, size=R**-0.5).requires_grad_()
    x = normal(rows, K).to(dtype).requires_grad_()
    settings = {"scale": 1.7, "bias": normal(E, N).to(dtype) if bias else None, "is_transposed": transposed}
    return (x, torch.tensor(ends), w.mT.contiguous() if transposed else w, a, b), settings


def results(operands, settings, backend):
    x, _, _, a, b = operands
    y = lora_grouped_linear(*operands, **settings, backend=backend)
    dy = torch.linspace(-1, 1, y.numel()).view(y.shape).to(y.dtype)
    return dict(zip(("y", "dx", "da", "db"), (y.detach(), *torch.autograd.grad(y, (x, a, b), dy)), strict=True))


@by_dtype
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize(
    ("ends", "rows"),
    [([130, 130, 131, 300], 300), ([0, 0, 5], 5), ([128, 256], 300), ([1, 2, 3, 4, 5, 6, 7, 8], 8), ([0, 0], 7)],
)
def test_groups_of_every_kind(ends, rows, transposed, dtype):
    """Empty ones, several tiles high, of one row; rows of no group are zero."""
    given = grouped(ends, rows, dtype, transposed)
    expected = results(*given, "eager")
    for name, tensor in results(*given, "emu").items():
        assert relative_l2(tensor, expected[name]) < tolerance(dtype), name
        assert ends[-1] == 0 or tensor.count_nonzero() > 0, name
        if name in ("y", "dx"):
            assert tensor[ends[-1] :].count_nonzero() == 0


def test_many_schedules(emu, request):
    """The schedule moves, the result does not."""
    given = grouped([60, 60, 190], 200, torch.bfloat16)
    first = results(*given, "emu")
    for seed in range(request.config.getoption("--seeds")):
        emu.configure(seed=seed, resident=1 + seed % 3, multiprocessors=1 + seed % 5)
        for name, tensor in results(*given, "emu").items():
            assert torch.equal(tensor, first[name]), (name, seed)


@pytest.fixture
def gathered(monkeypatch):
    """Everything by kernels that read rows where they lie: nothing asks where to copy them from."""
    monkeypatch.setattr(Rows, "token", property(lambda rows: pytest.fail("rows were copied")))
    with override(force_kernel="cuda gathered"):
        yield


GATHERED = {
    "w by rows": {"dtype": torch.float16, "bias": True, "adapter_dtype": torch.float32},
    "w by columns": {"activation": "gelu", "transposed": True, "R": 8},
    "a clamp": {"activation": "clamped_swiglu", "bias": "levels", "size": 0.1, "R": 1},
    "no gate": {"gate": False},
    "gate and up in turn": {"concatenated": False, "bias": True},
    "a function, one adapter": {"activation": torch.tanh, "gate": False, "adapters": ("down",)},
    "no adapter": {"adapters": (), "bias": True, "transposed": True},
    "the other adapter, two tiles of ranks": {"adapters": ("gate_up",), "R": 40},
    "one token": {"T": 1, "E": 4},
    "empty experts": {"E": 12, "k": 3, "dtype": torch.float16},
    "sentinels": {"T": 4, "index": torch.tensor([[0, 5], [5, 5], [2, 0], [5, 3]])},
}


@pytest.mark.usefixtures("gathered")
@pytest.mark.parametrize("name", GATHERED)
def test_rows_where_they_lie(name):
    """By the plan's "gathered" kernels, what each of them has an epilogue for and what not."""
    check("emu", **{"dtype": torch.bfloat16, "T": 5, "H": 16} | GATHERED[name])


@pytest.mark.usefixtures("gathered")
def test_a_grouped_layer_by_the_same_kernels():
    given = grouped([20, 20, 90], 92)
    expected = results(*given, "eager")
    for name, tensor in results(*given, "emu").items():
        assert relative_l2(tensor, expected[name]) < tolerance(torch.float16), name
        assert tensor.count_nonzero() > 0, name


@pytest.mark.usefixtures("gathered")
def test_the_same_bits_under_every_schedule(emu):
    o, settings = block(T=9, H=16, dtype=torch.bfloat16)
    first = None
    for seed in range(3):
        emu.configure(seed=seed, resident=1 + seed, multiprocessors=1 + 2 * seed)
        again = differentiated(lambda o, s: fused(o, s, "emu"), o, settings)
        first = first or again
        for name, tensor in again.items():
            assert torch.equal(tensor, first[name]), (name, seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_another_dtype_is_refused(dtype):
    o, settings = block(dtype=dtype, H=16)
    with pytest.raises(TypeError, match=f"bfloat16 and float16, not {dtype}".replace("torch.", "")):
        fused(o, settings, "emu")


def test_rows_that_tma_cannot_read_are_refused():
    o, settings = block(dtype=torch.float16, H=12)
    with pytest.raises(ValueError, match=r"N 16 and K 12 to be multiples of 8.*'triton'"):
        fused(o, settings, "emu")


def test_a_stack_with_gaps_is_refused():
    o, settings = block(dtype=torch.bfloat16, H=16)
    wide = torch.cat([o["down"], o["down"]], 2)
    o["down"] = wide[..., : o["down"].shape[2]]
    with pytest.raises(ValueError, match=r"stacks of matrices without gaps; the strides of weights .*'triton'"):
        fused(o, settings, "emu")
