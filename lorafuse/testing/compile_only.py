"""What the compiler makes of every kernel configuration that the planner can emit, on a machine without a GPU.

    python -m lorafuse.testing.compile_only sm_90 [--part 0/4] [--all] [--record FILE] [--json FILE]

The kernels' own launchers run on meta tensors behind a driver that launches nothing: what is compiled is what a GPU is
given, specializations included. Registers, stack and instructions are read from the binary with the cuobjdump and
nvdisasm of the Triton wheel. What a record holds under the digest of all that the compiler is given is read there.
"""

import argparse
import contextlib
import functools
import inspect
import itertools
import json
import re
import struct
import subprocess
import sys
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from lorafuse.kernels import lowrank, matmul
from lorafuse.plan import DEVICES, DeviceSpec, KernelConfig, Problem
from lorafuse.plan.configs_triton import candidates
from lorafuse.testing import (
    compile_columns,
    compile_decode,
    compile_multi,
    compile_ragged,
    compile_record,
    compile_routing,
    compile_siblings,
    compile_tickets,
)
from lorafuse.testing.compile_record import sample

__all__ = ["TARGETS", "Resources", "Variant", "compile_variants", "sample", "variants"]

# name: (compiler target, architecture whose configurations the planner would use)
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 80),
    "sm_89": (GPUTarget("cuda", 89, 32), 89),
    "sm_90": (GPUTarget("cuda", 90, 32), 90),
    "sm_100": (GPUTarget("cuda", 100, 32), 100),
    "sm_120": (GPUTarget("cuda", 120, 32), 120),
    # no plan is made for AMD GPUs; this keeps the kernels' source compilable for them, aligned problems only
    "gfx942": (GPUTarget("hip", "gfx942", 64), 89),
}
# (kernel, its configuration, whether it is one of backward)
_DENSE = (
    ("project", "project", False), ("y", "matmul", False), ("project_outer", "project_outer", True),
    ("reduce", "reduce", True), ("dx", "matmul", True), ("outer", "outer", True),
)  # fmt: skip
_RAGGED = (
    ("ragged", "matmul", False), ("activate", "matmul", False), ("activate_backward", "matmul", True),
    ("ragged_project", "project", False), ("ragged_outer", "outer", True),
)  # fmt: skip
_BACKWARD = {kernel for kernel, _, backward in (*_DENSE, *_RAGGED) if backward}
_BACKWARD |= {"multi_dx", "multi_outer", "packed_dx", "tickets_dx"}
# of the main loop over ragged rows: y of gathered rows, y, dx; an activation and its backward, of gate and up
# concatenated (their weights as nn.Linear stores them, or transposed), interleaved and transposed as gpt-oss has them,
# and without a gate
_LAYOUTS = ("concatenated", "transposed", "interleaved", "ungated")
EPILOGUES = {"ragged": ("gathered", "y", "dx"), "activate": _LAYOUTS, "activate_backward": _LAYOUTS}
# matrix instructions by what each architecture calls them
_INSTRUCTIONS = ("HGMMA", "HMMA", "UTCHMMA", "UTMALDG", "FFMA", "v_mfma")
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Variant:
    """One specialization of a kernel: its configuration, and what the operands make of it."""

    kernel: str
    config: KernelConfig
    dtype: str
    adapter_dtype: str = "float32"
    dropout: bool = False
    rank_tiles: int = 1
    aligned: bool = True
    epilogue: str = ""
    wide: bool = False

    @property
    def name(self) -> str:
        c = self.config
        tile = "x".join(str(size) for size in (c.block_m, c.block_n, c.block_k) if size)
        if self.kernel == "decode" or c.kernel == "columns":
            return " ".join(part for part in (self.kernel, self.epilogue, self.dtype) if part)
        parts = [self.kernel, c.form, tile, f"r{c.block_r * self.rank_tiles}", f"{c.stages}stages", f"{c.warps}warps"]
        parts += [self.dtype, "" if self.adapter_dtype == "float32" else f"adapter-{self.adapter_dtype}"]
        flags = (self.dropout, "dropout"), (not self.aligned, "unaligned"), (self.wide, "wide")
        parts += [self.epilogue, *(word for holds, word in flags if holds)]
        return " ".join(part for part in parts if part)

    @property
    def problem(self) -> Problem:
        """One that has this variant."""
        given = Problem(8192, 4096, 4096, 16, self.dtype, self.adapter_dtype)
        if self.kernel in compile_siblings.KERNELS:
            return compile_siblings.problem(self.kernel, given)
        return _problem(self.kernel, given)


@dataclass(frozen=True)
class Resources:
    """Registers and stack bytes of a thread, shared memory of a program in bytes, instructions by name.

    `digest` is that of what was compiled (compile_record.py).
    """

    registers: int
    stack: int
    shared: int
    instructions: dict[str, int]
    digest: str


