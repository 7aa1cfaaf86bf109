"""The steps of docs/hopper.md on a Hopper GPU: the bare product against cuBLAS, then what LoRA adds, form by form.

    python bench/hopper.py [--json FILE] [--rank 16] [--rounds 50] [--shape 8192,4096,4096]
    python bench/hopper.py --probes [--json FILE]      the prices of bench/probes.py instead, in three minutes

Needs lorafuse._cuda (`make cuda`). Every result is compared with fp64 first, and none is timed that is wrong. Times are
medians of interleaved calls with L2 filled by a read before each, on normal random data.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import probes
import torch
from torch import Tensor

from lorafuse.files import write_text
from lorafuse.testing.conditions import conditions, describe
from lorafuse.testing.numerics import relative_l2, tolerance
from lorafuse.testing.timing import measure_calls, percentile

SHAPES = ((8192, 4096, 4096), (8192, 8192, 8192))
# (block_n, stages, cluster) of the bare product
TILES = ((128, 4, 1), (128, 4, 2), (256, 3, 1), (256, 3, 2))
GROUP_M = 16
BF16 = 0

Call = Callable[[], Tensor]
Write = Callable[[list[dict[str, Any]]], None]


class Layer:
    """Operands of one shape, bf16, and the launches of the layer's parts, by name."""

    def __init__(self, native: Any, M: int, N: int, K: int, R: int, device: torch.device) -> None:
        self.native, self.M, self.N, self.K, self.R = native, M, N, K, R
        self.stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        generator = torch.Generator(device).manual_seed(0)

        def normal(rows: int, columns: int, size: float = 1.0) -> Tensor:
            return (torch.randn(rows, columns, generator=generator, device=device) * size).bfloat16()

        self.x, self.w, self.dy = normal(M, K), normal(N, K, K**-0.5), normal(M, N)
        self.a, self.b = normal(R, K, K**-0.5), normal(N, R, R**-0.5)
        self.y, self.dx = torch.empty_like(self.dy), torch.empty_like(self.x)
        self.xa = self.x.new_empty(M, R)
        self.dyb = (self.dy.float() @ self.b.float()).bfloat16()
        # from which blocks draw their tiles
        self.word = torch.zeros(1, dtype=torch.int32, device=device)

    def _linear(self, x: Tensor, y: Tensor, tile: tuple[int, int, int], transposed: bool = False, **low: Any) -> Tensor:
        """y by the main loop, with the low-rank part that `low` names."""
        K, N = (self.N, self.K) if transposed else (self.K, self.N)
        self.native.linear(
            type=BF16, M=self.M, N=N, K=K, R=self.R if low else 0, transposed=transposed, x=x.data_ptr(),
            stride_x=x.stride(0), w=self.w.data_ptr(), stride_w=self.w.stride(0), y=y.data_ptr(), stride_y=y.stride(0),
            tiling=(*tile, GROUP_M, 0), workspace=self.word.data_ptr(), stream=self.stream, **low,
        )  # fmt: skip
        return y

    def gemm(self, tile: tuple[int, int, int]) -> Tensor:
        return self._linear(self.x, self.y, tile)

    def _low(self) -> dict[str, Any]:
        return {"xa": self.xa.data_ptr(), "stride_xa": self.R, "b": self.b.data_ptr(), "stride_b": self.R}

    def two_kernels(self, tile: tuple[int, int, int], overlap: bool) -> Tensor:
        x, a = self.x, self.a
        self.native.project_x(
            type=BF16, a_type=BF16, M=self.M, K=self.K, R=self.R, x=x.data_ptr(), stride_x=x.stride(0), a=a.data_ptr(),
            stride_a=a.stride(0), xa=self.xa.data_ptr(), stride_xa=self.R, stream=self.stream,
        )  # fmt: skip
        return self._linear(x, self.y, tile, overlap_previous=overlap, **self._low())

    def input_gradient(self, tile: tuple[int, int, int], adapted: bool) -> Tensor:
        low = {"xa": self.dyb.data_ptr(), "stride_xa": self.R, "b": self.a.data_ptr(), "stride_b": self.a.stride(0)}
        return self._linear(self.dy, self.dx, tile, transposed=True, **(low if adapted else {}))

    def calls(self) -> dict[str, tuple[Call, str]]:
        """`{name: (call, which reference)}`."""
        best = TILES[-1]
        calls: dict[str, tuple[Call, str]] = {"cuBLAS forward": (lambda: torch.mm(self.x, self.w.t(), out=self.y), "y")}
        for tile in TILES:
            name = f"product, 128x{tile[0]}, {tile[1]} stages, cluster {tile[2]}"
            calls[name] = (lambda tile=tile: self.gemm(tile)), "y"
        calls |= {
            "forward, two kernels": (lambda: self.two_kernels(best, False), "adapted y"),
            "forward, two kernels, overlapped": (lambda: self.two_kernels(best, True), "adapted y"),
        }
        return calls | {
            "cuBLAS input gradient": (lambda: torch.mm(self.dy, self.w, out=self.dx), "dx"),
            "input gradient, frozen": (lambda: self.input_gradient(best, False), "dx"),
            "input gradient, adapted": (lambda: self.input_gradient(best, True), "adapted dx"),
        }

    def references(self) -> dict[str, Tensor]:
        x, w, dy, a, b, dyb = (t.double() for t in (self.x, self.w, self.dy, self.a, self.b, self.dyb))
        y, dx = x @ w.t(), dy @ w
        return {"y": y, "adapted y": y + (x @ a.t()) @ b.t(), "dx": dx, "adapted dx": dx + dyb @ a}


