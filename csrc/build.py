"""Builds `lorafuse._cuda` with nvcc, or with g++ `lorafuse._emu`, the same kernels on a CPU, or `lorafuse._cpu`, which
decodes weights and multiplies with the rank on CPUs. Standard library only.

    python csrc/build.py check              say which nvcc would build, or why none can (exit status 1)
    python csrc/build.py cuda [FILE] [--only NAME.cu ...] [--debug]
    python csrc/build.py emu [FILE] [--only NAME.cu ...] [--sanitize] [--kernels FOLDER]
    python csrc/build.py cpu [FILE]

FILE is the module; without one it is that of this checkout's package. ninja compiles what changed since the last build;
objects and ptxas' report of each are kept under build/csrc/.
"""

import argparse
import fcntl
import importlib.util
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

CSRC = Path(__file__).resolve().parent
ROOT = CSRC.parent
OLDEST_NVCC = (12, 8)
# nvcc's options by what a file's name ends with: sm_90a holds for its own instructions alone, while memory-bound
# passes serve every GPU from sm_80 on, those of the future through PTX
TARGETS = {
    "_sm90.cu": ("arch=compute_90a,code=sm_90a",),
    "_sm80.cu": ("arch=compute_80,code=sm_80", "arch=compute_90,code=sm_90", "arch=compute_80,code=compute_80"),
}
NVCC_FLAGS = (
    "-std=c++20 -O3 -Xptxas=-v,--warn-on-spills -Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wno-unknown-pragmas "
    "-DLORAFUSE_MOST_LOOKS=0"
)
# a kernel that waits for what never comes stops with a message, after seconds
NVCC_DEBUG_FLAGS = NVCC_FLAGS.replace("MOST_LOOKS=0", f"MOST_LOOKS={2**24}") + " -lineinfo"
GXX_FLAGS = "-std=c++20 -O2 -fPIC -fvisibility=hidden -Wall -Wno-psabi"
# products and sums are rounded apart, as torch rounds them
GXX_CPU_FLAGS = "-std=c++17 -O3 -ffp-contract=off -fPIC -fvisibility=hidden -Wall -Wextra -shared"
# of bindings in modules that only tests load: they compile in two thirds of the time
UNOPTIMIZED = " -O0"
# unoptimized: it compiles in half the time and the tests run small launches
SANITIZE = "-O0 -g1 -fsanitize=address,undefined -fno-sanitize-recover=undefined"

RULES = """
ninja_required_version = 1.10
rule nvcc
  command = {nvcc} {nvcc_flags} $targets -I {csrc}/include -MD -MF $out.d -c $in -o $out > $out.log 2>&1 $
      && {{ grep -i warning $out.log || true; }} || {{ cat $out.log; exit 1; }}
  depfile = $out.d
  deps = gcc
  description = nvcc $in
rule gxx
  command = {gxx} {gxx_flags} $flags -MD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = g++ $in
rule link
  command = {link}
  description = link $out
"""


class Unavailable(Exception):
    """What is needed is not here; the message says what, and how to get it."""


def find_nvcc() -> tuple[str, str]:
    """Path and version of the first nvcc that is new enough. Raises Unavailable."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), None, "/usr/local/cuda"]
    # the packages nvidia-cuda-nvcc, nvidia-nvvm, nvidia-cuda-crt, nvidia-cuda-runtime and nvidia-cuda-cccl of PyPI
    homes += [f"{folder}/nvidia/cu13" for folder in sys.path]
    paths = [f"{home}/bin/nvcc" if home else "" for home in homes]
    paths[2] = shutil.which("nvcc") or ""
    old = []
    for path in paths:
        if not path or not os.access(path, os.X_OK):
            continue
        output = subprocess.run([path, "--version"], capture_output=True, text=True).stdout
        version = re.search(r"V(\d+)\.(\d+)\.(\d+)", output)
        if version and (int(version[1]), int(version[2])) >= OLDEST_NVCC:
            return path, version[0][1:]
        old.append(f"{path} is {version[0][1:] if version else 'of no known version'}")
    oldest = ".".join(map(str, OLDEST_NVCC))
    raise Unavailable(
        f"nvcc {oldest} or newer was not found ({'; '.join(old) or 'nor any other'}): install the CUDA toolkit, or set "
        "CUDA_HOME to where it is"
    )


def find_ninja() -> str:
    neighbour = Path(sys.executable).with_name("ninja")
    path = str(neighbour) if neighbour.exists() else shutil.which("ninja")
    if not path:
        raise Unavailable("ninja was not found: pip install ninja")
    return path


def find_gxx() -> str:
    path = shutil.which(os.environ.get("CXX", "g++"))
    if not path:
        raise Unavailable("g++ was not found: install it, or set CXX to another compiler of C++20")
    return path


def pybind11_include() -> Path:
    """pybind11's headers, else those that torch brings."""
    for package in ("pybind11", "torch"):
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            if (Path(folder) / "include" / "pybind11").is_dir():
                return Path(folder) / "include"
    raise Unavailable("pybind11 was not found: pip install 'pybind11>=3'")


