"""`LoRAQKV` and `LoRAGatedMLP`: layers that read one x, run as one operator."""

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn

from lorafuse.activation import ACTIVATIONS, GATES
from lorafuse.functional import (
    MultiProjection,
    Projection,
    lora_gated_mlp,
    lora_gated_mlp_multi,
    lora_linears_multi,
    lora_qkv,
)
from lorafuse.nn.linear import LoRALinear
from lorafuse.nn.multi import AdapterRows, LoRALinearMulti, multi_projections, shared_rows

__all__ = ["LoRAGatedMLP", "LoRAQKV"]


_Layer: TypeAlias = nn.Linear | LoRALinear | LoRALinearMulti


class _Group(nn.Module):
    """Named layers, each a `LoRALinear`, a frozen `nn.Linear` or, of many adapters, a `LoRALinearMulti`; their own
    forward is not called.
    """

    def __init__(self, **layers: _Layer) -> None:
        super().__init__()
        for name, layer in layers.items():
            if isinstance(layer, LoRALinear | LoRALinearMulti):
                self.add_module(name, layer)
                continue
            if getattr(type(layer), "forward", None) is not nn.Linear.forward:
                raise TypeError(
                    f"{type(self).__name__} got a {type(layer).__name__} for {name}; it takes a LoRALinear, or an "
                    "nn.Linear with nn.Linear's forward, or a LoRALinearMulti"
                )
            layer.weight.requires_grad_(False)
            if layer.bias is not None:
                layer.bias.requires_grad_(False)
            self.add_module(name, layer)

    def _layers(self) -> Sequence[_Layer]:
        return list(self.children())  # type: ignore[arg-type]

    def _rows(self) -> AdapterRows | None:
        """Those of many adapters, within `AdapterPool.use_adapters`."""
        return shared_rows([layer for layer in self._layers() if isinstance(layer, LoRALinearMulti)])

    def _projections(self, x: Tensor) -> list[Projection]:
        return [_projection(layer, x) for layer in self._layers()]

    def reset_lora_parameters(self) -> None:
        """PEFT's initialization of every adapter: A uniform, B zero, so that each layer starts as its base."""
        for layer in self._adapted():
            layer.reset_lora_parameters()

    def merge(self) -> None:
        """Add `scale · B·A` into the weight of every adapted layer, which runs without its adapter then."""
        for layer in self._adapted():
            layer.merge()

    def unmerge(self) -> None:
        """Subtract what `merge` added, exact up to one rounding of the weights' dtype for each of the two."""
        for layer in self._adapted():
            layer.unmerge()

    def _adapted(self) -> list[LoRALinear]:
        return [layer for layer in self._layers() if isinstance(layer, LoRALinear)]


def _projection(layer: _Layer, x: Tensor) -> Projection:
    """A layer as it is now; x is what the group reads."""
    if isinstance(layer, LoRALinearMulti):
        return Projection(layer.weight, bias=layer.base.bias)  # type: ignore[arg-type]
    if not isinstance(layer, LoRALinear) or layer.merged:
        return Projection(layer.weight, bias=layer.bias)
    a, b, p = layer.lora_A.weight, layer.lora_B.weight, layer.dropout if layer.training else 0.0
    return Projection(layer.weight, a, b, layer.scale, layer.bias, p, layer.drawn_mask(x))


def _multi_projections(layers: Sequence[_Layer], rows: AdapterRows) -> list[MultiProjection]:
    """Layers of many adapters, and frozen ones. Raises TypeError for one with an adapter of its own for all rows."""
    for layer in layers:
        if isinstance(layer, LoRALinear):
            raise TypeError(
                "a LoRALinear has one adapter for all rows; the other layers of the group have one for each"
            )
    return multi_projections(layers, rows)


def _adapted(
    linears: Sequence[nn.Linear], names: Sequence[str], targets: Sequence[str], r: int, alpha: float | None,
    dropout: float, use_rslora: bool, dropout_rng: str, adapter_dtype: torch.dtype | None,
) -> list[nn.Linear | LoRALinear]:  # fmt: skip
    """The layers, those named in `targets` with an adapter. Raises ValueError for an unknown target."""
    unknown = [name for name in targets if name not in names]
    if unknown or isinstance(targets, str):
        raise ValueError(f"targets={targets!r} must be a sequence of names among {', '.join(names)}")
    settings = {
        "alpha": alpha, "dropout": dropout, "use_rslora": use_rslora, "dropout_rng": dropout_rng,
        "adapter_dtype": adapter_dtype,
    }  # fmt: skip
    return [
        LoRALinear.from_linear(linear, r, **settings) if name in targets else linear  # type: ignore[arg-type]
        for linear, name in zip(linears, names, strict=True)
    ]


