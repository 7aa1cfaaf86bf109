"""csrc, looked at without a GPU (T4): what nvcc makes of every kernel, the build, what may stand in which file.

`tests/cuda/cuda_budget.json` is a record of what each translation unit is compiled to, with the digest of all that it
was compiled from (tests/nvcc_record.py). Under the same digest it is read instead of compiled, but for a sample, which
must be what is on record; `make test-compile` compiles everything, `make budget` renews what has changed.
"""

import json
import os
import re
import runpy
import subprocess
import sys
import warnings
from importlib.util import spec_from_file_location

import nvcc_record
import pytest
import torch
from native_build import build, emulator, loads_alone
from native_commands import ROOT, command
from nvcc_record import BUDGET, INSTRUCTIONS, TICKETS, build_kernels

from lorafuse.backends import native
from lorafuse.backends.native_sources import source_hash

pytestmark = [pytest.mark.no_poison, pytest.mark.first]

CSRC = ROOT / "csrc"
# what the budget was made with: other compilers allocate other registers
NVCC = "13.0.88"
# Instructions that more kernels must have, of those that records count in their namespace anyway. INSTRUCTIONS is part
# of every digest: a row there makes all records stale.
STORED_BY_TMA = ("HGMMA", "UTMALDG", "UTMASTG", "STSM", "USETMAXREG")
REQUIRED = INSTRUCTIONS | {
    "lorafuse::sm90::gathered_kernel": STORED_BY_TMA,
    "lorafuse::sm90::gated_kernel": (*STORED_BY_TMA, "UTMALDG.2D.MULTICAST", *TICKETS),
    "lorafuse::sm90::siblings_kernel": (*STORED_BY_TMA, "UTMALDG.2D.MULTICAST", *TICKETS),
    "lorafuse::sm90::one_launch_kernel": STORED_BY_TMA,
    "lorafuse::sm90::xa_tiles_kernel": STORED_BY_TMA,
    "lorafuse::sm90::split_kernel": ("HGMMA", "UTMALDG", "USETMAXREG"),
}


@pytest.fixture(scope="module")
def kernels(request):
    """All units, compiled where they are not on record."""
    kernels = nvcc_record.Kernels(request.config.getoption("--every-dtype"))
    build_kernels(kernels.command)
    if kernels.stale and kernels.nvcc == NVCC:
        warnings.warn(f"the record of {sorted(kernels.stale)} is stale: run `make budget`", stacklevel=1)
    return kernels


@pytest.fixture(scope="module")
def table(kernels):
    """`{architecture: {kernel: …}}` of all kernels."""
    return kernels.table


class TestCompiled:
    def test_every_kernel_of_every_architecture(self, kernels, table):
        assert set(table) == {"sm_80", "sm_90", "sm_90a"}
        assert table["sm_80"].keys() == table["sm_90"].keys()
        for name in REQUIRED:
            assert any(kernel.startswith(name) for kernels in table.values() for kernel in kernels), name
        assert set(kernels.found) == {path.name for path in (CSRC / "kernels").glob("*.cu")}

    def test_nothing_lies_in_local_memory(self, table):
        for arch, kernels in table.items():
            assert {n: k for n, k in kernels.items() if k["stack"] or k["spills"]} == {}, arch

    def test_ptxas_repairs_nothing(self, kernels):
        """C7510 to C7519: it waits or arrives where the source does not, or serializes wgmma, and says so only here."""
        assert {name: unit["warnings"] for name, unit in kernels.found.items() if unit["warnings"]} == {}

    def test_the_instructions_are_there(self, table):
        seen = set()
        for arch, kernels in table.items():
            for kernel, actual in kernels.items():
                for name, requested in REQUIRED.items():
                    if kernel.startswith(name):
                        seen.add(name)
                        assert [i for i in requested if not actual["instructions"].get(i)] == [], (arch, kernel)
        assert seen == set(REQUIRED)

    def test_the_record_is_true(self, kernels):
        """Of all that was compiled: the sample, or in `make test-compile` everything."""
        assert kernels.false_entries() == []

    def test_a_falsified_record_is_seen(self, kernels):
        for name in sorted(name for name in kernels.compiled if kernels.found[name]["kernels"]):
            record = json.loads(json.dumps(kernels.found))
            entry = next(iter(next(iter(record[name]["kernels"].values())).values()))
            entry["registers"] -= 1
            seen = nvcc_record.Kernels(kernels.compiled == set(kernels.names), record)
            assert seen.false_entries() == [name]

    def test_the_budget_holds(self, kernels, table, request):
        if kernels.nvcc != NVCC:
            pytest.skip(f"the budget is that of nvcc {NVCC}, this is {kernels.nvcc}")
        if request.config.getoption("--update-budget"):
            nvcc_record.write(kernels.found)
            return
        budget = {}
        for unit in json.loads(BUDGET.read_text()).values():
            for arch, of in unit["kernels"].items():
                budget.setdefault(arch, {}).update(of)
        for arch, now in table.items():
            assert now.keys() == budget[arch].keys(), "run `make budget` and review the difference"
            grown = {n: k for n, k in now.items() if any(k[of] > budget[arch][n][of] for of in ("registers", "shared"))}
            assert grown == {}, "registers or shared memory grew; if it is worth it, run `make budget`"