def architectures() -> list[str]:
    codes = {target.split("code=")[1] for targets in TARGETS.values() for target in targets}
    return sorted(codes, key=lambda code: (code.startswith("compute"), code))


def module_file(target: str) -> Path:
    """Where the checkout's own package looks for the module."""
    return ROOT / "lorafuse" / f"_{target}{sysconfig.get_config_var('EXT_SUFFIX')}"


class Ninja:
    """A build of one module, as ninja reads it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lines: list[str] = []
        self.objects: list[str] = []

    def precompile(self, header: Path, flags: str) -> None:
        """Parse a header once for all files that include it; itself it would warn of its `#pragma once`."""
        _write(self.folder / header.name, f'#include "{header}"\n')
        self.lines += [f"build {header.name}.gch: gxx {header.name}", f"  flags = {flags} -x c++-header"]

    def compile(self, rule: str, source: Path, after: str = "", **variables: str) -> None:
        name = "-".join(source.relative_to(CSRC).parts) if source.is_relative_to(CSRC) else source.name
        self.objects.append(f"{name}.o")
        self.lines.append(f"build {name}.o: {rule} {source}" + (f" | {after}" if after else ""))
        self.lines += [f"  {key} = {value}" for key, value in variables.items()]

    def bind(self, include: str, python: str) -> None:
        """Compile what calls the kernels for Python. It takes longest, and begins first."""
        self.compile("gxx", CSRC / "bindings.cpp", flags=f"{include} {python}")

    def run(self, rules: str) -> Path:
        link = f"build module.so: link {' '.join(self.objects)}"
        _write(self.folder / "build.ninja", "\n".join([rules, *self.lines, link, "default module.so", ""]))
        subprocess.run([find_ninja(), "-C", str(self.folder), "-j", str(os.cpu_count() or 1)], check=True)
        return self.folder / "module.so"


def _write(path: Path, text: str) -> None:
    """Leaves the time of a file alone that would not change."""
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def build(
    target: str, out: Path, sanitize: bool = False, kernels: Path = CSRC / "kernels", only: Sequence[str] = (),
    debug: bool = False,
) -> None:  # fmt: skip
    """Build a module and put it at `out`. Raises Unavailable, or CalledProcessError for sources that do not compile.

    `only` names the kernels' files that are compiled: functions of others are looked up when they are called, so that
    the module loads with RTLD_LAZY alone. With `debug`, a kernel that waits too long stops with a message.
    """
    emulated = target == "emu"
    nvcc, version = ("", "") if emulated else find_nvcc()
    gxx = find_gxx()
    copied = kernels != CSRC / "kernels"
    folder = (
        ROOT
        / "build"
        / "csrc"
        / (target + ("-sanitize" if sanitize else "") + ("-copied" if copied else "") + ("-debug" if debug else ""))
    )
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        # tests and installations may build at the same time
        fcntl.flock(lock, fcntl.LOCK_EX)
        ninja = Ninja(folder)
        units = [kernels / name for name in sorted(only)] if only else sorted(kernels.glob("*.cu"))
        include = f"-I {CSRC}/include"
        python = f"-I {sysconfig.get_path('include')} -isystem {pybind11_include()} -DLORAFUSE_MODULE=_{target}"
        if emulated:
            compiler = subprocess.run([gxx, "--version"], capture_output=True, text=True).stdout.splitlines()[0]
            info = {"compiler": compiler, "architectures": [], "kernels": str(kernels) if copied else "csrc/kernels"}
            include = f"-I {CSRC}/emu/include {include}"
            python += " -DLORAFUSE_EMULATED"
            ninja.bind(include, python + UNOPTIMIZED)
            # a launch takes as long: most of its time is the emulator's own
            flags = f"{include} -x c++{'' if sanitize else ' -O1'}"
            ninja.precompile(CSRC / "emu" / "kernels.hpp", flags)
            for source in units:
                ninja.compile("gxx", source, after="kernels.hpp.gch", flags=f"-include kernels.hpp {flags}")
            # tests build from a copy, and let no warning of the emulator's own sources pass
            strict = " -Wextra -Werror" if copied else ""
            ninja.precompile(CSRC / "emu" / "engine.hpp", include + strict)
            for source in sorted((CSRC / "emu").glob("*.cpp")):
                ninja.compile("gxx", source, after="engine.hpp.gch", flags=f"-include engine.hpp {include}{strict}")
            link = f"{gxx} -shared{' -Wl,-z,lazy' if only else ''} $in -o $out"
        else:
            info = {"compiler": f"nvcc {version}{' --debug' if debug else ''}", "architectures": architectures()}
            ninja.bind(include, python + (UNOPTIMIZED if only else ""))
            for source in units:
                (ending,) = (e for e in TARGETS if source.name.endswith(e))
                ninja.compile("nvcc", source, targets=" ".join(f"-gencode {t}" for t in TARGETS[ending]))
            link = (
                f"{nvcc} -shared -cudart=static -Xlinker=--exclude-libs=ALL,-s{',-z,lazy' if only else ''} $in -o $out"
            )
        sources = runpy.run_path(str(ROOT / "lorafuse" / "backends" / "native_sources.py"))
        info["sources"] = sources["source_hash"](CSRC, emulated)
        text = json.dumps(json.dumps(info))
        declared = "const char* const lorafuse_build_info"
        _write(folder / "build_info.cpp", f"extern {declared};\n{declared} = {text};\n")
        ninja.compile("gxx", folder / "build_info.cpp")
        gxx_flags = f"{GXX_FLAGS} {SANITIZE}" if sanitize else GXX_FLAGS
        if sanitize:
            link += " -fsanitize=address,undefined"
        nvcc_flags = NVCC_DEBUG_FLAGS if debug else NVCC_FLAGS
        rules = RULES.format(nvcc=nvcc, nvcc_flags=nvcc_flags, gxx=gxx, gxx_flags=gxx_flags, csrc=CSRC, link=link)
        built = ninja.run(rules)
        out.parent.mkdir(parents=True, exist_ok=True)
        # a process that runs the former module keeps it
        unfinished = out.with_name(f"{out.name}.new")
        shutil.copy2(built, unfinished)
        os.replace(unfinished, out)


def build_cpu(out: Path) -> None:
    """`lorafuse._cpu`, which ctypes loads; raises as `build`."""
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = out.with_name(f"{out.name}.{os.getpid()}.new")
    sources = sorted((CSRC / "cpu").glob("*.cpp"))
    subprocess.run([find_gxx(), *GXX_CPU_FLAGS.split(), *sources, "-o", unfinished], check=True)
    os.replace(unfinished, out)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("check", "cuda", "emu", "cpu"))
    parser.add_argument("file", nargs="?", type=Path, help="of the module; without it, in this checkout's package")
    parser.add_argument("--sanitize", action="store_true", help="emu: with AddressSanitizer and UBSan")
    parser.add_argument("--kernels", type=Path, default=CSRC / "kernels", help="emu: compile these (tests plant bugs)")
    parser.add_argument("--only", nargs="+", default=(), metavar="NAME", help="a FILE with these of csrc/kernels")
    parser.add_argument("--debug", action="store_true", help="cuda: a kernel that waits too long stops with a message")
    return parser


def main() -> int:
    parser = arguments()
    args = parser.parse_args()
    if args.debug and args.what != "cuda":
        parser.error("--debug is for cuda: the emulator reports what never comes in any build")
    if args.only and (args.what == "cpu" or not args.file):
        parser.error("--only is for a FILE: a module that lacks kernels is not that of the package")
    if args.what != "emu" and (args.sanitize or args.kernels != CSRC / "kernels"):
        parser.error("--sanitize and --kernels are for emu")
    try:
        if args.what == "check":
            nvcc, version = find_nvcc()
            for find in (find_gxx, find_ninja, pybind11_include):
                find()
            print(f"nvcc {version} ({nvcc})")
        elif args.what == "cpu":
            build_cpu(args.file or module_file("cpu"))
        else:
            out = args.file or module_file(args.what)
            build(args.what, out, args.sanitize, args.kernels.resolve(), args.only, args.debug)
    except Unavailable as reason:
        print(reason, file=sys.stderr)
        return 1
    except subprocess.CalledProcessError as error:
        return error.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
