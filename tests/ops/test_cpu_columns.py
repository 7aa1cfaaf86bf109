"""The gradient of a factor for each column by csrc/cpu/columns.cpp: against fp64, for any sizes and threads."""

from types import SimpleNamespace

import pytest
import torch
from cpu_source import SOURCES, compiled, torch_threads

from lorafuse.backends import columns
from lorafuse.formats import cpu
from lorafuse.testing.numerics import relative_l2

SOURCE = (SOURCES / "columns.cpp").read_text()


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return compiled(tmp_path_factory.mktemp("columns"), "columns.cpp", SOURCE, "-O1")


@pytest.fixture
def use(monkeypatch):
    """Makes the pass call a library, and counts its calls."""
    calls = []

    def install(library):
        def counted(*given):
            calls.append(given)
            library.lorafuse_columns_backward(*given)

        monkeypatch.setattr(cpu, "library", lambda: SimpleNamespace(lorafuse_columns_backward=counted))
        return calls

    monkeypatch.setattr(columns, "OF_THREAD", 1)
    return install


@pytest.fixture(params=[1, 3])
def threads(request):
    with torch_threads(request.param):
        yield request.param


def check(M, N):
    """Every form; dfactor of many rows is as near to fp64 as torch's sum."""
    z, dy, factor = torch.randn(M, N), torch.randn(M, N), torch.randn(N)
    dz, dfactor = columns.columns_backward(dy, z, factor, True)
    assert torch.equal(dz, dy * factor)
    exact = (dy.double() * z.double()).sum(0)
    assert relative_l2(dfactor, exact) <= 2 * relative_l2((dy * z).sum(0), exact) + 1e-7
    alone, none = columns.columns_backward(dy, None, factor, True)
    assert torch.equal(alone, dz)
    assert none is None
    none, again = columns.columns_backward(dy, z, factor, False)
    assert none is None
    assert torch.equal(again, dfactor)


@pytest.mark.parametrize(("M", "N"), [(1, 1), (3, 17), (64, 512), (65, 513), (200, 1030), (2000, 5)])
def test_every_form(built, use, threads, M, N):
    calls = use(built)
    check(M, N)
    assert len(calls) == 3


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("std::min(kColumns, stop - c)", "std::min(kColumns, stop - c) - 1"),
        ("dz + m * C + c", "dz + m * C"),
        ("total[i] += sums[i]", "total[i] = sums[i]"),
        ("part * step, std::min", "part * step + part, std::min"),
    ],
    ids=["tail of columns", "place of dz", "blocks of rows", "threads"],
)
def test_planted_bugs_are_seen(use, tmp_path, before, after):
    assert SOURCE.count(before) == 1
    use(compiled(tmp_path, "columns.cpp", SOURCE.replace(before, after), "-O0"))
    with torch_threads(3), pytest.raises(AssertionError):
        check(200, 1030)


def test_what_torch_computes(built, use):
    """Other dtypes, what is not dense, and nothing."""
    calls = use(built)
    z, factor = torch.randn(8, 6), torch.randn(6)
    columns.columns_backward(z.double(), z.double(), factor.double(), True)
    columns.columns_backward(z, z.t().contiguous().t(), factor, True)
    columns.columns_backward(z[:0], z[:0], factor, True)
    columns.columns_backward(z.bfloat16(), None, factor, True)
    assert not calls


def test_nan_and_infinity_stay(built, use):
    use(built)
    z, factor = torch.randn(70, 40), torch.randn(40)
    z[3, 7], z[66, 9] = torch.nan, torch.inf
    _, dfactor = columns.columns_backward(torch.ones_like(z), z, factor, True)
    assert dfactor.isnan().nonzero().flatten().tolist() == [7]
    assert dfactor[9] == torch.inf
