"""How far experts are from fp64 in 16-bit dtypes (T1, T2), against PEFT, which adds ΔW to W in the base's dtype."""

import copy

import moe_models
import pytest
import torch
import transformers
from experts_reference import block, differentiated, fused, plain
from test_peft_experts import step
from tiny_families import tiny_model
from torch.nn import functional as F

import lorafuse
from lorafuse.backends import aten_loop
from lorafuse.functional import lora_grouped_linear
from lorafuse.operands import Rows
from lorafuse.testing.numerics import relative_l2

pytest_plugins = "backend_fixtures"


def as_peft(o, settings):
    """W + ΔW materialized in the base's dtype, expert by expert."""
    stacks = [
        o[name] + (settings[f"{name}_scale"] * (o[f"{name}_b"] @ o[f"{name}_a"])).to(o[name].dtype)
        for name in ("gate_up", "down")
    ]
    out = torch.zeros_like(o["x"])
    for e, (up, down) in enumerate(zip(*stacks, strict=True)):
        t, j = torch.where(o["topk_index"] == e)
        gate, up = F.linear(o["x"][t], up).chunk(2, 1)
        out = out.index_add(0, t, F.linear(F.silu(gate) * up, down) * o["topk_weight"][t, j, None])
    return out


def errors(backend, dtype, adapter_dtype, scale, T, **sizes):
    """`{name: (ours, PEFT's)}`, summed over several problems: of one alone the ratio is mostly noise."""
    actual = {}
    for seed in range(3):
        o, settings = block(T=T + seed, E=3, R=1, dtype=dtype, adapter_dtype=adapter_dtype, **sizes)
        settings |= {"gate_up_scale": scale, "down_scale": scale}
        for name in ("gate_up_b", "down_b"):
            # within fp16's range
            o[name] = o[name] / 8
        exact = {name: t if t.dtype is torch.int64 else t.double() for name, t in o.items()}
        reference = differentiated(lambda o, s: plain(o, **s), exact, settings)
        ours = differentiated(lambda o, s: fused(o, s, backend), o, settings)
        theirs = differentiated(as_peft, o, settings)
        for name, t in reference.items():
            one, other = actual.get(name, (0.0, 0.0))
            actual[name] = one + relative_l2(ours[name], t), other + relative_l2(theirs[name], t)
    return actual


CASES = [
    (backend, dtype, adapter_dtype, scale)
    for backend in ("eager", "grouped_mm", "triton")
    for dtype in (torch.bfloat16, torch.float16)
    for adapter_dtype in (torch.float32, dtype)
    # powers of two are exact
    for scale in (16.0, 37.0)
    # the interpreter's bf16 is wrong; torch has a fast grouped_mm for bf16 alone
    if (backend, dtype) not in (("triton", torch.bfloat16), ("grouped_mm", torch.float16))
    # PEFT's own gradients are infinite there; those of fp32 adapters are finite, and so must ours be
    and (adapter_dtype, scale) != (torch.float16, 37.0)
]


@pytest.mark.parametrize(("backend", "dtype", "adapter_dtype", "scale"), CASES)
def test_rank_1_and_a_large_scale(backend, dtype, adapter_dtype, scale, request):
    if backend == "grouped_mm":
        request.getfixturevalue("by_grouped_mm")
    sizes = {"T": 24, "H": 64, "I": 32} if backend == "triton" else {"T": 150, "H": 192, "I": 96}
    name = "eager" if backend == "grouped_mm" else backend
    for tensor, (ours, theirs) in errors(name, dtype, adapter_dtype, scale, **sizes).items():
        assert ours <= 2 * theirs, f"{tensor}: {ours / 3:.1e}, PEFT {theirs / 3:.1e}"


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_the_scale_of_grouped_layers_is_outside_fp16(backend):
    x, w, a, b = (torch.randn(s).half() for s in ((40, 16), (2, 24, 16), (2, 2, 16), (2, 24, 2)))
    a, b = (t.float().requires_grad_() for t in (a, b))
    y = lora_grouped_linear(x, torch.tensor([20, 40]), w, a, b, scale=50.0, backend=backend)
    dy = torch.full_like(y, 200.0)
    da, db = torch.autograd.grad(y, (a, b), dy)
    assert max(da.abs().max(), db.abs().max()) > 65504
    for e, rows in enumerate((slice(20), slice(20, 40))):
        x_e, dy_e = x[rows].double(), dy[rows].double()
        assert relative_l2(da[e], 50 * (dy_e @ b[e].double()).t() @ x_e) < 4e-3
        assert relative_l2(db[e], 50 * dy_e.t() @ (x_e @ a[e].double().t())) < 4e-3


def test_a_sum_over_rows_is_rounded_once_for_each_part():
    """A group's rows are a multiple of a step and the rest; the sum of both is fp32."""
    left, right = torch.full((33, 1), 256.0).bfloat16(), torch.ones(33, 2).bfloat16()
    # bf16 has no 8193
    left[-1] = 1
    actual = aten_loop.outer(left, right, Rows(33, torch.tensor([33])), torch.empty(1, 1, 2), False, 1.0)
    assert actual.tolist() == [[[256 * 32 + 1] * 2]]


class TestExpertsThatAreComputedInFp32:
    def model(self, dtype, implementation=None):
        model = tiny_model(
            transformers.OpenAIPrivacyFilterForTokenClassification,
            layer_types=["full_attention"] * 2,
            experts_implementation=implementation,
        ).train()
        adapter = moe_models.peft.LoraConfig(
            r=4, target_modules=[], target_parameters=moe_models.targets("gpt_oss"), init_lora_weights=False
        )
        return moe_models.peft.get_peft_model(model.to(dtype), adapter, autocast_adapter_dtype=False)

    def test_16_bit_weights_run_as_peft_ships_them(self):
        model = self.model(torch.bfloat16)
        patched = copy.deepcopy(model)
        report = lorafuse.patch(patched)
        assert not report.patched
        assert "OpenAIPrivacyFilterExperts computes in float32 from torch.bfloat16 weights" in str(report)
        expected = step(model)
        for name, t in step(patched).items():
            assert torch.equal(t, expected[name]), name

    @pytest.mark.parametrize(("dtype", "implementation"), [(torch.float32, None), (torch.bfloat16, "grouped_mm")])
    def test_others_are_patched(self, dtype, implementation):
        assert {p.kind for p in lorafuse.patch(self.model(dtype, implementation)).patched} == {"experts"}
