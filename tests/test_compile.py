"""Every kernel configuration that a plan can lead to, compiled for every architecture (T3), against a resource budget.

`tests/kernel_budget.json` holds registers and shared memory of each; it may shrink by itself and grows by decision:
`make budget` writes it anew, and the difference is reviewed.
"""

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

import pytest

from lorafuse.plan import DEVICES
from lorafuse.plan.config import shared_memory
from lorafuse.testing.compile_only import TARGETS, Resources, variants

pytestmark = pytest.mark.no_poison

BUDGET = Path(__file__).with_name("kernel_budget.json")
# what the budget was made with: other compilers allocate other registers
TRITON = "3.6.0"
LIMITS = {f"sm_{device.arch}": device.smem_per_block for device in DEVICES.values()} | {"gfx942": 65536}
MATRIX = {"sm_80": "HMMA", "sm_89": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "sm_120": "HMMA", "gfx942": "v_mfma"}
by_target = pytest.mark.parametrize("target", TARGETS)


def compile_target(target, file, everything):
    # not in this process: its kernels were defined for the interpreter
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "lorafuse.testing.compile_only", target, "--json", file]
    done = subprocess.run(
        [*command, "--all"] if everything else command, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return {name: Resources(**found) for name, found in json.loads(file.read_text()).items()}


@pytest.fixture(scope="module")
def tables(request, tmp_path_factory):
    """`{target: {name of a specialization: Resources}}`, all compiled once; `--every-dtype` for `make test-compile`."""
    everything = request.config.getoption("--every-dtype")
    folder = tmp_path_factory.mktemp("compiled")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = {t: pool.submit(compile_target, t, folder / f"{t}.json", everything) for t in TARGETS}
        return {target: job.result() for target, job in jobs.items()}


@by_target
def test_all_were_compiled(tables, target, request):
    everything = request.config.getoption("--every-dtype")
    assert sorted(tables[target]) == [v.name for v in variants(target, everything)]
    assert len(tables[target]) > 50


@by_target
def test_nothing_lies_in_local_memory(tables, target):
    assert {name: found.stack for name, found in tables[target].items() if found.stack} == {}


@by_target
def test_shared_memory_fits_and_the_planner_knew(tables, target, request):
    configs = {v.name: v for v in variants(target, request.config.getoption("--every-dtype"))}
    for name, found in tables[target].items():
        assert found.shared <= LIMITS[target], name
        if target != "gfx942" and configs[name].config.kernel != "reduce":
            itemsize = 4 if configs[name].dtype == "float32" else 2
            assert found.shared <= shared_memory(configs[name].config, itemsize), name


@by_target
def test_the_matrix_instructions_are_there(tables, target, request):
    configs = {v.name: v for v in variants(target, request.config.getoption("--every-dtype"))}
    for name, found in tables[target].items():
        variant = configs[name]
        if variant.dtype == "float32" or variant.config.kernel == "reduce":
            continue
        # tiles of fewer than 64 rows are too short for the warpgroup's instructions
        rows = variant.config.block_n if variant.config.kernel in ("dyb_db", "da", "outer") else variant.config.block_m
        short = target in ("sm_90", "sm_100") and rows < 64
        assert found.instructions.get("HMMA" if short else MATRIX[target]), (name, found)
        if variant.config.form == "tma":
            assert found.instructions.get("UTMALDG"), (name, found)


def test_tma_is_what_hopper_and_blackwell_run(tables):
    for target in ("sm_90", "sm_100"):
        aligned = [n for n in tables[target] if n.startswith(("fwd", "dx")) and "float16" in n and "unaligned" not in n]
        assert aligned
        assert all(" tma " in name for name in aligned)


@by_target
def test_the_budget_holds(tables, target, request):
    if metadata.version("triton") != TRITON:
        pytest.skip(f"the budget is that of Triton {TRITON}, this is {metadata.version('triton')}")
    if request.config.getoption("--every-dtype"):
        pytest.skip("the budget is of the specializations whose resources differ, not of every dtype")
    found = {name: [r.registers, r.shared] for name, r in tables[target].items()}
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
