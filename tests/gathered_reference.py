"""Operands of products of gathered ragged rows (api_gathered.hpp), their launches, and what they are in fp64."""

from dataclasses import dataclass

import torch

from lorafuse.activation import gate_backward

__all__ = ["ACTIVATIONS", "TILINGS", "TYPES", "Case", "Gated", "GatedCase", "Gradients", "Operands", "Ranks", "same"]

# (block_n, stages, cluster, group_m, sms, block_m)
TILINGS = ((256, 3, 1, 16, 0, 128), (128, 4, 1, 16, 0, 128), (256, 4, 1, 16, 0, 64), (256, 2, 1, 16, 0, 128))
TYPES = {torch.bfloat16: 0, torch.float16: 1}
# by the numbers of api_gated.hpp
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2", "clamped_swiglu")


@dataclass(frozen=True)
class Case:
    """Ends of the groups' rows, of `rows` in all, which are `choices` of tokens; columns, reduction and rank."""

    ends: tuple[int, ...] = (60, 60, 190)
    rows: int = 200
    choices: int = 4
    N: int = 136
    K: int = 136
    R: int = 24
    transposed: bool = False
    bias: bool = True
    dtype: torch.dtype = torch.bfloat16


class Operands:
    """Of a case. Behind the last column of x lies NaN, which no result may hold."""

    def __init__(self, case, device="cpu", seed=0):
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape, size=1.0):
            return torch.randn(shape, generator=generator).mul_(size).to(case.dtype)

        self.case, E = case, len(case.ends)
        self.wide = torch.full((-(-case.rows // case.choices), -(-case.K // 8) * 8 + 8), float("nan"), dtype=case.dtype)
        self.x.copy_(normal(*self.x.shape))
        self.offsets = torch.tensor(case.ends)
        self.order = torch.randperm(case.rows, generator=generator)
        self.w, self.b = normal(E, case.N, case.K, size=case.K**-0.5), normal(E, case.N, case.R, size=0.3)
        if case.transposed:
            self.w, self.b = self.w.mT.contiguous(), self.b.mT.contiguous()
        self.xa = normal(case.rows, case.R)
        self.bias = normal(E, case.N) if case.bias else None
        self.word = torch.zeros(1, dtype=torch.int32)
        for name, value in list(vars(self).items()):
            if isinstance(value, torch.Tensor):
                setattr(self, name, value.to(device))
        self.stream = torch.cuda.current_stream().cuda_stream if device == "cuda" else 0

    @property
    def x(self):
        return self.wide[:, : self.case.K]

    @property
    def gathered(self):
        return self.wide[self.order // self.case.choices][:, : self.case.K]

    def expected(self):
        """In fp64; rows of no group are NaN, as they are before the launch."""
        case, first = self.case, 0
        y = self.xa.new_full((case.rows, case.N), float("nan"), dtype=torch.float64)
        for g, end in enumerate(case.ends):
            w, b = (t[g].double() if case.transposed else t[g].double().t() for t in (self.w, self.b))
            rows = slice(first, end)
            y[rows] = self.gathered[rows].double() @ w + self.xa[rows].double() @ b
            if case.bias:
                y[rows] += self.bias[g].double()
            first = end
        return y

    def arguments(self, x, tiling):
        case, y = self.case, self.xa.new_full((self.case.rows, self.case.N), float("nan"))
        # as long as the launch may read it
        self.read = x
        return y, {
            "type": TYPES[case.dtype], "rows": case.rows, "groups": len(case.ends), "N": case.N, "K": case.K,
            "R": case.R, "transposed": case.transposed, "offsets": self.offsets.data_ptr(), "x": x.data_ptr(),
            "stride_x": x.stride(0), "w": self.w.data_ptr(), "bias": self.bias.data_ptr() if case.bias else 0,
            "xa": self.xa.data_ptr(), "stride_xa": case.R, "b": self.b.data_ptr(), "y": y.data_ptr(),
            "stride_y": case.N, "tiling": tiling, "stream": self.stream,
        }  # fmt: skip

    def launch(self, native, tiling=TILINGS[0]):
        """y through the order."""
        y, arguments = self.arguments(self.x, tiling)
        places = {"order": self.order.data_ptr(), "choices": self.case.choices, "workspace": self.word.data_ptr()}
        native.gathered_linear(**arguments, **places)
        return y

    def through_order(self, native, tiling=TILINGS[0]):
        y = self.launch(native, tiling)
        assert self.word.item() == 0
        return y

    def in_order(self, native, tiling=TILINGS[0]):
        """y of a gathered copy."""
        y, arguments = self.arguments(self.gathered, tiling)
        native.gathered_linear(**arguments, workspace=self.word.data_ptr())
        assert self.word.item() == 0
        return y

    def grouped(self, native, tiling=TILINGS[0]):
        y, arguments = self.arguments(self.gathered, tiling)
        native.grouped_linear(**arguments, workspace=self.word.data_ptr())
        assert self.word.item() == 0
        return y


@dataclass(frozen=True)
class GatedCase(Case):
    """Of gate and up side by side, N columns both, in one launch with their activation."""

    activation: str = "silu"


class Gated(Operands):
    """Of a gated case; the launch gives h too."""

    def launch(self, native, tiling=TILINGS[0]):
        """u and h."""
        case, I = self.case, self.case.N // 2
        u, arguments = self.arguments(self.x, tiling)
        h = u.new_full((case.rows, I), float("nan"))
        native.gathered_linear(
            **arguments | {"N": I}, order=self.order.data_ptr(), choices=case.choices, workspace=self.word.data_ptr(),
            activation=ACTIVATIONS.index(case.activation), h=h.data_ptr(), stride_h=I,
        )  # fmt: skip
        return torch.cat([u, h], 1)


class Gradients(Operands):
    """Of a gated case without bias, whose product is dh; the launch gives the gradient of u, h and parts of ⟨dh, h⟩."""

    def __init__(self, case, device="cpu", seed=0):
        super().__init__(case, device, seed)
        generator = torch.Generator().manual_seed(seed + 1)
        self.u = torch.randn(case.rows, 2 * case.N, generator=generator).to(case.dtype).to(device)
        self.row_scale = torch.rand(case.rows, generator=generator).add_(0.5).to(device)

    def launch(self, native, tiling=TILINGS[0], **changed):
        """du, h and, of each column of tiles, a row's ⟨dh, h⟩, side by side in fp32."""
        case, I = self.case, self.case.N
        _, arguments = self.arguments(self.x, tiling)
        du, h = (self.xa.new_full((case.rows, columns), float("nan")) for columns in (2 * I, I))
        products = self.row_scale.new_full((-(-I // 256), case.rows), float("nan"))
        given = {
            "order": self.order.data_ptr(), "choices": case.choices, "workspace": self.word.data_ptr(),
            "activation": ACTIVATIONS.index(case.activation), "y": du.data_ptr(), "stride_y": 2 * I,
            "h": h.data_ptr(), "stride_h": I, "u": self.u.data_ptr(), "stride_u": 2 * I,
            "row_scale": self.row_scale.data_ptr(), "products": products.data_ptr(),
        }  # fmt: skip
        native.gathered_linear(**arguments | given | changed)
        return torch.cat([du.float(), h.float(), products.t()], 1)

    def results(self, launched):
        """du, h and ⟨dh, h⟩ of the rows of all groups, of what a launch gave."""
        I, end = self.case.N, self.case.ends[-1]
        du, h, products = launched[:end].split([2 * I, I, launched.shape[1] - 3 * I], 1)
        return du, h, products.sum(1)

    def expected_results(self):
        """Those in fp64."""
        end, h = self.case.ends[-1], self.row_scale.new_empty((self.case.ends[-1], self.case.N), dtype=torch.float64)
        dh, (gate, up) = self.expected()[:end], self.u[:end].double().chunk(2, 1)
        scaled = dh * self.row_scale[:end].double().unsqueeze(1)
        du = torch.cat(gate_backward(self.case.activation, scaled, gate, up, h), 1)
        return du, h, (dh * h).sum(1)


class Ranks(Operands):
    """Of a case, whose rows of x, K columns, are multiplied with the rank: b [E, K, R], and `xa` is narrow."""

    def __init__(self, case, device="cpu", seed=0):
        super().__init__(case, device, seed)
        generator = torch.Generator().manual_seed(seed + 1)
        self.b = torch.randn(len(case.ends), case.K, case.R, generator=generator).to(case.dtype).to(device)
        # rows of no group hold anything
        self.xa[case.ends[-1] :] = float("nan")

    def launch(self, native, need=(True, True), dtype=torch.float32, gathered=False, scale=1.7):
        """`(projected, outer)`, None where not needed; outer with K last where the case is transposed."""
        case, x = self.case, self.gathered if gathered else self.x
        projected = self.xa.new_full((case.rows, case.R), float("nan")) if need[0] else None
        shape = (case.R, case.K) if case.transposed else (case.K, case.R)
        outer = self.xa.new_full((len(case.ends), *shape), float("nan"), dtype=dtype) if need[1] else None
        given = {
            "type": TYPES[case.dtype], "rows": case.rows, "groups": len(case.ends), "C": case.K, "R": case.R,
            "offsets": self.offsets.data_ptr(), "wide": x.data_ptr(), "stride_wide": x.stride(0), "scale": scale,
            "b": self.b.data_ptr(), "narrow": self.xa.data_ptr(), "stride_narrow": case.R,
            "transposed": case.transposed, "outer_type": TYPES.get(dtype, 2), "stride_projected": case.R,
            **{name: t.data_ptr() for name, t in (("projected", projected), ("outer", outer)) if t is not None},
        }  # fmt: skip
        if not gathered:
            given |= {"order": self.order.data_ptr(), "choices": case.choices}
        work = self.xa.new_full((native.ragged_ranks_workspace(**given) // 4,), float("nan"), dtype=torch.float32)
        self.last = given | {"workspace": work.data_ptr()}
        native.ragged_ranks(**self.last, stream=self.stream)
        return projected, outer

    def expected(self, scale=1.7):
        """Both in fp64; rows of no group are NaN."""
        case, first = self.case, 0
        x, xa, b = self.gathered.double(), self.xa.double(), self.b.double()
        projected = x.new_full((case.rows, case.R), float("nan"))
        outer = torch.zeros_like(b)
        for g, end in enumerate(case.ends):
            rows = slice(first, end)
            projected[rows] = x[rows] @ b[g]
            outer[g] = scale * (x[rows].t() @ xa[rows])
            first = end
        return projected, outer.mT if case.transposed else outer


def same(one, other):
    """Bit for bit, what nobody wrote included."""
    return torch.equal(one.view(torch.int16), other.view(torch.int16))
