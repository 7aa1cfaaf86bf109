"""What layers of one x refuse (T1): the operand by name, what was passed, the rule and the fix."""

import re

import pytest
import torch
from group_reference import Case, linears, make, mlp
from torch.nn import functional as F

from lorafuse import functional as LF
from lorafuse.errors import BackendUnavailable

operators = pytest.mark.parametrize("name", ["linears", "mlp"])


def operands(name, **changes):
    return make(Case(**{"N": (14, 14, 10), "K": 12} | changes), of_mlp=name == "mlp")


def wrong(**changes):
    return lambda o: o.projections.__setitem__(1, o.projections[1]._replace(**changes))


REFUSED = {
    "a shape of weight": (
        wrong(weight=torch.ones(14, 13)),
        ValueError,
        r"weight \[14, 13\].*(projection 1|up); with K = 12",
    ),
    "a shape of a": (wrong(a=torch.ones(3, 13)), ValueError, r"a \[3, 13\]"),
    "ranks that differ": (wrong(a=torch.ones(5, 12)), ValueError, r"a \[5, 12\], b \[14, 3\]"),
    "no rank": (wrong(a=torch.ones(0, 12), b=torch.ones(14, 0)), ValueError, "R >= 1"),
    "a shape of bias": (wrong(bias=torch.ones(13)), ValueError, r"bias \[13\]"),
    "half an adapter": (wrong(b=None), ValueError, "only one of a and b for (projection 1|up)"),
    "a list": (wrong(weight=[1.0]), TypeError, "got a list for (projection 1|up)'s weight"),
    "no projection": (lambda o: o.projections.__setitem__(1, o.projections[1].weight), TypeError, "got a Tensor for"),
    "a trained weight": (wrong(weight=torch.ones(14, 12, requires_grad=True)), NotImplementedError, "freeze it"),
    "a transposed weight": (wrong(weight=LF.Weight(torch.ones(14, 12), True)), ValueError, "got a transposed weight"),
    "another device": (
        wrong(weight=torch.ones(14, 12, device="meta")),
        ValueError,
        "all tensors must be on one device",
    ),
    "another dtype": (wrong(weight=torch.ones(14, 12).double()), TypeError, "float64 for (projection 1|up)'s weight"),
    "another dtype of bias": (wrong(bias=torch.ones(14).double()), TypeError, "must have one floating dtype"),
    "integers": (wrong(a=torch.ones(3, 12, dtype=torch.int32)), TypeError, "adapters must be floating"),
    "a scale": (wrong(scale=float("inf")), ValueError, "(projection 1|up)'s scale=inf is not finite"),
    "a probability": (wrong(dropout_p=1.5), ValueError, "dropout_p=1.5 is not a probability"),
    "a seed": (wrong(dropout_p=0.5, seed="one"), ValueError, "seed='one' is not an int"),
}


@operators
@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused(name, what):
    change, error, message = REFUSED[what]
    o = operands(name)
    change(o)
    with pytest.raises(error, match=message):
        (mlp if name == "mlp" else linears)(o)


def test_what_else_is_refused():
    o = operands("linears")
    with pytest.raises(ValueError, match="got no projection"):
        LF.lora_linears(o.x, [])
    with pytest.raises(TypeError, match="got a list for x"):
        LF.lora_linears([1.0], o.projections)
    with pytest.raises(ValueError, match="x of 1 to 4 dimensions"):
        LF.lora_linears(torch.ones(1, 1, 1, 1, 12), o.projections)
    with pytest.raises(ValueError, match="backend='none'"):
        LF.lora_linears(o.x, o.projections, backend="none")
    with pytest.raises(BackendUnavailable, match=re.escape("backend='cuda' is not available")):
        LF.lora_linears(o.x, o.projections, backend="cuda")
    o = operands("mlp")
    o.projections[1] = LF.Projection(torch.ones(13, 12))
    with pytest.raises(ValueError, match="a gate of 14 out features and an up of 13"):
        mlp(o)


def test_a_frozen_group_is_what_linear_layers_are():
    o = operands("linears", R=(0, 0, 0), bias=(True, True, False))
    for y, one in zip(linears(o), o.projections, strict=True):
        assert torch.equal(y, F.linear(o.x, one.weight, one.bias))


@operators
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_dense_weight_is_its_tensor(name, dtype):
    o, run = operands(name), mlp if name == "mlp" else linears
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
        expected = run(o)
        o.projections = [one._replace(weight=LF.Weight(one.weight)) for one in o.projections]
        assert all(map(torch.equal, run(o), expected))
    assert expected[0].dtype is dtype
