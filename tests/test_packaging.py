"""Wheel and source distribution (T0), built from a checkout full of leftovers; the doctor in an installed wheel."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
import warm_python
import yaml

import lorafuse

pytestmark = pytest.mark.no_poison

ROOT = Path(__file__).parents[1]
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
LIB = f"build/lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}/lorafuse"
# of former builds, of tests, of an editor, and of a build that was interrupted
LEFTOVERS = (
    f"lorafuse/_cuda{SUFFIX}",
    f"lorafuse/_cuda{SUFFIX}.new",
    f"lorafuse/_emu{SUFFIX}",
    f"lorafuse/_cpu{SUFFIX}",
    f"{LIB}/_cuda{SUFFIX}",
    f"{LIB}/_emu{SUFFIX}",
    f"{LIB}/a_module_of_old.py",
    f"build/bdist.{sysconfig.get_platform()}/wheel/lorafuse/_cuda{SUFFIX}",
    "build/csrc/cuda/module.so",
    "csrc/kernels/stale.so",
    "csrc/kernels/linear_sm90.cu.orig",
    "csrc/__pycache__/build.cpython-311.pyc",
    "bench/baselines/__pycache__/peft.cpython-311.pyc",
    "lorafuse/plan/__pycache__/cost.cpython-311.pyc",
    "lorafuse/plan/.0123456789abcdef.tmp",
    "lorafuse/.pytest_cache/README.md",
    "tests/__pycache__/test_cli.cpython-311.pyc",
    "runs/demo/report.json",
)
SOURCES = ("lorafuse", "csrc", "bench/baselines")
PAGES = ("README.md", "CHANGELOG.md", "CITATION.cff")
# stands for csrc/build.py where nvcc is
BUILDS = "import pathlib, sys\nif sys.argv[1] != 'check': pathlib.Path(sys.argv[2]).write_bytes(b'built now')\n"


def files_of(folder):
    clean = [path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    return {str(path.relative_to(ROOT)) for path in clean if ".so" not in path.suffixes}


def built(folder, *what, **variables):
    environment = {**os.environ, **variables, "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "setup.py", "-q", *what]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (folder / "dist").glob("*.whl")
    return zipfile.ZipFile(wheel)


@pytest.fixture(scope="module")
def dirty(tmp_path_factory):
    """A copy of the checkout with leftovers in it, built once before."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in (*SOURCES, *PAGES, "pyproject.toml", "setup.py", "MANIFEST.in", "LICENSE", "tests"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        else:
            shutil.copy(ROOT / name, folder / name)
    for name in LEFTOVERS:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("stale")
    return folder


@pytest.fixture(scope="module")
def wheel(dirty):
    return built(dirty, "sdist", "bdist_wheel", LORAFUSE_SKIP_CUDA_BUILD="1")


def test_a_wheel_holds_what_the_checkout_tracks(wheel):
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    baselines = {f"lorafuse/_baselines/{path.name}" for path in (ROOT / "bench" / "baselines").glob("*.py")}
    # decoding on CPUs is compiled wherever there is a compiler
    compiled = {f"lorafuse/_cpu{SUFFIX}"} if shutil.which(os.environ.get("CXX", "g++")) else set()
    assert names == files_of(ROOT / "lorafuse") | baselines | compiled
    assert all(wheel.read(name).startswith(b"\x7fELF") for name in compiled)


def test_a_source_distribution_holds_what_the_checkout_tracks(wheel, dirty):
    (path,) = (dirty / "dist").glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {m.name.partition("/")[2] for m in archive.getmembers() if m.isfile()}
    made = {name for name in names if ".egg-info/" in name} | {"PKG-INFO", "setup.cfg"}
    kept = {"pyproject.toml", "setup.py", "MANIFEST.in", "LICENSE", *PAGES}
    assert names - made == kept.union(*(files_of(ROOT / folder) for folder in SOURCES))


def test_a_wheel_with_kernels_holds_those_built_now(dirty, wheel):
    shutil.rmtree(dirty / "dist")
    (dirty / "csrc" / "build.py").write_text(BUILDS)
    actual = built(dirty, "bdist_wheel", LORAFUSE_SKIP_CUDA_BUILD="0")
    modules = {name: actual.read(name) for name in actual.namelist() if ".so" in name}
    assert modules == {f"lorafuse/_{name}{SUFFIX}": b"built now" for name in ("cuda", "cpu")}


def test_the_doctor_of_an_installed_wheel_advises_what_exists_there(wheel, tmp_path):
    wheel.extractall(tmp_path / "site")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    # the finder of an editable install would lend the checkout's modules to the wheel's package
    run = "import sys; finders = [f for f in sys.meta_path if '__editable__' in getattr(f, '__module__', '')]; "
    run += "[sys.meta_path.remove(f) for f in finders]; "
    run += "from lorafuse.cli import main; sys.exit(main(['doctor', '--json']))"
    command = [sys.executable, "-c", run]
    done = warm_python.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True, timeout=600
    )
    actual = {finding["name"]: finding for finding in json.loads(done.stdout)["findings"]}
    for name in ("lorafuse._cuda", "lorafuse._emu", "cuda"):
        assert "install lorafuse from its sources" in actual[name]["fix"] or name == "cuda"
    for finding in actual.values():
        assert "make " not in finding["fix"]
        assert "csrc" not in finding["fix"] + finding["value"]


def workflow(name):
    return yaml.safe_load((ROOT / ".github" / "workflows" / f"{name}.yml").read_text())


def test_a_release_is_one_version_everywhere():
    versions = {
        "changes": re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1],
        "citation": yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"],
        "package": lorafuse.__version__,
    }
    assert len(set(versions.values())) == 1, versions


def test_wheels_are_built_for_every_python_and_by_an_nvcc_that_the_build_takes():
    """The commands of .github/workflows run on GitHub alone; what they repeat of this repository is compared."""
    pythons = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', (ROOT / "pyproject.toml").read_text())
    settings = workflow("release")["jobs"]["wheels"]["steps"][1]["env"]
    built = [name.removesuffix("-manylinux_x86_64") for name in settings["CIBW_BUILD"].split()]
    assert built == [f"cp{version.replace('.', '')}" for version in pythons]
    oldest = runpy.run_path(str(ROOT / "csrc" / "build.py"))["OLDEST_NVCC"]
    assert f"cuda-nvcc-{oldest[0]}-{oldest[1]} " in settings["CIBW_BEFORE_ALL_LINUX"]
    assert f"CUDA_HOME=/usr/local/cuda-{oldest[0]}.{oldest[1]}" in settings["CIBW_ENVIRONMENT_LINUX"]


def test_every_issue_is_asked_for_the_doctor():
    templates = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
    forms = [yaml.safe_load(path.read_text()) for path in templates if path.name != "config.yml"]
    assert len(forms) == 3
    for form in forms:
        (doctor,) = [part for part in form["body"] if part.get("id") == "doctor"]
        assert doctor["validations"]["required"]
        assert "lorafuse doctor --json" in doctor["attributes"]["description"]
    commands = workflow("ci")["jobs"]["test"]["steps"]
    assert commands[-1]["run"].startswith("make test")
