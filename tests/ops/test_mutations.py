"""Wrong operators turn the gate red (T1): mutations of the eager backend, and what betrays each."""

from types import SimpleNamespace

import pytest
import torch

from lorafuse import philox
from lorafuse.backends import eager
from lorafuse.ops import linear as op
from lorafuse.testing.check_linear import GATE, check_linear

MUTATIONS = {}


def mutation(red):
    """Register a function of fresh `(forward, backward)` that returns them wrong; `red` shows it first."""

    def register(function):
        MUTATIONS[function.__name__] = function, red
        return function

    return register


def _with_forward(change):
    """Forward whose operands `(x, w, bias, a, b, seed, scale, p)` went through `change`."""
    return (lambda *args: eager.linear_forward(*change(*args[:8]), *args[8:])), eager.linear_backward


def _with_backward(change):
    """Backward whose `(dx, da, db, dbias)` went through `change`, which also gets its arguments."""

    def backward(*args):
        return change(eager.linear_backward(*args), *args)

    return eager.linear_forward, backward


@mutation("y")
def drop_the_lora_term():
    return _with_forward(lambda x, w, bias, a, b, seed, scale, p: (x, w, bias, a, b, seed, 0.0, p))


@mutation("y")
def double_the_scale():
    return _with_forward(lambda x, w, bias, a, b, seed, scale, p: (x, w, bias, a, b, seed, 2 * scale, p))


