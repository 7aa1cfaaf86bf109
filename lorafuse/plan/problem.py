"""What a planner knows of one call."""

from dataclasses import dataclass

__all__ = ["Problem"]


@dataclass(frozen=True)
class Problem:
    """One LoRA linear. `M` tokens, `N` out features, `K` in features, `R` rank; dtypes by name ("bfloat16", …)."""

    M: int
    N: int
    K: int
    R: int
    dtype: str
    adapter_dtype: str
    device_type: str
    bias: bool = False
    dropout: bool = False
    base_format: str = "dense"
