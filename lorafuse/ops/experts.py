"""`lorafuse::lora_experts` and `lorafuse::lora_grouped_linear`: schemas, shape rules, fake kernels, autograd.

What they compute is in `lorafuse.backends.loop_experts`. Besides their result they return what backward needs, so that
a compiled graph holds it: rows in the order of their experts. There is no gradient of an expert's weights or biases.

A backward that is differentiated again, or for several gradients at once, and calls under a transform of torch are
those of `experts_plain`.
"""

from collections.abc import Callable
from functools import partial
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from lorafuse.activation import Activation, Recomputed, named
from lorafuse.backends import base, probe
from lorafuse.errors import BackendUnavailable
from lorafuse.ops import experts_plain
from lorafuse.ops._define import LIBRARY
from lorafuse.ops.autocast import outside_autocast
from lorafuse.ops.linear import plan_problem
from lorafuse.ops.transforms import is_transformed, needs_plain_backward

__all__ = ["lora_experts", "lora_experts_recomputed", "lora_grouped_linear"]

_LAYERS = "Tensor{opt} up_a, Tensor{opt} up_b, Tensor{opt} down_a, Tensor{opt} down_b".format(opt="?")
_ACT = "float up_scale, float down_scale, bool transposed, str activation, bool gated, bool interleaved"
LIBRARY.define(
    "lora_experts(Tensor x, Tensor index, Tensor weight, Tensor up, Tensor down, Tensor? up_bias, Tensor? down_bias,"
    f" {_LAYERS}, {_ACT}, str backend)"
    " -> (Tensor out, Tensor u, Tensor xa, Tensor ha, Tensor order, Tensor ends)"
)
LIBRARY.define(
    "lora_experts_backward(Tensor dout, Tensor x, Tensor weight, Tensor up, Tensor down, Tensor? down_bias,"
    f" {_LAYERS}, {_ACT}, Tensor u, Tensor xa, Tensor ha, Tensor order, Tensor ends, bool[] needs, str backend)"
    " -> (Tensor dx, Tensor dweight, Tensor d_up_a, Tensor d_up_b, Tensor d_down_a, Tensor d_down_b)"
)
LIBRARY.define(
    "lora_grouped_linear(Tensor x, Tensor ends, Tensor w, Tensor? bias, Tensor? a, Tensor? b, float scale,"
    " bool transposed, str backend) -> (Tensor y, Tensor xa)"
)
LIBRARY.define(
    "lora_grouped_linear_backward(Tensor dy, Tensor? x, Tensor? xa, Tensor ends, Tensor w, Tensor? a, Tensor? b,"
    " float scale, bool transposed, bool[] needs, str backend) -> (Tensor dx, Tensor da, Tensor db)"
)


# activations that are functions, which no schema holds: by the name that the operator gets instead
_functions: WeakValueDictionary[str, Recomputed] = WeakValueDictionary()


def _activation(name: str, gated: bool, interleaved: bool) -> Activation | Recomputed:
    return _functions[name] if name in _functions else named(name, gated, interleaved)


def _gated(name, gated):
    return None if name in _functions else gated


def _run(backend, x, problem, *operands):
    """The module that runs a call; `problem(*operands)` is what the plan is asked for "auto"."""
    backend = base.resolve(backend)
    run = base.load(_planned(x.device, partial(problem, *operands)) if backend == "auto" else backend)
    if not hasattr(run, "experts_forward"):
        raise BackendUnavailable(
            f"backend={backend!r} has no kernels for experts and grouped layers; use 'eager', 'triton' or 'auto'"
        )
    return run


def _planned(device, problem):
    """The backend of the plan, where there is more than one; `problem()` is what is planned."""
    able = base.candidates(device.type)
    return able[0] if len(able) == 1 else plan_problem(problem(), device).backend


def _rank(a):
    return 0 if a is None else a.shape[1]


def _kept(grads, like):
    return tuple(like.new_empty(0) if g is None else g for g in grads)


def _experts(x, index, weight, up, down, ub, db, ua, ubb, da, dbb, s1, s2, transposed, act, gated, inter, backend):
    operands = x, index.shape[1], up, down, ua, da, transposed, _gated(act, gated)
    run = _run(backend, x, probe.experts_problems, *operands, False).experts_forward
    act = _activation(act, gated, inter)
    with outside_autocast(x):
        return run(x, index, weight, up, down, ub, db, ua, ubb, da, dbb, s1, s2, transposed, act)


