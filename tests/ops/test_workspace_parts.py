"""Quantized stacks that are decoded in parts of a budget, and mutations of that and of the workspace."""

import pytest
from quantized_calls import changed, check_same, experts, grouped, two_at_a_time

import lorafuse
from lorafuse.backends import aten_grouped, aten_loop, triton, workspace
from lorafuse.backends.protocol import Backend

pytest_plugins = "backend_fixtures"
pytestmark = pytest.mark.usefixtures("empty_workspace")


# bytes of two matrices of a stack of `grouped`, in fp32, and of one of gate_up or two of down of `EXPERTS`
BUDGET = 2 * 24 * 40 * 4 + 3
EXPERTS = {"H": 24, "I": 36}


@pytest.fixture
def small_budget(monkeypatch):
    monkeypatch.setattr(workspace, "budget", lambda: BUDGET)


@pytest.mark.usefixtures("small_budget")
class TestParts:
    @pytest.mark.parametrize(
        ("ends", "is_transposed"),
        [((0, 0, 9, 9, 12), False), ((4, 7, 7, 7, 9), True), ((3, 5, 6, 7, 7), False), ((4, 7, 9, 11, 12), True)],
    )
    def test_grouped(self, ends, is_transposed, decoded):
        check_same(grouped(backend="triton", is_transposed=is_transposed, ends=ends))
        assert [sizes[0] for sizes in decoded] == [2, 2, 1] * 2

    def test_no_rows(self):
        assert not grouped(backend="triton", ends=(0, 0, 0, 0, 0)).results()["y"].any()

    @pytest.mark.parametrize("activation", ["silu", lambda u: u[:, :36] * u[:, 36:]], ids=["known", "function"])
    def test_experts(self, activation, decoded):
        check_same(experts(**EXPERTS, backend="triton", activation=activation))
        forward = [(1, 72, 24)] * 5 + [(2, 24, 36)] * 2 + [(1, 24, 36)]
        assert decoded == forward + forward[5:] + forward[:5]

    @pytest.mark.parametrize("is_transposed", [False, True])
    @pytest.mark.parametrize("ends", [(4, 4, 9, 9, 12), (0, 0, 9, 9, 12), (4, 7, 7, 7, 9), (4, 7, 9, 11, 12)])
    def test_grouped_mm(self, ends, is_transposed, by_grouped_mm, monkeypatch):
        of_stack, parts = by_grouped_mm.parts, []

        def recorded(*given):
            for groups, part in of_stack(*given):
                parts.append(groups)
                yield groups, part

        monkeypatch.setattr(by_grouped_mm, "parts", recorded)
        check_same(grouped(is_transposed=is_transposed, ends=ends))
        assert parts.count(slice(2, 4)) == 2

    def test_experts_by_grouped_mm(self, by_grouped_mm):
        check_same(experts(**EXPERTS))


class TestBudget:
    def test_a_matrix_that_is_larger(self, monkeypatch, decoded):
        monkeypatch.setattr(workspace, "budget", lambda: 1)
        check_same(grouped(backend="triton"))
        assert set(decoded) == {(1, 24, 40)}
        assert [t.numel() for t in workspace.FREE] == [24 * 40 * 4]

    def test_all_at_once_within_it(self, decoded):
        check_same(grouped(backend="triton"))
        assert set(decoded) == {(5, 24, 40)}


def in_parts(**given):
    def run():
        check_same(grouped(**given))

    return run


# (where the function is, its name, what is changed, into what, the check that turns red)
MUTATIONS = {
    "two users of one buffer": (workspace, "buffer", "memory = FREE.pop()", "memory = FREE[-1]", two_at_a_time),
    "a buffer is lost": (workspace, "buffer", "FREE.append(memory)", "pass", two_at_a_time),
    "nobody gives it back": (
        workspace, "buffer", "    finally:", "    except KeyError:", two_at_a_time
    ),
    "every part is the first": (
        Backend, "parts", "w.select(start, stop)", "w.select(0, stop - start)", in_parts(backend="triton"),
    ),
    "adapters of the first part": (
        triton.Triton, "matmul", "t[groups] for", "t[: groups.stop - groups.start] for", in_parts(backend="triton"),
    ),
    "rows of the first part": (triton.Triton, "matmul", ".part(groups)", "", in_parts(backend="triton")),
    "parts of a new result each": (triton.Triton, "matmul", '"out": out', '"out": None', in_parts(backend="triton")),
    "every group is the first": (aten_loop, "_matrices", "w.select(e, e + 1)", "w.select(0, 1)", in_parts()),
}  # fmt: skip
OF_GROUPED_MM = {
    "ends of a part from the first row": ("rows.offsets[groups] - some.start", "rows.offsets[groups]"),
    "biases of the first part": ("else bias[groups]", "else bias[: groups.stop - groups.start]"),
    "ranks of the first part": ("low.b[groups]", "low.b[: groups.stop - groups.start]"),
}


@pytest.mark.no_poison
@pytest.mark.parametrize("name", MUTATIONS)
def test_each_mutation_is_red(name, monkeypatch, small_budget):
    owner, function, old, new, run = MUTATIONS[name]
    run()
    lorafuse.clear_workspace()
    monkeypatch.setattr(owner, function, changed(getattr(owner, function), old, new))
    with pytest.raises((AssertionError, ValueError)):
        run()


@pytest.mark.parametrize("name", OF_GROUPED_MM)
def test_each_mutation_of_grouped_mm_is_red(name, monkeypatch, small_budget, by_grouped_mm):
    owner = aten_grouped.GroupedMM
    monkeypatch.setattr(owner, "matmul", changed(owner.matmul, *OF_GROUPED_MM[name]))
    with pytest.raises((AssertionError, RuntimeError)):
        check_same(grouped(ends=(4, 7, 9, 11, 12)))
