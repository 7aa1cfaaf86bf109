"""Expert layers and grouped linear layers with LoRA in Triton kernels (`lorafuse.kernels`).

Same operators as `eager_experts`, shapes and meaning of arguments included. Rows are sorted, cut into tiles and
combined on the device and nothing waits for it. Rows of x are gathered by the kernels that read them. A known
activation is computed in the epilogue of the first projection, and its backward in that of the product that gives dh;
a function of the caller's runs in torch between them.
"""

from functools import lru_cache

import torch
from torch import Tensor

from lorafuse.activation import Activation, Recomputed
from lorafuse.backends import eager_experts, probe
from lorafuse.backends.on_gpu import check_device, device_guard
from lorafuse.backends.routing import route
from lorafuse.kernels import combine, lowrank, matmul
from lorafuse.kernels.rows import Tiles
from lorafuse.plan import DeviceSpec, KernelConfig, Problem, find
from lorafuse.plan.configs_triton import best

__all__ = ["experts_backward", "experts_forward", "grouped_backward", "grouped_forward"]

# the GPU whose plans the interpreter runs
_INTERPRETED_AS = "H200"


# every launch needs one, and making it takes 16 us, a look at the cache 0.5 (AMD EPYC, 2026-11-29)
@lru_cache(maxsize=4096)
def _problem(
    M: int, N: int, K: int, R: int, dtype: str, adapter_dtype: str, aligned: bool, groups: int, epilogue: str,
    gradients: tuple[str, ...],
) -> Problem:  # fmt: skip
    return Problem(
        M, N, K, R, dtype, adapter_dtype, aligned=aligned, groups=groups, is_ragged=True, epilogue=epilogue,
        gradients=gradients,
    )  # fmt: skip


@lru_cache(maxsize=4096)
def _config(kernel: str, problem: Problem, device: DeviceSpec) -> KernelConfig:
    found = best(kernel, problem, device)
    assert found is not None
    return found


class _Projection:
    """One linear layer of every group, its kernels configured: w `[G, N, K]`, or `[G, K, N]` when transposed."""

    def __init__(
        self,
        tiles: Tiles,
        like: Tensor,
        w: Tensor,
        a: Tensor | None,
        b: Tensor | None,
        scale: float,
        transposed: bool,
        layout: str = "",
    ) -> None:
        """`layout` is that of gate and up in the rows of w."""
        self.tiles, self.a, self.b, self.scale = tiles, a, b, scale
        self.w = w.transpose(1, 2) if transposed else w
        self._device = _spec(like.device)
        dtype, adapter = (str(t.dtype).removeprefix("torch.") for t in (like, like if a is None else a))
        rank = 1 if a is None else a.shape[1]
        sizes = max(tiles.rows, 1), self.w.shape[1], self.w.shape[2], rank
        self._layer = *sizes, dtype, adapter, _is_aligned(self.w, layout), tiles.groups
        self.programs = self._device.sms

    def config(self, kernel: str, epilogue: str = "", gradients: tuple[str, ...] = ()) -> KernelConfig:
        return _config(kernel, _problem(*self._layer, epilogue, gradients), self._device)

    def rows_of_b(self) -> Tensor | None:
        """b with contiguous rows, for the epilogues that read a few of them; rounded there, after its scale."""
        return None if self.b is None else _packed(self.b, self.b.dtype)

    def project(self, x: Tensor, source: Tensor | None = None) -> Tensor | None:
        """`xa [S, R]`; None without an adapter."""
        if self.a is None:
            return None
        return lowrank.project(x, self.a.to(x.dtype), self.config("project"), tiles=self.tiles, source=source)

    def project_back(self, dy: Tensor, source: Tensor | None = None) -> Tensor | None:
        """`dyb = dy b`, `[S, R]`, without the scale, which may lead out of fp16's range; None without an adapter."""
        if self.b is None:
            return None
        b = _packed(self.b.transpose(1, 2), dy.dtype)
        return lowrank.project(dy, b, self.config("project"), tiles=self.tiles, source=source)

    def linear(self, x: Tensor, bias: Tensor | None, xa: Tensor | None, source: Tensor | None = None) -> Tensor:
        """y."""
        given = x, self.w, bias, xa, self.rows_of_b(), self.scale
        return matmul.matmul(*given, self.programs, self.config("matmul"), tiles=self.tiles, source=source)

    def linear_back(self, dy: Tensor, dyb: Tensor | None, source: Tensor | None = None) -> Tensor:
        """dx."""
        w, a = self.w.transpose(1, 2), None if self.a is None else self.a.transpose(1, 2)
        given = dy, w, None, dyb, a, self.scale
        config = self.config("matmul", "", ("dx",))
        return matmul.matmul(*given, self.programs, config, tiles=self.tiles, source=source)

    def da(self, x: Tensor, dyb: Tensor, source: Tensor | None = None, factor: Tensor | None = None) -> Tensor:
        """The gradient of a, each row times its factor."""
        assert self.a is not None
        da = self.a.new_empty(self.a.shape)
        given = x, dyb, self.scale, da.transpose(1, 2), self.config("outer")
        lowrank.outer(*given, tiles=self.tiles, source=source, row_scale=factor)
        return da

    def db(self, dy: Tensor, xa: Tensor, source: Tensor | None = None, factor: Tensor | None = None) -> Tensor:
        """The gradient of b, each row times its factor."""
        assert self.b is not None
        db = self.b.new_empty(self.b.shape)
        given = dy, xa, self.scale, db, self.config("outer")
        lowrank.outer(*given, tiles=self.tiles, source=source, row_scale=factor)
        return db


