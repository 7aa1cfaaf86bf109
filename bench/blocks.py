"""Products with a whole weight on a CPU, low-rank product included, in fp32: those of csrc/cpu in blocks of columns
(`lorafuse.backends.aten_blocks`), and torch's.

    OMP_NUM_THREADS=2 python bench/blocks.py --shape 576,576 1536,576 --m 16 128 1024 [--rank 16] [--rounds 40] [--cpu]

Shapes are N,K. Medians in us of torch and of ours, all in turn: y and dx of a dense weight, and of one in NF4, which
torch multiplies after it was decoded whole. Elapsed time or, with --cpu, that of the process.
"""

import argparse
import time

import torch
from rank import Pair, medians
from torch import Tensor
from torch.nn import functional as F

from lorafuse.backends import aten_blocks, aten_rank
from lorafuse.operands import LowRank, Weight
from lorafuse.tune.stored import random_weight


def torchs(x: Tensor, w: Weight, low: LowRank, whole: Tensor) -> Tensor:
    """The product without blocks, as the eager backend computes it elsewhere."""
    if w.format != "dense":
        w = w.decoded(torch.float32, whole)
    y = F.linear(x, w.left())
    if aten_rank.adds(low.xa, low.b, low.is_transposed, *y.shape):
        return aten_rank.add(y, low.xa, low.b, low.is_transposed, low.scale)
    return y.addmm_(low.xa, low.b if low.is_transposed else low.b.t(), alpha=low.scale)


def forms(M: int, N: int, K: int, R: int) -> dict[str, Pair]:
    """`(torch's, ours)` by form."""
    whole, pairs = torch.empty(N, K), {}
    for name, w in (
        ("dense", Weight(torch.randn(N, K))),
        ("nf4", random_weight("nf4", N, K, torch.float32, torch.device("cpu"))),
    ):
        for of, weight in (("y", w), ("dx", w.t)):
            n, k = weight.sizes
            x, low = torch.randn(M, k), LowRank(torch.randn(M, R), torch.randn(n, R), 0.1)
            pairs[f"{name} {of}"] = (
                lambda x=x, w=weight, low=low: torchs(x, w, low, whole),
                lambda x=x, w=weight, low=low: aten_blocks.product(x, w, None, low),
            )
    return pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", default=["576,576", "192,576", "1536,576", "576,1536"], metavar="N,K")
    parser.add_argument("--m", nargs="+", type=int, default=[16, 128, 512, 1024])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--cpu", action="store_true", help="the process's CPU time instead of elapsed time")
    args = parser.parse_args()
    if reason := aten_blocks.why_not():
        parser.error(f"torch alone multiplies here: {reason}")
    clock = time.process_time_ns if args.cpu else time.perf_counter_ns
    print(f"{torch.get_num_threads()} threads, us of torch / ours")
    for M in args.m:
        for shape in args.shape:
            N, K = map(int, shape.split(","))
            of = medians(forms(M, N, K, args.rank), args.rounds, clock)
            shown = ", ".join(f"{name} {theirs:.0f} / {ours:.0f}" for name, (theirs, ours) in of.items())
            print(f"M {M}, {N} x {K}: {shown}", flush=True)


if __name__ == "__main__":
    main()
