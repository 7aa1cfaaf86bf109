"""Products with the rank by csrc/cpu/rank.cpp, built anew: against fp64, for any sizes, strides and threads."""

import pytest
import torch
from cpu_source import SOURCES, UNREADABLE, compiled, run_a_layer, run_layers_of_one_x, torch_threads
from torch._subclasses import FakeTensorMode

from lorafuse.backends import aten_blocks, aten_rank
from lorafuse.formats import cpu
from lorafuse.testing.numerics import relative_l2

ADD = '#include "rank_add.hpp"\n'
SOURCE = (
    (SOURCES / "rank.cpp").read_text().replace(ADD, (SOURCES / "rank_add.hpp").read_text().replace("#pragma once", ""))
)
# M, C, R: tails of rows and of columns, several blocks, one row, one column, every number of vectors
SIZES = [
    (128, 576, 16), (63, 577, 8), (257, 301, 24), (100, 192, 48), (50, 97, 64), (7, 4096, 16), (1, 2000, 8),
    (2000, 1, 16), (17, 1009, 56), (11, 15, 40),
]  # fmt: skip


def made(folder, source, *flags):
    """The functions of `rank.cpp`, or of what was made of it."""
    library = compiled(folder, "rank.cpp", source, *flags)
    if not library.lorafuse_rank_runs():
        pytest.skip("csrc/cpu/rank.cpp is for CPUs with AVX2 and FMA and without AVX-512")
    return library.lorafuse_rank_read, library.lorafuse_rank_add


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return made(tmp_path_factory.mktemp("rank"), SOURCE, "-O1")


@pytest.fixture
def use(monkeypatch):
    """Makes the primitives call these functions, whatever the sizes."""
    # which multiplies by the weight, and adds
    monkeypatch.setattr(aten_blocks, "functions", lambda: None)
    monkeypatch.setattr(aten_rank, "MANY", 1)
    monkeypatch.setattr(aten_rank, "SOME", 1)
    monkeypatch.setattr(aten_rank, "OF_THREAD", 1)
    return lambda functions: monkeypatch.setattr(aten_rank, "functions", lambda: functions)


@pytest.fixture(params=[1, 3])
def threads(request):
    with torch_threads(request.param):
        yield request.param


def operands(M, C, R):
    """wide, narrow, and the factor as `[C, R]` and as `[R, C]`: parts of wider tensors."""
    wide, narrow = torch.randn(M, C + 3)[:, :C], torch.randn(M, R + 5)[:, 2 : R + 2]
    return wide, narrow, torch.randn(C, R + 1)[:, :R], torch.randn(R, C + 2)[:, 1 : C + 1]


def forms(wide, narrow, tall, flat):
    """`{form: (result, the same in torch and in fp64)}`; what is added to is strided, and NaN around its columns."""
    M, C = wide.shape
    results = {}

    def record(name, result, formula):
        given = wide, narrow, tall, flat
        results[name] = result, formula(*given), formula(*(t.double() for t in given))

    record("xa", aten_rank.project(wide, flat, False, 2.0), lambda x, n, t, f: 2.0 * (x @ f.T))
    record("dyb", aten_rank.project(wide, tall, True, -0.5), lambda x, n, t, f: -0.5 * (x @ t))
    record("da", aten_rank.outer(narrow, wide, flat, False, 3.0), lambda x, n, t, f: 3.0 * (n.T @ x))
    record("db", aten_rank.outer(narrow, wide, tall, True, 3.0), lambda x, n, t, f: 3.0 * (x.T @ n))
    dyb, db = aten_rank.project_outer(wide, tall, narrow, 1.5)
    record("dyb of both", dyb, lambda x, n, t, f: 1.5 * (x @ t))
    record("db of both", db, lambda x, n, t, f: 1.5 * (x.T @ n))
    for name, factor, is_transposed in (("y", tall, False), ("dx", flat, True)):
        around = torch.full((M + 2, C + 8), torch.nan)
        around[1:-1, 3 : C + 3] = wide
        assert aten_rank.adds(narrow, factor, is_transposed, M, C)
        aten_rank.add(around[1:-1, 3 : C + 3], narrow, factor, is_transposed, 0.7)
        record(
            name,
            around[1:-1, 3 : C + 3].clone(),
            lambda x, n, t, f, i=is_transposed: torch.addmm(x, n, f if i else t.T, alpha=0.7),
        )
        around[1:-1, 3 : C + 3] = torch.nan
        assert around.isnan().all()
    return results


def check(M, C, R):
    for name, (result, in_torch, exact) in forms(*operands(M, C, R)).items():
        error, of_torch = relative_l2(result, exact), relative_l2(in_torch, exact)
        assert result.shape == exact.shape, name
        assert error <= 2 * of_torch + 1e-7, f"{name}: {error:.1e}, torch {of_torch:.1e}"


@pytest.mark.parametrize("sizes", SIZES)
def test_every_form(built, use, threads, sizes):
    use(built)
    check(*sizes)


