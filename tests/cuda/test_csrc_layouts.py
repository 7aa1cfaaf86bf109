"""Arithmetic of csrc that a host can run (T5): layouts against CuTe and PTX tables, tile schedules by enumeration.

`tests/cuda/csrc/*_check.cpp` do the comparing; g++ compiles them from the headers that the kernels use.
"""

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

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


def mismatches(binary):
    """Check → number of mismatches, as the program prints them."""
    result = subprocess.run([binary], capture_output=True, text=True, timeout=60)
    actual = {name: int(count) for name, count in re.findall(r"^(.*): (\d+)$", result.stdout, re.MULTILINE)}
    assert actual
    assert result.returncode == int(any(actual.values()))
    return actual


def mutated(folder, header, before, after):
    """A folder whose `lorafuse/<header>` has `after` in place of `before`."""
    text = (CSRC / "include" / "lorafuse" / header).read_text()
    assert text.count(before) == 1, f"{header} holds {before!r} {text.count(before)} times"
    (folder / "lorafuse").mkdir()
    (folder / "lorafuse" / header).write_text(text.replace(before, after))
    return folder


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


@pytest.mark.parametrize(
    ("before", "after", "check"),
    [
        ("(offset >> 3) & 0x70", "(offset >> 3) & 0x30", "ptx swizzle"),
        ("i / 2 % 2 * 8", "i / 2 % 2 * 16", "ptx fragments"),
        ("static_cast<uint32_t>(box_rows * kBoxRowBytes), 1024", "1024, 1024", "ptx descriptor"),
        ("uint64_t{1} << 62", "uint64_t{2} << 62", "ptx descriptor"),
    ],
)
def test_a_wrong_layout_is_seen(tmp_path, before, after, check):
    assert mismatches(build("layout_check", tmp_path, mutated(tmp_path, "layout.cuh", before, after)))[check] > 0


def test_schedules(schedule_check):
    actual = mismatches(schedule_check)
    assert not any(actual.values()), actual


@pytest.mark.parametrize(
    ("before", "after", "check"),
    [
        ("within % height, within / height}", "within % group, within / group}", "order: every tile once"),
        ("tile.column + 1};", "tile.column};", "order: every tile once, column 0 first"),
        ("c * chunk + tile.row, tile.column - 1}", "tile.row, tile.column - 1}", "backward: every tile and item once"),
        (
            "TileOrder{rows, columns, tiles.group}.at(within)",
            "TileOrder{rows, columns, tiles.group}.at(rows * columns - 1 - within)",
            "backward: whatever waits has a later number; tickets: every tile and item once under any order of arrival",
        ),
        ("wave < full_waves() ? program : program - slack()", "program", "walk: every tile once"),
        ("program >= slack() ? 1 : 0", "program < tiles % programs ? 1 : 0", "walk: slack in the first programs"),
        ("? walk.slack() : walk.programs;", "? walk.programs : walk.slack();", "items: free where there is slack"),
        (
            "last += static_cast<int64_t>(",
            "last = static_cast<int64_t>(",
            "ragged: every row of every column once; "
            "ragged tickets: every row of every column once under any order of arrival, one last ticket",
        ),
    ],
)
def test_a_wrong_schedule_is_seen(tmp_path, before, after, check):
    actual = mismatches(build("schedule_check", tmp_path, mutated(tmp_path, "schedule.cuh", before, after)))
    assert all(actual[name] > 0 for name in check.split("; "))


@pytest.mark.parametrize(
    ("before", "after"),
    [("tile.column >= ends[output]", "tile.column > ends[output]"), ("ends[output - 1] : 0", "ends[0] : 0")],
)
def test_a_tile_of_another_layer_is_seen(tmp_path, before, after):
    folder = mutated(tmp_path, "side_by_side.cuh", before, after)
    assert mismatches(build("schedule_check", tmp_path, folder))["side by side: every tile of every output once"] > 0


@pytest.mark.parametrize(("before", "after"), [("< divisor) ++shift", "<= divisor) ++shift"), (" + 1;", ";")])
def test_a_wrong_division_is_seen(tmp_path, before, after):
    folder = mutated(tmp_path, "divisor.cuh", before, after)
    assert mismatches(build("schedule_check", tmp_path, folder))["division: every quotient"] > 0


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
