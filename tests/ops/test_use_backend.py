"""`lorafuse.use_backend` (T1): a setting of the process, or of a block in one thread or task."""

import asyncio
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import lorafuse
from lorafuse.backends import base
from lorafuse.errors import BackendUnavailable
from lorafuse.functional import lora_linear

pytest_plugins = "backend_fixtures"
pytestmark = pytest.mark.usefixtures("no_choice_yet")


def operands():
    x, w = torch.randn(3, 8), torch.randn(6, 8)
    return x, w, torch.randn(2, 8, requires_grad=True), torch.randn(6, 2, requires_grad=True)


def test_the_default_is_auto():
    assert base.current() == "auto"


class TestUseBackend:
    def test_as_setter(self):
        lorafuse.use_backend("eager")
        assert base.current() == "eager"
        lorafuse.use_backend("auto")
        assert base.current() == "auto"

    def test_as_context_manager(self):
        with lorafuse.use_backend("eager") as entered:
            assert isinstance(entered, lorafuse.use_backend)
            assert base.current() == "eager"
        assert base.current() == "auto"

    def test_nested(self, spy):
        with lorafuse.use_backend("eager"):
            with lorafuse.use_backend("triton"):
                assert base.current() == "triton"
                with lorafuse.use_backend("auto"):
                    assert base.current() == "auto"
                assert base.current() == "triton"
            assert base.current() == "eager"
        assert base.current() == "auto"

    def test_restores_after_an_exception(self):
        lorafuse.use_backend("auto")
        with pytest.raises(KeyError), lorafuse.use_backend("eager"):
            raise KeyError
        assert base.current() == "auto"

    @pytest.mark.parametrize("name", ["cuda", "cuDNN"])
    def test_a_refusal_changes_nothing(self, name):
        lorafuse.use_backend("eager")
        with pytest.raises((BackendUnavailable, ValueError)):
            lorafuse.use_backend(name)
        assert base.current() == "eager"

    def test_calls_follow_it(self, spy):
        with lorafuse.use_backend("triton"):
            y = lora_linear(*operands())
        assert spy.calls == ["linear_forward"]
        # backward runs where forward ran, whatever is set by then
        y.sum().backward()
        assert spy.calls == ["linear_forward", "linear_backward"]
        lora_linear(*operands())
        assert len(spy.calls) == 2

    def test_blocks_that_overlap_in_threads_leave_nothing_behind(self, spy):
        barrier, seen = threading.Barrier(2, timeout=30), []

        def worker(name, leaves_first):
            barrier.wait()
            block = lorafuse.use_backend(name)
            barrier.wait()
            with block:
                barrier.wait()
                seen.append((name, base.current()))
                if not leaves_first:
                    barrier.wait()
            if leaves_first:
                barrier.wait()

        for first in (True, False):
            threads = [
                threading.Thread(target=worker, args=args, daemon=True)
                for args in (("eager", first), ("triton", not first))
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(60)
                assert not thread.is_alive()
        assert sorted(seen) == [("eager", "eager")] * 2 + [("triton", "triton")] * 2
        assert base.current() == "auto"

    def test_a_block_is_over_before_another_begins(self):
        waiting = lorafuse.use_backend("eager")
        done = threading.Thread(target=lambda: lorafuse.use_backend("auto").__enter__().__exit__(), daemon=True)
        done.start()
        done.join(60)
        assert not done.is_alive()
        with waiting:
            assert base.current() == "eager"
        assert base.current() == "auto"

    def test_tasks_do_not_see_each_others_blocks(self, spy):
        async def task(name):
            with lorafuse.use_backend(name):
                await asyncio.sleep(0)
                assert base.current() == name
                await asyncio.sleep(0)
                return base.current()

        async def both():
            return await asyncio.gather(task("eager"), task("triton"))

        assert asyncio.run(both()) == ["eager", "triton"]
        assert base.current() == "auto"

    def test_a_block_in_one_thread_is_not_seen_in_another(self, spy):
        lorafuse.use_backend("eager")
        with lorafuse.use_backend("triton"), ThreadPoolExecutor(1) as pool:
            assert pool.submit(base.current).result() == "eager"
            lora_linear(*operands())
        assert spy.calls == ["linear_forward"]

    def test_setters_in_a_loop_hold_no_memory(self):
        first = weakref.ref(lorafuse.use_backend("eager"))
        for _ in range(3):
            lorafuse.use_backend("auto")
        assert first() is None

    def test_one_object_as_several_blocks(self):
        block = lorafuse.use_backend("eager")
        with block, block:
            assert base.current() == "eager"
        with block:
            assert base.current() == "eager"
        assert base.current() == "auto"

    def test_a_compiled_call_looks_when_it_runs(self, spy):
        compiled = torch.compile(lambda *o: lora_linear(*o), fullgraph=True, backend="aot_eager")
        o = operands()
        expected = compiled(*o)
        assert spy.calls == []
        with lorafuse.use_backend("triton"):
            assert torch.equal(compiled(*o), expected)
        assert spy.calls == ["linear_forward"]

    def test_a_named_backend_wins(self, spy):
        with lorafuse.use_backend("triton"):
            lora_linear(*operands(), backend="eager").sum().backward()
        assert spy.calls == []
        with lorafuse.use_backend("eager"):
            lora_linear(*operands(), backend="triton")
        assert spy.calls == ["linear_forward"]
