"""How results are compared: the one tolerance table, and the three-way rule. No switch loosens either.

A result passes when its error is below twice that of plain torch in the same dtype, both against an fp64 reference,
plus a floor of one rounding of that dtype (so that an error-free torch result does not demand an error-free one of
ours).
"""

import torch
from torch import Tensor

__all__ = ["assert_three_way", "lora_formula", "relative_l2", "rounding", "tolerance"]

# relative L2 error against an fp64 reference: about four roundings of the dtype, and for fp32 what PEFT equality
# demands
_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
# half a unit in the last place, relative
_ROUNDING = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def tolerance(dtype: torch.dtype) -> float:
    """Largest relative L2 error of a result in `dtype` against an fp64 reference."""
    return _TOLERANCE[dtype]


def rounding(dtype: torch.dtype) -> float:
    """Relative error of one rounding to `dtype`."""
    return _ROUNDING[dtype]


def relative_l2(actual: Tensor, expected: Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖ in fp64; 0 for two empty tensors, inf for NaN or a wrong non-zero on all zeros.

    Raises ValueError when the shapes differ.
    """
    if actual.shape != expected.shape:
        raise ValueError(f"shapes differ: {list(actual.shape)} and {list(expected.shape)}")
    actual, expected = actual.detach().double(), expected.detach().double()
    error, size = (actual - expected).norm().item(), expected.norm().item()
    if error == 0.0:
        return 0.0
    return error / size if size > 0.0 and error == error else float("inf")


def assert_three_way(name: str, actual: Tensor, same_dtype: Tensor, reference: Tensor) -> None:
    """Assert the three-way rule for one tensor; the message gives its name, both errors and the bound."""
    ours, theirs = relative_l2(actual, reference), relative_l2(same_dtype, reference)
    bound = 2.0 * theirs + rounding(actual.dtype)
    assert ours <= bound, f"{name}: error {ours:.3e} above {bound:.3e} (torch in {actual.dtype}: {theirs:.3e})"


def lora_formula(
    x: Tensor, w: Tensor, a: Tensor, b: Tensor, dy: Tensor, scale: float, keep: Tensor | None = None
) -> dict[str, Tensor]:
    """`y = x wᵀ + scale · (x aᵀ) bᵀ` and its gradients `dx`, `da`, `db`, in fp64; all inputs 2-D.

    `keep`, bool `[M, K]`, masks x in the low-rank path; dropout's `1 / (1 - p)` is a part of `scale`.
    """
    x, w, a, b, dy = (t.detach().double() for t in (x, w, a, b, dy))
    low = x if keep is None else x * keep
    xa, dyb = low @ a.t(), dy @ b
    low_dx = dyb @ a if keep is None else keep * (dyb @ a)
    return {
        "y": x @ w.t() + scale * xa @ b.t(),
        "dx": dy @ w + scale * low_dx,
        "da": scale * dyb.t() @ low,
        "db": scale * dy.t() @ xa,
    }