def run_shape(native: Any, shape: tuple[int, int, int], rank: int, rounds: int) -> dict[str, Any] | str:
    """The figures of one shape, or what is wrong."""
    M, N, K = shape
    layer = Layer(native, M, N, K, rank, torch.device("cuda"))
    calls, expected = layer.calls(), layer.references()
    for name, (call, key) in calls.items():
        layer.y.fill_(float("nan"))
        layer.dx.fill_(float("nan"))
        error = relative_l2(call(), expected[key])
        if not error <= tolerance(torch.bfloat16):
            return f"{name} is wrong by {error:.2e} relative, the bound is {tolerance(torch.bfloat16):.0e}"
    del expected
    seconds = measure_calls({n: call for n, (call, _) in calls.items()}, rounds, 10, torch.device("cuda"))
    figures = {}
    for name, values in seconds.items():
        median = statistics.median(values)
        base = statistics.median(seconds["cuBLAS input gradient" if "gradient" in name else "cuBLAS forward"])
        figures[name] = {
            "median": median, "p20": percentile(values, 0.2), "p80": percentile(values, 0.8),
            "of_cublas": base / median, "useful_flops": 2 * M * N * K / median,
        }  # fmt: skip
    return {"M": M, "N": N, "K": K, "R": rank, "rounds": rounds, "calls": figures}


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every median and spread there")
    parser.add_argument("--probes", action="store_true", help="what columns, sums, flags and experts' loops cost")
    parser.add_argument("--rank", type=int, default=16, help="of the adapter, a multiple of 8 (16)")
    parser.add_argument("--rounds", type=int, default=50, help="timed calls of each step (50)")
    parser.add_argument("--shape", action="append", metavar="M,N,K", help="may be repeated (the two of docs/hopper.md)")
    return parser


def run_probes(native: Any, sizes: probes.Sizes, rounds: int, device: torch.device, write: Write) -> int:
    """Measure each probe and write what is done after each; 1 where one was wrong."""
    results, status = [], 0
    for name in probes.PROBES:
        result = probes.measured(native, name, sizes, rounds, device)
        if isinstance(result, str):
            print(f"{name}: no numbers, {result}")
            status = 1
            continue
        results.append(result)
        print("\n".join(probes.described(result)), flush=True)
        write(results)
    return status


def main() -> int:
    """0 when every result was right; 1 when one was not, or the kernels cannot run here."""
    parser = arguments()
    args = parser.parse_args()
    if args.rank < 8 or args.rank % 8 or args.rounds < 1:
        parser.error("--rank must be a multiple of 8, --rounds at least 1")
    try:
        shapes = [tuple(map(int, text.split(","))) for text in args.shape or ()] or list(SHAPES)
        if any(len(shape) != 3 or min(shape) < 1 for shape in shapes):
            raise ValueError
    except ValueError:
        parser.error("--shape must be tokens, out and in features: --shape 8192,4096,4096")
    from lorafuse.backends import base

    state = base.availability("cuda")
    if not state.ok:
        print(f"the CUDA kernels cannot run here: {state.reason}; fix: {state.fix}")
        return 1
    from lorafuse import _cuda  # type: ignore[attr-defined]

    setting = conditions(torch.device("cuda"))
    print(describe(setting))

    def write(results: list[dict[str, Any]]) -> None:
        if args.json:
            write_text(args.json, json.dumps({"conditions": setting, "results": results}, indent=1) + "\n")

    if args.probes:
        return run_probes(_cuda, probes.Sizes(), args.rounds, torch.device("cuda"), write)
    results, status = [], 0
    for shape in shapes:
        result = run_shape(_cuda, shape, args.rank, args.rounds)  # type: ignore[arg-type]
        if isinstance(result, str):
            print(f"{shape}: no numbers, {result}")
            status = 1
            continue
        results.append(result)
        print(f"\nM {result['M']}, N {result['N']}, K {result['K']}, R {result['R']}, bf16")
        for name, figure in result["calls"].items():
            print(
                f"  {name:<42}{figure['median'] * 1e6:9.1f} us [{figure['p20'] * 1e6:.1f}-{figure['p80'] * 1e6:.1f}]"
                f"  {figure['of_cublas']:6.3f} of cuBLAS  {figure['useful_flops'] / 1e12:6.0f} TFLOP/s"
            )
        write(results)
    return status


if __name__ == "__main__":
    sys.exit(main())
