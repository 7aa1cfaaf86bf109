"""A small causal transformer, dense or mixture of experts, and the same one with this project's LoRA layers in it."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lorafuse.nn import LoRAExperts, LoRALinear
from lorafuse.study.tasks import ALPHABET

__all__ = ["ALPHA", "LAYERS", "Size", "Transformer", "adapter_parameters", "trained"]

# of the source: paths scaled by 32 / r at every rank
ALPHA = 32.0
# which linear layers an adapter goes to
LAYERS = {"all": ("attention", "mlp"), "attention": ("attention",), "mlp": ("mlp",)}
_ATTENTION, _MLP = ("q", "k", "v", "o"), ("gate", "up", "down")


@dataclass(frozen=True)
class Size:
    """Shape of the transformer. `experts` 0 is a dense gated MLP; else each token goes to `active` of them."""

    width: int = 64
    depth: int = 2
    heads: int = 4
    inner: int = 128
    experts: int = 0
    active: int = 2
    vocabulary: int = len(ALPHABET)
    length: int = 16

    def wide(self, width: int) -> "Size":
        """The same shape at another width: heads of as many features, the MLP as many times wider than the model."""
        return replace(
            self, width=width, heads=self.heads * width // self.width, inner=self.inner * width // self.width
        )


class Attention(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.heads = size.heads
        self.q, self.k, self.v, self.o = (nn.Linear(size.width, size.width, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.gate = nn.Linear(size.width, size.inner, bias=False)
        self.up = nn.Linear(size.width, size.inner, bias=False)
        self.down = nn.Linear(size.inner, size.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class Experts(nn.Module):
    """Trainable experts with the weights of `LoRAExperts`. Every expert runs on every token: slow, short, exact."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(size.experts, 2 * size.inner, size.width))
        self.down_proj = nn.Parameter(torch.empty(size.experts, size.width, size.inner))
        for weight in (self.gate_up_proj, self.down_proj):
            nn.init.uniform_(weight, -1 / math.sqrt(weight.shape[-1]), 1 / math.sqrt(weight.shape[-1]))

    def forward(self, x: Tensor, topk_index: Tensor, topk_weight: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        gate, up = torch.einsum("th,eih->eti", rows, self.gate_up_proj).chunk(2, dim=-1)
        each = torch.bmm(nn.functional.silu(gate) * up, self.down_proj.transpose(1, 2))
        chosen = torch.zeros(len(rows), len(each)).to(topk_weight).scatter(1, topk_index, topk_weight)
        return torch.einsum("eth,te->th", each, chosen).view(x.shape)


class MoE(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.active = size.active
        self.router = nn.Linear(size.width, size.experts, bias=False)
        self.experts: nn.Module = Experts(size)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.router(x).flatten(0, -2).softmax(-1)
        weight, index = scores.topk(self.active, dim=-1)
        return self.experts(x, index, weight / weight.sum(-1, keepdim=True))


class Block(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.norm_attention, self.norm_mlp = nn.LayerNorm(size.width), nn.LayerNorm(size.width)
        self.attention = Attention(size)
        self.mlp: nn.Module = MoE(size) if size.experts else MLP(size)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm_attention(x))
        return x + self.mlp(self.norm_mlp(x))


class Transformer(nn.Module):
    """Pre-norm, learned positions, no biases. `logits [B, L, vocabulary]` of `tokens [B, L]`."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.size = size
        self.embedding = nn.Embedding(size.vocabulary, size.width)
        self.position = nn.Parameter(torch.empty(size.length, size.width))
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.depth))
        self.norm = nn.LayerNorm(size.width)
        self.unembedding = nn.Linear(size.width, size.vocabulary, bias=False)
        for weight in (self.embedding.weight, self.position):
            nn.init.normal_(weight, std=0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.position[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.unembedding(self.norm(x))

    def adapt(self, rank: int, layers: str = "all", alpha: float = ALPHA) -> None:
        """Freeze the model and put an adapter of that rank on each layer of `layers`, drawn from torch's generator.

        Experts get rank / active experts each, rounded up.
        """
        self.requires_grad_(False)
        for block in self.blocks:
            assert isinstance(block, Block)
            if "attention" in LAYERS[layers]:
                _adapt_linears(block.attention, _ATTENTION, rank, alpha)
            if "mlp" in LAYERS[layers]:
                if isinstance(block.mlp, MoE):
                    block.mlp.experts = _adapted_experts(block.mlp.experts, self.size, rank, alpha)
                else:
                    _adapt_linears(block.mlp, _MLP, rank, alpha)


def _adapt_linears(module: nn.Module, names: tuple[str, ...], rank: int, alpha: float) -> None:
    for name in names:
        setattr(module, name, LoRALinear.from_linear(getattr(module, name), rank, alpha=alpha))


def _adapted_experts(experts: nn.Module, size: Size, rank: int, alpha: float) -> LoRAExperts:
    own = math.ceil(rank / size.active)
    adapted = LoRAExperts(size.experts, size.width, size.inner, own, alpha=alpha)
    adapted.load_state_dict(experts.state_dict(), strict=False)
    return adapted


def trained(model: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters that training changes."""
    return (parameter for parameter in model.parameters() if parameter.requires_grad)


def adapter_parameters(size: Size, rank: int, layers: str = "all") -> int:
    """How many parameters `Transformer.adapt` adds."""
    square = 4 * rank * 2 * size.width if "attention" in LAYERS[layers] else 0
    if "mlp" not in LAYERS[layers]:
        return size.depth * square
    if not size.experts:
        return size.depth * (square + 3 * rank * (size.width + size.inner))
    each = math.ceil(rank / size.active) * (size.width + 2 * size.inner + size.inner + size.width)
    return size.depth * (square + size.experts * each)