def test_results_are_the_same_again(built, use, threads):
    use(built)
    given = operands(100, 577, 24)
    for (first, *_), (second, *_) in zip(forms(*given).values(), forms(*given).values(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
@pytest.mark.parametrize("place", range(4))
def test_what_is_not_finite_reaches_what_it_reaches_in_torch(built, use, place, value):
    use(built)
    given = operands(50, 111, 16)
    given[place][9, 13] = value
    for name, (result, _, exact) in forms(*given).items():
        assert torch.equal(result.isfinite(), exact.isfinite()), name
        assert torch.equal(result.isnan(), exact.isnan()), name


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("LORAFUSE_TAIL(4);", ""),
        ("packs ? R : of.factor.column, projected", "R, projected"),
        ("j < columns) {\n        copy_rows(part + j", "false) {\n        copy_rows(part + j"),
        ("sum += partial[(i * M + m) * R + r];", "sum = partial[(i * M + m) * R + r];"),
    ],
    ids=["tail of rows", "pitch", "tail of columns", "threads"],
)
def test_a_wrong_line_is_seen(built, use, tmp_path, line, wrong):
    assert line in SOURCE
    use(made(tmp_path, SOURCE.replace(line, wrong)))
    with torch_threads(2), pytest.raises(AssertionError, match="torch"):
        check(70, 101, 16)


def declined(wide, narrow, tall, flat):
    """Whether torch multiplies these, in every form."""
    results = (
        aten_rank.project(wide, flat, False, 1.0), aten_rank.project(wide, tall, True, 1.0),
        aten_rank.outer(narrow, wide, flat, False, 1.0), aten_rank.outer(narrow, wide, tall, True, 1.0),
        aten_rank.project_outer(wide, tall, narrow, 1.0),
    )  # fmt: skip
    adds = [aten_rank.adds(narrow, f, is_transposed, *wide.shape) for f, is_transposed in ((tall, False), (flat, True))]
    return all(result is None for result in results) and not any(adds)


@pytest.mark.parametrize("R", [1, 4, 12, 72])
def test_other_ranks_are_torchs(built, use, R):
    use(built)
    assert declined(*operands(20, 30, R))


OTHERS = UNREADABLE | {"strided": lambda t: torch.stack([t, t, t], -1)[..., 0]}


@pytest.mark.parametrize("change", OTHERS.values(), ids=OTHERS)
def test_what_has_other_values_than_its_memory_is_torchs(built, use, change):
    use(built)
    assert declined(*map(change, operands(20, 30, 16)))


def test_what_has_no_memory_is_torchs(built, use):
    use(built)
    with FakeTensorMode():
        assert declined(*operands(20, 30, 16))
    given = operands(20, 30, 16)
    runs = []
    torch.vmap(lambda t: (runs.append(not declined(*given)), t)[1])(torch.ones(2))
    assert runs == [False]
    assert not declined(*given)


def test_sizes_that_do_not_fit_are_torchs_to_refuse(built, use):
    use(built)
    wide, narrow, tall, flat = operands(20, 30, 16)
    assert declined(wide, narrow[:-1], tall[:-1], flat[:, :-1])
    assert aten_rank.project_outer(wide, tall, narrow[:-1], 1.0) is None
    assert not aten_rank.adds(narrow[:-1], tall, False, 20, 30)
    assert not aten_rank.adds(narrow, flat, False, 20, 30)
    with pytest.raises(RuntimeError, match=r"size|shape"):
        torch.ops.lorafuse.lora_linear_backward(
            torch.randn(20, 30), torch.randn(20, 8), torch.randn(19, 16), torch.randn(30, 8), torch.randn(16, 8),
            torch.randn(30, 16), None, 1.0, 0.0, [True] * 4, "eager",
        )  # fmt: skip


def test_few_elements_are_torchs(built, monkeypatch):
    monkeypatch.setattr(aten_rank, "functions", lambda: built)
    assert declined(*operands(20, 30, 16))
    assert not declined(*operands(64, 4096, 16))


@pytest.fixture
def counted(built, use):
    """`(calls, the functions)`, which count."""
    calls = []

    def count(function):
        def call(*arguments):
            calls.append(function.__name__)
            function(*arguments)

        return call

    use([count(function) for function in built])
    return calls


def test_a_layer_runs_them(counted):
    run_a_layer()
    # xa; y; dyb with db; dx; da
    assert [name.removeprefix("lorafuse_rank_") for name in counted] == ["read", "add", "read", "add", "read"]


def test_layers_of_one_x_run_them(counted):
    run_layers_of_one_x()
    # xa of all; each y; each dyb with db; dx of all; da of all
    expected = ["read", *["add"] * 3, *["read"] * 3, "add", "read"]
    assert [name.removeprefix("lorafuse_rank_") for name in counted] == expected


def test_where_it_does_not_run_there_is_a_reason(monkeypatch):
    monkeypatch.setattr(cpu, "why_not", lambda: "no library")
    assert aten_rank.why_not() == "no library"
    monkeypatch.setattr(cpu, "why_not", lambda: "")
    monkeypatch.setattr(aten_rank, "functions", lambda: None)
    assert "AVX-512" in aten_rank.why_not()
