"""Every kernel configuration that a plan can lead to, compiled for every architecture (T3), against a resource budget.

`tests/kernels/kernel_budget.json` is a record of what each specialization needs, with the digest of all that it was
compiled from. Under the same digest it is read instead of compiled, but for a sample of each kernel, which must be what
is on record; `make test-compile` compiles everything. Registers and shared memory may shrink by themselves and grow by
decision: `make budget` renews what has changed, and the difference is reviewed.
"""

import json
import os
import subprocess
import sys
import warnings
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

import pytest

from lorafuse.plan import DEVICES
from lorafuse.plan.configs_triton import shared_memory
from lorafuse.testing.compile_only import TARGETS, Resources, sample, variants

pytestmark = [pytest.mark.no_poison, pytest.mark.first]

BUDGET = Path(__file__).with_name("kernel_budget.json")
MODULE = "lorafuse.testing.compile_only"
# what the budget was made with: other compilers allocate other registers
TRITON = "3.6.0"
LIMITS = {f"sm_{device.arch}": device.smem_per_block for device in DEVICES.values()} | {"gfx942": 65536}
# kernels that multiply no matrices, and have no tiles whose shared memory a plan foresees
UNPLANNED = ("reduce", "decode", "columns")
MATRIX = {"sm_80": "HMMA", "sm_89": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "sm_120": "HMMA", "gfx942": "v_mfma"}


@pytest.fixture(scope="module", params=TARGETS)
def target(request):
    return request.param


@pytest.fixture(scope="module")
def everything(request):
    """Whether every dtype is compiled, for `make test-compile`, or only those whose resources differ."""
    return request.config.getoption("--every-dtype")


def compiler(*command):
    """Runs Python where Triton compiles: in this process the kernels were defined for the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, timeout=3600)
    assert done.returncode == 0, done.stderr[-4000:]
    return done


def resources(file):
    return {name: Resources(**actual) for name, actual in json.loads(file.read_text()).items()}


@pytest.fixture(scope="module")
def record(target):
    """`{name of a specialization: Resources}` as `make budget` wrote it."""
    return {name: Resources(**actual) for name, actual in json.loads(BUDGET.read_text()).get(target, {}).items()}


@pytest.fixture(scope="module")
def table(target, everything, record, tmp_path_factory):
    """`{name of a specialization: Resources}` as of now, compiled where it is not on record."""
    file = tmp_path_factory.mktemp("compiled") / f"{target}.json"
    compiler("-m", MODULE, target, "--json", file, *(["--all"] if everything else ["--record", BUDGET]))
    table = resources(file)
    stale = [name for name in table if name in record and record[name].digest != table[name].digest]
    if stale and not everything:
        warnings.warn(f"{target}: the record of {len(stale)} specializations is stale: run `make budget`", stacklevel=1)
    return table


def test_all_were_compiled(table, target, everything):
    assert sorted(table) == [v.name for v in variants(target, everything)]
    assert len(table) > 50


def test_nothing_lies_in_local_memory(table):
    assert {name: actual.stack for name, actual in table.items() if actual.stack} == {}


def test_shared_memory_fits_and_the_planner_knew(table, target, everything):
    configs = {v.name: v for v in variants(target, everything)}
    for name, actual in table.items():
        assert actual.shared <= LIMITS[target], name
        if target != "gfx942" and configs[name].config.kernel not in UNPLANNED:
            assert actual.shared <= shared_memory(configs[name].config, configs[name].problem), name


def test_the_matrix_instructions_are_there(table, target, everything):
    configs = {v.name: v for v in variants(target, everything)}
    for name, actual in table.items():
        variant = configs[name]
        if variant.dtype == "float32" or variant.config.kernel in UNPLANNED:
            continue
        # tiles of fewer than 64 rows are too short for the warpgroup's instructions
        rows = variant.config.block_n if variant.config.kernel in ("project_outer", "outer") else variant.config.block_m
        short = target in ("sm_90", "sm_100") and rows < 64
        assert actual.instructions.get("HMMA" if short else MATRIX[target]), (name, actual)
        if variant.config.form == "tma":
            assert actual.instructions.get("UTMALDG"), (name, actual)


@pytest.mark.parametrize("target", ["sm_90", "sm_100"], indirect=True)
def test_tma_is_what_hopper_and_blackwell_run(table):
    aligned = [n for n in table if n.startswith(("y ", "dx ")) and "float16" in n and "unaligned" not in n]
    assert aligned
    assert all(" tma " in name for name in aligned)


def false_entries(record, table):
    """What a record says of the inputs that it names and a compiler does not."""
    return {n: r for n, r in record.items() if n in table and r.digest == table[n].digest and r != table[n]}


def test_the_record_is_true(table, target, everything, record):
    """Of all that was compiled: the sample, or in `make test-compile` everything."""
    assert false_entries(record, table) == {}
    assert len(sample(variants(target, everything))) >= 6


def test_the_budget_holds(table, target, everything, record, request):
    if metadata.version("triton") != TRITON:
        pytest.skip(f"the budget is that of Triton {TRITON}, this is {metadata.version('triton')}")
    if everything:
        pytest.skip("the budget is of the specializations whose resources differ, not of every dtype")
    if request.config.getoption("--update-budget"):
        tables = json.loads(BUDGET.read_text()) if BUDGET.exists() else {}
        write(tables | {target: {name: asdict(table[name]) for name in sorted(table)}})
        return
    assert table.keys() == record.keys(), "run `make budget` and review the difference"
    grown = {
        name: f"{was} -> {now}"
        for name, now in table.items()
        if (was := record[name]).registers < now.registers or was.shared < now.shared
    }
    assert grown == {}, "registers or shared memory grew; if it is worth it, run `make budget`"


def write(tables):
    """One line a specialization, for reviews."""
    lines = [
        f' "{target}": {{\n'
        + ",\n".join(f'  "{name}": {json.dumps(actual)}' for name, actual in table.items())
        + "\n }"
        for target, table in tables.items()
    ]
    BUDGET.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def test_decoding_contracts_no_product_and_sum(table, target):
    """A fused multiply-add rounds once where the formats' codecs round twice."""
    # an IEEE division, of which NVFP4 has one, is made of them
    decoded = {name: needs for name, needs in table.items() if name.startswith("decode ") and "nvfp4" not in name}
    assert len(decoded) >= 10
    if target != "gfx942":
        assert [name for name, needs in decoded.items() if needs.instructions.get("FFMA")] == []
