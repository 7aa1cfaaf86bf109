"""What frozen weights hold, and what decoding them takes, by the format of a base. A model, not a measurement.

Any of them may store stacks of experts too, as `lorafuse.integrations.adapt_experts` runs them; transformers quantizes
the linear layers alone by bitsandbytes, and both as FP8.
"""

from lorafuse.advise.shapes import Linear, ModelShapes
from lorafuse.formats.sizes import stored_bytes
from lorafuse.plan import DeviceSpec

__all__ = ["BASES", "decode_seconds", "frozen_bytes"]

# of the product that reads it, and of what is not adapted
_HALF = 2
# their formats in `lorafuse.formats`
BASES = {"NF4": "nf4", "FP4": "fp4", "int8": "int8", "FP8": "fp8", "MXFP4": "mxfp4"}


def frozen_bytes(shapes: ModelShapes, base: str, *, experts: bool = True) -> int:
    """Bytes of all frozen weights: the adapted ones as `base` stores them, stacks of experts too unless `experts` is
    False, everything else in 16 bits. Raises ValueError for an unknown base.
    """
    packed = _packed(shapes, experts)
    rest = shapes.parameters - sum(x.weights for x in packed)
    return round(rest * _HALF + sum(_stored(x, base) for x in packed))


def decode_seconds(
    shapes: ModelShapes, base: str, device: DeviceSpec, *, checkpointing: bool = False, experts: bool = True
) -> float:
    """Seconds that decoding adds to a micro-batch of lorafuse: each weight is read as stored and written in 16 bits
    before forward's product and before that of dx, with checkpointing before the second forward too.
    """
    moved = sum(_stored(x, base) + x.weights * _HALF for x in _packed(shapes, experts))
    return (3 if checkpointing else 2) * moved / device.sustained_bandwidth


def _packed(shapes: ModelShapes, experts: bool) -> list[Linear]:
    return [x for x in shapes.adapted if experts or not x.parameter]


def _stored(linear: Linear, base: str) -> float:
    if base not in BASES:
        raise ValueError(f"base {base!r} is not one of {', '.join(BASES)}")
    return linear.weights / (linear.N * linear.K) * stored_bytes(BASES[base], linear.N, linear.K)
