"""The layer without adapters by this project's own products: where it is faster, the LoRA tax is measured from it.

The suffix names the backend of linear layers; experts run by the planned one.
"""

from functools import cache

import torch

from lorafuse import functional
from lorafuse.backends import base
from lorafuse.bench.result import Failed
from lorafuse.plan import Problem, select

LABEL = "frozen, by lorafuse"
TRAINS = "nothing"
FORMS = {"": {"backend": None}, "triton": {"backend": "triton"}, "cuda": {"backend": "cuda"}}
# the planner has no problem without an adapter; a rank of one tensor-core step asks for the same tiles
_RANK = 16


def unavailable(kind, device, backend):
    if kind in ("moe", "model"):
        return "" if backend is None else "experts have no such form"
    if backend is None:
        return "named by its backend"
    return "needs a GPU" if device.type != "cuda" else base.availability(backend).reason


class CudaProduct(torch.autograd.Function):
    """`x · wᵀ` and `dy · w` in the main loop of the CUDA kernels at rank 0, by the tiles of the adapted layer's plan.

    `native` is the module of the kernels, `spec` the planner's GPU.
    """

    @staticmethod
    def forward(ctx, x, w, native, spec):
        ctx.save_for_backward(w)
        ctx.kernels = native, spec
        return _cuda(native, spec, x, w, ())

    @staticmethod
    def backward(ctx, dy):
        return _cuda(*ctx.kernels, dy, ctx.saved_tensors[0], ("dx", "da", "db")), None, None, None


def _problem(M, w, gradients):
    return Problem(M, *w.shape, _RANK, str(w.dtype).removeprefix("torch."), "float32", gradients=gradients)


@cache
def _word(device):
    """From which blocks draw their tiles; launches are one after the other."""
    return torch.zeros(1, dtype=torch.int32, device=device)


def _cuda(native, spec, x, w, gradients):
    from lorafuse.backends.cuda import TYPES

    N, K = w.shape
    tile = select(_problem(x.shape[0], w, gradients), spec, (("cuda", ""),)).config("matmul")
    out, inner = (K, N) if gradients else (N, K)
    y = x.new_empty(x.shape[0], out)
    stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0
    native.linear(
        type=TYPES[x.dtype], M=x.shape[0], N=out, K=inner, R=0, transposed=bool(gradients), x=x.data_ptr(),
        stride_x=x.stride(0), w=w.data_ptr(), stride_w=w.stride(0), y=y.data_ptr(), stride_y=out,
        tiling=(tile.block_n, tile.stages, tile.cluster, tile.group_m, 0), workspace=_word(x.device).data_ptr(),
        stream=stream,
    )  # fmt: skip
    return y


def linear(given, backend):
    if backend == "cuda":
        from lorafuse.backends import native as built
        from lorafuse.backends import problems
        from lorafuse.plan import configs_cuda

        native, spec = built.load("_cuda"), problems.device_spec(given.x.device)
        if reason := configs_cuda.refusal(_problem(given.x.shape[0], given.w, ()), spec):
            raise Failed(reason)
        return (lambda x: CudaProduct.apply(x, given.w, native, spec)), {}
    ends = torch.tensor([given.x.shape[0]], dtype=torch.int32, device=given.x.device)
    return (lambda x: functional.lora_grouped_linear(x, ends, given.w[None], backend=backend)), {}


def experts(given, backend):
    def call(x, index, weight):
        return functional.lora_experts(x, index, weight, given.gate_up, given.down)

    return call, {}


def model(given, backend):
    """Frozen experts by lorafuse; a model without experts has nothing else than `frozen`."""
    from lorafuse.integrations import register_experts

    if not given.has_experts:
        raise Failed("without experts it is the frozen model")
    register_experts()
    whole = given.frozen()
    whole.set_experts_implementation("lorafuse")
    return whole, {}