@mutation("y")
def swap_two_adapters():
    """Two adapters of half the rank each: A of the first meets B of the second."""
    return _with_forward(
        lambda x, w, bias, a, b, seed, scale, p: (x, w, bias, a, b.roll(b.shape[1] // 2, 1), seed, scale, p)
    )


@mutation("y")
def skip_the_last_k_block():
    def cut(x, w, bias, a, b, seed, scale, p):
        x = x.clone()
        x[..., -16:] = 0
        return x, w, bias, a, b, seed, scale, p

    return _with_forward(cut)


@mutation("y")
def skip_the_last_k_block_of_the_low_rank_path():
    def cut(x, w, bias, a, b, seed, scale, p):
        a = a.clone()
        a[:, -16:] = 0
        return x, w, bias, a, b, seed, scale, p

    return _with_forward(cut)


@mutation("y")
def read_b_the_wrong_way_round():
    """As a kernel with swapped strides does: memory order of [R, N] in a tensor of [N, R]."""
    return _with_forward(
        lambda x, w, bias, a, b, seed, scale, p: (x, w, bias, a, b.reshape(b.shape[::-1]).t(), seed, scale, p)
    )


@mutation("y")
def read_a_the_wrong_way_round():
    return _with_forward(
        lambda x, w, bias, a, b, seed, scale, p: (x, w, bias, a.reshape(a.shape[::-1]).t(), b, seed, scale, p)
    )


@mutation("y")
def forget_the_bias():
    return _with_forward(lambda x, w, bias, *rest: (x, w, None, *rest))


@mutation("y")
def scale_the_bias():
    return _with_forward(
        lambda x, w, bias, a, b, seed, scale, p: (
            x,
            w,
            bias if bias is None else bias * scale,
            a,
            b,
            seed,
            scale,
            p,
        )
    )


@mutation("y")
def forget_to_rescale_after_dropout():
    def shrink(x, w, bias, a, b, seed, scale, p):
        return x, w, bias, a, b, seed, scale if seed is None else scale * (1 - p), p

    return _with_forward(shrink)


@mutation("y")
def drop_the_base_input_too():
    def drop(x, w, bias, a, b, seed, scale, p):
        if seed is not None:
            flat = x.reshape(-1, x.shape[-1])
            x = (flat * philox.keep_mask(seed, p, slice(0, flat.shape[0]), flat.shape[1])).view(x.shape)
        return x, w, bias, a, b, seed, scale, p

    return _with_forward(drop)


@mutation("y")
def compute_in_bfloat16():
    def forward(x, w, bias, a, b, *rest):
        low = [None if t is None else t.bfloat16() for t in (x, w, bias, a, b)]
        return tuple(t.to(x.dtype) for t in eager.linear_forward(*low, *rest))

    return forward, eager.linear_backward


@mutation("y")
def leave_the_last_row_unwritten():
    def forward(*args):
        y, xa = eager.linear_forward(*args)
        y.view(-1, y.shape[-1])[-1] = float("nan")
        return y, xa

    return forward, eager.linear_backward


@mutation("x")
def write_the_input():
    def forward(x, *rest):
        y, xa = eager.linear_forward(x, *rest)
        x.mul_(1.25)
        return y, xa

    return forward, eager.linear_backward


@mutation("db")
def reuse_a_stale_xa():
    first = {}

    def forward(*args):
        y, xa = eager.linear_forward(*args)
        return y, first.setdefault((xa.shape, xa.dtype), xa)

    return forward, eager.linear_backward


@mutation("db")
def keep_xa_in_one_shared_buffer():
    buffers = {}

    def forward(*args):
        y, xa = eager.linear_forward(*args)
        buffer = buffers.setdefault((xa.shape, xa.dtype), xa.clone())
        # a kernel's write, which autograd does not see
        buffer.data.copy_(xa)
        return y, buffer

    return forward, eager.linear_backward


@mutation("dx")
def forget_the_scale_in_dx():
    def unscaled(grads, dy, x, xa, w, a, b, seed, scale, p, *needs):
        return (eager.linear_backward(dy, x, xa, w, a, b, seed, 1.0, p, *needs)[0], *grads[1:])

    return _with_backward(unscaled)


@mutation("dx")
def forget_the_base_in_dx():
    def low_rank_only(grads, dy, x, xa, w, *rest):
        return (eager.linear_backward(dy, x, xa, w * 0, *rest)[0], *grads[1:])

    return _with_backward(low_rank_only)


@mutation("dx")
def forget_the_mask_in_dx():
    def unmasked(grads, dy, x, xa, w, a, b, seed, scale, p, *needs):
        if seed is None:
            return grads
        return (eager.linear_backward(dy, x, xa, w, a, b, None, scale / (1 - p), 0.0, *needs)[0], *grads[1:])

    return _with_backward(unmasked)


@mutation("da")
def forget_the_mask_in_da():
    def unmasked(grads, dy, x, xa, w, a, b, seed, scale, p, *needs):
        if seed is None:
            return grads
        wrong = eager.linear_backward(dy, x, xa, w, a, b, None, scale / (1 - p), 0.0, *needs)
        return (grads[0], wrong[1], *grads[2:])

    return _with_backward(unmasked)


@mutation("y")
def shift_the_mask_by_one_row():
    def forward(*args):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(eager, "keep_mask", _shifted)
            return eager.linear_forward(*args)

    return forward, eager.linear_backward


@mutation("dx")
def shift_the_mask_by_one_row_in_backward():
    def backward(*args):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(eager, "keep_mask", _shifted)
            return eager.linear_backward(*args)

    return eager.linear_forward, backward


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
        dy.view(-1, dy.shape[-1])[-7:] = 0
        return (grads[0], eager.linear_backward(dy, x, *rest)[1], *grads[2:])

    return _with_backward(cut)


@mutation("dbias")
def average_the_bias_gradient():
    def average(grads, dy, *rest):
        return (*grads[:3], None if grads[3] is None else grads[3] / (dy.numel() // dy.shape[-1]))

    return _with_backward(average)


def run_gate():
    for case in GATE:
        check_linear(case)


def test_the_right_backend_is_green(monkeypatch):
    same = SimpleNamespace(linear_forward=eager.linear_forward, linear_backward=eager.linear_backward)
    monkeypatch.setattr(op, "eager", same)
    run_gate()


@pytest.mark.parametrize("name", MUTATIONS)
def test_each_mutation_is_red(monkeypatch, name):
    build, red = MUTATIONS[name]
    forward, backward = build()
    monkeypatch.setattr(op, "eager", SimpleNamespace(linear_forward=forward, linear_backward=backward))
    with pytest.raises(AssertionError) as failure:
        run_gate()
    assert str(failure.value).startswith(f"{red}:")