class LoRAQKV(_Group):
    """The projections of an attention block as one operator: `(q_proj(x), k_proj(x), v_proj(x))`.

    The state dict holds `q_proj.weight`, `q_proj.lora_A.weight`, …, as the three layers name them. Each layer has its
    own rank, scale, dropout and bias; out features may differ (grouped-query attention).

    Args:
        q_proj, k_proj, v_proj: a `LoRALinear` each, or an `nn.Linear`, which is frozen and has no adapter. An
            `AdapterPool` replaces these by `LoRALinearMulti`s, whose rows of many adapters are one operator too.

    Raises TypeError for other modules, ValueError for in features that differ.
    """

    _NAMES = ("q_proj", "k_proj", "v_proj")

    def __init__(
        self,
        q_proj: _Layer,
        k_proj: _Layer,
        v_proj: _Layer,
    ) -> None:
        super().__init__(q_proj=q_proj, k_proj=k_proj, v_proj=v_proj)
        if len({layer.in_features for layer in self._layers()}) > 1:
            shown = ", ".join(f"{name} {layer.in_features}" for name, layer in self.named_children())
            raise ValueError(f"LoRAQKV got in features {shown}; the three layers read one x")

    @classmethod
    def from_linears(
        cls,
        q_proj: nn.Linear,
        k_proj: nn.Linear,
        v_proj: nn.Linear,
        r: int,
        *,
        alpha: float | None = None,
        dropout: float = 0.0,
        use_rslora: bool = False,
        dropout_rng: str = "philox",
        adapter_dtype: torch.dtype | None = None,
        targets: Sequence[str] = _NAMES,
    ) -> "LoRAQKV":
        """Adapted layers over `nn.Linear`s, whose weights and biases are shared, not copied, and frozen.

        `targets` names the layers that get an adapter; r, alpha, dropout, use_rslora, dropout_rng and adapter_dtype are
        those of `LoRALinear` for each. Raises ValueError for an unknown target, and what
        `LoRALinear.from_linear` raises.
        """
        settings = r, alpha, dropout, use_rslora, dropout_rng, adapter_dtype
        return cls(*_adapted((q_proj, k_proj, v_proj), cls._NAMES, targets, *settings)).train(q_proj.training)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`(q, k, v)`, `[..., out_features]` of each layer, for x `[..., in_features]`."""
        rows = self._rows()
        if rows is None:
            return lora_qkv(x, *self._projections(x))
        flat, offsets = rows.sorted(x)
        q, k, v = (rows.restored(y, x) for y in lora_linears_multi(
            flat, offsets, _multi_projections(self._layers(), rows)
        ))  # fmt: skip
        return q, k, v


class LoRAGatedMLP(_Group):
    """The gated MLP of a transformer as one operator: `down_proj(act(gate_proj(x)) · up_proj(x))`.

    The state dict holds `gate_proj.weight`, `gate_proj.lora_A.weight`, …, as the three layers name them. Backward keeps
    x, gate and up, and computes `act(gate) · up` again.

    Args:
        gate_proj, up_proj, down_proj: a `LoRALinear` each, an `nn.Linear`, or a `LoRALinearMulti`, as of `LoRAQKV`.
        activation: a name of `lorafuse.activation.ACTIVATIONS` or `GATES`.
        recompute_up: do not keep up either; backward multiplies x by its weight once more.

    Raises TypeError for other modules, ValueError for sizes that do not fit or an unknown activation.
    """

    _NAMES = ("gate_proj", "up_proj", "down_proj")

    def __init__(
        self,
        gate_proj: _Layer,
        up_proj: _Layer,
        down_proj: _Layer,
        *,
        activation: str = "silu",
        recompute_up: bool = False,
    ) -> None:
        super().__init__(gate_proj=gate_proj, up_proj=up_proj, down_proj=down_proj)
        if activation not in ACTIVATIONS and activation not in GATES:
            raise ValueError(f"activation {activation!r} is not one of {', '.join((*ACTIVATIONS, *GATES))}")
        sizes = {name: (layer.out_features, layer.in_features) for name, layer in self.named_children()}
        if sizes["gate_proj"] != sizes["up_proj"] or sizes["down_proj"][1] != sizes["up_proj"][0]:
            shown = ", ".join(f"{name} [{n}, {k}]" for name, (n, k) in sizes.items())
            raise ValueError(f"LoRAGatedMLP got {shown}; the rule is gate_proj and up_proj [I, H], down_proj [H, I]")
        self.activation, self.recompute_up = activation, recompute_up

    @classmethod
    def from_linears(
        cls,
        gate_proj: nn.Linear,
        up_proj: nn.Linear,
        down_proj: nn.Linear,
        r: int,
        *,
        activation: str = "silu",
        recompute_up: bool = False,
        alpha: float | None = None,
        dropout: float = 0.0,
        use_rslora: bool = False,
        dropout_rng: str = "philox",
        adapter_dtype: torch.dtype | None = None,
        targets: Sequence[str] = _NAMES,
    ) -> "LoRAGatedMLP":
        """Adapted layers over `nn.Linear`s, whose weights and biases are shared, not copied, and frozen.

        `targets` names the layers that get an adapter; r, alpha, dropout, use_rslora, dropout_rng and adapter_dtype are
        those of `LoRALinear` for each. Raises ValueError for an unknown target, and what
        `LoRALinear.from_linear` raises.
        """
        settings = r, alpha, dropout, use_rslora, dropout_rng, adapter_dtype
        layers = _adapted((gate_proj, up_proj, down_proj), cls._NAMES, targets, *settings)
        return cls(*layers, activation=activation, recompute_up=recompute_up).train(gate_proj.training)

    def forward(self, x: Tensor) -> Tensor:
        """y `[..., H]` for x `[..., H]`."""
        rows = self._rows()
        if rows is not None:
            flat, offsets = rows.sorted(x)
            layers = _multi_projections(self._layers(), rows)
            return rows.restored(lora_gated_mlp_multi(flat, offsets, *layers, activation=self.activation), x)
        return lora_gated_mlp(x, *self._projections(x), activation=self.activation, recompute_up=self.recompute_up)

    def extra_repr(self) -> str:
        return f"activation={self.activation}" + (", recompute_up=True" if self.recompute_up else "")
