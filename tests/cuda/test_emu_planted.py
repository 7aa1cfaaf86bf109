"""Bugs planted in the sm_90 kernels (tests/planted.py), each of which their emulation must report or show (T5).

The kernels without one are right under the same schedules. Bugs of the memory-bound passes are in test_emu_skinny.py,
of the decode kernels in test_emu_decode.py.
"""

import re
from functools import cache

import planted
import pytest
import test_emu_decode
import test_emu_skinny
import torch
from emu_launches import gated, gated_ha, gated_masked, masked
from gathered_reference import Case as GatheredCase
from gathered_reference import Gated, GatedCase, Gradients, Operands, Ranks
from group_reference import Case, linears, make
from group_reference import results as group_results
from native_build import EMULATOR as emu
from native_build import emulator
from native_commands import ROOT
from operators import Linear
from test_emu_experts import grouped, results

from lorafuse.backends import base
from lorafuse.plan import clear_cache, configs_cuda, override
from lorafuse.testing.check_linear import LinearCase, make_operands

# by what the table names as seeing a bug: (launch, (block_n, stages, cluster), blocks that run at a time)
SCENARIOS = {
    "two_kernel": ("two_kernel", (256, 3, 2), 0),
    "two_kernel, one cluster at a time": ("two_kernel", (128, 4, 2), 2),
    "xa_in_tiles": ("xa_in_tiles", (256, 3, 1), 0),
    "xa_in_tiles, one block at a time": ("xa_in_tiles", (128, 4, 1), 1),
    "split_k": ("split_k", (128, 4, 1), 0),
    "concurrent_backward": ("concurrent_backward", (256, 3, 1), 0),
    "concurrent_backward, four stages": ("concurrent_backward", (128, 4, 1), 0),
    # the blocks that sum are the first and compute the tiles too, of which the ring holds one
    "concurrent_backward, one block at a time": ("concurrent_backward", (128, 6, 1), 1),
    "fused_backward": ("fused_backward", (256, 3, 1), 0),
    "fused_forward": ("fused_forward", (256, 3, 1), 0),
    "siblings": ("siblings", (256, 3, 2), 0),
    "siblings with masks": ("siblings with masks", (128, 4, 2), 0),
    "gated": ("gated", (128, 4, 2), 0),
    "gated with a mask": ("gated with a mask", (128, 4, 2), 0),
    "gated with ha": ("gated with ha", (256, 3, 2), 0),
    "grouped": ("grouped", None, 0),
    "gathered": ("gathered", (256, 3, 1, 16, 0, 128), 0),
    "gathered_gated": ("gathered_gated", (256, 3, 1, 16, 0, 128), 0),
    "ragged_ranks": ("ragged_ranks", None, 0),
    "gathered_gradients": ("gathered_gradients", (256, 3, 1, 16, 0, 128), 0),
}
SEEN_BY = {bug.name: bug.seen_by for bug in planted.BUGS}


@pytest.fixture(scope="module", autouse=True)
def _built():
    emulator()
    # da and db in parts of one tile's rows
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(configs_cuda, "SUM_ROWS", 128)
        clear_cache()
        yield
    clear_cache()
    emu.configure()
    # words that a bug left set are not those of other tests
    base.load("emu").flags.clear()


def run(kind, tiling):
    """What a scenario computes, as tensors; launches leave words for the next one."""
    # nor those of the next run
    base.load("emu").flags.clear()
    if kind == "grouped":
        return list(results(*grouped([60, 60, 190], 200, torch.bfloat16), "emu").values())
    if kind == "gathered_gated":
        # a row block and a part of one in two groups, and memory for what a bug writes behind them
        o = Gated(GatedCase(ends=(150, 290), rows=384, N=2 * 72, K=72, R=8))
        return [o.launch(emu, tiling)[:290], o.word]
    if kind == "ragged_ranks":
        o = Ranks(GatheredCase(ends=(60, 60, 250), rows=260, K=264, R=16))
        projected, outer = o.launch(emu)
        return [projected[:250], outer]
    if kind == "gathered_gradients":
        # two tiles a block, of which some end with a part of a row block; more stages of gates than the ring has
        o = Gradients(GatedCase(ends=(150, 290), rows=292, N=264, K=72, R=8, bias=False))
        return [o.launch(emu, tiling)[:290], o.word]
    if kind == "gathered":
        # tiles that go around the ring, and more of them than blocks
        o = Operands(GatheredCase(N=264, K=264, R=8))
        return [o.launch(emu, tiling)[:190], o.word]
    if kind == "siblings":
        with override(force_kernel="cuda siblings", cuda_tiles=[tiling]):
            o = make(
                Case(N=(72, 40, 264), R=(40, 0, 80), K=200, leading=(150,), dtype=torch.bfloat16, bias=(True,) * 3)
            )
            return list(group_results(lambda o: linears(o, backend="emu"), o).values())
    of_groups = {"gated": gated, "gated with ha": gated_ha, "gated with a mask": gated_masked}
    of_groups |= {"siblings with masks": masked}
    if kind in of_groups:
        return of_groups[kind](tiling)
    operator = Linear("emu")
    # sums over few rows, so that the ring holds an item and one consumer can be an item ahead
    rows = 100 if kind == "concurrent_backward" else 300
    # tiles of two stages of a ring of four, so that a producer can be two tiles ahead
    K = 64 if kind in ("two_kernel", "xa_in_tiles") and tiling[1] == 4 else 200
    if kind == "split_k":
        # one tile, whose cluster of four the multiprocessors hold; parts of K that go around the ring
        rows, K = 40, 64 * 22
    # ranks whose sums lie where the other consumer's rows go out
    R = 40 if tiling == (128, 6, 1) else 24
    o = make_operands(LinearCase(leading=(rows,), N=120 if kind == "split_k" else 264, K=K, R=R, dtype=torch.bfloat16))
    if kind in ("concurrent_backward", "fused_backward"):
        _, xa = operator.forward(o.x, o.w, None, o.a, o.b, None, 1.7, 0.0)
        given = o.dy, o.x, xa, o.w, o.a, o.b, None, 1.7, 0.0, True, True, True, False
        with override(force_kernel=f"cuda {kind}", cuda_tiles=[tiling]):
            # one launch leaves flags for a second one
            both = [operator.backward(*given)[:3] for _ in range(2 if kind == "fused_backward" else 1)]
        return [tensor for one in both for tensor in one] + list(base.load("emu").flags.values())
    if kind == "split_k":
        # x is what the launch before writes
        first = make_operands(LinearCase(leading=(rows,), N=K, K=64, R=24, dtype=torch.bfloat16))
        with override(force_kernel="cuda two_kernel"):
            o.x = operator.forward(first.x, first.w, None, first.a, first.b, None, 1.7, 0.0)[0]
    launches = range(2 if kind in ("two_kernel", "xa_in_tiles", "fused_forward") else 1)
    with override(force_kernel=f"cuda {kind}", cuda_tiles=[tiling]):
        actual = [operator.forward(o.x, o.w, o.bias, o.a, o.b, None, 1.7, 0.0) for _ in launches]
    return [tensor for pair in actual for tensor in pair]


