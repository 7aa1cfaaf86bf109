"""How long tiles take when other kernels hold SMs: tiles that each program owns, and tiles by ticket. A simulation.

    python bench/schedule.py [--tiles 1024] [--tile 45] [--sms 132] [--held 16] [--microseconds 300]
    python bench/schedule.py --shape 8192,4096,4096 [--rate 75]

Time is in tiles. A program starts when an SM is free, in the order of its number, and stays to its end. By ticket it
draws its next tile after the main loop of the one it computes, as `lorafuse/kernels/tickets.py` and
`csrc/kernels/tickets_sm90.cuh` do. With a shape: forward and backward of such a layer (M, N, K) in one launch
each (`csrc/kernels/one_launch_sm90.cuh`), whose tiles wait for what other programs compute, in microseconds.
"""

import argparse
import heapq
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

__all__ = [
    *("ACTIVATION", "Work", "arguments", "backward", "column_zero_first", "forward", "handed_out", "indivisible"),
    *("owned", "product", "proportional", "tickets", "walked"),
]

# microseconds of a tile of 128 x 256 at K 4096 (model: 128 of 132 SMs take eight waves in 360)
_TILE = 45.0
# of a tile: what its main loop takes of it (model)
_MAIN_LOOP = 0.95
# of a K-block of 64 in tiles of 128 x 256 and 128 x 128; of the rest of a tile; from the release of a flag to a box
# that TMA has loaded; and how long before its end a program draws what comes next: what the ring still holds (model)
_BLOCK, _EPILOGUE, _FLAG, _RING = {256: 0.69, 128: 0.376}, 0.8, 1.5, 2.0
# of a tile of gate and up, and of one of dh: the exponentials of their epilogues (model: 65 and 135 us of
# Llama-3.1-8B's MLP at 8192 rows, of 54.3 and 27.2 waves)
ACTIVATION = 1.2, 5.0


def owned(tiles: int, programs: int, free: Sequence[float]) -> float:
    """When the last tile ends, where tile t is that of program t % programs; SM i is free from `free[i]` on."""
    sms, end = list(free), 0.0
    heapq.heapify(sms)
    for program in range(programs):
        done = heapq.heappop(sms) + len(range(program, tiles, programs))
        end = max(end, done)
        heapq.heappush(sms, done)
    return end


def tickets(tiles: int, programs: int, free: Sequence[float]) -> float:
    """The same by ticket."""
    waiting, sms, drawn, end = programs, list(free), 0, 0.0
    heapq.heapify(sms)
    # when the programs that run draw their next tile
    draws: list[float] = []
    while draws or waiting:
        if waiting and sms and (not draws or sms[0] <= draws[0]):
            begin, waiting = heapq.heappop(sms), waiting - 1
        else:
            begin = heapq.heappop(draws) + 1 - _MAIN_LOOP
        if drawn < tiles:
            drawn, end = drawn + 1, max(end, begin + 1)
            heapq.heappush(draws, begin + _MAIN_LOOP)
        else:
            heapq.heappush(sms, begin)
    return end


def walked(tiles: int, programs: int, next_program: Sequence[int]) -> list[int]:
    """The tiles in the order in which they begin, where program `next_program[i]` makes the i-th step of all.

    In its first step a program draws a tile, in every other one it begins the last and draws the next. Then all go on
    to the end.
    """
    drawn, holds, begun = 0, [-1] * programs, []
    order = [*next_program, *(program for _ in range(tiles + 2) for program in range(programs))]
    for program in order:
        tile = holds[program]
        if tile >= tiles:
            continue
        holds[program], drawn = drawn, drawn + 1
        if tile >= 0:
            begun.append(tile)
    return begun


@dataclass(frozen=True)
class Work:
    """A tile or an item: microseconds, and the numbers of the works whose flags it waits for.

    A tile computes meanwhile and needs what it waits for in its last `tail` microseconds; an item waits first.
    """

    microseconds: float
    needs: Sequence[int] = ()
    tail: float = 0.0


def handed_out(works: Sequence[Work], free: Sequence[float]) -> list[float]:
    """When each work ends, handed out in their order; program i starts at `free[i]`."""
    # when a program draws, and when it can begin what it has drawn
    programs, ends = [(start, start) for start in free], []
    heapq.heapify(programs)
    for work in works:
        _, begin = heapq.heappop(programs)
        assert all(number < len(ends) for number in work.needs), "it waits for what has a later number"
        there = max((ends[number] + _FLAG for number in work.needs), default=0.0)
        before = work.microseconds - work.tail if work.tail else 0.0
        end = max(begin + before, there) + work.microseconds - before
        ends.append(end)
        heapq.heappush(programs, (max(begin, end - _RING), end))
    return ends


def _tile(reduction: int, block_n: int) -> float:
    return reduction / 64 * _BLOCK[block_n] + _EPILOGUE


