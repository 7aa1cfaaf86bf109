"""The version, and the extensions of csrc; the rest is in pyproject.toml. Importing lorafuse here would need torch.

`build_ext` builds `lorafuse._cuda` where nvcc is, `lorafuse._cpu` where g++ is, and `lorafuse._emu` where
LORAFUSE_BUILD_EMULATOR is 1; LORAFUSE_SKIP_CUDA_BUILD=1 leaves the first out. Without nvcc it says so, and lorafuse
runs without CUDA kernels; without g++ it decodes quantized weights on CPUs more slowly.
`build_py` copies bench/baselines into the package, for `lorafuse bench` without a checkout. A wheel holds what
this build makes, nothing that an earlier one left.
"""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import SetupError

ROOT = Path(__file__).parent
BUILD = ROOT / "csrc" / "build.py"


def read_version() -> str:
    """`__version__` of lorafuse/__init__.py; raises RuntimeError if it is not assigned there."""
    path = ROOT / "lorafuse" / "__init__.py"
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and any(getattr(t, "id", "") == "__version__" for t in node.targets):
            return str(ast.literal_eval(node.value))
    raise RuntimeError(f'{path} has no line `__version__ = "x.y.z"`: add one')


class BuildAnew(build):
    """A folder of an earlier build keeps modules that have been renamed, and kernels of other sources."""

    def run(self) -> None:
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class WheelAnew(bdist_wheel):
    """The same for the folder that becomes the wheel, which an interrupted build leaves."""

    def run(self) -> None:
        shutil.rmtree(self.bdist_dir, ignore_errors=True)
        super().run()


class BuildKernels(build_ext):
    """Leaves compiling to csrc/build.py. SetupError skips an optional extension; nvcc's own errors end the build."""

    def build_extension(self, ext: Extension) -> None:
        target = ext.name.removeprefix("lorafuse._")
        if target == "cuda":
            if os.environ.get("LORAFUSE_SKIP_CUDA_BUILD") == "1":
                raise SetupError("LORAFUSE_SKIP_CUDA_BUILD is 1")
            found = subprocess.run([sys.executable, BUILD, "check"], capture_output=True, text=True)
            if found.returncode:
                raise SetupError(found.stderr.strip())
        command = [sys.executable, BUILD, target, self.get_ext_fullpath(ext.name)]
        if target == "cpu":
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise SetupError(done.stderr.strip())
        else:
            subprocess.run(command, check=True)


class CopyBaselines(build_py):
    """`_baselines` is a folder of files that are loaded by path, as bench/baselines/ is; no package."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        folder = Path(self.build_lib) / "lorafuse" / "_baselines"
        self.mkpath(str(folder))
        for file in sorted((ROOT / "bench" / "baselines").glob("*.py")):
            self.copy_file(str(file), str(folder / file.name))


sources = ["csrc/bindings.cpp"]
modules = [Extension("lorafuse._cuda", sources, optional=True)]
on_cpus = [f"csrc/cpu/{name}.cpp" for name in ("columns", "decode", "rank")]
modules.append(Extension("lorafuse._cpu", on_cpus, optional=True))
if os.environ.get("LORAFUSE_BUILD_EMULATOR") == "1":
    modules.append(Extension("lorafuse._emu", sources))

commands = {"build": BuildAnew, "bdist_wheel": WheelAnew, "build_ext": BuildKernels, "build_py": CopyBaselines}
setup(version=read_version(), ext_modules=modules, cmdclass=commands)
