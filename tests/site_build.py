"""Builds the documentation's site: mkdocs and its parts lie in an overlay, build/docs, outside the environment."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
REQUIREMENTS = ROOT / "requirements" / "docs.txt"
OVERLAY = ROOT / "build" / "docs"


def overlay() -> Path:
    """The folder with mkdocs, installed anew where requirements/docs.txt or Python changed.

    Raises subprocess.CalledProcessError, with pip's words in stderr, where it cannot be installed.
    """
    digest = hashlib.sha256(REQUIREMENTS.read_bytes() + sys.version.encode()).hexdigest()
    stamp = OVERLAY / "stamp"
    if not stamp.exists() or stamp.read_text() != digest:
        shutil.rmtree(OVERLAY, ignore_errors=True)
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile"]
        command = [*pip, "--target", str(OVERLAY), "-r", str(REQUIREMENTS)]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
        stamp.write_text(digest)
    return OVERLAY


def build(site: str, root: Path = ROOT) -> int:
    """Build the site of a checkout, every warning an error; what mkdocs says goes to stderr, its status is returned."""
    variables = {**os.environ, "PYTHONPATH": str(overlay()), "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(Path(site).resolve())]
    return subprocess.run(command, cwd=root, env=variables, timeout=300).returncode
