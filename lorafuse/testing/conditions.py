"""The conditions of a measurement, at the top of every table and result file."""

import datetime
import importlib.util
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

import torch

__all__ = ["conditions", "cpu", "describe", "program_output"]

_PACKAGES = ("torch", "triton", "peft", "transformers")


def conditions(device: torch.device) -> dict[str, str]:
    """Device, its power limit and driver or the CPU's threads, versions, commit and date."""
    model, flags = cpu()
    setting = {"device": model + (" with AMX" if "amx_bf16" in flags else ""), "threads": str(torch.get_num_threads())}
    if device.type == "cuda":
        setting = {"device": torch.cuda.get_device_name(device), "cuda": str(torch.version.cuda)}
        query = ("nvidia-smi", f"--id={device.index or 0}", "--query-gpu=power.limit,driver_version")
        answer = program_output(*query, "--format=csv,noheader")
        if answer:
            setting["power limit"], _, setting["driver"] = answer.partition(", ")
    setting["python"] = platform.python_version()
    for package in _PACKAGES:
        if importlib.util.find_spec(package) is not None:
            setting[package] = metadata.version(package)
    from lorafuse import __version__

    setting["lorafuse"] = __version__
    root = Path(__file__).parents[2]
    commit = (
        program_output("git", "-C", str(root), "rev-parse", "--short=12", "HEAD") if (root / ".git").exists() else ""
    )
    if commit:
        changed = program_output("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no")
        setting["commit"] = commit + ("+changes" if changed else "")
    setting["date"] = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    return setting


def describe(setting: dict[str, str]) -> str:
    """The conditions in one line."""
    return ", ".join(value if key == "device" else f"{key} {value}" for key, value in setting.items())


def cpu() -> tuple[str, set[str]]:
    """Model name and feature flags, from /proc/cpuinfo where there is one."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.processor() or platform.machine(), set()
    lines = (line.partition(":") for line in cpuinfo.read_text().splitlines())
    fields = {key.strip(): value.strip() for key, _, value in lines}
    flags = fields.get("flags") or fields.get("Features") or ""
    return fields.get("model name", platform.machine()), set(flags.split())


def program_output(*command: str) -> str:
    """The output of a program, "" when it is absent or fails."""
    if shutil.which(command[0]) is None:
        return ""
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""