class TestModule:
    @pytest.fixture
    def module(self, kernels):
        """`lorafuse._cuda`; one that lacks units on record loads as long as nobody calls them."""
        return kernels.load()

    def test_it_needs_neither_torch_nor_a_driver(self, kernels, monkeypatch):
        info = loads_alone("_cuda", kernels.module.parent)
        monkeypatch.setattr("importlib.util.find_spec", lambda name: spec_from_file_location(name, kernels.module))
        assert info == native.info.__wrapped__("_cuda")
        assert info["architectures"] == ["sm_80", "sm_90", "sm_90a", "compute_80"]
        assert info["sources"] == source_hash(CSRC, emulated=False)
        needed = subprocess.run(["ldd", kernels.module], capture_output=True, text=True, timeout=300).stdout
        assert "libcud" not in needed
        assert "libtorch" not in needed

    def test_every_function_is_defined(self, kernels):
        """What the module lacks is what the units have that were not compiled."""
        assert kernels.undefined() <= kernels.lacking()

    def test_the_emulator_neither(self):
        emulator()
        assert loads_alone("_emu") == native.info("_emu")

    def test_what_cuda_says_is_an_error(self, module):
        if torch.cuda.is_available():
            pytest.skip("there is a GPU: nothing fails")
        round_adapter = module.round_adapter
        given = {"in_type": 2, "type": 0, "rows": 2, "columns": 8, "in": 64, "stride_in": 8, "out": 64}
        with pytest.raises(RuntimeError, match="cuda"):
            round_adapter(**given, stride_out=8)
        with pytest.raises(ValueError, match="stride 4 of out is below its 8 columns"):
            round_adapter(**given, stride_out=4)
        with pytest.raises(TypeError, match="incompatible function arguments"):
            round_adapter(2, 0)
        with pytest.raises(TypeError, match="missing keyword stride_out"):
            round_adapter(**given)
        with pytest.raises(TypeError, match="unknown keyword 'columns_'"):
            round_adapter(**given, stride_out=8, columns_=8)
        with pytest.raises(TypeError, match="keyword 'rows'"):
            round_adapter(**given | {"rows": "2"}, stride_out=8)


