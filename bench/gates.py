"""Gated activations of fp32 on a CPU: the one pass of csrc/cpu (`lorafuse.activation`), and torch's operations.

    OMP_NUM_THREADS=2 python bench/gates.py --m 128 512 --inner 1536 [--rounds 40] [--wall]

Medians in us of torch and of ours, all in turn, of h, and of both gradients with h: CPU time of the process or, with
--wall, elapsed. Each call allocates its results and reads operands that 24 MiB of other numbers drove out.
"""

import argparse
import statistics
import time

import torch

from lorafuse import activation
from lorafuse.activation import ACTIVATIONS, GATES, gate_backward, gate_forward


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--m", nargs="+", type=int, default=[128, 512])
    parser.add_argument("--inner", type=int, default=1536)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--wall", action="store_true", help="elapsed time instead of CPU time")
    args = parser.parse_args()
    ours = activation.function()
    if ours is None:
        parser.error("torch alone computes here: lorafuse._cpu is absent or this CPU is not one for it")
    clock = time.perf_counter_ns if args.wall else time.process_time_ns
    # glibc takes the memory of no smaller tensor from the system anew, once one of this size was freed
    torch.zeros(6 << 20)
    others = torch.zeros(6 << 20)
    print(f"{torch.get_num_threads()} threads, us of torch / ours")
    for M in args.m:
        gate, up, given = (torch.randn(M, args.inner) for _ in range(3))
        for name in (*ACTIVATIONS, *GATES):
            times: dict[tuple[str, bool], list[float]] = {}
            for i in range(2 * args.rounds):
                activation.function = lambda is_ours=i % 2: ours if is_ours else None  # type: ignore[assignment]
                for of in ("h", "gradients"):
                    dh = given.clone()
                    others.add_(1)
                    start = clock()
                    if of == "h":
                        gate_forward(name, gate, up)
                    else:
                        gate_backward(name, dh, gate, up, torch.empty_like(gate))
                    times.setdefault((of, bool(i % 2)), []).append((clock() - start) / 1e3)
            shown = (f"{of} {statistics.median(times[of, False]):.0f} / {statistics.median(times[of, True]):.0f}"
                     for of in ("h", "gradients"))  # fmt: skip
            print(f"{M} x {args.inner}, {name}: {', '.join(shown)}", flush=True)


if __name__ == "__main__":
    main()
