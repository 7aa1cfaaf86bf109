"""Say what lorafuse finds on this machine, what it cannot use and how to fix that, and check the arithmetic.

Exit status 0 when lorafuse can run and its self-test is right, 1 when not.
"""

import argparse
import json
import os
import platform
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import torch

from lorafuse import env, functional
from lorafuse.backends import aten_blocks, aten_rank, base, native
from lorafuse.cli import _common
from lorafuse.errors import MissingDependency
from lorafuse.formats import cpu as cpu_decoding
from lorafuse.plan import tuned
from lorafuse.testing import numerics
from lorafuse.testing.conditions import cpu, program_output
from lorafuse.versions import MINIMUM, is_older

SUMMARY = "versions, devices, compilers, backends, and a numerical self-test"

__all__ = ["SUMMARY", "Finding", "add_arguments", "findings", "run"]

PURPOSES = {
    "torch": "required",
    "triton": "optional: the triton backend",
    "numpy": "optional: Triton's interpreter, plots",
    "peft": "optional: lorafuse.patch",
    "transformers": "optional: lorafuse.patch on mixture-of-experts models",
    "accelerate": "optional: Hugging Face Trainer",
    "bitsandbytes": "optional: bases in NF4, FP4 or int8",
    "torchao": "optional: bases in int8, float8, intx or NF4",
    "compressed-tensors": "optional: checkpoints in NVFP4",
}
_COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}
_CPU_UNITS = {"avx512f": "AVX-512", "avx512_bf16": "AVX-512 bf16", "amx_bf16": "AMX bf16", "bf16": "Arm bf16"}
_REPORT_IT = "please report it with this output"


@dataclass(frozen=True)
class Finding:
    """One line of the report; `status` is "ok", "warn" (works, with less) or "fail" (does not work)."""

    section: str
    name: str
    value: str
    status: str = "ok"
    fix: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the findings as JSON; needs no rich")


def run(args: argparse.Namespace) -> int:
    """Print the findings; 1 if any of them is a failure, else 0."""
    if not args.json:
        _require_rich()
    listed = list(findings())
    healthy = all(finding.status != "fail" for finding in listed)
    if args.json:
        print(json.dumps({"healthy": healthy, "findings": [asdict(finding) for finding in listed]}, indent=2))
    else:
        render(listed, healthy)
    return 0 if healthy else 1


def findings() -> Iterator[Finding]:
    """Everything the doctor looks at, section by section."""
    yield from _versions()
    yield from device_findings()
    yield from _compilers()
    yield from _backends()
    yield from _environment()
    yield from _measurements()
    yield from _self_test()


def installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _versions() -> Iterator[Finding]:
    yield Finding("versions", "lorafuse", installed("lorafuse") or f"not installed, run from {Path.cwd()}")
    yield Finding("versions", "python", f"{platform.python_version()} ({sys.executable})")
    for package, purpose in PURPOSES.items():
        yield version_finding(package, purpose, installed(package), installed("triton"))


def version_finding(package: str, purpose: str, version: str | None, triton: str | None) -> Finding:
    at_least = MINIMUM.get(package)
    fix = f'pip install "{package}>={at_least}"' if at_least else f"pip install {package}"
    bad = "fail" if purpose == "required" else "warn"
    if version is None:
        return Finding("versions", package, f"not installed ({purpose})", bad, fix)
    if at_least and is_older(version, at_least):
        return Finding("versions", package, f"{version}, older than {at_least} ({purpose})", bad, fix)
    if package == "numpy" and triton and is_older(triton, "3.7") and not is_older(version, "2.4"):
        value = f"{version}; Triton {triton}'s interpreter fails with numpy 2.4 and newer"
        return Finding("versions", package, value, "warn", 'pip install "numpy<2.4"')
    return Finding("versions", package, version)


def device_findings() -> Iterator[Finding]:
    model, flags = cpu()
    units = [label for flag, label in _CPU_UNITS.items() if flag in flags]
    cores = f"{os.cpu_count()} cores, {torch.get_num_threads()} torch threads"
    yield Finding("devices", "cpu", f"{model}, {cores}, {', '.join(units) or 'no bf16 units'}")
    smi = program_output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    driver = smi.splitlines()[0] if smi else "unknown"
    if not torch.cuda.is_available():
        if smi and torch.version.cuda is None:
            value = f"driver {driver} shows a GPU, but torch {torch.__version__} is built without CUDA"
            fix = "install a CUDA build of torch: https://pytorch.org/get-started"
            yield Finding("devices", "cuda", value, "warn", fix)
        else:
            yield Finding("devices", "cuda", "no device")
        return
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        memory = f"{gpu.total_memory / 2**30:.0f} GiB"
        value = f"{gpu.name}, compute capability {gpu.major}.{gpu.minor}, {memory}"
        value += f", driver {driver}, CUDA {torch.version.cuda}"
        yield Finding("devices", f"cuda:{index}", value)


def _compilers() -> Iterator[Finding]:
    for name, purpose in (("nvcc", "builds lorafuse._cuda"), ("g++", "builds lorafuse._cpu and _emu")):
        version = re.search(r"\d+\.\d+(\.\d+)?", program_output(name, "--version"))
        value = f"{version[0]} ({shutil.which(name)})" if version else f"not found on PATH; it {purpose}"
        yield Finding("compilers", name, value)
    yield _module("_cuda", "optional: the CUDA kernels for Hopper")
    yield _module("_emu", "optional: the same on a CPU, for tests")
    reason, shown = cpu_decoding.why_not(), "lorafuse._cpu"
    if reason:
        value = f"not used (optional: decodes quantized weights and multiplies by the rank on CPUs): {reason}"
        yield Finding("compilers", shown, value, "warn", native.how_to_build("_cpu"))
    else:
        reason = aten_rank.why_not()
        value = f"; torch multiplies by the rank: {reason}" if reason else ", activates, multiplies by the rank in fp32"
        if not reason:
            reason = aten_blocks.why_not()
            value += f"; torch multiplies by weights: {reason}" if reason else " and by weights, block by block"
        yield Finding("compilers", shown, f"decodes quantized weights on CPUs{value}")


