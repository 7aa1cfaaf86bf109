"""The launches of siblings' kernels that `compile_only` compiles, on meta tensors: q, k and v, or gate, up and down."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from lorafuse.kernels import gated, matmul, siblings
from lorafuse.plan import DeviceSpec, KernelConfig, Problem
from lorafuse.plan.configs_triton import candidates
from lorafuse.testing.compile_decode import ARCHITECTURES

__all__ = ["KERNELS", "configs", "launch"]

# kernel: its gradients, epilogue, and how many layers it has
KERNELS = {
    "siblings": ((), "", 3),
    "siblings_dx": (("dx",), "", 3),
    "gated": ((), "gated", 2),
    "gated_backward": (("dx",), "gated", 1),
}
_OUT = (4096, 1024, 1024)
# of those that a gate multiplies by up, the one that holds most registers
_ACTIVATION = "gelu_tanh"


def problem(kernel: str, given: Problem) -> Problem:
    """The problem of one of `KERNELS` with the sizes and dtypes of `given`."""
    gradients, epilogue, layers = KERNELS[kernel]
    return replace(given, gradients=gradients, epilogue=epilogue, siblings=layers)


def configs(given: Problem, device: DeviceSpec, everything: bool = True) -> Iterator[tuple[str, KernelConfig]]:
    """Kernels and the configurations of `given`, whose masks only dx has.

    Without `everything` the largest tile, at several rank tiles, on an architecture of each kind: what holds most
    registers. These kernels, with a main loop for each layer, take long to compile.
    """
    if not everything and (given.R != 64 or device.arch not in ARCHITECTURES):
        return
    for kernel, (gradients, epilogue, _) in KERNELS.items():
        if not given.dropout or (gradients and (everything or not epilogue)):
            legal = candidates("matmul", problem(kernel, given), device)
            yield from ((kernel, config) for config in (legal if everything else legal[:1]))


def launch(kernel: str, config: KernelConfig, dtype: torch.dtype, R: int, aligned: bool, dropout: bool) -> None:
    """One launch of R ranks a layer, fp32 adapters; unless `aligned`, sizes are odd."""
    M, K, *N = (8192, 4096, *_OUT) if aligned else (8191, 4095, *(n + 1 for n in _OUT))

    def tensor(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    fp32, seed = torch.float32, tensor(1, of=torch.int64) if dropout else None
    xa = [tensor(M, 3 * R)[:, i * R : (i + 1) * R] for i in range(3)]
    if kernel == "gated_backward":
        gate, up, w = tensor(M, K), tensor(M, K), tensor(N[0], K)
        operands = tensor(M, N[0]), w.t(), tensor(M, R), tensor(R, K, of=fp32).t(), None, gate, up
        matmul.gated_backward(*operands, _ACTIVATION, 132, config, seed=seed, p=0.1)
        return
    if kernel == "gated":
        lows = [siblings.Low(low, tensor(N[0], R, of=fp32), 2.0) for low in xa[:2]]
        weights, biases = [tensor(N[0], K), tensor(N[0], K)], [tensor(N[0]), None]
        gated.gated(tensor(M, K), weights, biases, lows, _ACTIVATION, 132, config)
        return
    if kernel == "siblings":
        lows = [siblings.Low(low, tensor(n, R, of=fp32), 2.0) for low, n in zip(xa, N, strict=True)]
        siblings.matmuls(tensor(M, K), [tensor(n, K) for n in N], [tensor(n) for n in N], lows, 132, config)
        return
    terms = [(tensor(M, n), tensor(n, K).t()) for n in N]
    # those without a mask are one
    rows = xa if dropout else [tensor(M, R)]
    lows = [siblings.Low(low, tensor(R, K, of=fp32).t(), None, seed, 0.1) for low in rows]
    siblings.matmul_sum(terms, lows, 132, config)
