"""PEFT's LoRA layers in a model that transformers shards by columns and rows (`DistributedConfig(tp_size=…)`).

transformers replaces the forward of each sharded linear layer, and PEFT has it replace that of lora_B over a column-
parallel base and of lora_A over a row-parallel one: each makes DTensors of its inputs, multiplies and reduces. A fused
layer reads the local parts of all weights instead and sends once: `lorafuse.parallel.tp` says what.
"""

import sys
from typing import Any, NamedTuple

from torch import Tensor, nn

from lorafuse.integrations.hf_common import altered, is_dtensor

__all__ = ["TWO_MESHES", "Sharded", "run_sharded", "sharded_parts"]

TWO_MESHES = (
    "its base is sharded by FSDP2 and tensor parallelism at once, where PEFT makes adapters of wrong sizes: use one, "
    "or lorafuse.parallel in groups of a mesh"
)


class Sharded(NamedTuple):
    """The local operands of a layer, and how its parts are put together."""

    is_column: bool
    group: Any
    weight: Tensor
    a: Tensor
    b: Tensor
    scale: float
    bias: Tensor | None
    dropout_p: float


def sharded_parts(layer: Any, name: str, dropout_p: float) -> Sharded | str:
    """The present state of a layer over a DTensor weight, adapter `name` active; a str, the reason it does not run."""
    base, a, b = layer._modules["base_layer"], layer.lora_A[name], layer.lora_B[name]
    style = _style(base)
    if style is None:
        return "its base weight is a DTensor that neither FSDP2 nor transformers' tensor parallelism put there"
    kind, mesh = style
    if kind not in ("colwise", "rowwise"):
        return f"its base is sharded by the style {kind}; lorafuse runs colwise and rowwise"
    sharded, whole = (b, a) if kind == "colwise" else (a, b)
    if _style(sharded) != style or altered(whole) or is_dtensor(whole.weight):
        return "its lora_A or lora_B is not sharded as PEFT shards it"
    scale, b_bias = layer.scaling[name], b._parameters["bias"]
    if isinstance(scale, Tensor) or b_bias is not None:
        return "tensor parallelism with a bias of lora_B or a scale in a tensor"
    group = mesh.get_group() if mesh.ndim == 1 else mesh.get_group("tp")
    weight, a, b, bias = (_local(t) for t in (base.weight, a.weight, b.weight, base.bias))
    return Sharded(kind == "colwise", group, weight, a, b, scale, bias, dropout_p)


def run_sharded(x: Tensor, parts: Sharded, backend: str | None) -> Tensor:
    """y of a layer: this rank's columns of it, or all where the ranks hold rows."""
    # not at the top: builds of torch without torch.distributed have no DTensor either
    from lorafuse.parallel import column_parallel_linear, row_parallel_linear

    is_column, group, weight, a, b, scale, bias, p = parts
    run = column_parallel_linear if is_column else row_parallel_linear
    return run(x, weight, a, b, group, scale=scale, bias=bias, dropout_p=p, backend=backend)


def _style(module: nn.Module) -> tuple[str, Any] | None:
    """The name of the style by which transformers replaced the forward of a linear layer, and the mesh; None: not so.

    "colwise" and "rowwise" are those whose tensors are local: x whole and y a part, or x a part and y whole.
    """
    shipped, forward = sys.modules.get("transformers.distributed.tensor_parallel"), module.__dict__.get("forward")
    if shipped is None or getattr(forward, "__globals__", None) is not vars(shipped):
        return None
    cells = dict(zip(forward.__code__.co_freevars, forward.__closure__ or (), strict=True))
    if not {"self", "mesh", "original_forward"} <= cells.keys():
        return None
    style, mesh, own = (cells[key].cell_contents for key in ("self", "mesh", "original_forward"))
    if type(module) is not nn.Linear or getattr(own, "__func__", None) is not nn.Linear.forward:
        return None
    known = {
        shipped.ColwiseParallel: ("colwise", shipped.Replicate(), shipped.Shard(-1)),
        shipped.RowwiseParallel: ("rowwise", shipped.Shard(-1), shipped.Replicate()),
    }
    name, *layouts = known.get(type(style), (type(style).__name__,))
    if layouts and ([style.input_layouts, style.output_layouts] != layouts or not style.use_local_output):
        name = f"{name} with x {style.input_layouts} and y {style.output_layouts}"
    return name, mesh


def _local(tensor: Any) -> Any:
    return tensor.to_local() if is_dtensor(tensor) else tensor