def product(M: int, N: int, K: int, block_n: int = 256, activation: float = 0.0) -> list[Work]:
    """The tiles of a product alone (`csrc/kernels/linear_sm90.cuh`), with an activation of so long in each.

    Those of layers of one x are of their columns together (`csrc/kernels/siblings_sm90.cuh`), for multiples of
    `block_n`; those of their dx have the reductions together.
    """
    return [Work(_tile(K, block_n) + activation)] * (-(-M // 128) * -(-N // block_n))


def column_zero_first(M: int, N: int, K: int) -> list[Work]:
    """y = x wᵀ with xa in the tiles of column 0, a tenth longer (`csrc/kernels/xa_tiles_sm90.cuh`)."""
    rows, columns, tile = -(-M // 128), -(-N // 256), _tile(K, 256)
    others = [Work(tile, (row,), _EPILOGUE) for row in range(rows) for _ in range(columns - 1)]
    return [Work(tile * 1.1)] * rows + others


def forward(M: int, N: int, K: int, rate: float, block_n: int = 256, group: int = 8) -> list[Work]:
    """y and xa in the order of `BackwardOrder` without sums, where an SM streams `rate` GB/s of x beside the tiles."""
    rows, columns, tile = -(-M // 128), -(-N // block_n), _tile(K, block_n)
    works: list[Work] = []
    for first in range(0, rows, group):
        group_rows = range(min(group, rows - first))
        items = range(len(works), len(works) + len(group_rows))
        works += [Work(128 * K * 2 / rate / 1e3) for _ in group_rows]
        works += [Work(tile, (items[row],), _EPILOGUE) for _ in range(columns) for row in group_rows]
    return works


def backward(M: int, N: int, K: int, rate: float, block_n: int = 256, group: int = 8, chunk: int = 16) -> list[Work]:
    """dx, dyb, da and db in the order of `BackwardOrder` (schedule.cuh), where an SM streams `rate` GB/s."""
    rows, columns, tile = -(-M // 128), -(-K // block_n), _tile(N, block_n)
    sums = -(-N // block_n), -(-K // block_n)
    works: list[Work] = []
    for start in range(0, rows, chunk):
        end = min(rows, start + chunk)
        of_row: dict[int, int] = {}
        for first in range(start, end, group):
            for row in range(first, min(end, first + group)):
                of_row[row] = len(works)
                works.append(Work(128 * N * 2 / rate / 1e3))
            group_rows = [row for row in of_row if row >= first]
            works += [Work(tile, (of_row[row],), _EPILOGUE) for _ in range(columns) for row in group_rows]
        item = (end - start) * 128 * block_n * 2 / rate / 1e3
        works += [Work(item)] * sums[0] + [Work(item, tuple(of_row.values()))] * sums[1]
    return works


def indivisible(works: Sequence[Work], free: Sequence[float]) -> float:
    """When works of one length are done under the best schedule there is, if none of them is divided."""
    length = works[0].microseconds
    assert all(work == Work(length) for work in works)
    # an SM can end one at each multiple of it
    ends: Iterator[float] = heapq.merge(*(itertools.count(start + length, length) for start in free))
    return next(itertools.islice(ends, len(works) - 1, None))


def proportional(tiles: float, free: Sequence[float]) -> float:
    """When the work is done if it could be divided as finely as one likes over the SMs that are free."""
    starts, work = sorted(free), float(tiles)
    for count in range(1, len(starts)):
        capacity = count * (starts[count] - starts[count - 1])
        if capacity >= work:
            return starts[count - 1] + work / count
        work -= capacity
    return starts[-1] + work / len(starts)


def _print_layer(M: int, N: int, K: int, args: argparse.Namespace) -> int:
    idle, held = [0.0] * args.sms, [args.microseconds] * args.held + [0.0] * (args.sms - args.held)
    for direction, written, read, order in (("forward", N, K, forward), ("backward", K, N, backward)):

        def alone(block_n: int, written: int = written, read: int = read) -> float:
            return -(-(-(-M // 128) * -(-written // block_n)) // args.sms) * _tile(read, block_n)

        works = order(M, N, K, args.rate, min((256, 128), key=alone))
        tiles = [Work(work.microseconds) for work in works if work.tail]
        total = sum(work.microseconds for work in works)
        for name, free in (("alone", idle), (f"{args.held} SMs held for {args.microseconds:.0f} us", held)):
            print(
                f"{direction:<8} {name:<26} tiles {max(handed_out(tiles, free)):6.1f}, all "
                f"{max(handed_out(works, free)):6.1f}, proportional {proportional(total, free):6.1f} us (simulated)"
            )
    return 0


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiles", type=int, default=1024, help="of the launch (1024: 8192 x 4096)")
    parser.add_argument("--tile", type=float, default=_TILE, help=f"microseconds of one ({_TILE:.0f}: 4096 features)")
    parser.add_argument("--sms", type=int, default=132, help="of the GPU, and programs (132)")
    parser.add_argument("--held", type=int, default=16, help="SMs that another kernel holds (16)")
    parser.add_argument("--microseconds", type=float, default=300.0, help="for so long (300)")
    parser.add_argument("--shape", type=lambda text: [int(size) for size in text.split(",")], help="M,N,K of a layer")
    parser.add_argument("--rate", type=float, default=75.0, help="GB/s that an SM streams while others run tiles (75)")
    return parser


def main() -> int:
    """Print all four."""
    args = arguments().parse_args()
    if args.shape:
        return _print_layer(*args.shape, args)
    free = [args.microseconds / args.tile] * args.held + [0.0] * (args.sms - args.held)
    for name, tiles in (
        ("each program its own tiles", owned(args.tiles, args.sms, free)),
        ("by ticket", tickets(args.tiles, args.sms, free)),
        ("the best of whole tiles", indivisible([Work(1.0)] * args.tiles, free)),
        ("proportional", proportional(args.tiles, free)),
    ):
        print(f"{name:<28} {tiles * args.tile:6.0f} us (simulated)")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
