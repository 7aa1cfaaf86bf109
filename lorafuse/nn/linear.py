"""`LoRALinear`: a frozen `nn.Linear` with one LoRA adapter, run as one operator."""

import math

import torch
from torch import Tensor, nn

from lorafuse import formats
from lorafuse.functional import lora_linear
from lorafuse.philox import check_dropout_rng, draw_mask

__all__ = ["LoRALinear"]


class LoRALinear(nn.Module):
    """`y = x·weightᵀ + bias + scale · lora_B(lora_A(dropout(x)))` with frozen weight and bias.

    The state dict holds `weight` and `bias`, named as `nn.Linear` names them, and `lora_A.weight [r, in]` and
    `lora_B.weight [out, r]`, named as PEFT's adapter files name them, so base checkpoints and adapters load by name.

    Args:
        in_features, out_features: K and N.
        r: rank, at least 1.
        alpha: the path is scaled by alpha / r, or alpha / sqrt(r) with `use_rslora`.
        dropout: probability with which inputs of the low-rank path are dropped in training.
        bias: whether the base has a bias.
        use_rslora: rank-stabilized scaling (Kalajdzievski 2023, arXiv 2312.03732).
        dropout_rng: "torch" draws nn.Dropout's masks, as in `lorafuse.patch`; "philox" lorafuse's own.
        device, dtype: of the base.
        adapter_dtype: of lora_A and lora_B; None means fp32 on a half-precision base (as PEFT does), else the base's.

    Raises ValueError for a rank below 1, a dropout outside [0, 1], an alpha that is not finite or an unknown
    dropout_rng.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int,
        *,
        alpha: float | None = None,
        dropout: float = 0.0,
        bias: bool = True,
        use_rslora: bool = False,
        dropout_rng: str = "philox",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if r < 1:
            raise ValueError(f"r={r} is not a rank; it must be at least 1")
        if not 0.0 <= dropout <= 1.0:
            raise ValueError(f"dropout={dropout} is not a probability; it must be between 0 and 1")
        if alpha is not None and not math.isfinite(alpha):
            raise ValueError(f"alpha={alpha} is not finite; the low-rank path is scaled by alpha / r")
        check_dropout_rng(dropout_rng)
        base = nn.Linear(in_features, out_features, bias, device, dtype)
        self.in_features, self.out_features, self.r = in_features, out_features, r
        self.alpha = float(r if alpha is None else alpha)
        self.scale = self.alpha / (math.sqrt(r) if use_rslora else r)
        self.dropout, self.dropout_rng = dropout, dropout_rng
        self.merged = False
        self.weight = base.weight.requires_grad_(False)
        self.bias = base.bias if base.bias is None else base.bias.requires_grad_(False)
        if adapter_dtype is None:
            half = self.weight.dtype in (torch.bfloat16, torch.float16)
            adapter_dtype = torch.float32 if half else self.weight.dtype
        where = {"device": self.weight.device, "dtype": adapter_dtype}
        self.lora_A = nn.Linear(in_features, r, bias=False, **where)
        self.lora_B = nn.Linear(r, out_features, bias=False, **where)
        self.reset_lora_parameters()

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        r: int,
        *,
        alpha: float | None = None,
        dropout: float = 0.0,
        use_rslora: bool = False,
        dropout_rng: str = "philox",
        adapter_dtype: torch.dtype | None = None,
    ) -> "LoRALinear":
        """An adapted layer over `linear`: its weight and bias are shared, not copied, and frozen.

        Raises TypeError when `linear` is not an `nn.Linear`, is a subclass with a forward of its own (a quantized one),
        or holds a quantized weight.
        """
        if getattr(type(linear), "forward", None) is not nn.Linear.forward:
            raise TypeError(
                f"from_linear got a {type(linear).__name__}; it takes an nn.Linear with nn.Linear's forward"
            )
        if formats.adopt(linear) is not None:
            raise TypeError(
                f"from_linear got an nn.Linear over {type(linear.weight).__name__}; adapt quantized layers with PEFT "
                "and lorafuse.patch, or give lorafuse.formats.adopt(linear) to lora_linear"
            )
        layer = cls(
            linear.in_features,
            linear.out_features,
            r,
            alpha=alpha,
            dropout=dropout,
            bias=linear.bias is not None,
            use_rslora=use_rslora,
            dropout_rng=dropout_rng,
            device="meta",
            dtype=linear.weight.dtype,
            adapter_dtype=adapter_dtype,
        )
        layer.weight = linear.weight.requires_grad_(False)
        layer.bias = linear.bias if linear.bias is None else linear.bias.requires_grad_(False)
        for factor in (layer.lora_A, layer.lora_B):
            factor.to_empty(device=linear.weight.device)
        layer.reset_lora_parameters()
        return layer.train(linear.training)

    def reset_lora_parameters(self) -> None:
        """PEFT's initialization: A uniform in ±1/sqrt(in_features), B zero, so that the layer starts as its base."""
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        """y `[..., out_features]` for x `[..., in_features]`."""
        if self.merged:
            return nn.functional.linear(x, self.weight, self.bias)
        return lora_linear(
            x,
            self.weight,
            self.lora_A.weight,
            self.lora_B.weight,
            scale=self.scale,
            bias=self.bias,
            dropout_p=self.dropout if self.training else 0.0,
            seed=self.drawn_mask(x),
        )

    def drawn_mask(self, x: Tensor) -> Tensor | None:
        """The mask of torch's dropout for an input with the sizes of x, but for features; None where the operator draws
        its own, or none is needed.
        """
        if self.dropout_rng != "torch" or not self.dropout or not self.training:
            return None
        if x.shape[-1] != self.in_features:
            x = x.new_empty((*x.shape[:-1], self.in_features))
        return draw_mask(x, self.lora_A.weight.dtype, self.dropout)

    @torch.no_grad()
    def merge(self) -> None:
        """Add `scale · B·A` into weight, computed in fp32 at least; forward is then the base product alone."""
        if not self.merged:
            self._add_delta(1.0)
            self.merged = True

    @torch.no_grad()
    def unmerge(self) -> None:
        """Subtract what `merge` added. Exact up to one rounding of weight's dtype for each of the two."""
        if self.merged:
            self._add_delta(-1.0)
            self.merged = False

    def _add_delta(self, sign: float) -> None:
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        delta = self.lora_B.weight.to(wide) @ self.lora_A.weight.to(wide)
        self.weight.copy_(self.weight.to(wide).add_(delta, alpha=sign * self.scale))

    def extra_repr(self) -> str:
        text = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
        text += f"r={self.r}, scale={self.scale:g}, dropout={self.dropout:g}"
        return text + (", merged" if self.merged else "")
