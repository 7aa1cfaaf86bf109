"""Routing in two launches: the rows are those of torch's stable sort, for every index that a router gives."""

from dataclasses import replace

import pytest
import torch
from kernel_mutations import install

from lorafuse.backends import triton as backend
from lorafuse.kernels import routing
from lorafuse.operands import route

pytestmark = pytest.mark.no_poison
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# tokens, choices of each, groups: one choice, off every block, several blocks of rows and of counts
SIZES = {"one": (1, 1, 1), "few": (7, 3, 5), "blocks": (700, 2, 5), "many groups": (150, 4, 128)}
# more blocks of 128 than are added at once
SUMS = 2100, 1, 3


def choices(T, k, groups, seed=0):
    """Choices of which some are sentinels, and the first group gets none where there are several."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(min(1, groups - 1), groups + 2, (T, k), generator=generator)
    index[0, 0] = groups - 1
    return index.to(DEVICE)


def check(index, groups):
    rows, expected = backend.BACKEND.route(index, groups), route(index, groups)
    assert (rows.count, rows.choices, rows.groups) == (expected.count, expected.choices, groups)
    for name in ("offsets", "order", "token"):
        actual, right = getattr(rows, name), getattr(expected, name)
        assert actual.dtype is right.dtype, name
        assert torch.equal(actual, right), name


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_rows_are_those_of_a_stable_sort(sizes):
    check(choices(*sizes), sizes[2])


def test_counts_of_many_blocks(monkeypatch):
    monkeypatch.setattr(routing, "BLOCK_S", 128)
    check(choices(*SUMS), 3)


def test_extremes_of_an_index():
    for index in (torch.full((130, 2), 3), torch.full((130, 2), 9), torch.tensor([[2**62, 0], [2, 2**31]])):
        check(index.to(DEVICE), 4)


def test_a_strided_index():
    check(choices(40, 6, 5)[:, ::2], 5)
    check(choices(6, 40, 5).t(), 5)


def test_no_rows_and_more_groups_than_counters():
    check(torch.empty((0, 2), dtype=torch.int64, device=DEVICE), 3)
    check(choices(5, 2, routing.MOST_GROUPS + 1), routing.MOST_GROUPS + 1)


def test_a_negative_index():
    index = choices(7, 3, 5)
    assert routing.route(index.reshape(-1), 5, 3).valid.tolist() == [1]
    index[6, 2] = -1
    made = routing.route(index.reshape(-1), 5, 3)
    # it is counted with those of no group, and nothing is written out of bounds
    assert made.valid.tolist() == [0]
    assert sorted(made.order.tolist()) == list(range(21))
    if DEVICE.type == "cpu":
        with pytest.raises(ValueError, match="topk_index holds -1; it must be an expert, 0 to 4"):
            backend.BACKEND.route(index, 5)


def test_nothing_is_read_on_the_host(monkeypatch):
    """Tensors without data have nothing to be read: two launches, whose operands are all on the device."""
    launched = []

    class Kernel:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return lambda *args, **options: launched.append((self.name, grid, options["BLOCK_S"]))

    for name in ("_count_kernel", "_scatter_kernel"):
        monkeypatch.setattr(routing, name, Kernel(name))
    rows = backend.BACKEND.route(torch.empty((8192, 8), dtype=torch.int64, device="meta"), 128)
    assert launched == [("_count_kernel", (128,), 512), ("_scatter_kernel", (128,), 512)]
    assert rows.order.device.type == "meta"


# (what is changed, into what)
MUTATIONS = {
    "sentinels are experts": ("(index > E), E, index", "(index > E), E - 1, index"),
    "an index beyond the sentinel": (
        "tl.where((index < 0) | (index > E), E, index)",
        "tl.where(index < 0, E, index % 4)",
    ),
    "a block counts its padding": ("mask=o_s < S, other=E)", "mask=o_s < S, other=0)"),
    "no blocks before": ("before += tl.sum(", "before += 0 * tl.sum("),
    "the own block before": ("(o_b < i_s)", "(o_b <= i_s)"),
    "the last counts are left out": ("range(0, blocks, BLOCK_B)", "range(0, BLOCK_B, BLOCK_B)"),
    "groups begin where they end": ("place = end - total + before", "place = end + before"),
    "ranks of all groups": ("(group[None, :] == group[:, None]) & ", ""),
    "equal choices backwards": ("(o_r[None, :] < o_r[:, None])", "(o_r[None, :] > o_r[:, None])"),
    "parts of a block over each other": ("place += tl.histogram", "place += 0 * tl.histogram"),
    "tokens are choices": ("(o_s // choices)", "(o_s // 1)"),
    "offsets without the last group": ("mask=o_e < E)", "mask=o_e < E - 1)"),
    "every index is valid": ("(negative == 0,", "(negative >= 0,"),
}


def differences(module, index, groups, block_s=128):
    """The results in which a module's kernels differ from torch, which may write far out of bounds."""
    flat, expected, module.BLOCK_S = index.reshape(-1), route(index, groups), block_s
    made = module.made(flat, groups, index.shape[1])
    S, margin = flat.shape[0], 4 * flat.shape[0] + 1024
    order, token = torch.full((2, S + 2 * margin), -1, device=DEVICE)[:, margin : margin + S]
    made = replace(made, order=order, token=token)
    made.offsets.fill_(-1)
    module.count(made)
    module.scatter(made)
    right = {"order": expected.order, "token": expected.token, "offsets": expected.offsets}
    return {name for name, one in right.items() if not torch.equal(getattr(made, name), one)}


def test_the_right_kernels_are_green(monkeypatch, tmp_path):
    install(routing, "_WARPS = 8", "_WARPS = 4", monkeypatch, tmp_path)
    assert differences(backend.routing, choices(*SUMS), 3) == set()


@pytest.mark.parametrize("name", MUTATIONS)
def test_each_mutation_is_red(name, monkeypatch, tmp_path):
    old, new = MUTATIONS[name]
    install(routing, old, new, monkeypatch, tmp_path)
    changed = backend.routing
    assert changed is not routing
    if name == "every index is valid":
        assert changed.route(torch.tensor([0, -1], device=DEVICE), 3, 1).valid.tolist() == [1]
        return
    few, several = choices(*SIZES["few"]), choices(300, 1, 5)
    cases = (changed, few, 5), (changed, several, 5, 512), (changed, choices(*SUMS), 3)
    assert any(differences(*case) for case in cases)
