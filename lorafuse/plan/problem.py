"""What a planner knows of one call."""

from dataclasses import dataclass, fields

__all__ = ["Problem"]

_ITEMSIZE = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Problem:
    """One projection with LoRA in one direction. `M` rows, `N` out and `K` in features, `R` rank; dtypes by name.

    An operator is a tuple of problems: a linear layer or a grouped one has one, the experts of a block have two in both
    directions, `(gate_up, down)`.

    `gradients` are those that a backward pass computes, of "dx", "da", "db", "dbias"; without any it is a forward pass.
    `aligned` says that every row of x, w and y starts on a 16-byte boundary, as TMA needs; of ragged rows, every row of
    w, whichever way round. `wide` says that xa and dyb are fp32, as adapters of a larger range than an fp16 base need.

    A dense layer is one group. `is_ragged` rows belong to `groups` through offsets on the device; they are `choices` of
    `M / choices` tokens where that is not 1, and gathered. `format` is the weight's (`lorafuse.formats`). `epilogue`
    "gated" or "activation" says that forward computes h from u; in backward, that the product that gives dh is
    followed by the activation's backward. `adapters` counts those whose rows are mixed. `siblings` are the layers of
    one x whose out features are `N` and whose ranks are `R` together. `packed` says that a kernel can decode tiles of
    the weight where they lie: its codes are contiguous, and every row begins with a byte.
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
    groups: int = 1
    is_ragged: bool = False
    choices: int = 1
    format: str = "dense"
    epilogue: str = ""
    adapters: int = 1
    siblings: int = 1
    packed: bool = False

    def __post_init__(self) -> None:
        # every call of a layer looks its plan up, and hashing all fields takes longer than that
        object.__setattr__(self, "_hash", hash(tuple(getattr(self, field.name) for field in fields(self))))

    def __hash__(self) -> int:
        return self._hash  # type: ignore[attr-defined]

    @property
    def itemsize(self) -> int:
        """Bytes of an element of x, w and y."""
        return _ITEMSIZE[self.dtype]

    @property
    def is_misaligned(self) -> bool:
        """Whether some row of x, w or y starts off a 16-byte boundary."""
        return not self.aligned or any(size * self.itemsize % 16 for size in (self.N, self.K))

    @property
    def read(self) -> int:
        """Features of the operand that the base product reads: x, or in backward dy."""
        return self.N if self.gradients else self.K

    @property
    def written(self) -> int:
        """Features of what the base product writes: y, or in backward dx."""
        return self.K if self.gradients else self.N

    @property
    def active(self) -> int:
        """How many groups can have rows."""
        return min(self.groups, self.M)

    def padded_rows(self, height: int) -> int:
        """Rows of all tiles of that height when rows are spread evenly over the groups."""
        groups = max(self.active, 1)
        return groups * -(-max(self.M // groups, 1) // height) * height
