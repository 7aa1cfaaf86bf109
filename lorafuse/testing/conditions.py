"""Under what conditions a number was measured: every table and every result file starts with these."""

import datetime
import importlib.util
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

import torch

__all__ = ["conditions", "describe"]

_PACKAGES = ("torch", "triton", "peft", "transformers")


def conditions(device: torch.device) -> dict[str, str]:
    """Device, its power limit and driver or the CPU's threads, versions, commit and date."""
    found = {"device": _cpu_name(), "threads": str(torch.get_num_threads())}
    if device.type == "cuda":
        found = {"device": torch.cuda.get_device_name(device), "cuda": str(torch.version.cuda)}
        if shutil.which("nvidia-smi"):
            query = ["nvidia-smi", f"--id={device.index or 0}", "--query-gpu=power.limit,driver_version"]
            answer = _output([*query, "--format=csv,noheader"])
            found["power limit"], _, found["driver"] = answer.partition(", ")
    found["python"] = platform.python_version()
    for package in _PACKAGES:
        if importlib.util.find_spec(package) is not None:
            found[package] = metadata.version(package)
    from lorafuse import __version__

    found["lorafuse"] = __version__
    root = Path(__file__).parents[2]
    commit = _output(["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"]) if (root / ".git").exists() else ""
    if commit:
        changed = _output(["git", "-C", str(root), "status", "--porcelain", "--untracked-files=no"])
        found["commit"] = commit + ("+changes" if changed else "")
    found["date"] = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    return found


def describe(found: dict[str, str]) -> str:
    """The conditions in one line."""
    return ", ".join(value if key == "device" else f"{key} {value}" for key, value in found.items())


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    amx = " with AMX" if "amx_bf16" in text else ""
    return (names[0] if names else platform.processor() or platform.machine()) + amx


def _output(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""
