"""Problems that the tests of the planner share."""

import itertools

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
