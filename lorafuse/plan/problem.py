"""What a planner knows of one call."""

from dataclasses import dataclass

__all__ = ["Problem"]

_ITEMSIZE = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Problem:
    """One LoRA linear, forward or backward. `M` tokens, `N` out and `K` in features, `R` rank; dtypes by name.

    `gradients` are those that a backward pass computes, of "dx", "da", "db", "dbias"; without any it is a forward pass.
    `aligned` says that every row of x, w and y starts on a 16-byte boundary, as TMA needs; `wide` that xa and dyb are
    fp32, as adapters of a larger range than an fp16 base need.
    """

    M: int
    N: int
    K: int
    R: int
    dtype: str
    adapter_dtype: str
    bias: bool = False
    dropout: bool = False
    gradients: tuple[str, ...] = ()
    aligned: bool = True
    wide: bool = False
    base_format: str = "dense"

    @property
    def itemsize(self) -> int:
        """Bytes of an element of x, w and y."""
        return _ITEMSIZE[self.dtype]