def _module(name: str, purpose: str) -> Finding:
    """What csrc was compiled to: for which architectures, from which sources; or why not, and how to."""
    shown = f"lorafuse.{name}"
    if not native.built(name):
        why = native.why_not_built() if name == "_cuda" else ""
        value = f"not built ({purpose})" + (f": {why}" if why else "")
        return Finding("compilers", shown, value, "warn", native.how_to_build(name))
    if reason := native.stale(name):
        return Finding("compilers", shown, reason, "warn", native.how_to_build(name))
    return Finding("compilers", shown, native.describe(name))


def _backends() -> Iterator[Finding]:
    for name in base.BACKENDS:
        state = base.availability(name)
        if state.ok:
            yield Finding("backends", name, "available")
        else:
            yield Finding("backends", name, f"not available: {state.reason}", "warn", state.fix)


def _environment() -> Iterator[Finding]:
    for variable in env.VARIABLES.values():
        value = env.get(variable.name)
        note = " (default)" if value == variable.default else ""
        yield Finding("environment", variable.name, value + note)


def _measurements() -> Iterator[Finding]:
    """What `lorafuse tune` has kept, a file a GPU model; nothing where it never ran."""
    for path in sorted((env.cache_dir() / "tuned").glob("*.json")):
        try:
            entries = tuned.read(path, own=True)
        except ValueError as error:
            # plans follow the model then
            yield Finding("measurements", path.stem, str(error), "warn", f"rm {shlex.quote(str(path))}")
            continue
        dates = sorted(entry.date for entry in entries)
        value = f"{path}: {len(entries)} entries" + (f", the last of {dates[-1]}" if dates else "")
        known = ((name, installed(name)) for name in ("torch", "triton"))
        old = [
            f"{name} {version}"
            for name, version in known
            if any(entry.conditions.get(name, version) != version for entry in entries)
        ]
        if old:
            value += f"; some were measured with another version than {' and '.join(old)}"
        fix = "run lorafuse tune --again" if old else ""
        yield Finding("measurements", path.stem, value, "warn" if old else "ok", fix)


def _self_test() -> Iterator[Finding]:
    devices = ["cpu"] + [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    for device in devices:
        for backend in base.candidates(torch.device(device).type):
            for dtype in (torch.float32, torch.bfloat16):
                if backend != "cuda" or (dtype is torch.bfloat16 and _is_hopper(device)):
                    yield _self_test_one(backend, device, dtype)
    if native.built("_emu") and base.availability(base.EMULATOR).ok:
        yield _self_test_one(base.EMULATOR, "cpu", torch.bfloat16)


def _is_hopper(device: str) -> bool:
    return torch.cuda.get_device_capability(device) == (9, 0)


def _self_test_one(backend: str, device: str, dtype: torch.dtype) -> Finding:
    """The worst relative L2 error of y and of every gradient against the formula in fp64, for one backend."""
    name = f"{backend} {device} {str(dtype).removeprefix('torch.')}"
    scale = 2.0
    generator = torch.Generator().manual_seed(0)
    # b is not zero: at LoRA's initialization the whole low-rank term could be missing unseen
    x, w, a, b, dy = (
        torch.randn(shape, generator=generator).to(dtype).double()
        for shape in ((64, 96), (80, 96), (8, 96), (80, 8), (64, 80))
    )
    expected = numerics.lora_formula(x, w, a, b, dy, scale)
    leaf_x, leaf_a, leaf_b = (t.to(device, dtype).requires_grad_() for t in (x, a, b))
    try:
        y = functional.lora_linear(leaf_x, w.to(device, dtype), leaf_a, leaf_b, scale=scale, backend=backend)
        dx, da, db = torch.autograd.grad(y, (leaf_x, leaf_a, leaf_b), dy.to(device, dtype))
    except RuntimeError as error:
        return Finding("self-test", name, f"raised {type(error).__name__}: {error}", "fail", _REPORT_IT)
    actual = {"y": y.detach(), "dx": dx, "da": da, "db": db}
    errors = {key: numerics.relative_l2(actual[key].double().cpu(), expected[key]) for key in expected}
    worst = max(errors, key=lambda key: errors[key])
    bound = numerics.tolerance(dtype)
    # written so that a NaN error fails
    ok = all(error <= bound for error in errors.values())
    value = f"worst relative error {errors[worst]:.1e} ({worst}), bound {bound:.1e}"
    return Finding("self-test", name, value, "ok" if ok else "fail", "" if ok else _REPORT_IT)


def _require_rich() -> None:
    if installed("rich") is None:
        raise MissingDependency("the table needs rich: pip install rich, or use --json")


def render(listed: list[Finding], healthy: bool) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for title in ("", "what", "found"):
        table.add_column(title, overflow="fold")
    section = ""
    for finding in listed:
        if finding.section != section:
            section = finding.section
            table.add_section()
            table.add_row("", f"[bold]{section}[/bold]", "")
        mark = f"[{_COLOURS[finding.status]}]{finding.status}[/]"
        fix = f"\nfix: {escape(finding.fix)}" if finding.fix else ""
        table.add_row(mark, finding.name, escape(finding.value) + fix)
    console = _common.console()
    console.print(table)
    failed = [finding.name for finding in listed if finding.status == "fail"]
    console.print("\nhealthy" if healthy else f"\nnot healthy: {', '.join(failed)}")
