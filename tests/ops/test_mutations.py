"""Wrong operators turn the gate red (T1): mutations of the eager backend, and what betrays each."""

import pytest
import torch

from lorafuse import philox
from lorafuse.backends import aten
from lorafuse.operands import Weight
from lorafuse.ops import linear as op
from lorafuse.testing.check_linear import GATE, check_linear

MUTATIONS = {}


class Operator(aten.Aten):
    """Eager with a forward and a backward of its own, in the place of what is made of the primitives."""

    def __init__(self, forward, backward):
        self.linear_forward, self.linear_backward = forward, backward


def right_forward(x, w, bias, a, b, plan, scale, dropout):
    return op.forward(aten.BACKEND, plan, x, w, bias, a, b, scale, dropout, False)


def right_backward(dy, x, xa, w, a, b, plan, scale, dropout, needs):
    return op.backward(aten.BACKEND, plan, dy, x, xa, w, a, b, scale, dropout, needs, False)


def mutation(red):
    """Register a function of fresh `(forward, backward)` that returns them wrong; `red` shows it first."""

    def register(function):
        MUTATIONS[function.__name__] = function, red
        return function

    return register


def _with_forward(change):
    """Forward whose operands `(x, w, bias, a, b, scale, dropout)` went through `change`."""

    def forward(x, w, bias, a, b, plan, scale, dropout):
        *tensors, scale, dropout = change(x, w, bias, a, b, scale, dropout)
        return right_forward(*tensors, plan, scale, dropout)

    return forward, right_backward


def _with_backward(change):
    """Backward whose `(dx, da, db, dbias)` went through `change`, which also gets its arguments."""

    def backward(*args):
        return change(right_backward(*args), *args)

    return right_forward, backward


@mutation("y")
def drop_the_lora_term():
    return _with_forward(lambda x, w, bias, a, b, scale, dropout: (x, w, bias, a, b, 0.0, dropout))


@mutation("y")
def double_the_scale():
    return _with_forward(lambda x, w, bias, a, b, scale, dropout: (x, w, bias, a, b, 2 * scale, dropout))


