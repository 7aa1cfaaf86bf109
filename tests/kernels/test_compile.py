"""Every kernel configuration that a plan can lead to, compiled for every architecture (T3), against a resource budget.

`tests/kernels/kernel_budget.json` holds registers and shared memory of each; it may shrink by itself and grows by
decision: `make budget` writes it anew, and the difference is reviewed.
"""

import json
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from lorafuse.plan import DEVICES
from lorafuse.plan.configs_triton import shared_memory
from lorafuse.testing.compile_only import TARGETS, Resources, variants

pytestmark = [pytest.mark.no_poison, pytest.mark.first]

BUDGET = Path(__file__).with_name("kernel_budget.json")
# what the budget was made with: other compilers allocate other registers
TRITON = "3.6.0"
LIMITS = {f"sm_{device.arch}": device.smem_per_block for device in DEVICES.values()} | {"gfx942": 65536}
MATRIX = {"sm_80": "HMMA", "sm_89": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "sm_120": "HMMA", "gfx942": "v_mfma"}


@pytest.fixture(scope="module", params=TARGETS)
def target(request):
    return request.param


@pytest.fixture(scope="module")
def everything(request):
    """Whether every dtype is compiled, for `make test-compile`, or only those whose resources differ."""
    return request.config.getoption("--every-dtype")


@pytest.fixture(scope="module")
def table(target, everything, tmp_path_factory):
    """`{name of a specialization: Resources}` of a target: what its tests share is compiled once."""
    file = tmp_path_factory.mktemp("compiled") / f"{target}.json"
    # not in this process: its kernels were defined for the interpreter
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "lorafuse.testing.compile_only", target, "--json", file]
    done = subprocess.run(
        [*command, "--all"] if everything else command, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return {name: Resources(**found) for name, found in json.loads(file.read_text()).items()}


def test_all_were_compiled(table, target, everything):
    assert sorted(table) == [v.name for v in variants(target, everything)]
    assert len(table) > 50


def test_nothing_lies_in_local_memory(table):
    assert {name: found.stack for name, found in table.items() if found.stack} == {}


def test_shared_memory_fits_and_the_planner_knew(table, target, everything):
    configs = {v.name: v for v in variants(target, everything)}
    for name, found in table.items():
        assert found.shared <= LIMITS[target], name
        if target != "gfx942" and configs[name].config.kernel != "reduce":
            assert found.shared <= shared_memory(configs[name].config, configs[name].problem), name


def test_the_matrix_instructions_are_there(table, target, everything):
    configs = {v.name: v for v in variants(target, everything)}
    for name, found in table.items():
        variant = configs[name]
        if variant.dtype == "float32" or variant.config.kernel == "reduce":
            continue
        # tiles of fewer than 64 rows are too short for the warpgroup's instructions
        rows = variant.config.block_n if variant.config.kernel in ("project_outer", "outer") else variant.config.block_m
        short = target in ("sm_90", "sm_100") and rows < 64
        assert found.instructions.get("HMMA" if short else MATRIX[target]), (name, found)
        if variant.config.form == "tma":
            assert found.instructions.get("UTMALDG"), (name, found)


@pytest.mark.parametrize("target", ["sm_90", "sm_100"], indirect=True)
def test_tma_is_what_hopper_and_blackwell_run(table):
    aligned = [n for n in table if n.startswith(("fwd", "dx")) and "float16" in n and "unaligned" not in n]
    assert aligned
    assert all(" tma " in name for name in aligned)


def test_the_budget_holds(table, target, everything, request):
    if metadata.version("triton") != TRITON:
        pytest.skip(f"the budget is that of Triton {TRITON}, this is {metadata.version('triton')}")
    if everything:
        pytest.skip("the budget is of the specializations whose resources differ, not of every dtype")
    found = {name: [r.registers, r.shared] for name, r in table.items()}
    budget = json.loads(BUDGET.read_text()) if BUDGET.exists() else {}
    if request.config.getoption("--update-budget"):
        tables = budget | {target: dict(sorted(found.items()))}
        # one line a specialization, for reviews
        text = json.dumps(tables, indent=1)
        BUDGET.write_text(re.sub(r"\[\s+(\d+),\s+(\d+)\s+\]", r"[\1, \2]", text) + "\n")
        return
    assert found.keys() == budget[target].keys(), "run `make budget` and review the difference"
    grown = {
        name: f"{budget[target][name]} -> {now}"
        for name, now in found.items()
        if any(n > b for n, b in zip(now, budget[target][name], strict=True))
    }
    assert grown == {}, "registers or shared memory grew; if it is worth it, run `make budget`"
