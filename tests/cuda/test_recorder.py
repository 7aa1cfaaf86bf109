"""What a recorder makes of a pass over operators of torch, and the launches that csrc records (T5)."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from native_build import emulator
from test_recording import assert_same, forward, in_python, operands

from lorafuse.backends import recorder, recording

pytest_plugins = "emu_fixtures"
# filling memory would be a part of what is watched
pytestmark = [pytest.mark.no_poison, pytest.mark.usefixtures("emu")]


def recorded(call, *given):
    """A pass as `repeat` sees it: (recording or why there is none, results)."""
    try:
        return recorder.record(emulator(), given, partial(call, *given))
    except recorder.NotRecorded as error:
        return str(error), error.results


def again(one, *given):
    backend = SimpleNamespace(stream=lambda device: 0)
    return one.run(backend, given, [t.data_ptr() for t in given])


def test_operators_of_torch_are_called_again():
    def call(x, y):
        both = torch.cat([x, y], 1)
        both[:, ::2].mul_(x)
        left, right = torch.split_with_sizes_copy(both, [1, 5], 1)
        return [left, None, (both @ right).t(), x.new_empty(0)]

    x, y = torch.randn(6, 3), torch.randn(6, 3)
    one, results = recorded(call, torch.ones(6, 3), torch.ones(6, 3))
    assert results[2].shape == (5, 6)
    assert_same(
        dict(enumerate(filter(torch.is_tensor, again(one, x, y)))), dict(enumerate(filter(torch.is_tensor, call(x, y))))
    )


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda x: [x], "a result is an operand"),
        (lambda x: [x.view(-1)], "a result is an operand"),
        (lambda x: [y := x + 1, y[0]], "results share memory"),
        (lambda x: [torch.rand_like(x)], "draws numbers"),
        (lambda x: [x.add_(1) + 1], "writes into an operand"),
        (lambda x: [x * x.sum().item()], "returns no tensors"),
    ],
)
def test_what_cannot_be_repeated_is_named(call, reason):
    x = torch.ones(4, 3)
    refused, results = recorded(call, x)
    assert reason in refused
    assert results[0].shape in ((4, 3), (12,))
    # and the thread records again
    assert torch.equal(again(recorded(lambda x: [x + 1], x)[0], x)[0], x + 1)


def test_a_tensor_that_is_given_twice_is_not_recorded():
    """Which of the two an operator reads is not known, and next time they may be two."""
    x = torch.ones(4, 3)
    refused, (both,) = recorded(lambda x, y: [torch.cat([x, y])], x, x)
    assert "share memory" in refused
    assert both.shape == (8, 3)


def test_scratch_is_shared_by_what_is_not_in_use_together():
    generator = torch.Generator().manual_seed(3)

    def draw(least, most):
        return int(torch.randint(least, most, (), generator=generator))

    for _ in range(200):
        memories, begin = [], 0
        for _ in range(draw(1, 9)):
            size, first = draw(1, 5000), draw(0, 6)
            memories.append(recording.Memory(None, "allocated", begin, begin + size, first=first, last=draw(first, 7)))
            begin += size
        total, step = recorder.packed(memories), recorder.ALIGN
        for i, one in enumerate(memories):
            assert one.offset % step == 0
            assert one.offset + one.end - one.begin <= total
            for other in memories[:i]:
                is_together = one.first <= other.last + 1 and other.first <= one.last + 1
                size, of_other = one.end - one.begin, other.end - other.begin
                assert not is_together or one.offset + size <= other.offset or other.offset + of_other <= one.offset
        assert total <= sum(-(-(m.end - m.begin) // step) * step for m in memories)
    apart = [recording.Memory(None, "allocated", 0, 1000, first=2 * i, last=2 * i) for i in range(4)]
    assert recorder.packed(apart) == 1000


def test_launches_of_csrc(emu):
    one, other = emu.Launches(), emu.Launches()
    one.start()
    with pytest.raises(RuntimeError, match="records launches already"):
        other.start()
    x, w, a, b = operands()
    in_python(forward, x, w, a, b)
    one.stop()
    assert len(one) == 2
    assert x.data_ptr() in one.pointers(0)
    with pytest.raises(ValueError, match="a pointer without an address"):
        one.run(0, 1, [0], 0, -1)
    with pytest.raises(IndexError):
        one.pointers(2)
    other.start()
    other.stop()
    assert len(other) == 0
