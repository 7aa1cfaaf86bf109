"""csrc, looked at without a GPU (T4): what nvcc makes of every kernel, the build, what may stand in which file.

`tests/cuda/cuda_budget.json` holds registers and static shared memory of every kernel; `make budget` writes it anew.
"""

import importlib.util
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from native_build import REPORTS, ROOT, build, command, compiled, emulator, loads_alone

from lorafuse.backends import native
from lorafuse.backends.native_sources import source_hash

pytestmark = [pytest.mark.no_poison, pytest.mark.first]

CSRC = ROOT / "csrc"
BUDGET = Path(__file__).with_name("cuda_budget.json")
# what the budget was made with: other compilers allocate other registers
NVCC = "nvcc 13.0.88"
# what a kernel of the name's beginning must be made of, by architecture
TMA_AND_WGMMA = ("HGMMA", "UTMALDG", "UTMALDG.2D.MULTICAST", "UTMASTG", "STSM", "USETMAXREG")
INSTRUCTIONS = {
    "lorafuse::sm90::linear_kernel": TMA_AND_WGMMA,
    "lorafuse::sm90::grouped_kernel": ("HGMMA", "UTMALDG", "USETMAXREG"),
    "lorafuse::skinny::project_kernel": ("HMMA", "LDGSTS"),
    "lorafuse::skinny::reduce_kernel": ("HMMA", "LDGSTS"),
}


def demangled(text):
    return subprocess.run(["c++filt"], input=text, capture_output=True, text=True, check=True).stdout


def short(name):
    """`lorafuse::sm90::linear_kernel<lorafuse::BF16, 256, 4, (Form)2>` of a signature."""
    name = re.sub(r"\(lorafuse::\w+::(\w+)\)", r"(\1)", name.removeprefix("void "))
    return re.sub(r">\(.*", ">", name).replace("lorafuse::BF16", "bf16").replace("lorafuse::FP16", "fp16")


def reports():
    return {path.name: path.read_text() for path in sorted((REPORTS / "cuda").glob("*.o.log"))}


def kernels_of(report):
    """`{architecture: {kernel: {registers, stack, spills, shared}}}` of what ptxas -v printed."""
    found = {}
    for entry in demangled(report).split("Compiling entry function '")[1:]:
        name, arch = re.match(r"(.*)' for '(\w+)'", entry).groups()
        numbers = {
            "registers": r"Used (\d+) registers",
            "stack": r"(\d+) bytes stack frame",
            "spills": r"(\d+) bytes spill stores",
            "shared": r"(\d+) bytes smem",
        }
        read = {key: re.search(pattern, entry) for key, pattern in numbers.items()}
        found.setdefault(arch, {})[short(name)] = {key: int(m[1]) if m else 0 for key, m in read.items()}
    return found


@pytest.fixture(scope="module")
def table():
    """`{architecture: {kernel: …}}` of all kernels."""
    compiled()
    merged = {}
    for report in reports().values():
        for arch, kernels in kernels_of(report).items():
            merged.setdefault(arch, {}).update(kernels)
    return merged


class TestCompiled:
    def test_every_kernel_of_every_architecture(self, table):
        assert set(table) == {"sm_80", "sm_90", "sm_90a"}
        assert table["sm_80"].keys() == table["sm_90"].keys()
        for name in INSTRUCTIONS:
            assert any(kernel.startswith(name) for kernels in table.values() for kernel in kernels), name
        sources = {path.name for path in (CSRC / "kernels").glob("*.cu")}
        assert {name.removeprefix("kernels-").removesuffix(".o.log") for name in reports()} == sources

    def test_nothing_lies_in_local_memory(self, table):
        for arch, kernels in table.items():
            assert {n: k for n, k in kernels.items() if k["stack"] or k["spills"]} == {}, arch

    def test_ptxas_repairs_nothing(self, table):
        """C7510 to C7519: it waits or arrives where the source does not, or serializes wgmma, and says so only here."""
        assert [line for text in reports().values() for line in text.splitlines() if re.search(r"C75\d\d", line)] == []
        assert [line for text in reports().values() for line in text.splitlines() if "warning" in line.lower()] == []

    def test_the_budget_holds(self, table, request):
        if native.info("_cuda")["compiler"] != NVCC:
            pytest.skip(f"the budget is that of {NVCC}, this is {native.info('_cuda')['compiler']}")
        now = {
            arch: {n: [k["registers"], k["shared"]] for n, k in sorted(table[arch].items())} for arch in sorted(table)
        }
        if request.config.getoption("--update-budget"):
            # one line a kernel, for reviews
            BUDGET.write_text(re.sub(r"\[\s+(\d+),\s+(\d+)\s+\]", r"[\1, \2]", json.dumps(now, indent=1)) + "\n")
            return
        budget = json.loads(BUDGET.read_text())
        for arch, kernels in now.items():
            assert kernels.keys() == budget[arch].keys(), "run `make budget` and review the difference"
            grown = {n: v for n, v in kernels.items() if any(a > b for a, b in zip(v, budget[arch][n], strict=True))}
            assert grown == {}, "registers or shared memory grew; if it is worth it, run `make budget`"