def grouped_forward(
    x: Tensor,
    ends: Tensor,
    w: Tensor,
    bias: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    scale: float,
    transposed: bool,
) -> tuple[Tensor, Tensor]:
    """`(y [S, N], xa [S, R])`; rows after the last group's are zero."""
    check_device(x)
    if x.numel() == 0 or w.numel() == 0:
        return eager_experts.grouped_forward(x, ends, w, bias, a, b, scale, transposed)
    with device_guard(x.device):
        layer = _Projection(Tiles(ends, x.shape[0]), x, w, a, b, scale, transposed)
        x = _rows(x)
        xa = layer.project(x)
        y = layer.linear(x, None if bias is None else bias.contiguous(), xa)
        beyond = _beyond(ends, x.shape[0])
        y.masked_fill_(beyond, 0)
        return y, x.new_empty((x.shape[0], 0)) if xa is None else xa.masked_fill_(beyond, 0)


def grouped_backward(
    dy: Tensor,
    x: Tensor | None,
    xa: Tensor | None,
    ends: Tensor,
    w: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    scale: float,
    transposed: bool,
    need_dx: bool,
    need_da: bool,
    need_db: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """`(dx, da, db)`, None where not needed; da and db in their parameters' dtypes, zero for groups without rows."""
    check_device(dy)
    needs = need_dx, need_da, need_db
    if dy.numel() == 0 or w.numel() == 0:
        return eager_experts.grouped_backward(dy, x, xa, ends, w, a, b, scale, transposed, *needs)
    dx = da = db = dyb = None
    with device_guard(dy.device):
        dy = _rows(dy)
        layer = _Projection(Tiles(ends, dy.shape[0]), dy, w, a, b, scale, transposed)
        if need_dx or need_da:
            dyb = layer.project_back(dy)
        if need_dx:
            dx = layer.linear_back(dy, dyb).masked_fill_(_beyond(ends, dy.shape[0]), 0)
        if need_da:
            assert x is not None
            assert dyb is not None
            da = layer.da(_rows(x), dyb)
        if need_db:
            assert xa is not None
            db = layer.db(dy, xa)
    return dx, da, db


def experts_forward(
    x: Tensor,
    index: Tensor,
    weight: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    up_a: Tensor | None,
    up_b: Tensor | None,
    down_a: Tensor | None,
    down_b: Tensor | None,
    up_scale: float,
    down_scale: float,
    transposed: bool,
    act: Activation | Recomputed,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`(out [T, H], u [S, U], xa [S, R], ha [S, R'], order [S], ends [E])`; rows of sentinels are not written."""
    check_device(x)
    low = up_a, up_b, down_a, down_b
    if index.numel() == 0 or up.numel() == 0 or down.numel() == 0:
        scales = up_scale, down_scale
        given = x, index, weight, up, down, up_bias, down_bias, *low, *scales, transposed, act
        return eager_experts.experts_forward(*given)
    with device_guard(x.device):
        x = _rows(x)
        up_bias, down_bias = (None if bias is None else bias.contiguous() for bias in (up_bias, down_bias))
        order, ends = route(index, up.shape[0])
        tiles, token = Tiles(ends, order.shape[0]), order // index.shape[1]
        first = _Projection(tiles, x, up, up_a, up_b, up_scale, transposed, _layout(act))
        second = _Projection(tiles, x, down, down_a, down_b, down_scale, transposed)
        xa = first.project(x, token)
        if isinstance(act, Activation):
            u, h = matmul.activated(
                x, first.w, up_bias, xa, first.rows_of_b(), up_scale, act.name, _layout(act), first.programs,
                first.config("matmul", "gated"), tiles=tiles, source=token,
            )  # fmt: skip
        else:
            u = first.linear(x, up_bias, xa, token)
            h = act.forward(u)
        ha = second.project(h)
        y = second.linear(h, down_bias, ha)
        out = combine.combine(y, order, ends, weight.contiguous(), x.shape[0])
        xa, ha = (x.new_empty((order.shape[0], 0)) if t is None else t for t in (xa, ha))
    return out, u, xa, ha, order, ends


def experts_backward(
    dout: Tensor,
    x: Tensor,
    weight: Tensor,
    up: Tensor,
    down: Tensor,
    down_bias: Tensor | None,
    up_a: Tensor | None,
    up_b: Tensor | None,
    down_a: Tensor | None,
    down_b: Tensor | None,
    up_scale: float,
    down_scale: float,
    transposed: bool,
    act: Activation | Recomputed,
    u: Tensor,
    xa: Tensor,
    ha: Tensor,
    order: Tensor,
    ends: Tensor,
    need_dx: bool,
    need_dweight: bool,
    need_up: bool,
    need_down: bool,
) -> tuple[Tensor | None, ...]:
    """`(dx, dweight, d up_a, d up_b, d down_a, d down_b)`, None where not needed or where there is no adapter."""
    check_device(dout)
    needs = need_dx, need_dweight, need_up and up_a is not None, need_down and down_a is not None
    need_dx, need_dweight, need_up, need_down = needs
    if order.numel() == 0 or up.numel() == 0 or down.numel() == 0:
        low = up_a, up_b, down_a, down_b, up_scale, down_scale, transposed, act
        return eager_experts.experts_backward(
            dout, x, weight, up, down, down_bias, *low, u, xa, ha, order, ends, *needs
        )
    dx = dweight = d_up_a = d_up_b = d_down_a = d_down_b = None
    with device_guard(dout.device):
        dout, x = _rows(dout), _rows(x)
        S, k = order.shape[0], weight.shape[1]
        tiles, token, factor = Tiles(ends, S), order // k, weight.reshape(-1)[order]
        first = _Projection(tiles, x, up, up_a, up_b, up_scale, transposed, _layout(act))
        second = _Projection(tiles, x, down, down_a, down_b, down_scale, transposed)
        gb = second.project_back(dout, token)
        if isinstance(act, Activation):
            a = None if down_a is None else down_a.transpose(1, 2)
            du, h, share = matmul.activation_backward(
                dout, second.w.transpose(1, 2), gb, a, down_scale, u, act.name, _layout(act), need_dweight,
                second.programs, second.config("matmul", "gated", ("dx",)), tiles=tiles, source=token,
                row_scale=factor,
            )  # fmt: skip
        else:
            h, dh = act.forward(u), second.linear_back(dout, gb, token)
            share = torch.linalg.vecdot(dh.float(), h.float()) if need_dweight else None
            du = act.backward(u, dh * factor.to(dh.dtype).unsqueeze(1))
        if need_down:
            assert gb is not None
            d_down_a = second.da(h, gb, None, factor)
            d_down_b = second.db(dout, ha, token, factor)
        if share is not None:
            if down_bias is not None:
                bias = down_bias.unsqueeze(1)
                of_bias = lowrank.project(dout, bias, second.config("project"), tiles=tiles, source=token)
                share = share + of_bias.squeeze(1)
            share = share.masked_fill(_beyond(ends, S).squeeze(1), 0).to(weight.dtype)
            dweight = weight.new_empty(weight.numel()).scatter_(0, order, share).view(weight.shape)
        del h
        if need_dx or need_up:
            dyb = first.project_back(du)
            if need_up:
                assert dyb is not None
                d_up_a, d_up_b = first.da(x, dyb, token), first.db(du, xa)
            if need_dx:
                dx = combine.combine(first.linear_back(du, dyb), order, ends, None, x.shape[0])
    return dx, dweight, d_up_a, d_up_b, d_down_a, d_down_b


def _layout(act: Activation | Recomputed) -> str:
    """How u holds gate and up, in the words of `lorafuse.kernels.epilogues`."""
    if not isinstance(act, Activation) or not act.gated:
        return ""
    return "interleaved" if act.interleaved else "concatenated"


def _is_aligned(w: Tensor, layout: str) -> bool:
    """Whether a descriptor can describe the stack w `[G, N, K]`, and gate and up apart where they are concatenated."""
    size = w.element_size()
    inner = 2 if w.stride(2) == 1 else 1
    outer = [w.stride(dim) for dim in range(3) if dim != inner]
    if layout == "concatenated":
        outer.append(w.shape[1] // 2 * w.stride(1))
    # a stride of 0 repeats one group's weight
    spaced = all(stride > 0 and stride * size % 16 == 0 for stride in outer)
    return w.stride(inner) == 1 and spaced and w.data_ptr() % 16 == 0


def _packed(t: Tensor, dtype: torch.dtype) -> Tensor:
    """`t` contiguous in `dtype`. PEFT packs b with the experts fastest: there each element is a sector of its own."""
    if t.is_contiguous() and t.dtype is dtype:
        return t
    return torch.empty_like(t, dtype=dtype, memory_format=torch.contiguous_format).copy_(t)


def _beyond(ends: Tensor, rows: int) -> Tensor:
    """`[rows, 1]`: which rows belong to no group."""
    return (torch.arange(rows, device=ends.device) >= ends[-1]).unsqueeze(1)


def _spec(device: torch.device) -> DeviceSpec:
    return probe.device_spec(device) or find(_INTERPRETED_AS)


def _rows(t: Tensor) -> Tensor:
    """`t` with contiguous rows."""
    return t if t.stride(1) == 1 else t.contiguous()
