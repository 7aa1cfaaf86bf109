"""PEFT's own LoRA tests, with every model patched as it is made: `make test-peft`.

They come from PEFT's source distribution, at the version in requirements/dev.txt. Offline, many need models of the hub
and fail as PEFT ships it; the tests that pass so must pass with patched models, and with models that are unpatched and
patched again before every forward. Exit status 1 when one does not.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from peft_suite.results import Result, compare  # noqa: E402

CACHE = ROOT / "build" / "peft-tests"
REQUIREMENTS = ROOT / "requirements" / "peft-tests.txt"


def pip(*arguments):
    subprocess.run([sys.executable, "-m", "pip", *arguments, "--quiet", "--no-deps"], check=True, timeout=600)


def distribution():
    """The folder with PEFT's tests, downloaded if they are not there; nothing else of the distribution is in it."""
    (version,) = re.findall(r"^peft==(\S+)", (ROOT / "requirements" / "dev.txt").read_text(), re.MULTILINE)
    folder = CACHE / version
    if not (folder / "pytest.ini").exists():
        # the build tools of .venv, so that pip installs none to read the name and version
        pip("download", "--no-binary", ":all:", "--no-build-isolation", "--dest", str(CACHE), f"peft=={version}")
        with tarfile.open(CACHE / f"peft-{version}.tar.gz") as archive:
            top = f"peft-{version}/"
            members = [member for member in archive if member.name.startswith(f"{top}tests/")]
            for member in members:
                member.name = member.name.removeprefix(top)
            archive.extractall(folder, members, filter="data")
        # the tests import one another as a package, and the distribution lacks the file that makes it one
        (folder / "tests" / "__init__.py").touch()
        (folder / "pytest.ini").write_text("[pytest]\n")
    return folder


def libraries():
    """The folder with what PEFT's tests import and development does not."""
    folder, stamp = CACHE / "libraries", CACHE / "libraries" / REQUIREMENTS.name
    if not stamp.exists() or stamp.read_text() != REQUIREMENTS.read_text():
        pip("install", "--upgrade", "--target", str(folder), "-r", str(REQUIREMENTS))
        stamp.write_text(REQUIREMENTS.read_text())
    return folder


def run(mode, only, options):
    """`{test: Result}` of the LoRA tests in one mode (`peft_suite.plugin.MODES`)."""
    folder = distribution()
    paths = [str(ROOT), str(ROOT / "tests"), str(libraries())]
    # the tests of every method are in the same files; the plugin leaves out those of other methods
    files = sorted(f"tests/{f.name}" for f in (folder / "tests").glob("test_*.py") if "lora" in f.read_text().lower())
    results = CACHE / f"{mode}.json"
    results.unlink(missing_ok=True)
    quiet = ["--quiet", "--tb=no", "--no-summary", "--disable-warnings"]
    plugins = ["-p", "peft_suite.plugin", "-p", "no:cacheprovider", f"--mode={mode}", f"--results={results}"]
    # a file that needs the hub to be read is no reason to stop
    command = [sys.executable, "-m", "pytest", "--continue-on-collection-errors", *quiet, *plugins]
    if only:
        command.append(f"--only={CACHE / only}.json")
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    subprocess.run([*command, *options, *files], cwd=folder, env=environment, check=False, timeout=7200)
    if not results.exists():
        sys.exit(f"pytest stopped before it had results of the mode {mode}")
    return {name: Result(*values) for name, values in json.loads(results.read_text()).items()}


def main():
    parser = argparse.ArgumentParser(
        prog="make test-peft", description=__doc__, epilog="Others go to pytest.", allow_abbrev=False
    )
    parser.add_argument("--modes", default="patched,cycled", help="which to compare with stock (default: %(default)s)")
    given, options = parser.parse_known_args()
    started = time.monotonic()
    stock = run("stock", None, options)
    counts = Counter(result.outcome for result in stock.values())
    print(f"\nstock: {counts['passed']} pass, {counts['failed']} fail (most need the hub), {counts['skipped']} skipped")
    comparisons = {mode: compare(stock, run(mode, "stock", options)) for mode in given.modes.split(",")}
    for mode, comparison in comparisons.items():
        print(f"\n{mode}: {comparison}")
    print(f"\n{time.monotonic() - started:.0f} s")
    sys.exit(not all(comparison.is_good for comparison in comparisons.values()))


if __name__ == "__main__":
    main()