def instructions(file):
    """`[(kernel, its SASS), …]`, once for every architecture."""
    # Triton's wheel brings one too
    beside = Path(importlib.util.find_spec("triton").origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    tool = shutil.which("cuobjdump") or str(beside)
    text = demangled(subprocess.run([tool, "-sass", file], capture_output=True, text=True, check=True).stdout)
    parts = re.split(r"Function : (.*)", text)[1:]
    return [(short(name), sass) for name, sass in zip(parts[::2], parts[1::2], strict=True)]


def test_the_instructions_are_there():
    compiled()
    seen = set()
    for file in sorted((REPORTS / "cuda").glob("kernels-*.o")):
        for kernel, sass in instructions(file):
            for name, wanted in INSTRUCTIONS.items():
                if kernel.startswith(name):
                    seen.add(name)
                    assert [i for i in wanted if not re.search(rf"\b{re.escape(i)}", sass)] == [], kernel
    assert seen == set(INSTRUCTIONS)


class TestModule:
    def test_it_needs_neither_torch_nor_a_driver(self):
        compiled()
        info = loads_alone("_cuda")
        assert info == native.info("_cuda")
        assert info["architectures"] == ["sm_80", "sm_90", "sm_90a", "compute_80"]
        assert info["sources"] == source_hash(CSRC, emulated=False)
        needed = subprocess.run(["ldd", native.load("_cuda").__file__], capture_output=True, text=True).stdout
        assert "libcud" not in needed
        assert "libtorch" not in needed

    def test_the_emulator_neither(self):
        emulator()
        assert loads_alone("_emu") == native.info("_emu")

    def test_what_cuda_says_is_an_error(self):
        compiled()
        if torch.cuda.is_available():
            pytest.skip("there is a GPU: nothing fails")
        round_adapter = native.load("_cuda").round_adapter
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

    @pytest.mark.parametrize(("version", "said"), [(None, "nor any other"), ("12.4.131", "nvcc is 12.4.131")])
    def test_without_one_it_says_what_it_found(self, script, nvcc, monkeypatch, version, said):
        if version:
            monkeypatch.setenv("CUDA_HOME", str(nvcc("old", version).parents[1]))
        with pytest.raises(script["Unavailable"], match=f"nvcc 12.8 or newer was not found.*{said}.*CUDA_HOME"):
            script["find_nvcc"]()

    def test_an_installation_can_leave_it_out(self, tmp_path):
        environment = {**os.environ, "LORAFUSE_SKIP_CUDA_BUILD": "1"}
        command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=True)
        assert "LORAFUSE_SKIP_CUDA_BUILD is 1" in done.stdout + done.stderr
        assert list(tmp_path.rglob("*.so")) == []

    def test_nothing_is_built_twice(self):
        for target in ("emu", "cuda"):
            if not build(target):
                assert "no work to do" in subprocess.run(command(target), capture_output=True, text=True).stdout

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
    found = {
        f"{path.name}:{i}: {line}"
        for path in files
        for i, line in enumerate(path.read_text().splitlines(), 1)
        if re.search(FORBIDDEN[folder], line.partition("//")[0])
    }
    assert found == set()


def test_every_wrapper_has_its_emulation():
    device, emulated = (CSRC / folder / "lorafuse" / "ptx" for folder in ("include", "emu/include"))
    assert {path.name for path in device.iterdir()} == {path.name for path in emulated.iterdir()}
    signature = r"LF_DEVICE [\w:<>]+\s+(\w+)\("
    for path in sorted(device.iterdir()):
        emulates = set(re.findall(r"\b(\w+)\(", (emulated / path.name).read_text()))
        missing = set(re.findall(signature, path.read_text())) - emulates
        assert missing - {"shared_address"} == set(), path.name


def test_files_are_short_enough_to_have_one_job():
    sources = [path for path in CSRC.rglob("*") if path.suffix in (".cu", ".cuh", ".cpp", ".hpp", ".py")]
    assert {str(p.relative_to(ROOT)): n for p in sources if (n := p.read_text().count("\n")) > 400} == {}