@mutation("y")
def swap_two_adapters():
    """Two adapters of half the rank each: A of the first meets B of the second."""
    return _with_forward(
        lambda x, w, bias, a, b, scale, dropout: (x, w, bias, a, b.roll(b.shape[1] // 2, 1), scale, dropout)
    )


@mutation("y")
def skip_the_last_k_block():
    def cut(x, w, bias, a, b, scale, dropout):
        x = x.clone()
        x[..., -16:] = 0
        return x, w, bias, a, b, scale, dropout

    return _with_forward(cut)


@mutation("y")
def skip_the_last_k_block_of_the_low_rank_path():
    def cut(x, w, bias, a, b, scale, dropout):
        a = a.clone()
        a[:, -16:] = 0
        return x, w, bias, a, b, scale, dropout

    return _with_forward(cut)


@mutation("y")
def read_b_the_wrong_way_round():
    """As a kernel with swapped strides does: memory order of [R, N] in a tensor of [N, R]."""
    return _with_forward(
        lambda x, w, bias, a, b, scale, dropout: (x, w, bias, a, b.reshape(b.shape[::-1]).t(), scale, dropout)
    )


@mutation("y")
def read_a_the_wrong_way_round():
    return _with_forward(
        lambda x, w, bias, a, b, scale, dropout: (x, w, bias, a.reshape(a.shape[::-1]).t(), b, scale, dropout)
    )


@mutation("y")
def forget_the_bias():
    return _with_forward(lambda x, w, bias, *rest: (x, w, None, *rest))


@mutation("y")
def scale_the_bias():
    return _with_forward(
        lambda x, w, bias, a, b, scale, dropout: (
            x,
            w,
            bias if bias is None else bias * scale,
            a,
            b,
            scale,
            dropout,
        )
    )


@mutation("y")
def forget_to_rescale_after_dropout():
    def shrink(x, w, bias, a, b, scale, dropout):
        return x, w, bias, a, b, scale if dropout is None else scale * (1 - dropout.p), dropout

    return _with_forward(shrink)


@mutation("y")
def drop_the_base_input_too():
    def drop(x, w, bias, a, b, scale, dropout):
        if dropout is not None:
            x = x * philox.keep_mask(dropout.seed, dropout.p, slice(0, x.shape[0]), x.shape[1])
        return x, w, bias, a, b, scale, dropout

    return _with_forward(drop)


@mutation("y")
def compute_in_bfloat16():
    def forward(x, w, bias, a, b, *rest):
        x16, bias, a, b = (None if t is None else t.bfloat16() for t in (x, bias, a, b))
        actual = right_forward(x16, Weight(w.data.bfloat16()), bias, a, b, *rest)
        return tuple(t.to(x.dtype) for t in actual)

    return forward, right_backward


@mutation("y")
def leave_the_last_row_unwritten():
    def forward(*args):
        y, xa = right_forward(*args)
        y[-1] = float("nan")
        return y, xa

    return forward, right_backward


@mutation("x")
def write_the_input():
    def forward(x, *rest):
        y, xa = right_forward(x, *rest)
        x.mul_(1.25)
        return y, xa

    return forward, right_backward


@mutation("db")
def reuse_a_stale_xa():
    first = {}

    def forward(*args):
        y, xa = right_forward(*args)
        return y, first.setdefault((xa.shape, xa.dtype), xa)

    return forward, right_backward


@mutation("db")
def keep_xa_in_one_shared_buffer():
    buffers = {}

    def forward(*args):
        y, xa = right_forward(*args)
        buffer = buffers.setdefault((xa.shape, xa.dtype), xa.clone())
        # a kernel's write, which autograd does not see
        buffer.data.copy_(xa)
        return y, buffer

    return forward, right_backward


@mutation("dx")
def forget_the_scale_in_dx():
    def unscaled(grads, *args):
        return (right_backward(*args[:7], 1.0, *args[8:])[0], *grads[1:])

    return _with_backward(unscaled)


@mutation("dx")
def forget_the_base_in_dx():
    def low_rank_only(grads, dy, x, xa, w, *rest):
        return (right_backward(dy, x, xa, Weight(w.data * 0), *rest)[0], *grads[1:])

    return _with_backward(low_rank_only)


@mutation("dx")
def forget_the_mask_in_dx():
    def unmasked(grads, *args):
        *given, _, needs = args
        return (right_backward(*given, None, needs)[0], *grads[1:])

    return _with_backward(unmasked)


@mutation("da")
def forget_the_mask_in_da():
    def unmasked(grads, *args):
        *given, _, needs = args
        return (grads[0], right_backward(*given, None, needs)[1], *grads[2:])

    return _with_backward(unmasked)


@mutation("y")
def shift_the_mask_by_one_row():
    def forward(*args):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(aten, "keep_mask", _shifted)
            return right_forward(*args)

    return forward, right_backward


@mutation("dx")
def shift_the_mask_by_one_row_in_backward():
    def backward(*args):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(aten, "keep_mask", _shifted)
            return right_backward(*args)

    return right_forward, backward


def _shifted(seed, p, rows, columns):
    return philox.keep_mask(seed, p, slice(rows.start + 1, rows.stop + 1), columns)


@mutation("da")
def forget_the_scale_in_da():
    return _with_backward(lambda grads, *args: (grads[0], grads[1] / args[7], *grads[2:]))


@mutation("db")
def forget_the_scale_in_db():
    return _with_backward(lambda grads, *args: (*grads[:2], grads[2] / args[7], grads[3]))


@mutation("da")
def give_no_gradient_to_a():
    return _with_backward(lambda grads, *args: (grads[0], torch.zeros_like(grads[1]), *grads[2:]))


@mutation("db")
def give_no_gradient_to_b():
    return _with_backward(lambda grads, *args: (*grads[:2], torch.zeros_like(grads[2]), grads[3]))


@mutation("da")
def leave_out_the_last_tokens_of_da():
    def cut(grads, dy, x, *rest):
        dy = dy.clone()
        dy[-7:] = 0
        return (grads[0], right_backward(dy, x, *rest)[1], *grads[2:])

    return _with_backward(cut)


@mutation("dbias")
def average_the_bias_gradient():
    def average(grads, dy, *rest):
        return (*grads[:3], None if grads[3] is None else grads[3] / dy.shape[0])

    return _with_backward(average)


def run_gate():
    for case in GATE:
        check_linear(case)


def test_the_right_backend_is_green(monkeypatch):
    monkeypatch.setattr("lorafuse.ops.choose.ATEN", Operator(right_forward, right_backward))
    run_gate()


@pytest.mark.parametrize("name", MUTATIONS)
def test_each_mutation_is_red(monkeypatch, name):
    build, red = MUTATIONS[name]
    monkeypatch.setattr("lorafuse.ops.choose.ATEN", Operator(*build()))
    with pytest.raises(AssertionError) as failure:
        run_gate()
    assert str(failure.value).startswith(f"{red}:")
