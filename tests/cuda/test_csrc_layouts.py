"""Arithmetic of csrc that a host can run (T5): layouts against CuTe and PTX tables, tile schedules by enumeration.

`tests/cuda/csrc/*_check.cpp` do the comparing; g++ compiles them from the headers that the kernels use.
"""

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import planted
import pytest
import torch
from planted import Bug

from lorafuse.philox import philox_4x32

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")


def build(source, folder, *includes, options=()):
    """Compiles `tests/cuda/csrc/<source>.cpp` into `folder`; `includes` come before the project's headers."""
    binary = folder / source
    paths = [*includes, CSRC / "emu" / "include", CSRC / "include"]
    command = ["g++", "-std=c++20", "-O1", "-w", *options, *(f"-I{path}" for path in paths)]
    command += [str(Path(__file__).parent / "csrc" / f"{source}.cpp"), "-o", str(binary)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    return binary


def mismatches(binary, bug=""):
    """Check → number of mismatches, as the program prints them, with `bug` on of those woven into its headers."""
    environment = {**os.environ, "PLANTED": bug}
    result = subprocess.run([binary], capture_output=True, text=True, timeout=60, env=environment)
    actual = {name: int(count) for name, count in re.findall(r"^(.*): (\d+)$", result.stdout, re.MULTILINE)}
    assert actual
    assert result.returncode == int(any(actual.values()))
    return actual


def woven(source, folder, bugs):
    """`source` built once from headers that hold all `bugs`, each of which `mismatches` switches on."""
    headers = folder / "lorafuse"
    planted.weave(CSRC / "include" / "lorafuse", headers, bugs)
    for path in {headers / bug.file for bug in bugs}:
        # which bug is on is no constant
        path.write_text(re.sub(r"\b(LF_HOST_DEVICE|static) constexpr\b", r"\1", path.read_text()))
    return build(source, folder, folder, options=[Path(__file__).parent / "csrc" / "planted.cpp"])


def cute_headers():
    """Include folders of CuTe (from the nvidia-cutlass package) and of the CUDA toolkit, which it includes; or None."""
    package = importlib.util.find_spec("cutlass_library")
    nvcc = shutil.which("nvcc")
    if package is None or nvcc is None:
        return None
    cute = Path(package.submodule_search_locations[0]) / "source" / "include"
    dry_run = subprocess.run([nvcc, "--dryrun", "-x", "cu", "/dev/null"], capture_output=True, text=True, timeout=60)
    top = re.search(r"TOP=(\S+)", dry_run.stderr)
    toolkit = [Path(top[1]) / "targets" / "x86_64-linux" / "include", Path(top[1]) / "include"] if top else []
    toolkit = [path for path in toolkit if (path / "cuda_runtime.h").exists()][:1]
    if not toolkit or not (cute / "cute" / "tensor.hpp").exists():
        return None
    return [cute, *toolkit, *(path / "cccl" for path in toolkit)]


@pytest.fixture(scope="module")
def schedule_check(tmp_path_factory):
    return build("schedule_check", tmp_path_factory.mktemp("schedule"))


def test_layouts_are_those_of_the_ptx_manual(tmp_path):
    actual = mismatches(build("layout_check", tmp_path))
    assert {"ptx swizzle", "ptx fragments", "ptx descriptor"} <= set(actual)
    assert not any(actual.values()), actual


def test_layouts_and_descriptors_are_those_of_cute(tmp_path):
    headers = cute_headers()
    if headers is None:
        pytest.skip("no CuTe headers (pip install --no-deps nvidia-cutlass) or no CUDA toolkit")
    actual = mismatches(build("layout_check", tmp_path, *headers))
    assert sum(name.startswith("cute") for name in actual) == 17
    assert not any(actual.values()), actual


# name, header, the checks that see it, what the header holds, what the bug has instead
LAYOUT_BUGS = [
    Bug("bits of the swizzle", "layout.cuh", "ptx swizzle", "(offset >> 3) & 0x70", "(offset >> 3) & 0x30"),
    Bug("row of a register", "layout.cuh", "ptx fragments", "i / 2 % 2 * 8", "i / 2 % 2 * 16"),
    Bug(
        "leading offset", "layout.cuh", "ptx descriptor", "static_cast<uint32_t>(box_rows * kBoxRowBytes)", "1024u"
    ),
    Bug("swizzle of a descriptor", "layout.cuh", "ptx descriptor", "uint64_t{1} << 62", "uint64_t{2} << 62"),
]  # fmt: skip


@pytest.fixture(scope="module")
def woven_layouts(tmp_path_factory):
    return woven("layout_check", tmp_path_factory.mktemp("layouts"), LAYOUT_BUGS)


@pytest.mark.parametrize("bug", LAYOUT_BUGS, ids=lambda bug: bug.name)
def test_a_wrong_layout_is_seen(woven_layouts, bug):
    assert mismatches(woven_layouts, bug.name)[bug.seen_by] > 0


def test_schedules(schedule_check):
    actual = mismatches(schedule_check)
    assert not any(actual.values()), actual


SCHEDULE_BUGS = [Bug(name, header, check, *change) for name, header, check, change in (
    (
        "height of the last group of rows", "schedule.cuh",
        "order: every tile once; tickets: every tile once under any order of arrival",
        ("return {first + within % height, within / height};", "return {first + within % group, within / group};"),
    ),
    (
        "column after column 0", "schedule.cuh", "order: every tile once, column 0 first",
        ("return {tile.row, tile.column + 1};", "return {tile.row, tile.column};"),
    ),
    (
        "rows of a chunk", "schedule.cuh", "backward: every tile and item once",
        (
            "return {Work::kTile, c * chunk + tile.row, tile.column - 1};",
            "return {Work::kTile, tile.row, tile.column - 1};",
        ),
    ),
    (
        "tiles from the last", "schedule.cuh",
        "backward: whatever waits has a later number; tickets: every tile and item once under any order of arrival",
        (
            "TileOrder{rows, columns, tiles.group}.at(within)",
            "TileOrder{rows, columns, tiles.group}.at(rows * columns - 1 - within)",
        ),
    ),
    (
        "last number but one", "schedule.cuh",
        "tickets: one last number; "
        "side by side tickets: every tile of every output once under any order of arrival, one last number; "
        "ragged tickets: every row of every column once under any order of arrival, one last ticket",
        ("number + 1 == works + programs", "number + 2 == works + programs"),
    ),
    (
        "tiles before a group", "schedule.cuh",
        "ragged: every row of every column once; "
        "ragged tickets: every row of every column once under any order of arrival, one last ticket",
        (
            "last += static_cast<int64_t>(end > begin ? ceil_div(end - begin, block_m) : 0) * columns;",
            "last = static_cast<int64_t>(end > begin ? ceil_div(end - begin, block_m) : 0) * columns;",
        ),
    ),
    (
        "first column of the next output", "side_by_side.cuh",
        "side by side: every tile of every output once; "
        "side by side tickets: every tile of every output once under any order of arrival, one last number",
        ("tile.column >= ends[output]", "tile.column > ends[output]"),
    ),
    (
        "columns before an output", "side_by_side.cuh", "side by side: every tile of every output once",
        ("ends[output - 1]", "ends[0]"),
    ),
    (
        "shift of a power of two", "divisor.cuh", "division: every quotient",
        ("int64_t{1} << shift < divisor", "int64_t{1} << shift <= divisor"),
    ),
    (
        "magic number", "divisor.cuh", "division: every quotient",
        (
            "(beyond << 32) / static_cast<uint64_t>(divisor) + 1",
            "(beyond << 32) / static_cast<uint64_t>(divisor)",
        ),
    ),
)]  # fmt: skip


@pytest.fixture(scope="module")
def woven_schedules(tmp_path_factory):
    return woven("schedule_check", tmp_path_factory.mktemp("schedules"), SCHEDULE_BUGS)


@pytest.mark.parametrize("bug", SCHEDULE_BUGS, ids=lambda bug: bug.name)
def test_a_wrong_schedule_is_seen(woven_schedules, bug):
    actual = mismatches(woven_schedules, bug.name)
    assert all(actual[name] > 0 for name in bug.seen_by.split("; "))


def test_with_no_bug_on_woven_headers_are_right(woven_layouts, woven_schedules):
    assert not any({**mismatches(woven_layouts), **mismatches(woven_schedules)}.values())


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**63 - 1, 2**64 - 1])
@pytest.mark.parametrize("counter", [0, 1, 2**32 - 1, 2**32, 2**61 + 12345])
def test_philox_is_that_of_the_definition(schedule_check, seed, counter):
    words = subprocess.run(
        [schedule_check, str(seed), str(counter)], capture_output=True, text=True, check=True, timeout=300
    ).stdout
    low, high = (torch.tensor([part]) for part in (counter & 0xFFFFFFFF, counter >> 32))
    zero = torch.zeros(1, dtype=torch.int64)
    key = tuple(torch.tensor([part]) for part in (seed & 0xFFFFFFFF, seed >> 32))
    expected = philox_4x32((low, high, zero, zero), key)
    assert [int(word) for word in words.split()] == [int(word) for word in expected]
