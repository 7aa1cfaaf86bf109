"""What the LoRA linear refuses (T1): each message holds the value, the rule and the fix."""

import itertools
import math

import numpy as np
import pytest
import torch

from lorafuse.functional import lora_linear
from lorafuse.nn import LoRALinear

M, N, K, R = 3, 6, 8, 2


def operands(**replaced):
    shapes = {"x": (M, K), "weight": (N, K), "a": (R, K), "b": (N, R)}
    return {name: torch.randn(shape) for name, shape in shapes.items()} | replaced


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("x", (M, K + 1)),
        ("x", ()),
        ("x", (1, 1, 1, 1, K)),
        ("weight", (K, N)),
        ("weight", (K,)),
        ("weight", (1, N, K)),
        ("a", (K, R)),
        ("a", (R, K - 1)),
        ("a", (R + 1, K)),
        ("a", (0, K)),
        ("b", (R, N)),
        ("b", (N + 1, R)),
        ("b", (N, 0)),
        ("b", (N,)),
        ("bias", (N + 1,)),
        ("bias", (1,)),
        ("bias", (N, 1)),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_shapes(name, shape, device):
    given = {n: t.to(device) for n, t in operands(**{name: torch.randn(shape)}).items()}
    with pytest.raises(ValueError, match="lora_linear got") as error:
        lora_linear(**given)
    message = str(error.value)
    assert f"{name} {list(shape)}" in message
    assert "x [..., K]" in message
    assert "a [R, K], b [N, R]" in message
    assert "lora_A.weight" in message


def test_rank_zero_is_no_rank():
    with pytest.raises(ValueError, match="R >= 1"):
        lora_linear(**operands(a=torch.randn(0, K), b=torch.randn(N, 0)))


@pytest.mark.parametrize("name", ["x", "weight", "a", "b", "bias"])
def test_devices(name):
    given = operands(bias=torch.randn(N))
    given[name] = given[name].to("meta")
    with pytest.raises(ValueError, match=f"{name} on meta.*one device.*\\.to\\("):
        lora_linear(**given)


@pytest.mark.parametrize("name", ["a", "b"])
def test_adapters_are_floating(name):
    given = operands()
    given[name] = given[name].int()
    with pytest.raises(TypeError, match=f"{name} torch.int32.*must be floating"):
        lora_linear(**given)


@pytest.mark.parametrize(("name", "other"), [("x", torch.bfloat16), ("weight", torch.float64)])
def test_base_dtypes(name, other):
    given = operands()
    given[name] = given[name].to(other)
    with pytest.raises(TypeError, match=f"{name} {other}.*one floating dtype.*(cast x|autocast)"):
        lora_linear(**given)


def test_bias_dtype():
    with pytest.raises(TypeError, match="bias torch.bfloat16"):
        lora_linear(**operands(bias=torch.randn(N).bfloat16()))


def test_integers_are_no_input():
    given = operands()
    with pytest.raises(TypeError, match=r"x torch.int64.*floating"):
        lora_linear(**given | {"x": given["x"].long(), "weight": given["weight"].long()})


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
@pytest.mark.parametrize("name", ["x", "weight"])
def test_autocast_makes_no_floats_of_other_dtypes(name, dtype):
    given = operands()
    given[name] = given[name].to(dtype)
    with torch.autocast("cpu"), pytest.raises(TypeError, match=f"{name} {dtype}"):
        lora_linear(**given)


_NO_TENSORS = ([[1.0]], 3, "x", np.ones((3, 8), np.float32))


@pytest.mark.parametrize(
    ("name", "other"),
    [
        *itertools.product(("x", "weight", "a", "b", "bias"), _NO_TENSORS),
        *itertools.product(("x", "weight", "a", "b"), (None,)),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_operands_are_tensors(name, other):
    with pytest.raises(TypeError, match=f"got a {type(other).__name__} for {name}; it must be a tensor"):
        lora_linear(**operands(**{name: other}))


@pytest.mark.parametrize("scale", [math.nan, math.inf, -math.inf])
def test_the_scale_is_finite(scale):
    with pytest.raises(ValueError, match=f"scale={scale} is not finite"):
        lora_linear(**operands(), scale=scale)
    with pytest.raises(ValueError, match=f"alpha={scale} is not finite"):
        LoRALinear(K, N, R, alpha=scale)


@pytest.mark.parametrize("seed", [2**63, -(2**63) - 1, 1.5, "1"])
def test_integers_of_64_bits_are_seeds(seed):
    with pytest.raises(ValueError, match="seed=.* is not an int of 64 bits"):
        lora_linear(**operands(), dropout_p=0.5, seed=seed)


def test_weight_gets_no_gradient():
    given = operands()
    given["weight"].requires_grad_()
    with pytest.raises(NotImplementedError, match=r"\[6, 8\].*requires_grad_\(False\).*functional\.linear"):
        lora_linear(**given)


@pytest.mark.parametrize("p", [-0.1, 1.0001, math.nan, math.inf])
def test_dropout_is_a_probability(p):
    with pytest.raises(ValueError, match=f"dropout_p={p} .*between 0 and 1"):
        lora_linear(**operands(), dropout_p=p)


@pytest.mark.parametrize(
    "seed",
    [
        torch.zeros(1),
        torch.zeros(1, dtype=torch.int32),
        torch.zeros((), dtype=torch.int64),
        torch.zeros(2, dtype=torch.int64),
        torch.zeros(1, dtype=torch.int64, device="meta"),
    ],
    ids=lambda seed: f"{seed.dtype}{list(seed.shape)}{seed.device}",
)
def test_seed_tensors(seed):
    with pytest.raises(ValueError, match="seed is a") as error:
        lora_linear(**operands(), dropout_p=0.5, seed=seed)
    message = str(error.value)
    for part in (str(seed.dtype), str(list(seed.shape)), f"on {seed.device}", "int64, of shape [1], on cpu"):
        assert part in message


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("leading", [(), (5,), (0,), (2, 3), (2, 3, 4)])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_meta_tensors_give_meta_results(leading, dropout_p, dtype):
    def meta(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)

    x, a, b = meta(*leading, K), meta(R, K, dtype=torch.float32), meta(N, R, dtype=torch.float32)
    bias = meta(N)
    y = lora_linear(x, meta(N, K).detach(), a, b, bias=bias, dropout_p=dropout_p)
    assert (y.shape, y.dtype, y.device.type) == ((*leading, N), dtype, "meta")
    y.backward(torch.empty_like(y))
    for tensor in (x, a, b, bias):
        assert (tensor.grad.shape, tensor.grad.dtype) == (tensor.shape, tensor.dtype)
        assert tensor.grad.is_meta