def _fake_experts(x, index, weight, up, down, ub, db, ua, ubb, da, dbb, s1, s2, transposed, act, gated, inter, backend):
    rows = index.shape[0] * index.shape[1]
    u = x.new_empty((rows, up.shape[2] if transposed else up.shape[1]))
    order = index.new_empty((rows,))
    low = x.new_empty((rows, _rank(ua))), x.new_empty((rows, _rank(da)))
    return torch.empty_like(x), u, *low, order, index.new_empty((up.shape[0],))


def _experts_backward(dout, x, weight, up, down, db, ua, ub, da, dbb, s1, s2, transposed, act, gated, inter, *rest):
    *saved, needs, backend = rest
    operands = x, weight.shape[1], up, down, ua, da, transposed, _gated(act, gated)
    run = _run(backend, x, probe.experts_problems, *operands, True).experts_backward
    act = _activation(act, gated, inter)
    need_dx, need_dweight, *adapters = needs
    with outside_autocast(x):
        grads = run(
            dout, x, weight, up, down, db, ua, ub, da, dbb, s1, s2, transposed, act, *saved,
            need_dx, need_dweight, any(adapters[:2]), any(adapters[2:]),
        )  # fmt: skip
    return _kept(grads, dout)


def _fake_experts_backward(dout, x, weight, up, down, db, ua, ub, da, dbb, *rest):
    needs = rest[-2]
    pairs = any(needs[2:4]), any(needs[4:6])
    made = (needs[0], needs[1], pairs[0], pairs[0], pairs[1], pairs[1])
    like = (x, weight, ua, ub, da, dbb)
    return tuple(
        t.new_empty(t.shape) if need and t is not None else dout.new_empty(0)
        for t, need in zip(like, made, strict=True)
    )


# of lora_experts: which inputs may have a gradient, in the order of lora_experts_backward's results
_DIFFERENTIABLE = (0, 2, 7, 8, 9, 10)


