"""What nvcc makes of every translation unit of csrc/kernels, compiled now or on record.

`tests/cuda/cuda_budget.json` is the record: `{unit: {digest, defines, warnings, kernels: {architecture: {kernel:
{registers, stack, spills, shared, instructions}}}}}`. Compiling is deterministic: under the digest of all its inputs,
what a unit is compiled to is known. A fixed sample of units is compiled in any case.
"""

import hashlib
import importlib.util
import inspect
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from functools import cache, cached_property
from pathlib import Path

import pytest
from native_build import build
from native_commands import REPORTS, ROOT

from lorafuse.backends import native

__all__ = ["BUDGET", "INSTRUCTIONS", "Kernels", "digest", "sample", "without_comments", "write"]

CSRC = ROOT / "csrc"
BUDGET = Path(__file__).parent / "cuda" / "cuda_budget.json"
# what a kernel of the name's beginning must be made of, by architecture
WGMMA = ("HGMMA", "UTMALDG", "USETMAXREG")
# a number that is drawn, and passed on in shared memory
TICKETS = ("ATOMG", "STAS")
TMA_AND_WGMMA = ("HGMMA", "UTMALDG", "UTMALDG.2D.MULTICAST", "UTMASTG", "STSM", "USETMAXREG")
INSTRUCTIONS = {
    "lorafuse::sm90::linear_kernel": (*TMA_AND_WGMMA, *TICKETS),
    "lorafuse::sm90::siblings_kernel": TMA_AND_WGMMA,
    "lorafuse::sm90::gated_kernel": TMA_AND_WGMMA,
    "lorafuse::sm90::one_launch_kernel": (*WGMMA, *TICKETS),
    "lorafuse::sm90::xa_tiles_kernel": (*WGMMA, *TICKETS),
    "lorafuse::sm90::split_kernel": WGMMA,
    "lorafuse::sm90::grouped_kernel": (*WGMMA, *TICKETS),
    "lorafuse::sm90::gathered_kernel": (*WGMMA, *TICKETS),
    "lorafuse::skinny::project_kernel": ("HMMA", "LDGSTS"),
    "lorafuse::skinny::reduce_kernel": ("HMMA", "LDGSTS"),
    "lorafuse::decode::decode_kernel": ("LDG.E.EF.128", "STG.E.128"),
}
# of the module that has the sample alone
CALLED = "lorafuse::round_adapter("


@cache
def script():
    """The names of csrc/build.py, which every digest asks for its options."""
    return runpy.run_path(str(CSRC / "build.py"))


def demangled(text):
    return subprocess.run(["c++filt"], input=text, capture_output=True, text=True, check=True).stdout


def short(name):
    """`lorafuse::sm90::linear_kernel<lorafuse::BF16, 256, 4, (Form)2>` of a signature."""
    name = re.sub(r"\(lorafuse::\w+::(\w+)\)", r"(\1)", name.removeprefix("void "))
    return re.sub(r">\(.*", ">", name).replace("lorafuse::BF16", "bf16").replace("lorafuse::FP16", "fp16")


def resources(report):
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


def warnings(report):
    """C7510 to C7519: ptxas waits or arrives where the source does not, or serializes wgmma; and any other warning."""
    return [line for line in report.splitlines() if re.search(r"C75\d\d", line) or "warning" in line.lower()]


