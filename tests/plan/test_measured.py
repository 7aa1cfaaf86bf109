"""The measured tables that ship (T1): made from bench/results/, and followed by plans before the model."""

import copy
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from lorafuse.plan import DEVICES, Problem, find, select, tuned

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "bench"))

import measured  # noqa: E402

AVAILABLE = (("eager", ""), ("triton", ""), ("cuda", ""))
Q = Problem(512, 4096, 4096, 16, "bfloat16", "float32", gradients=("dx", "da", "db"))


@pytest.fixture(scope="module")
def rows():
    """A result file of three row counts of one layer."""
    return json.loads((ROOT / "bench" / "results" / "h200-2026-11-26-rows.json").read_text())


def kernel(problem, available=AVAILABLE):
    plan = select(problem, find("H200"), available)
    return plan.chosen.name, plan.reasons[-1]


def test_what_ships_is_valid_and_not_empty():
    assert [path.stem for path in sorted((ROOT / measured.FOLDER).iterdir())] == ["h200"]
    for spec in DEVICES.values():
        entries = tuned.read(tuned.FOLDER / tuned.file_name(spec.model))
        assert bool(entries) == (spec.model == "H200")


@pytest.mark.parametrize(
    ("M", "winner"),
    [(512, "one_pass_backward"), (2048, "one_pass_backward"), (8192, "cuda one_pass_backward")],
)
def test_plans_take_what_was_measured_fastest(rows, M, winner):
    """At 512 rows Triton's backward took 51 us where that of the CUDA kernels took 59."""
    chosen, why = kernel(replace(Q, M=M))
    assert chosen == winner
    assert "when measured on H200" in why
    assert "commit 42a016e4784e, shipped" in why


@pytest.mark.parametrize("change", [{"M": 256}, {"M": 32768}, {"R": 8}, {"N": 4104}, {"dropout": True}])
def test_what_was_not_measured_follows_the_model(change):
    assert "when measured" not in kernel(replace(Q, **change))[1]


def test_a_winner_that_cannot_run_here_is_passed_over():
    assert kernel(replace(Q, M=8192), (("eager", ""), ("triton", ""), ("cuda", "not built")))[0] == "one_pass_backward"


def test_overlapping_spreads_leave_the_models_choice(rows):
    content = copy.deepcopy(rows)
    (result,) = [r for r in content["results"] if r["M"] == 512]
    content["results"] = [result]
    assert [e.kernel for e in measured.tables([content])["H200"]] == ["cuda two_kernel", "one_pass_backward"]
    result["variants"]["lorafuse-triton"]["backward"]["p80"] = result["variants"]["lorafuse"]["backward"]["p20"]
    assert [e.kernel for e in measured.tables([content])["H200"]] == ["cuda two_kernel"] + ["cuda one_pass_backward"]


def test_a_later_file_replaces_the_point_of_an_earlier_one(rows):
    later = copy.deepcopy(rows)
    later["conditions"]["commit"] = "later"
    for result in later["results"]:
        variants = result["variants"]
        variants["lorafuse-cuda"] = copy.deepcopy(variants["lorafuse-eager"])
        variants["lorafuse-eager"]["forward"] = {"median": 1e-6, "p20": 1e-6, "p80": 1e-6}
    (forward, *_) = measured.tables([rows, later])["H200"]
    assert (forward.kernel, forward.commit) == ("aten_beta1", "later")
    assert forward.M == (512, 16384)
    (forward, *_) = measured.tables([later, rows])["H200"]
    assert forward.commit == "42a016e4784e"


def test_what_names_no_known_gpu_or_kernel_gives_nothing(rows):
    other = copy.deepcopy(rows)
    other["conditions"]["device"] = "NVIDIA GeForce 9000"
    assert measured.tables([other, rows | {"kind": "moe"}]) == {}
    alone = copy.deepcopy(rows)
    for result in alone["results"]:
        result["variants"] = {"lorafuse-triton": result["variants"]["lorafuse-triton"]}
    assert measured.tables([alone]) == {"H200": ()}
