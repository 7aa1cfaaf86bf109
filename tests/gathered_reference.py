"""Operands of products of gathered ragged rows (api_gathered.hpp), their launches, and what they are in fp64."""

from dataclasses import dataclass

import torch

__all__ = ["ACTIVATIONS", "TILINGS", "TYPES", "Case", "Gated", "GatedCase", "Operands", "same"]

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


def same(one, other):
    """Bit for bit, what nobody wrote included."""
    return torch.equal(one.view(torch.int16), other.view(torch.int16))
