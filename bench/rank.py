"""Products with the rank on a CPU, of one layer in fp32: those of csrc/cpu (`lorafuse.backends.aten_rank`) and torch's.

    OMP_NUM_THREADS=2 python bench/rank.py --shape 576,576 1536,576 --m 16 128 1024 --rank 16 [--rounds 40] [--wall]

Shapes are N,K. Of each form the medians in us of torch and of ours, all in turn, and last what each takes of the two
base products: CPU time of the process or, with --wall, elapsed. xa, dyb with db, and da read x or dy; y and dx are
added to.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable

import torch
from torch.nn import functional as F

from lorafuse.backends import aten_rank

Pair = tuple[Callable[[], object], Callable[[], object]]


def forms(M: int, N: int, K: int, R: int) -> dict[str, Pair]:
    """`(torch's, ours)` by form."""
    x, w, dy, a, b = (torch.randn(sizes) for sizes in ((M, K), (N, K), (M, N), (R, K), (N, R)))
    xa, dyb, y, dx, none = x @ a.t(), dy @ b, torch.randn(M, N), torch.randn(M, K), torch.zeros(())
    return {
        "base": (lambda: F.linear(x, w), lambda: torch.mm(dy, w)),
        "xa": (lambda: F.linear(x, a), lambda: aten_rank.project(x, a, False, 1.0)),
        "y": (lambda: y.addmm_(xa, b.t(), alpha=0.1), lambda: aten_rank.add(y, xa, b, False, 0.1)),
        "dyb, db": (
            lambda: (torch.mm(dy, b).mul_(2.0), torch.addmm(none, dy.t(), xa, beta=0, alpha=2.0)),
            lambda: aten_rank.project_outer(dy, b, xa, 2.0),
        ),
        "dx": (lambda: dx.addmm_(dyb, a, alpha=0.1), lambda: aten_rank.add(dx, dyb, a, True, 0.1)),
        "da": (lambda: torch.mm(dyb.t(), x), lambda: aten_rank.outer(dyb, x, a, False, 1.0)),
    }


def medians(pairs: dict[str, Pair], rounds: int, clock: Callable[[], int]) -> dict[str, tuple[float, float]]:
    """us of each, all in turn."""
    calls = [(name, i) for name in pairs for i in (0, 1)]
    times: dict[tuple[str, int], list[float]] = {call: [] for call in calls}
    for _ in range(rounds + 2):
        random.shuffle(calls)
        for name, i in calls:
            start = clock()
            pairs[name][i]()
            times[name, i].append((clock() - start) / 1e3)
    return {name: tuple(statistics.median(times[name, i][2:]) for i in (0, 1)) for name in pairs}  # type: ignore[misc]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", default=["576,576", "192,576", "1536,576", "576,1536"], metavar="N,K")
    parser.add_argument("--m", nargs="+", type=int, default=[128, 1024])
    parser.add_argument("--rank", nargs="+", type=int, default=[16])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--wall", action="store_true", help="elapsed time instead of CPU time")
    args = parser.parse_args()
    if reason := aten_rank.why_not():
        parser.error(f"torch alone multiplies here: {reason}")
    clock = time.perf_counter_ns if args.wall else time.process_time_ns
    print(f"{torch.get_num_threads()} threads, us of torch / ours")
    for M in args.m:
        for shape in args.shape:
            for R in args.rank:
                N, K = map(int, shape.split(","))
                of = medians(forms(M, N, K, R), args.rounds, clock)
                base = sum(of.pop("base"))
                tax = (100 * sum(times[i] for times in of.values()) / base for i in (0, 1))
                shown = ", ".join(f"{name} {theirs:.0f} / {ours:.0f}" for name, (theirs, ours) in of.items())
                print(
                    f"M {M}, {N} x {K}, R {R}: base {base:.0f}; {shown}; {next(tax):.1f} / {next(tax):.1f} %",
                    flush=True,
                )


if __name__ == "__main__":
    main()
