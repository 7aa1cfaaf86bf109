"""Which sources a built extension is of. Standard library only: csrc/build.py runs this file without the package."""

import hashlib
from pathlib import Path

__all__ = ["source_hash"]

# what is not compiled into the module for GPUs, and what into neither
_EMULATOR, _CPU = "emu", "cpu"


def source_hash(csrc: Path, emulated: bool) -> str:
    """A hash of the names and contents of all files that `lorafuse._emu`, or else `lorafuse._cuda`, is built from."""
    digest = hashlib.sha256()
    for path in sorted(csrc.rglob("*")):
        name = path.relative_to(csrc)
        if not path.is_file() or "__pycache__" in name.parts or (name.parts[0] == _EMULATOR and not emulated):
            continue
        if name.parts[0] == _CPU:
            continue
        digest.update(f"{name.as_posix()}\0".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]