def _save_experts(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    # index and up_bias for second derivatives alone
    ctx.save_for_backward(*inputs[:11], *output[1:])
    ctx.settings, ctx.backend = inputs[11:17], inputs[17]
    # held here, or a function is gone before backward
    ctx.activation = _activation(*inputs[14:17])


def _differentiate_experts(ctx, dout, *_):
    grads = [None] * 18
    needed = [i for i in _DIFFERENTIABLE if ctx.needs_input_grad[i]]
    if dout is None:
        return tuple(grads)
    # read once: a checkpoint hands them out once
    tensors = ctx.saved_tensors
    inputs, saved = tensors[:11], tensors[11:]
    if needs_plain_backward(dout):
        given = *inputs, *ctx.settings[:3], ctx.activation
        found = experts_plain.gradients(experts_plain.experts, given, needed, dout)
    else:
        x, _, weight, up, down, _, down_bias, *adapters = inputs
        needs = [i in needed for i in _DIFFERENTIABLE]
        operands = x, weight, up, down, down_bias, *adapters
        every = torch.ops.lorafuse.lora_experts_backward(dout, *operands, *ctx.settings, *saved, needs, ctx.backend)
        found = [grad for grad, need in zip(every, needs, strict=True) if need]
    for i, grad in zip(needed, found, strict=True):
        grads[i] = grad
    return tuple(grads)


def _grouped(x, ends, w, bias, a, b, scale, transposed, backend):
    run = _run(backend, x, probe.grouped_problem, x, w, a, transposed, False)
    with outside_autocast(x):
        return run.grouped_forward(x, ends, w, bias, a, b, scale, transposed)


def _fake_grouped(x, ends, w, bias, a, b, scale, transposed, backend):
    return x.new_empty((x.shape[0], w.shape[2 if transposed else 1])), x.new_empty((x.shape[0], _rank(a)))


def _grouped_backward(dy, x, xa, ends, w, a, b, scale, transposed, needs, backend):
    run = _run(backend, dy, probe.grouped_problem, dy, w, a, transposed, True)
    with outside_autocast(dy):
        return _kept(run.grouped_backward(dy, x, xa, ends, w, a, b, scale, transposed, *needs), dy)


def _fake_grouped_backward(dy, x, xa, ends, w, a, b, scale, transposed, needs, backend):
    dx = dy.new_empty((dy.shape[0], w.shape[1 if transposed else 2]) if needs[0] else 0)
    return dx, *(t.new_empty(t.shape) if need else dy.new_empty(0) for t, need in zip((a, b), needs[1:], strict=True))


def _save_grouped(ctx, inputs, output):
    x, *operands, ctx.scale, ctx.transposed, ctx.backend = inputs
    ctx.set_materialize_grads(False)
    # bias for second derivatives alone; dx does not depend on x
    low = ctx.needs_input_grad[4] or ctx.needs_input_grad[5]
    ctx.save_for_backward(x if low else None, *operands, output[1])


def _differentiate_grouped(ctx, dy, _):
    grads = [None] * 9
    needed = [i for i in (0, 4, 5) if ctx.needs_input_grad[i]]
    if dy is None:
        return tuple(grads)
    x, ends, w, bias, a, b, xa = ctx.saved_tensors
    if needs_plain_backward(dy):
        if x is None:
            x = w.new_zeros((dy.shape[0], w.shape[1 if ctx.transposed else 2])).requires_grad_()
        given = x, ends, w, bias, a, b, ctx.scale, ctx.transposed
        found = experts_plain.gradients(experts_plain.grouped, given, needed, dy)
    else:
        needs = [i in needed for i in (0, 4, 5)]
        op = torch.ops.lorafuse.lora_grouped_linear_backward
        every = op(dy, x, xa, ends, w, a, b, ctx.scale, ctx.transposed, needs, ctx.backend)
        found = [grad for grad, need in zip(every, needs, strict=True) if need]
    for i, grad in zip(needed, found, strict=True):
        grads[i] = grad
    return tuple(grads)


for _name, _real, _fake in (
    ("lora_experts", _experts, _fake_experts),
    ("lora_experts_backward", _experts_backward, _fake_experts_backward),
    ("lora_grouped_linear", _grouped, _fake_grouped),
    ("lora_grouped_linear_backward", _grouped_backward, _fake_grouped_backward),
):
    LIBRARY.impl(_name, _real, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lorafuse::{_name}", _fake, lib=LIBRARY)
torch.library.register_autograd(
    "lorafuse::lora_experts", _differentiate_experts, setup_context=_save_experts, lib=LIBRARY
)
torch.library.register_autograd(
    "lorafuse::lora_grouped_linear", _differentiate_grouped, setup_context=_save_grouped, lib=LIBRARY
)


def lora_experts(*args) -> Tensor:
    """out of the operator; see `lorafuse.functional.lora_experts` for the meaning."""
    if is_transformed(args[0]):
        with outside_autocast(args[0]):
            *operands, name, gated, interleaved, _ = args
            act = _activation(name, gated, interleaved)
            return experts_plain.experts(*operands, act)  # type: ignore[call-arg]
    return torch.ops.lorafuse.lora_experts(*args)[0]


def lora_experts_recomputed(*args, activation: Callable[[Tensor], Tensor], backend: str) -> Tensor:
    """The same with any activation; `args` are those of the operator up to `transposed`."""
    # a compiler would compile again for every name; importing it for nobody takes seconds
    run = torch._dynamo.disable(_recomputed) if torch.compiler.is_compiling() else _recomputed
    return run(args, activation, backend)


def _recomputed(args, activation, backend):
    x, index, _, up, down, _, _, up_a, _, down_a, *_, transposed = args
    if base.resolve(backend) == "auto":
        # backward runs where forward does
        operands = x, index.shape[1], up, down, up_a, down_a, transposed, None, False
        backend = _planned(x.device, partial(probe.experts_problems, *operands))
    act = Recomputed(activation)
    name = f"function {id(act)}"
    _functions[name] = act
    return lora_experts(*args, name, True, False, backend)


def lora_grouped_linear(*args) -> Tensor:
    """y of the operator; see `lorafuse.functional.lora_grouped_linear` for the meaning."""
    if is_transformed(args[0]):
        with outside_autocast(args[0]):
            return experts_plain.grouped(*args[:-1])
    return torch.ops.lorafuse.lora_grouped_linear(*args)[0]