def variants(target: str, everything: bool) -> list[Variant]:
    """All specializations that plans of a target can lead to; without `everything` only those whose resources differ.

    Those are bfloat16 and float32 with fp32 adapters, which hold more registers than adapters of half the size.
    """
    arch = TARGETS[target][1]
    device = next(spec for spec in DEVICES.values() if spec.arch == arch)
    chosen = set()
    dtypes = ("bfloat16", "float16", "float32") if everything else ("bfloat16", "float32")
    alignments = (True,) if target == "gfx942" else (True, False)
    # fp32 xa and dyb over fp16
    kinds = [(dtype, False) for dtype in dtypes] + [("float16", True)] * everything
    sizes = itertools.product(kinds, (16, 32, 64, 128, 256), alignments, (True, False))
    for (dtype, wide), R, aligned, dropout in sizes:
        problem = Problem(8192, 4096, 4096, R, dtype, "float32", dropout=dropout, aligned=aligned, wide=wide)
        for kernel, of, _ in _DENSE:
            for config in candidates(of, _problem(kernel, problem), device):
                masked = dropout and kernel in ("project", "dx", "outer")
                # one rank tile is a kernel of its own, more of them are a loop
                tiles = min(2, R // config.block_r) if kernel in ("y", "dx") else 1
                adapters = ("float32", dtype) if everything and kernel not in ("outer", "reduce") else ("float32",)
                # a limit of registers is ptxas's
                config = replace(config, splits=1, max_registers=0 if target == "gfx942" else config.max_registers)
                chosen |= {
                    Variant(kernel, config, dtype, adapter, masked, tiles, aligned, wide=wide) for adapter in adapters
                }
        for kernel, config in compile_siblings.configs(problem, device, everything):
            config = replace(config, max_registers=0 if target == "gfx942" else config.max_registers)
            tiles = min(2, R // config.block_r)
            chosen.add(Variant(kernel, config, dtype, "float32", dropout, tiles, aligned, wide=wide))
        if not wide and target != "gfx942":
            of_few = compile_decode.packed_configs(problem, device)
            chosen |= {
                Variant(kernel, config, dtype, "float32", dropout, min(2, R // config.block_r), aligned, case)
                for kernel, config, case in of_few
            }
        if aligned and target != "gfx942":
            tiled = compile_tickets.configs(problem, device, everything)
            ranks = ((kernel, config, min(2, -(-R // config.block_r))) for kernel, config in tiled)
            chosen |= {Variant(kernel, c, dtype, "float32", dropout, tiles) for kernel, c, tiles in ranks}
        if not dropout and not wide and target != "gfx942":
            chosen |= set(_ragged_variants(problem, device, everything))
    cases = itertools.product(dtypes, compile_decode.CASES)
    chosen |= {Variant("decode", compile_decode.CONFIG, dtype, epilogue=case) for dtype, case in cases}
    passes = itertools.product(dtypes, compile_columns.CASES)
    chosen |= {Variant(name, compile_columns.CONFIG, dtype, epilogue=case) for dtype, (name, case) in passes}
    chosen |= {Variant(kernel, compile_decode.CONFIG, "int64") for kernel in compile_routing.KERNELS}
    many = compile_multi.configs(itertools.product(dtypes, alignments if target != "gfx942" else ()), device)
    chosen |= {Variant(*one, dropout=True, aligned=aligned) for one, aligned in many}
    return sorted(chosen, key=lambda v: v.name)


def _problem(kernel: str, problem: Problem) -> Problem:
    """The problem in the direction, with the rows and the epilogue, of a kernel."""
    gradients = ("dx", "da", "db") if kernel in _BACKWARD else ()
    ragged = any(kernel == name for name, *_ in _RAGGED) or kernel in (*compile_multi.KERNELS, compile_tickets.RAGGED)
    epilogue = "gated" if kernel.startswith("activate") else ""
    return replace(problem, gradients=gradients, is_ragged=ragged, groups=128 if ragged else 1, epilogue=epilogue)


def _ragged_variants(problem: Problem, device: DeviceSpec, everything: bool) -> Iterator[Variant]:
    """Those of grouped layers: the main loop with each of its epilogues, forward and with w read transposed."""
    for kernel, of, _ in _RAGGED:
        epilogues = EPILOGUES.get(kernel, ("",))
        for config, epilogue in itertools.product(candidates(of, _problem(kernel, problem), device), epilogues):
            tiles = min(2, -(-problem.R // config.block_r)) if kernel in EPILOGUES else 1
            if everything or kernel not in EPILOGUES or _differs(config, epilogue, problem):
                yield Variant(kernel, config, problem.dtype, "float32", False, tiles, problem.aligned, epilogue)


def _differs(config: KernelConfig, epilogue: str, problem: Problem) -> bool:
    """Whether a main loop is of those that need most: the common layouts at every rank, the others at one."""
    common = epilogue in ("gathered", "concatenated")
    if config.block_m >= 64:
        return problem.R in ((16, 32, 64) if common else (32,)) and epilogue != "transposed"
    if problem.itemsize == 2 and problem.aligned:
        return common and problem.R == 32
    shown = epilogue in ("gathered", "concatenated", "interleaved")
    return shown and problem.R in ((16, 64) if epilogue == "gathered" else (64,))


class _Offline:
    """A driver of no device: the compiler asks it for the target, and nobody launches."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_device(self) -> int:
        # a number of its own, because kernels keep what they compiled by device
        return [known for known, _ in TARGETS.values()].index(self.target)

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


@contextlib.contextmanager
def _compiling(target: GPUTarget, known: Callable[[str], Resources | None]) -> Iterator[list[tuple[str, Any]]]:
    """Launches within it compile and do not run; yields the list that receives digests and compiled kernels.

    Where `known` returns the resources of a digest, these stand for the kernel.
    """
    compiled: list[tuple[str, Any]] = []
    run, compile_one = JITFunction.run, JITFunction._do_compile
    readers = "".join(inspect.getsource(reader) for reader in _READERS) + str(_INSTRUCTIONS)

    def compile_it(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        return run(self, *args, grid=grid, warmup=True, **kwargs)

    def compile_unknown(
        self: Any, key: Any, signature: Any, device: Any, constexprs: Any, options: Any, attrs: Any, _: bool
    ) -> Any:
        source, backend = self.ASTSource(self, signature, constexprs, attrs), self.device_caches[device][3]
        digest = compile_record.digest(source, options, backend, readers)
        kernel = known(digest) or self.compile(source, target=target, options=vars(options))
        compiled.append((digest, kernel))
        return kernel

    driver.set_active(_Offline(target))
    compile_record.drop_comments("lorafuse.kernels")
    JITFunction.run, JITFunction._do_compile = compile_it, compile_unknown
    try:
        yield compiled
    finally:
        JITFunction.run, JITFunction._do_compile = run, compile_one


def compile_variants(
    chosen: list[Variant], target: str, known: Callable[[Variant, str], Resources | None] = lambda variant, digest: None
) -> list[Resources]:
    """Compile specializations for a target of `TARGETS` and read what each needs. Reports progress on stderr.

    `known(variant, digest)` returns the resources that stand for what is not to be compiled, or None.
    """
    with _compiling(TARGETS[target][0], lambda digest: known(variant, digest)) as out:
        for i, variant in enumerate(chosen):
            _launch(variant)
            made = "known" if isinstance(out[-1][1], Resources) else "compiled"
            sys.stderr.write(f"[{i + 1}/{len(chosen)}] {target} {variant.name}: {made}\n")
    assert len(out) == len(chosen), "a launch is one kernel"
    fresh = [(digest, kernel) for digest, kernel in out if not isinstance(kernel, Resources)]
    if target == "gfx942":
        read = iter([_resources_amd(digest, kernel) for digest, kernel in fresh])
    else:
        counts = _instructions_nvidia([kernel.asm["cubin"] for _, kernel in fresh], target) if fresh else []
        read = iter([_resources_nvidia(*one, count) for one, count in zip(fresh, counts, strict=True)])
    return [kernel if isinstance(kernel, Resources) else next(read) for _, kernel in out]


def _launch(variant: Variant) -> None:
    c, dtype = variant.config, getattr(torch, variant.dtype)
    # odd sizes and strides are what a problem of no alignment specializes on
    m, n, k = (8192, 4096, 4096) if variant.aligned else (8191, 4097, 4095)
    r = (c.block_r or 16) * variant.rank_tiles

    tensor = functools.partial(compile_decode.meta, of=dtype)
    adapter = getattr(torch, variant.adapter_dtype)
    x, w, dy = tensor(m, k), tensor(n, k), tensor(m, n)
    xa = tensor(m, r, of=torch.float32 if variant.wide else dtype)
    a, b = tensor(r, k, of=adapter), tensor(n, r, of=adapter)
    seed = tensor(1, of=torch.int64) if variant.dropout else None
    p, programs = (0.1 if variant.dropout else 0.0), 132
    if any(variant.kernel == name for name, *_ in _RAGGED):
        compile_ragged.launch(variant, m, n, k, r)
    elif variant.kernel in compile_siblings.KERNELS:
        compile_siblings.launch(variant.kernel, c, dtype, r, variant.aligned, variant.dropout)
    elif variant.kernel in compile_multi.KERNELS:
        compile_multi.launch(variant.kernel, c, dtype, m, n, k)
    elif variant.kernel in compile_decode.PACKED_KERNELS:
        compile_decode.launch_packed(variant.kernel, c, dtype, variant.epilogue, r, variant.aligned, variant.dropout)
    elif variant.kernel in compile_tickets.KERNELS:
        compile_tickets.launch(variant, r)
    elif variant.kernel in compile_routing.KERNELS:
        compile_routing.launch(variant.kernel)
    elif variant.kernel == "decode":
        compile_decode.launch(variant.epilogue, dtype)
    elif c.kernel == "columns":
        compile_columns.launch(variant.kernel, variant.epilogue, dtype)
    elif variant.kernel == "project":
        lowrank.project(x, a, c, seed=seed, p=p, wide=variant.wide)
    elif variant.kernel == "y":
        matmul.matmul(x, w, tensor(n), xa, b, 2.0, programs, c)
    elif variant.kernel == "dx":
        matmul.matmul(dy, w.t(), None, xa, a.t(), None, programs, c, seed=seed, p=p)
    elif variant.kernel == "project_outer":
        lowrank.project_outer(dy, b, xa, True, True, c)
    elif variant.kernel == "outer":
        lowrank.outer_partials(x, xa, c, seed=seed, p=p)
    else:
        part = tensor(8, m, r, of=torch.float32)
        lowrank.sum_partials([(part, xa, 2.0), (part, tensor(m, r, of=adapter), 1.0), (part, xa, 1.0)], c)


def _resources_amd(digest: str, kernel: Any) -> Resources:
    text = kernel.asm["amdgcn"]
    registers, stack = (int(re.search(p, text)[1]) for p in (r"\.vgpr_count:\s+(\d+)", r"; ScratchSize: (\d+)"))  # type: ignore[index]
    return Resources(registers, stack, kernel.metadata.shared, _count([text]), digest)


def _resources_nvidia(digest: str, kernel: Any, instructions: dict[str, int]) -> Resources:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _output(_TOOLS / "cuobjdump", "-res-usage", file.name)
    registers, stack, local = (int(re.search(p, usage)[1]) for p in (r"REG:(\d+)", r"STACK:(\d+)", r"LOCAL:(\d+)"))  # type: ignore[index]
    return Resources(registers, stack + local, kernel.metadata.shared, instructions, digest)


def _instructions_nvidia(cubins: list[bytes], target: str) -> list[dict[str, int]]:
    """Matrix instructions of each kernel. One call disassembles all: nvdisasm needs half a second to start."""
    codes = [_machine_code(cubin) for cubin in cubins]
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(b"".join(codes))
        file.flush()
        text = _output(_TOOLS / "nvdisasm", "--binary", target.replace("sm_", "SM"), file.name)
    # one line an instruction of 16 bytes, behind its address
    lines = re.findall(r"^\s*/\*[0-9a-f]+\*/(.*)$", text, re.MULTILINE)
    assert 16 * len(lines) == sum(map(len, codes)), "nvdisasm read another number of instructions"
    rest = iter(lines)
    return [_count(itertools.islice(rest, len(code) // 16)) for code in codes]


def _machine_code(cubin: bytes) -> bytes:
    """The section of a 64-bit ELF file that holds its kernel's instructions."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<HHH", cubin, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + i * size) for i in range(count)]
    strings = sections[names][4]
    (code,) = (cubin[s[4] : s[4] + s[5]] for s in sections if cubin.startswith(b".text.", strings + s[0]))
    return code


def _count(lines: Iterable[str]) -> dict[str, int]:
    return dict(Counter(re.findall(rf"\b({'|'.join(_INSTRUCTIONS)})", "\n".join(lines))))


def _output(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


_READERS = (_resources_amd, _resources_nvidia, _instructions_nvidia, _machine_code, _count)


def _main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--part", default="0/1", help="of the specializations, by a hash of their names: 0/4 … 3/4")
    parser.add_argument("--all", action="store_true", help="every dtype, not only those whose resources differ")
    parser.add_argument("--record", type=Path, help="{target: {name: resources}} of earlier runs")
    parser.add_argument("--json", type=Path, help="write {name: resources} there")
    args = parser.parse_args()
    part, parts = map(int, args.part.split("/"))
    chosen = [v for v in variants(args.target, args.all) if zlib.crc32(v.name.encode()) % parts == part]
    earlier = json.loads(args.record.read_text()).get(args.target, {}) if args.record else {}
    record = {entry["digest"]: Resources(**entry) for entry in earlier.values()}
    sampled = sample(chosen)
    needs = compile_variants(chosen, args.target, lambda v, digest: None if v.name in sampled else record.get(digest))
    table = {variant.name: asdict(resources) for variant, resources in zip(chosen, needs, strict=True)}
    if args.json:
        args.json.write_text(json.dumps(table, indent=1) + "\n")
    else:
        for name, resources in table.items():
            sys.stdout.write(f"{name}: {resources}\n")
    return 0


if __name__ == "__main__":
    sys.exit(_main())
