"""`lorafuse tune --quant` (T2): over a base in 4 or 8 bits, where few rows can decode it in the product."""

import pytest
import test_tune
from test_tune import AVAILABLE, H200, SMALL, entries, plan

from lorafuse import cli
from lorafuse.plan import Problem, select

pytestmark = test_tune.pytestmark
target, times = test_tune.target, test_tune.times
QUANT = [*SMALL, "--m", "16", "96"]


def plan_of_nf4(M, gradients=()):
    given = {"gradients": gradients, "format": "nf4", "packed": M <= 64}
    return select(Problem(M, 32, 64, 4, "float16", "float32", **given), H200, AVAILABLE)


def test_a_main_loop_that_decodes_is_chosen_where_it_was_the_fastest(target, times, capsys):
    """It is right in both passes, by the gate; the dense measurements are others."""
    assert cli.main(QUANT) == 0
    assert (plan_of_nf4(16).kernel, plan_of_nf4(96).kernel) == ("two_kernel", "two_kernel")
    times |= {"packed": 1e-6}
    assert cli.main([*QUANT, "--quant", "nf4"]) == 0
    assert times["timed"][4:] == [
        ["aten_beta1", "aten_addmm", "two_kernel", "packed"],
        ["aten_beta1", "aten_addmm", "one_pass_backward", "packed"],
        ["aten_beta1", "aten_addmm", "two_kernel"],
        ["aten_beta1", "aten_addmm", "one_pass_backward"],
    ]
    of_nf4 = {(bool(e.gradients), e.M): e.kernel for e in entries() if e.format == "nf4"}
    # isqrt(16 * 96) = 39
    assert of_nf4 == {
        (False, (16, 39)): "packed", (False, (40, 96)): "two_kernel",
        (True, (16, 39)): "packed", (True, (40, 96)): "aten_addmm",
    }  # fmt: skip
    assert (plan_of_nf4(16).kernel, plan_of_nf4(16, ("dx", "da", "db")).kernel) == ("packed", "packed")
    assert plan_of_nf4(64).kernel == plan(16).kernel == "two_kernel"
    assert "32 × 64, float16 over nf4; times" in capsys.readouterr().out


@pytest.mark.parametrize("quant", ["fp4", "int8", "fp8"])
def test_every_format_passes_the_gate(target, times, quant):
    times |= {"packed": 1e-6}
    assert cli.main([*SMALL, "--m", "16", "--quant", quant]) == 0
    assert {(entry.format, entry.kernel) for entry in entries()} == {(quant, "packed")}
