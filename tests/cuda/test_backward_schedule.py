"""One launch each way, xa in tiles, products and groups by ticket, simulated (bench/schedule.py): how long they take.

That each tile and item runs once, in any order of arrival, is enumerated from the kernels' own headers
(tests/cuda/test_csrc_layouts.py).
"""

import itertools
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

import schedule  # noqa: E402

IDLE = [0.0] * 132
LAYERS = {"q": (4096, 4096), "gate": (14336, 4096), "down": (4096, 14336)}
# (N, K, activation) of the products of Llama-3.1-8B's groups
GROUPS = {
    "q, k and v": (6144, 4096),
    "dx of q, k and v": (4096, 6144),
    "gate and up": (28672, 4096),
    "dx of gate and up": (4096, 28672),
    "gate, up and h": (28672, 4096, schedule.ACTIVATION[0]),
    "dgate, dup and h": (14336, 4096, schedule.ACTIVATION[1]),
}
# how long another kernel holds 16 SMs
HELD = 100.0, 300.0, 1000.0, 10000.0


def seconds(works, free=IDLE):
    """When the last work ends, and when it would if work could be divided as finely as one likes."""
    return max(schedule.handed_out(works, free)), schedule.proportional(sum(w.microseconds for w in works), free)


@pytest.mark.parametrize("rate", [50, 75, 90])
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("M", [8192, 16384, 32768])
def test_sixteen_sms_held_by_another_kernel_cost_their_share(M, layer, rate):
    for microseconds in HELD:
        held = [microseconds] * 16 + IDLE[16:]
        for direction in (schedule.forward, schedule.backward):
            end, least = seconds(direction(M, *LAYERS[layer], rate), held)
            assert least <= end <= 1.15 * least


def product(M, name):
    """Its tiles, of one length."""
    N, K, *activation = (LAYERS | GROUPS)[name]
    return schedule.product(M, N, K, 256, *activation)


@pytest.mark.parametrize("sums", [0.0, 400.0], ids=["tiles", "four blocks sum first"])
@pytest.mark.parametrize("name", [*LAYERS, *GROUPS])
@pytest.mark.parametrize("M", [8192, 16384, 32768])
def test_tiles_alone_beside_another_kernel(M, name, sums):
    """Fixed tiles would end after the other kernel has, by a late block's whole part."""
    works = product(M, name)
    for microseconds in HELD:
        held = [microseconds] * 16 + [sums] * 4 + IDLE[20:]
        end, least = seconds(works, held)
        assert least <= end <= 1.15 * least
    tile = works[0].microseconds
    assert schedule.owned(len(works), 132, [300 / tile] * 16 + IDLE[16:]) * tile > 299 + len(works) // 132 * tile


@pytest.mark.parametrize("name", [*LAYERS, *GROUPS])
@pytest.mark.parametrize("M", [512, 1024, 2048, 4096, 8192])
def test_no_schedule_of_whole_tiles_is_faster(M, name):
    """Where few waves become one more, that is what tiles cost which nothing divides, and not their order."""
    works = product(M, name)
    for microseconds in (0.0, *HELD):
        held = [microseconds] * 16 + IDLE[16:]
        end, least = schedule.indivisible(works, held), schedule.proportional(len(works) * works[0].microseconds, held)
        assert least <= end <= max(schedule.handed_out(works, held)) <= 1.001 * end


@pytest.mark.parametrize("free", [[0.0, 0.0, 0.0], [0.0, 15.0, 3.0], [0.0, 25.0, 30.0]])
def test_the_best_of_whole_tiles_is_that_of_all_schedules(free):
    for count in range(1, 6):
        counts = (numbers for numbers in itertools.product(range(count + 1), repeat=3) if sum(numbers) == count)
        ends = [max(start + 10.0 * n for start, n in zip(free, each, strict=True) if n) for each in counts]
        assert schedule.indivisible([schedule.Work(10.0)] * count, free) == min(ends)


