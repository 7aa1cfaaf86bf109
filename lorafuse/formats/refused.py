"""What libraries store in a form that no format holds, and what to use instead."""

from typing import Any

from lorafuse.formats.codec import held, is_of

__all__ = ["refuse"]

_INSTEAD = "quantize with Int8WeightOnlyConfig, Float8WeightOnlyConfig, IntxWeightOnlyConfig or to_nf4"
# class of torchao: why
_TORCHAO = {
    "Int4Tensor": "int4 has no gradient there",
    "Int4PlainInt32Tensor": "int4 has no gradient there",
    "Int4PreshuffledTensor": "int4 has no gradient there",
    "Int4TilePackedTo4dTensor": "int4 has no gradient there",
    "IntxOpaqueTensor": "its data is packed for one CPU's kernels",
    "MXTensor": "its products quantize activations too",
    "NVFP4Tensor": "its products quantize activations too",
    "Float8SemiSparseTensor": "it is sparse",
}


def refuse(storage: object, name: str = "weight") -> None:
    """Raises ValueError for a tensor of torchao, or parameter `name` of a module that is one, which none of
    `lorafuse.formats` holds; nothing for what is not torchao's.
    """
    weight: Any = held(storage, name)
    for kind, reason in _TORCHAO.items():
        if is_of(weight, "torchao", kind):
            raise ValueError(f"torchao's {kind} {list(weight.shape)} cannot be adopted: {reason}; {_INSTEAD}")
    if is_of(weight, "torchao", "TorchAOBaseTensor"):
        raise ValueError(
            f"torchao's {type(weight).__name__} {list(weight.shape)} is not a format lorafuse reads; {_INSTEAD}"
        )
