"""Siblings in one launch each way (T2; on a GPU, T6): by name against fp64, in every form, forced by the plan."""

from dataclasses import replace

import pytest
import torch
from group_reference import Case, check, linears, make, mlp, plain_linears, plain_mlp

from lorafuse.kernels import gated, matmul, siblings
from lorafuse.plan import find, override

# fewer programs than tiles, so that they walk from one layer's to the next one's
FORMS = {"tma": replace(find("H200"), sms=3), "pointer": replace(find("A100"), sms=3)}
ALIGNED = Case(N=(136, 40, 72), K=96, R=(13, 0, 40), leading=(150,), dtype=torch.float16, adapter_dtype=torch.float32)
CASES = {
    "aligned": ALIGNED,
    "masked": replace(ALIGNED, p=(0.3, 0.0, 0.5), R=(6, 4, 40)),
    "misaligned": Case(N=(65, 12, 33), K=67, R=(5, 3, 0), leading=(70,), dtype=torch.float16),
    "fp32": Case(N=(65, 8), K=130, R=(20, 3), p=(0.0, 0.0), bias=(False, True), leading=(3, 23)),
    "frozen": replace(ALIGNED, R=(0, 0, 0), leading=(7,)),
    "four": Case(N=(8, 8, 16, 8), K=16, R=(2, 2, 2, 1), p=(0.0,) * 4, bias=(True,) * 4, dtype=torch.float16),
}


@pytest.fixture
def launches(monkeypatch):
    """How often each launcher of the kernels ran."""
    counts = {}
    names = (siblings, "matmuls"), (siblings, "matmul_sum"), (gated, "gated"), (matmul, "gated_backward")
    for module, name in names:
        run = getattr(module, name)

        def counted(*args, name=name, run=run, **more):
            counts[name] = counts.get(name, 0) + 1
            return run(*args, **more)

        monkeypatch.setattr(module, name, counted)
    return counts


# rows that TMA cannot read are read through pointers on every GPU
RUNS = [("tma", name) for name in CASES] + [("pointer", "aligned"), ("pointer", "masked")]


@pytest.mark.parametrize(("form", "case"), RUNS)
def test_every_gradient(form, case, launches):
    with override(force_kernel="siblings", interpreted_as=FORMS[form]):
        check(lambda o: linears(o, backend="triton"), plain_linears, make(CASES[case]), draws=1)
    assert launches == {"matmuls": 1, "matmul_sum": 1}


MLP = Case(N=(136, 136, 40), K=96, R=(13, 0, 40), leading=(70,), dtype=torch.float16, adapter_dtype=torch.float32)
MLPS = {
    "aligned": ("tma", MLP, "silu"),
    "pointers": ("pointer", MLP, "gelu_tanh"),
    "fp32": ("tma", Case(N=(65, 65, 9), K=33, R=(0, 3, 5), bias=(False, True, False), leading=(23,)), "clamped_swiglu"),
}


@pytest.mark.parametrize("name", MLPS)
def test_every_gradient_of_a_gated_mlp(name, launches):
    form, case, activation = MLPS[name]
    with override(force_kernel="siblings", interpreted_as=FORMS[form]):
        check(
            lambda o: mlp(o, activation, backend="triton"), lambda o: plain_mlp(o, activation),
            make(case, of_mlp=True), draws=1,
        )  # fmt: skip
    assert launches == {"gated": 1, "gated_backward": 1, "matmul_sum": 1}