def instructions(file):
    """`{architecture: {kernel: {an instruction: count in the SASS}}}`, of those that INSTRUCTIONS has for the kernel's
    namespace, and of all where it has none for that.
    """
    # Triton's wheel brings one too
    beside = Path(importlib.util.find_spec("triton").origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    tool = shutil.which("cuobjdump") or str(beside)
    text = subprocess.run([tool, "-sass", file], capture_output=True, text=True, check=True).stdout
    names = {}
    for start, wanted in INSTRUCTIONS.items():
        names.setdefault(start.rpartition("::")[0], set()).update(wanted)
    every = set().union(*names.values())
    found = {}
    for arch, code in zip(*[iter(re.split(r"arch = (\w+)", text)[1:])] * 2, strict=True):
        parts = re.split(r"Function : (.*)", code)[1:]
        kernels = map(short, demangled("\n".join(parts[::2])).splitlines())
        for kernel, sass in zip(kernels, parts[1::2], strict=True):
            looked_for = sorted(names.get(kernel.partition("<")[0].rpartition("::")[0], every))
            # the boundary comes last: searching for the text itself is ten times as fast as for \b before it
            counts = {name: len(re.findall(rf"{re.escape(name)}(?<!\w{re.escape(name)})", sass)) for name in looked_for}
            found.setdefault(arch, {})[kernel] = {name: count for name, count in counts.items() if count}
    return found


def defines(file):
    """Functions of the project that an object may have for others: plain ones, or with one template argument."""
    text = subprocess.run(["nm", "-C", "--defined-only", "-g", file], capture_output=True, text=True, check=True).stdout
    return sorted(re.findall(r"^\w+ [TW] (?:void )?(lorafuse::(?:\w+::)?\w+(?:<[^<>,]*>)?\(.*)$", text, re.MULTILINE))


READERS = (short, resources, warnings, instructions, defines)
source_of = cache(inspect.getsource)


@cache
def without_comments(source):
    """A C++ source without comments, trailing blanks and empty lines."""
    assert not re.search(r'\b(u8|[uUL])?R"[^"()]*\(', source), "raw strings are not read here"
    token = r'"(?:\\.|[^"\\\n])*"|' + r"'(?:\\.|[^'\\\n])'" + r"|//[^\n]*|/\*.*?\*/"
    source = re.sub(token, lambda m: " " if m[0].startswith("/") else m[0], source, flags=re.DOTALL)
    return "\n".join(line.rstrip() for line in source.splitlines() if line.strip())


@cache
def included(source):
    """Names of the files that a source includes."""
    return re.findall(r'^\s*#\s*include\s+["<]([^">]+)[">]', source, re.MULTILINE)


def reached(unit, csrc):
    """The unit and all files of csrc that it includes, whatever an #if says."""
    todo, found = [unit], set()
    while todo:
        path = todo.pop().resolve()
        if path in found:
            continue
        found.add(path)
        for name in included(path.read_text()):
            places = (path.parent / name, csrc / "include" / name)
            todo += [place for place in places if place.is_file()][:1]
    return sorted(found)


def digest(name, csrc=CSRC, nvcc=None, flags=None, targets=None):
    """Hash of all that decides what a unit is compiled to and what is read from it.

    Headers of CUDA are those of nvcc's version; the host's own declare nothing that a kernel computes with.
    """
    build_py = script()
    ending = next(ending for ending in build_py["TARGETS"] if name.endswith(ending))
    parts = [nvcc or build_py["find_nvcc"]()[1], flags or build_py["NVCC_FLAGS"]]
    parts += targets or build_py["TARGETS"][ending]
    parts += [f"{key}={os.environ.get(key, '')}" for key in ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS")]
    parts += [source_of(reader) for reader in READERS] + [repr(INSTRUCTIONS)]
    for path in reached(csrc / "kernels" / name, csrc.resolve()):
        parts += [path.relative_to(csrc.resolve()).as_posix(), without_comments(path.read_text())]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


def sample(record):
    """Units that are compiled in any case, always the same ones.

    The unit with the fewest kernels of each set of architectures, those without kernels, by which others are called,
    and the one of the function that tests call.
    """
    picked = {}
    for name in sorted(record, key=lambda name: (sum(map(len, record[name]["kernels"].values())), name)):
        architectures = tuple(sorted(record[name]["kernels"]))
        picked.setdefault(architectures or name, name)
    called = {name for name, unit in record.items() if any(text.startswith(CALLED) for text in unit["defines"])}
    return set(picked.values()) | called


class Kernels:
    """All units of csrc/kernels: those that are compiled now, and those that are read from the record."""

    def __init__(self, everything, record=None):
        self.names = sorted(path.name for path in (CSRC / "kernels").glob("*.cu"))
        self.record = (json.loads(BUDGET.read_text()) if BUDGET.exists() else {}) if record is None else record
        try:
            self.digests = {name: digest(name) for name in self.names}
            self.nvcc = script()["find_nvcc"]()[1]
        except script()["Unavailable"] as reason:
            pytest.skip(f"the CUDA kernels cannot be built: {reason}")
        self.stale = {n for n in self.names if self.record.get(n, {}).get("digest") != self.digests[n]}
        known = {} if everything else {n: self.record[n] for n in self.names if n not in self.stale}
        self.compiled = set(self.names) - known.keys() | sample(known)
        whole = self.compiled == set(self.names)
        # what builds the module: the package's own, or one that lacks units, which goes elsewhere
        self.module = script()["module_file"]("cuda") if whole else REPORTS / "cuda-sample" / "_cuda.so"
        self.command = ("cuda",) if whole else ("cuda", str(self.module), "--only", *sorted(self.compiled))

    @cached_property
    def found(self):
        """`{unit: what the record holds of it}` as of now."""
        return {n: self._read(n) if n in self.compiled else self.record[n] for n in self.names}

    def _read(self, name):
        return _compiled(self.command, name, self.digests[name])

    @cached_property
    def table(self):
        """`{architecture: {kernel: …}}` of all units."""
        merged = {}
        for found in self.found.values():
            for arch, kernels in found["kernels"].items():
                merged.setdefault(arch, {}).update(kernels)
        return merged

    def false_entries(self):
        """Units of which the record, under the digest of now, says what the compiler does not."""
        return [n for n in sorted(self.compiled - self.stale) if self.record[n] != self._read(n)]

    def lacking(self):
        """Functions that the units that are not compiled have for others."""
        return {name for n in self.names if n not in self.compiled for name in self.record[n]["defines"]}

    def undefined(self):
        """Functions of the project that the module lacks."""
        command = ["nm", "-DC", "--undefined-only", self.module]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return set(re.findall(r"U (?:void )?(lorafuse::.*)", text))

    def load(self):
        """The module; one that lacks units loads as long as nobody calls them."""
        if self.command == ("cuda",):
            return native.load("_cuda")
        spec = importlib.util.spec_from_file_location("_cuda", self.module)
        flags = sys.getdlopenflags()
        sys.setdlopenflags(os.RTLD_LAZY)
        try:
            module = importlib.util.module_from_spec(spec)
        finally:
            sys.setdlopenflags(flags)
        spec.loader.exec_module(module)
        return module


@cache
def _compiled(command, name, of):
    build_kernels(command)
    file = REPORTS / "cuda" / f"kernels-{name}.o"
    report = file.with_name(f"{file.name}.log").read_text()
    found, sass = resources(report), instructions(file)
    assert {a: k.keys() for a, k in found.items()} == {a: k.keys() for a, k in sass.items() if k}, name
    kernels = {
        arch: {kernel: one | {"instructions": sass[arch][kernel]} for kernel, one in sorted(found[arch].items())}
        for arch in sorted(found)
    }
    return {"digest": of, "defines": defines(file), "warnings": warnings(report), "kernels": kernels}


def build_kernels(command):
    reason = build(*command)
    if reason:
        pytest.skip(f"the CUDA kernels cannot be built: {reason}")


def write(found):
    """One line a kernel, for reviews."""
    text = json.dumps(found, indent=1)
    BUDGET.write_text(re.sub(r'\{\s+"registers"[^{}]*\{[^}]*\}\s+\}', lambda m: " ".join(m[0].split()), text) + "\n")