class TestBuild:
    @pytest.fixture
    def script(self):
        return runpy.run_path(str(CSRC / "build.py"))

    @pytest.fixture
    def nvcc(self, tmp_path, monkeypatch):
        """Writes an nvcc of a version into a folder of its own; there is no other."""
        access = os.access
        monkeypatch.setattr(os, "access", lambda path, mode: str(path).startswith(str(tmp_path)) and access(path, mode))
        for name in ("CUDA_HOME", "CUDA_PATH"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("PATH", "/usr/bin:/bin")

        def write(folder, version):
            path = tmp_path / folder / "bin" / "nvcc"
            path.parent.mkdir(parents=True)
            path.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release 0, V{version}'\n")
            path.chmod(0o755)
            return path

        return write

    def test_the_first_nvcc_that_is_new_enough(self, script, nvcc, monkeypatch):
        old, new, newer = (nvcc(*given) for given in (("old", "12.4.131"), ("new", "12.8.61"), ("newer", "13.0.88")))
        monkeypatch.setenv("CUDA_HOME", str(old.parents[1]))
        monkeypatch.setenv("CUDA_PATH", str(newer.parents[1]))
        monkeypatch.setenv("PATH", str(new.parent))
        assert script["find_nvcc"]() == (str(newer), "13.0.88")
        monkeypatch.delenv("CUDA_PATH")
        assert script["find_nvcc"]() == (str(new), "12.8.61")

    @pytest.mark.parametrize(("version", "message"), [(None, "nor any other"), ("12.4.131", "nvcc is 12.4.131")])
    def test_without_one_it_says_what_it_found(self, script, nvcc, monkeypatch, version, message):
        if version:
            monkeypatch.setenv("CUDA_HOME", str(nvcc("old", version).parents[1]))
        with pytest.raises(script["Unavailable"], match=f"nvcc 12.8 or newer was not found.*{message}.*CUDA_HOME"):
            script["find_nvcc"]()

    def test_an_installation_can_leave_it_out(self, tmp_path):
        environment = {**os.environ, "LORAFUSE_SKIP_CUDA_BUILD": "1"}
        command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path)]
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=ROOT, env=environment, check=True, timeout=300
        )
        assert "LORAFUSE_SKIP_CUDA_BUILD is 1" in done.stdout + done.stderr
        assert {path.name.partition(".")[0] for path in tmp_path.rglob("*.so")} <= {"_cpu"}

    @pytest.mark.parametrize("target", ["emu", "cuda"])
    def test_nothing_is_built_twice(self, target, request):
        given = request.getfixturevalue("kernels").command if target == "cuda" else (target,)
        if not build(*given):
            assert (
                "no work to do" in subprocess.run(command(*given), capture_output=True, text=True, timeout=300).stdout
            )

    def test_the_hash_is_of_what_a_module_is_built_from(self, tmp_path):
        (tmp_path / "kernels").mkdir()
        (tmp_path / "emu").mkdir()
        kernel, engine = tmp_path / "kernels" / "a.cu", tmp_path / "emu" / "b.cpp"
        kernel.write_text("1")
        engine.write_text("1")
        before = [source_hash(tmp_path, emulated) for emulated in (False, True)]
        assert before[0] != before[1]
        engine.write_text("2")
        after = [source_hash(tmp_path, emulated) for emulated in (False, True)]
        assert after[0] == before[0]
        assert after[1] != before[1]
        kernel.rename(tmp_path / "kernels" / "c.cu")
        assert source_hash(tmp_path, False) != before[0]


FORBIDDEN = {
    "kernels": r"\basm\b|extern __shared__|__\w+sync\w*\(|__shfl|__ldg|__device__|__global__|#if|while \(true\)",
    "include/lorafuse/ptx": r"#ifdef|#if ",
}


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_layers_of_csrc(folder):
    """PTX stands behind the wrappers, and one source is compiled twice without a switch in it."""
    files = sorted((CSRC / folder).glob("*"))
    assert files
    actual = {
        f"{path.name}:{i}: {line}"
        for path in files
        for i, line in enumerate(path.read_text().splitlines(), 1)
        if re.search(FORBIDDEN[folder], line.partition("//")[0])
    }
    assert actual == set()


def test_every_wrapper_has_its_emulation():
    device, emulated = (CSRC / folder / "lorafuse" / "ptx" for folder in ("include", "emu/include"))
    assert {path.name for path in device.iterdir()} == {path.name for path in emulated.iterdir()}
    signature = r"LF_DEVICE [\w:<>]+\s+(\w+)\("
    for path in sorted(device.iterdir()):
        emulates = set(re.findall(r"\b(\w+)\(", (emulated / path.name).read_text()))
        missing = set(re.findall(signature, path.read_text())) - emulates
        # one is a part of others' bodies: the emulator reports what never comes in any build
        assert missing - {"shared_address", "stop_after"} == set(), path.name


def test_files_are_short_enough_to_have_one_job():
    sources = [path for path in CSRC.rglob("*") if path.suffix in (".cu", ".cuh", ".cpp", ".hpp", ".py")]
    assert {str(p.relative_to(ROOT)): n for p in sources if (n := p.read_text().count("\n")) > 400} == {}