@cache
def right(kind, tiling):
    """What the kernels without a bug compute."""
    emu.configure()
    return run(kind, tiling)


@pytest.mark.parametrize("bug", planted.names(*SCENARIOS))
def test_it_is_seen(bug, request):
    """Under one of ten schedules at least: the rarest, a block that ends too early, is seen under one of four."""
    schedules = max(10, request.config.getoption("--seeds") // 20)
    kind, tiling, resident = SCENARIOS[SEEN_BY[bug]]
    expected = right(kind, tiling)
    seen, messages = 0, set()
    for seed in range(schedules):
        emu.configure(seed=seed, resident=resident, multiprocessors=4, planted=bug)
        try:
            actual = run(kind, tiling)
        except emu.EmulationError as error:
            seen += 1
            messages.add(str(error).splitlines()[0])
        else:
            seen += any(not torch.equal(one, other) for one, other in zip(actual, expected, strict=True))
        assert emu.statistics()["planted_reached"], "the line did not run: give it another scenario"
        if seen >= schedules // 10:
            break
    assert seen >= schedules // 10, f"seen under {seen} of {schedules} schedules: {messages}"


def test_a_flag_that_never_comes_is_named():
    """Every block ends or waits: the emulator says for what, and does not hang."""
    emu.configure(seed=3, multiprocessors=4, planted="flag_never_set")
    with pytest.raises(emu.EmulationError, match=r"deadlock(.|\n)*waiting until the counter at .* is 2; it is 0"):
        run("xa_in_tiles", (256, 3, 1))


def test_every_bug_is_run():
    assert len(planted.names(*SCENARIOS)) > 25
    elsewhere = test_emu_skinny.SCENARIOS.keys() | test_emu_decode.SCENARIOS.keys()
    assert set(SEEN_BY.values()) == SCENARIOS.keys() | elsewhere
    assert all("LF_PLANTED" not in path.read_text() for path in (ROOT / "csrc" / "kernels").iterdir())


class TestWeave:
    def weave(self, tmp_path, source, *rows):
        (tmp_path / "kernels").mkdir()
        (tmp_path / "kernels" / "k.cuh").write_text(source)
        bugs = tuple(planted.Bug(name, "k.cuh", "two_kernel", text, instead) for name, text, instead in rows)
        planted.weave(tmp_path / "kernels", tmp_path / "out", bugs)
        return (tmp_path / "out" / "k.cuh").read_text()

    def test_a_text_is_there_twice(self, tmp_path):
        woven = self.weave(tmp_path, "f(a,\n  b); g(c);", ("one", "f(a, b);", ""), ("two", "c", "d"))
        assert woven == '{ if (LF_PLANTED("one")) {  } else { f(a,\n  b); } } g((LF_PLANTED("two") ? (d) : (c)));'

    @pytest.mark.parametrize(("text", "times"), [("h();", 0), ("f();", 2)])
    def test_a_text_that_is_not_there_once_is_an_error(self, tmp_path, text, times):
        with pytest.raises(AssertionError, match=f"'one': k.cuh holds its text {times} times: {re.escape(text)}"):
            self.weave(tmp_path, "f(); g(); f();", ("one", text, ""))

    def test_texts_that_overlap_are_an_error(self, tmp_path):
        with pytest.raises(AssertionError, match="of k.cuh overlap"):
            self.weave(tmp_path, "f(); g(); h();", ("one", "f(); g();", ""), ("two", "g(); h();", ""))
