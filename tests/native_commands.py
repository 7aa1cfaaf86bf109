"""How tests build csrc. Run as a script, it builds the emulator: `make` starts that while pip still installs.

Standard library only; the builds need pybind11 and ninja. A test that comes before a build has ended waits for it, and
reports what a build said that failed.
"""

import subprocess
import sys
from pathlib import Path

import planted

__all__ = ["REPORTS", "ROOT", "SANITIZED", "SANITIZED_BUILD", "command"]

ROOT = Path(__file__).parents[1]
# of the build of each module: what ptxas said of every object
REPORTS = ROOT / "build" / "csrc"
# the emulator under AddressSanitizer and UBSan
SANITIZED = REPORTS / "emu-sanitize" / "_emu.so"
# with the units that its tests launch, and those that these refer to by address; the module loads without the others
SANITIZED_BUILD = (
    "emu", str(SANITIZED), "--sanitize", "--only",
    "decode_sm80.cu", "device_sm80.cu", "grouped_dx_sm90.cu", "grouped_forward_sm90.cu", "grouped_sm90.cu",
    "linear_dx_adapter_grads_sm90.cu", "linear_dx_dropout_sm90.cu", "linear_dx_sm90.cu", "linear_forward_sm90.cu",
    "linear_sm90.cu", "round_sm80.cu", "skinny_sm80.cu", "xa_tiles_sm90.cu",
)  # fmt: skip


def command(target, *options):
    """What builds a module; `lorafuse._emu` of kernels with the planted bugs, all of them off."""
    if target == "emu" and "--sanitize" not in options:
        planted.weave(ROOT / "csrc" / "kernels", REPORTS / "planted")
        options += "--kernels", str(REPORTS / "planted")
    return [sys.executable, str(ROOT / "csrc" / "build.py"), target, *options]


if __name__ == "__main__":
    for build in (("emu",), SANITIZED_BUILD):
        subprocess.run(command(*build), timeout=3600)
