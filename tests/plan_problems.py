"""Problems that the tests of the planner share."""

import itertools
from dataclasses import replace

from lorafuse.plan import Problem

HEADLINE = Problem(8192, 4096, 4096, 16, "bfloat16", "float32")
ALL = (("eager", ""), ("triton", ""), ("cuda", "no extension"))
BACKWARD = ("dx", "da", "db")


def problems():
    """Problems of every kind that the planner tells apart."""
    sizes = [(1, 64, 64), (7, 4097, 4095), (512, 1024, 4096), (8192, 4096, 4096), (32768, 14336, 4096), (300, 6, 10)]
    for (M, N, K), R, dtype in itertools.product(sizes, (1, 13, 16, 64, 256, 300), ("bfloat16", "float16", "float32")):
        for gradients, dropout in itertools.product(((), BACKWARD, ("db",), ("dx", "dbias")), (False, True)):
            yield Problem(M, N, K, R, dtype, "float32", dropout=dropout, gradients=gradients, aligned=M != 300)


def experts(T=8192, E=128, k=8, H=2048, I=768, R=16, *, gated=True, backward=False, **fields):  # noqa: E741
    """The problems of a block of Qwen3-30B-A3B, or of other sizes."""
    up = Problem(
        T * k, 2 * I if gated else I, H, R, "bfloat16", "float32", gradients=BACKWARD if backward else (), groups=E,
        is_ragged=True, choices=k,
    )  # fmt: skip
    epilogue = {"epilogue": "gated" if gated else "activation"}
    down = replace(up, N=H, K=I, **fields, **(epilogue if backward else {}))
    return replace(up, **fields, **({} if backward else epilogue)), down


def grouped(S=65536, *, backward=False, **fields):
    """The problem of a grouped linear layer."""
    (layer, _) = experts(backward=backward, **fields)
    return replace(layer, M=S, choices=1, epilogue="")
