"""The cost model of the planner (T1): known figures, and every term of it by what changes when it changes."""

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from plan_problems import ALL, BACKWARD, HEADLINE, problems

from lorafuse.plan import DEVICES, cost, find, override, select
from lorafuse.plan.candidate import KernelConfig

pytestmark = pytest.mark.no_poison

MEASURED = Path(__file__).parents[2] / "bench" / "results" / "h200-2026-11-26-linear.json"


def frozen(problem, device):
    return cost.frozen((problem,), device).seconds


def eager(problem, device):
    return math.fsum(part.seconds for part in cost.aten((problem,), "aten_beta1", device))


def addmm(problem, device):
    return math.fsum(part.seconds for part in cost.aten((problem,), "aten_addmm", device))


class TestCost:
    """M 8192, K = N 4096, R 16, bf16 on an H200, microseconds."""

    @pytest.mark.parametrize(
        ("model", "forward", "backward"),
        [
            (frozen, 348, 348),
            (eager, 403, 451),
            (addmm, 423, 471),
        ],
    )
    def test_known_figures(self, model, forward, backward):
        device = find("H200")
        assert model(HEADLINE, device) * 1e6 == pytest.approx(forward, rel=0.01)
        actual = model(replace(HEADLINE, gradients=BACKWARD), device)
        assert actual * 1e6 == pytest.approx(backward, rel=0.01)

    def test_it_says_what_was_measured(self):
        """Within 8 % of the committed medians of an H200, forward and backward of every candidate."""
        (result,) = (r for r in json.loads(MEASURED.read_text())["results"] if r["case"] == "llama-3.1-8b.q")
        assert all(result[key] == getattr(HEADLINE, key) for key in ("M", "N", "K", "R", "dtype"))
        every = (*ALL, ("cuda", ""))
        for gradients, half in (((), "forward"), (BACKWARD, "backward")):
            problem, device = replace(HEADLINE, gradients=gradients), find("H200")
            # what has run on no GPU yet is not in the file
            candidates = select(problem, device, every).candidates
            unknown = "fused_forward", "concurrent_backward", "fused_backward", "aten_addmm"
            candidates = [w for w in candidates if w.kernel not in unknown]
            fastest = {
                name: min(w.seconds for w in candidates if w.backend == name) for name in ("eager", "triton", "cuda")
            }
            modelled = {
                "frozen": frozen(problem, device),
                "lorafuse-eager": fastest["eager"],
                "lorafuse-triton": fastest["triton"],
                "lorafuse": fastest["cuda"],
            }
            for name, seconds in modelled.items():
                assert seconds == pytest.approx(result["variants"][name][half]["median"], rel=0.08), (name, half)

    def test_two_kernels_cost_a_pass_and_a_main_loop(self):
        """A pass over x at 0.7 of a copy's bandwidth, 2 us between, and a main loop at 0.94 of cuBLAS."""
        plan = select(HEADLINE, find("H200"), ALL)
        assert plan.kernel == "two_kernel"
        (candidate,) = (w for w in plan.candidates if w.kernel == plan.kernel)
        assert candidate.seconds * 1e6 == pytest.approx(15.7 / 0.7 + 2 + 347.9 * (1 + 16 / 4096) / 0.94, rel=0.01)

    @pytest.mark.parametrize("gradients", [(), BACKWARD])
    @pytest.mark.parametrize("device", DEVICES)
    def test_more_work_never_costs_less(self, device, gradients):
        device = find(device)
        models = [frozen, eager, addmm]
        for name, values in {"M": (1, 512, 1024, 8192, 32768), "N": (1024, 4096, 16384), "K": (1024, 4096)}.items():
            for model in models:
                costs = [model(replace(HEADLINE, gradients=gradients, **{name: v}), device) for v in values]
                assert all(less <= more * (1 + 1e-12) for less, more in itertools.pairwise(costs))

    def test_an_adapter_never_costs_less_than_no_adapter(self):
        for problem, device in itertools.product(problems(), DEVICES.values()):
            if "dx" in problem.gradients or not problem.gradients:
                base = frozen(problem, device)
                for candidate in select(problem, device, ALL).candidates:
                    assert candidate.seconds >= base * 0.999, (problem, device.name, candidate.kernel)

    def seconds(self, kernel, problem, device, **config):
        """Of a 128x128 configuration of a kernel."""
        return cost.kernel_seconds(KernelConfig(kernel, "tma", 128, 128, 64, 16, 3, 8, **config), problem, find(device))

    def test_pointers_are_slower_where_a_warpgroup_multiplies(self):
        for device, fraction in (("H200", 0.85), ("B200", 0.85), ("RTX 5090", 1.0), ("A100", 1.0)):
            config = KernelConfig("matmul", "tma", 128, 128, 64, 16, 3, 8)
            tma, pointer = (
                cost.kernel_seconds(replace(config, form=form), HEADLINE, find(device)) for form in ("tma", "pointer")
            )
            assert tma / pointer == pytest.approx(fraction * 0.97 / 0.94)

    @pytest.mark.parametrize(("device", "ratio"), [("A100", 16), ("RTX 4090", 2), ("H200", 989 / 67)])
    def test_fp32_runs_at_the_rate_of_the_cuda_cores(self, device, ratio):
        half, full = (frozen(replace(HEADLINE, dtype=dtype), find(device)) for dtype in ("bfloat16", "float32"))
        assert full / half == pytest.approx(ratio, rel=0.01)

    def test_low_rank_columns_are_part_of_the_product(self):
        one, many = (self.seconds("matmul", replace(HEADLINE, R=R), "H200") for R in (16, 256))
        assert many / one == pytest.approx((4096 + 256) / (4096 + 16))

    @pytest.mark.parametrize(("kernel", "gradients"), [("project", ()), ("matmul", BACKWARD), ("outer", BACKWARD)])
    def test_a_mask_costs_its_integers(self, kernel, gradients):
        """25 operations an element, 64 a clock and SM at 1.7 GHz; four times as many where neighbours share nothing."""
        mask = 8192 * 4096 * 25 / (132 * 64 * 1.7e9)
        problem = replace(HEADLINE, gradients=gradients)
        plain, dropped = (self.seconds(kernel, replace(problem, dropout=d), "H200") for d in (False, True))
        assert dropped - plain == pytest.approx(mask)
        misaligned = replace(problem, K=4097)
        plain, dropped = (self.seconds(kernel, replace(misaligned, dropout=d), "H200") for d in (False, True))
        assert dropped - plain == pytest.approx(4 * mask * 4097 / 4096)

    def test_a_mask_in_torch_operators_costs_more_than_the_layer(self):
        with_mask, without = (eager(replace(HEADLINE, dropout=d), find("H200")) for d in (True, False))
        assert with_mask > 5 * without

    def test_x_is_read_again_for_every_rank_tile(self):
        one, four = (self.seconds("project", replace(HEADLINE, R=R), "H200") for R in (16, 64))
        assert four == pytest.approx(4 * one)

    def test_few_programs_do_not_reach_the_bandwidth(self):
        """One program streams 110 GB/s."""
        config = KernelConfig("project", "pointer", 64, 0, 64, 16, 3, 4)
        actual = cost.kernel_seconds(config, replace(HEADLINE, M=64), find("H200"))
        assert actual == pytest.approx(64 * 4096 * 2 / 110e9 / 0.7)

    def test_dbias_is_a_pass_of_its_own_in_eager_and_free_in_triton(self):
        device, with_bias = find("H200"), (*BACKWARD, "dbias")
        one, other = (
            {c.kernel: c.seconds for c in select(replace(HEADLINE, gradients=g), device, ALL).candidates}
            for g in (BACKWARD, with_bias)
        )
        for order in ("aten_beta1", "aten_addmm"):
            assert other[order] - one[order] == pytest.approx(8192 * 4096 * 2 / 4.3e12 / 0.7 + 2e-6)
        assert other["one_pass_backward"] == one["one_pass_backward"]

    def test_waves_are_quantized(self):
        """One tile more than fills the GPU costs a wave more."""
        device = find("H200")
        config = KernelConfig("matmul", "tma", 128, 256, 64, 16, 3, 8)
        full = cost.kernel_seconds(config, replace(HEADLINE, M=128 * 132, N=256), device)
        more = cost.kernel_seconds(config, replace(HEADLINE, M=128 * 133, N=256), device)
        assert more == pytest.approx(2 * full)

    @pytest.mark.parametrize(
        ("gradients", "decoded"), [((), True), (("dx", "da"), True), (("da", "db"), False)], ids=["y", "dx", "da"]
    )
    def test_decoding_costs_every_candidate_the_same(self, gradients, decoded):
        device, available = find("H200"), (*ALL[:2], ("cuda", ""))
        dense = select(replace(HEADLINE, gradients=gradients), device, available)
        plan = select(replace(HEADLINE, gradients=gradients, format="nf4"), device, available)
        assert (plan.backend, plan.kernel) == (dense.backend, dense.kernel)
        stored = 0.5 + 1 / 64 + 4 / (64 * 256)
        seconds = 4096 * 4096 * (2 + stored) / device.sustained_bandwidth if decoded else 0.0
        for one, other in zip(plan.candidates, dense.candidates, strict=True):
            assert one.seconds - other.seconds == pytest.approx(seconds)
            assert one.launch_seconds == other.launch_seconds

    @pytest.mark.parametrize("gradients", [(), BACKWARD], ids=["forward", "backward"])
    def test_few_rows_may_decode_in_the_main_loop(self, gradients):
        """A candidate with no decoding of its own, which the model does not choose by itself."""
        few = replace(HEADLINE, M=16, format="nf4", packed=True, gradients=gradients)
        plan = select(few, find("H200"), ALL)
        candidates = {c.kernel: c for c in plan.candidates}
        packed = candidates["packed"]
        assert plan.kernel != "packed"
        assert plan.reasons[-1].endswith("packed is chosen only where measured") or plan.backend == "eager"
        assert not any(part.name.startswith("decode") for part in packed.parts)
        decoded = candidates["one_pass_backward" if gradients else "two_kernel"]
        assert packed.seconds < decoded.seconds
        with override(force_kernel="packed"):
            forced = select(few, find("H200"), ALL)
        assert (forced.kernel, forced.config("packed").block_m) == ("packed", 16)
        no_dx = tuple(g for g in gradients if g != "dx") or ("da",)
        unfit = {
            "many rows": {"M": 65}, "codes that no kernel reads": {"packed": False}, "fp32": {"dtype": "float32"},
            "another format": {"format": "intx"}, "nothing to decode": {"gradients": no_dx},
        }  # fmt: skip
        for reason, fields in unfit.items():
            kernels = {c.kernel for c in select(replace(few, **fields), find("H200"), ALL).candidates}
            assert "packed" not in kernels, reason

    def test_what_a_tile_that_is_decoded_costs(self):
        """128 tiles of 16 x 32 on 132 SMs: 13 instructions an element, 128 of an SM in a clock, and their products."""
        config = KernelConfig("packed", "pointer", 16, 32, 64, 16, 1, 4)
        few, device = replace(HEADLINE, M=16, format="nf4"), find("H200")
        decoded = 32 * 4096 * 13 / (128 * 1.7e9)
        actual = cost.kernel_seconds(config, few, device)
        assert actual == pytest.approx(decoded + cost.tile_seconds(config, few, device))
        # 64 rows of x for each tile, at what an SM streams
        tall = replace(config, block_m=64)
        assert cost.kernel_seconds(tall, replace(few, M=64, format="int8"), device) >= 64 * 2 * 4096 / 110e9

    def test_the_host_is_a_figure_of_its_own(self):
        """An ATen operator takes the host 12 us, a Triton kernel 60: at 512 rows longer than the GPU needs."""
        actual = {c.kernel: c for c in select(replace(HEADLINE, M=512), find("H200"), ALL).candidates}
        launches = {"aten_beta1": 6 * 12, "aten_addmm": 5 * 12, "two_kernel": 2 * 60}
        for kernel, us in launches.items():
            assert actual[kernel].launch_seconds == pytest.approx(us * 1e-6)
            assert actual[kernel].step_seconds == actual[kernel].launch_seconds > actual[kernel].seconds
        wide = {c.kernel: c for c in select(HEADLINE, find("H200"), ALL).candidates}
        for kernel, us in launches.items():
            assert wide[kernel].launch_seconds == pytest.approx(us * 1e-6)
            assert wide[kernel].step_seconds == wide[kernel].seconds

    def test_the_order_with_fewer_launches_is_ahead_at_few_rows(self):
        """The base product first launches a kernel less, but reads y again."""
        few, many = (
            {c.kernel: c.seconds for c in select(replace(HEADLINE, M=M), find("H200"), ALL).candidates}
            for M in (512, 8192)
        )
        assert few["aten_addmm"] < few["aten_beta1"]
        assert many["aten_beta1"] < many["aten_addmm"]
