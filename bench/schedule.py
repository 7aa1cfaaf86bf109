"""How long tiles take when other kernels hold SMs: tiles that each program owns, and tiles by ticket. A simulation.

    python bench/schedule.py [--tiles 1024] [--sms 132] [--held 16] [--microseconds 300]

Time is in tiles. A program starts when an SM is free, in the order of its number, and stays to its end. By ticket it
draws its next tile after the main loop of the one it computes, as `lorafuse/kernels/tickets.py` does.
"""

import argparse
import heapq
from collections.abc import Sequence

__all__ = ["owned", "proportional", "tickets", "walked"]

# microseconds of a tile of 128 x 256 at K 4096 (model: 128 of 132 SMs take eight waves in 360)
_TILE = 45.0
# of a tile: what its main loop takes of it (model)
_MAIN_LOOP = 0.95


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


def proportional(tiles: int, free: Sequence[float]) -> float:
    """When the work is done if it could be divided as finely as one likes over the SMs that are free."""
    starts, work = sorted(free), float(tiles)
    for count in range(1, len(starts)):
        capacity = count * (starts[count] - starts[count - 1])
        if capacity >= work:
            return starts[count - 1] + work / count
        work -= capacity
    return starts[-1] + work / len(starts)


def main() -> int:
    """Print all three."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiles", type=int, default=1024, help="of the launch (1024: 8192 x 4096)")
    parser.add_argument("--sms", type=int, default=132, help="of the GPU, and programs (132)")
    parser.add_argument("--held", type=int, default=16, help="SMs that another kernel holds (16)")
    parser.add_argument("--microseconds", type=float, default=300.0, help="for so long (300)")
    args = parser.parse_args()
    free = [args.microseconds / _TILE] * args.held + [0.0] * (args.sms - args.held)
    for name, tiles in (
        ("each program its own tiles", owned(args.tiles, args.sms, free)),
        ("by ticket", tickets(args.tiles, args.sms, free)),
        ("proportional", proportional(args.tiles, free)),
    ):
        print(f"{name:<28} {tiles * _TILE:6.0f} us (simulated)")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