@pytest.mark.parametrize(
    ("M", "name", "fixed", "tickets", "over"),
    [
        (8192, "q, k and v", 795, 585, 0.05),
        (8192, "dx of q, k and v", 769, 603, 0.08),
        (8192, "gate, up and h", 2793, 2585, 0.02),
        (8192, "dgate, dup and h", 1649, 1399, 0.00),
        (2048, "q", 180, 135, 0.36),
        (2048, "q, k and v", 270, 180, 0.21),
        (2048, "dx of q, k and v", 268, 201, 0.36),
        (2048, "gate, up and h", 900, 692, 0.04),
        (2048, "dgate, dup and h", 600, 400, 0.06),
    ],
)
def test_groups_beside_another_kernel(M, name, fixed, tickets, over):
    """The figures of docs/performance.md, for 300 us."""
    works, held = product(M, name), [300.0] * 16 + IDLE[16:]
    tile = works[0].microseconds
    end, least = seconds(works, held)
    assert schedule.owned(len(works), 132, [start / tile for start in held]) * tile == pytest.approx(fixed, abs=0.6)
    assert end == pytest.approx(tickets, abs=0.6)
    assert end / least == pytest.approx(1 + over, abs=0.006)


def test_the_last_tiles_in_halves():
    """The figures of docs/performance.md: q at 2048 rows, of whose 256 tiles the last 24 have 128 columns each."""
    wholes, halves = (schedule.product(2048, 4096, 4096, block_n) for block_n in (256, 128))
    works = wholes[:-24] + halves[-48:]
    for held, free in ((114.8, [300.0] * 16 + IDLE[16:]), (94.7, IDLE)):
        assert max(schedule.handed_out(works, free)) == pytest.approx(held, abs=0.1)


@pytest.mark.parametrize("microseconds", [100, 300, 1000, 10000])
def test_xa_in_tiles_beside_another_kernel(microseconds):
    """k at 32768 rows; a launch of two waves cannot be divided so finely."""
    end, least = seconds(schedule.column_zero_first(32768, 1024, 4096), [microseconds] * 16 + IDLE[16:])
    assert least <= end <= 1.15 * least


def test_what_idle_sms_have_time_for_is_nearly_free():
    """The figures of docs/performance.md: q at 8192 rows, of which the tiles take eight waves of 45 us."""
    works = schedule.backward(8192, 4096, 4096, 75)
    tiles = [schedule.Work(work.microseconds) for work in works if work.tail]
    assert len(tiles) == 1024
    assert seconds(tiles)[0] == pytest.approx(359.7, abs=0.1)
    assert seconds(works)[0] == pytest.approx(373.7, abs=0.1)
    parts = {chunk: seconds(schedule.backward(8192, 4096, 4096, 75, chunk=chunk))[0] for chunk in (8, 16, 32)}
    assert min(parts, key=parts.get) == 16


@pytest.mark.parametrize(("M", "tiles", "at_75", "at_50"), [(512, 24.9, 24.9, 24.9), (8192, 359.7, 359.7, 368.6)])
def test_xa_beside_the_tiles_is_nearly_free(M, tiles, at_75, at_50):
    """The figures of docs/performance.md: q, whose tiles leave four SMs idle in each or the last wave."""
    block_n = 128 if M == 512 else 256
    works = {rate: schedule.forward(M, 4096, 4096, rate, block_n) for rate in (50, 75)}
    assert seconds([schedule.Work(work.microseconds) for work in works[75] if work.tail])[0] == pytest.approx(
        tiles, abs=0.1
    )
    assert seconds(works[75])[0] == pytest.approx(at_75, abs=0.1)
    assert seconds(works[50])[0] == pytest.approx(at_50, abs=0.1)


def test_a_work_that_waits_for_a_later_one_is_an_error():
    with pytest.raises(AssertionError, match="later number"):
        schedule.handed_out([schedule.Work(1.0, (1,), 0.5), schedule.Work(1.0)], IDLE)


def test_an_item_waits_first_and_a_tile_last():
    first = schedule.Work(10.0)
    tile, item = schedule.Work(10.0, (0,), 1.0), schedule.Work(10.0, (0,))
    flag = 1.5
    assert schedule.handed_out([first, tile, item], IDLE) == [10.0, 10.0 + flag + 1.0, 10.0 + flag + 10.0]
