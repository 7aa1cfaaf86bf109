"""The launches of ragged kernels that `compile_only` compiles, on meta tensors, as experts launch them."""

from typing import Any

import torch

from lorafuse.kernels import lowrank, matmul
from lorafuse.kernels.rows import Tiles

__all__ = ["launch"]


def launch(variant: Any, rows: int, n: int, k: int, r: int) -> None:
    """One launch of a `compile_only.Variant`: x `[rows, k]` gathered, `n` columns of gate and up together."""
    c, dtype, adapter = variant.config, getattr(torch, variant.dtype), getattr(torch, variant.adapter_dtype)

    def tensor(*shape: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    tiles = Tiles(tensor(128, of=torch.int64), rows)
    tiles.preset(c.block_m, tensor(rows // 16, 3, of=torch.int32))
    a, b = tensor(128, r, k, of=adapter), tensor(128, n, r, of=adapter)
    # what PEFT packs, and matmuls get repacked: b with neighbours from different groups
    apart = tensor(n, r, 128, of=adapter).permute(2, 0, 1)
    x, w, u, xa = tensor(rows, k), tensor(128, n, k), tensor(rows, n), tensor(rows, r)
    token = tensor(rows, of=torch.int64)
    if variant.kernel == "ragged_project":
        lowrank.project(u, apart.transpose(1, 2), c, tiles=tiles, source=token)
    elif variant.kernel == "ragged_outer":
        lowrank.outer(u, xa, 1.0, apart, c, tiles=tiles, source=token, row_scale=tensor(rows))
    elif variant.kernel == "ragged":
        if variant.epilogue == "dx":
            matmul.matmul(u, w.transpose(1, 2), None, xa, a.transpose(1, 2), 2.0, 132, c, tiles=tiles)
            return
        source = token if variant.epilogue == "gathered" else None
        matmul.matmul(x, w, tensor(128, n), xa, b, 2.0, 132, c, tiles=tiles, source=source)
    else:
        interleaved, gated = variant.epilogue == "interleaved", variant.epilogue != "ungated"
        gate = "" if not gated else "interleaved" if interleaved else "concatenated"
        # gelu_tanh holds most registers of those that a gate multiplies
        activation = "clamped_swiglu" if interleaved else "gelu_tanh"
        transposed = variant.epilogue in ("transposed", "interleaved")
        if variant.kernel == "activate":
            w = tensor(128, k, n).transpose(1, 2) if transposed else w
            forward = x, w, tensor(128, n), xa, b, 2.0, activation, gate, 132, c
            matmul.activated(*forward, tiles=tiles, source=token)
            return
        inner = n // 2 if gated else n
        down = tensor(128, inner, k) if transposed else tensor(128, k, inner).transpose(1, 2)
        low = tensor(128, r, inner, of=adapter).transpose(1, 2)
        backward = x, down, xa, low, 2.0, u, activation, gate, True, 132, c
        matmul.activation_backward(*backward, tiles=tiles, source=token, row_scale=tensor(rows))
