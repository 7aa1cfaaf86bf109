"""Random weights in the formats that csrc decodes, with what separates one order of rounding from another."""

import math

import torch

from lorafuse.operands import Weight

__all__ = ["FP4", "NF4", "four_bits", "fp8", "fp8_operands"]

NF4 = torch.tensor(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334]
    + [-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224]
    + [0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]
)  # fmt: skip
FP4 = torch.tensor([0, 0.0052083333, 0.6666667, 1, 0.3333333, 0.5, 0.1666667, 0.25])
FP4 = torch.cat((FP4, -FP4))


def four_bits(*sizes, block=64, rounded="bfloat16", nested=False, scale=1.0, code=NF4, kind="nf4"):
    """Random codes; every block has a scale of its own, one is zero and one negative."""
    count = math.prod(sizes)
    blocks = -(-count // block)
    data = torch.randint(0, 256, (-(-count // 2),), dtype=torch.uint8)
    absmax = torch.rand(blocks) * scale
    absmax[blocks // 2], absmax[-1] = 0.0, -absmax[-1]
    statistics = absmax, code
    if nested:
        outer = torch.rand(-(-blocks // 256)) * scale, torch.randn(256), torch.tensor(0.37) * scale
        statistics = torch.randint(0, 256, (blocks,), dtype=torch.uint8), code, *outer
    return Weight(data, False, statistics, f"{kind}:{','.join(map(str, sizes))};block={block};dtype={rounded}")


def fp8_operands(G, N, K, blocks, scale_dtype=torch.float32):
    """Every byte is there, NaN and subnormal numbers too; every block has a scale of its own."""
    data = torch.randint(0, 256, (G, N, K), dtype=torch.uint8)
    data.view(-1)[:256] = torch.arange(256, dtype=torch.uint8)[: data.numel()]
    sizes = G, -(-N // blocks[0]), -(-K // blocks[1])
    if scale_dtype is torch.float8_e8m0fnu:
        scale = torch.randint(100, 140, sizes, dtype=torch.uint8)
        # 2^-127, a subnormal number, and NaN
        scale.view(-1)[0], scale.view(-1)[-1] = 0, 255 if scale.numel() > 1 else 0
        return data.view(torch.float8_e4m3fn), scale.view(scale_dtype)
    return data.view(torch.float8_e4m3fn), (torch.rand(sizes) * 0.02).to(scale_dtype)


def fp8(*sizes, blocks=(128, 128), scale_dtype=torch.float32, rounded=True):
    """A matrix or stack; one number scales all of it where `blocks` is None. `rounded`: transformers' order."""
    *groups, N, K = sizes
    data, scale = fp8_operands(math.prod(groups), N, K, blocks or (N, K), scale_dtype)
    rows, columns = blocks or (N, K)
    scale = scale.view(*groups, *scale.shape[1:]) if blocks else scale.flatten()[:1].view(())
    order = ";scale=rounded" if rounded else ""
    return Weight(data.view(sizes), False, (scale,), f"fp8:block={rows}x{columns}{order}")
