"""The planner (T1): devices, what is legal, the choice and its reasons, measurements."""

import itertools
import json
import math
import re
import subprocess
import sys
from dataclasses import replace

import pytest
from plan_problems import ALL, BACKWARD, HEADLINE, problems

from lorafuse import formats
from lorafuse.plan import DEVICES, clear_cache, find, override, recognize, select, tuned
from lorafuse.plan.candidate import KernelConfig, padded_rank
from lorafuse.plan.configs_triton import candidates, illegal, shared_memory

pytestmark = pytest.mark.no_poison

# Triton's kernels need sm_80
WITH_KERNELS = [device for device in DEVICES.values() if device.arch >= 80]


class TestDevice:
    def test_the_table(self):
        large = ["A100", "L40S", "RTX 4090", "H100", "H200", "B200", "RTX 5090"]
        assert list(DEVICES) == [*large, "T4", "A10G", "RTX A6000", "RTX 3090", "L4"]
        for name, device in DEVICES.items():
            assert device.name == name
            assert 0 < device.sustained_flops < device.bf16_flops
            assert 0 < device.sustained_bandwidth < device.hbm_bandwidth
            assert device.smem_per_block in (65536, 101376, 166912, 232448)
            assert device.source.startswith("measured") == (name == "H200")

    @pytest.mark.parametrize("name", ["H200", "h200", "NVIDIA H200", "rtx4090", "GeForce RTX 4090", "RTX-4090", "4090"])
    def test_names_are_found(self, name):
        assert find(name).name in ("H200", "RTX 4090")

    def test_an_unknown_name_lists_the_known(self):
        with pytest.raises(ValueError, match=r"'H20'.*mean H200.*A100, L40S") as error:
            find("H20")
        assert all(name in str(error.value) for name in DEVICES)

    def probe(self, name, capability, sms, bandwidth):
        return recognize(
            name=name, capability=capability, sms=sms, smem_per_block=1000, l2_bytes=2000, clock_hz=1.7e9,
            memory_bandwidth=bandwidth,
        )  # fmt: skip

    @pytest.mark.parametrize(
        ("name", "capability", "sms", "bandwidth", "known"),
        [
            ("NVIDIA H200", (9, 0), 132, 4917e9, "H200"),
            ("NVIDIA H100 80GB HBM3", (9, 0), 132, 3352e9, "H100"),
            ("NVIDIA A100-SXM4-80GB", (8, 0), 108, 2039e9, "A100"),
            ("NVIDIA GeForce RTX 4090", (8, 9), 128, 1008e9, "RTX 4090"),
        ],
    )
    def test_a_known_gpu_keeps_its_rates_and_its_own_sizes(self, name, capability, sms, bandwidth, known):
        actual = self.probe(name, capability, sms, bandwidth)
        assert (actual.name, actual.sms, actual.smem_per_block, actual.l2_bytes) == (name, sms, 1000, 2000)
        assert actual.sustained_flops == DEVICES[known].sustained_flops
        # measurements are found under one name, live and with --gpu
        assert actual.model == find(known).model == known

    @pytest.mark.parametrize(
        ("name", "capability", "sms", "bandwidth", "per_clock"),
        [
            ("NVIDIA GeForce RTX 3080", (8, 6), 68, 760e9, 512),
            ("NVIDIA GeForce RTX 4090 Laptop GPU", (8, 9), 76, 576e9, 512),
            ("NVIDIA H100 PCIe", (9, 0), 114, 2039e9, 4096),
            ("NVIDIA A100-PCIE-40GB", (8, 0), 108, 1555e9, 2048),
            ("NVIDIA Thor", (11, 0), 20, 273e9, 8192),
            ("NVIDIA R100", (13, 0), 200, 13e12, 512),
            ("Tesla V100", (7, 0), 80, 900e9, 1024),
            ("Tesla P100", (6, 0), 56, 700e9, 1024),
        ],
    )
    def test_an_unknown_gpu_is_accepted(self, name, capability, sms, bandwidth, per_clock):
        actual = self.probe(name, capability, sms, bandwidth)
        assert actual.source == "estimated from clocks and architecture"
        assert actual.model == name
        assert actual.bf16_flops == per_clock * sms * 1.7e9
        assert actual.hbm_bandwidth == bandwidth
        assert 0.8 * bandwidth < actual.sustained_bandwidth < bandwidth

    def test_an_old_gpu_runs_eager_and_says_why(self):
        plan = select(HEADLINE, self.probe("Tesla V100", (7, 0), 80, 900e9), ALL)
        assert plan.backend == "eager"
        assert "triton: its kernels need sm_80, Tesla V100 is sm_70" in plan.reasons


class TestLegal:
    CONFIG = KernelConfig("matmul", "tma", 128, 256, 64, 16, 3, 8)

    def test_every_kernel_of_every_problem_has_a_legal_configuration(self):
        for problem, device in itertools.product(problems(), WITH_KERNELS):
            for kernel in ("project", "matmul", "project_outer", "outer", "reduce"):
                actual = candidates(kernel, problem, device)
                assert actual, (kernel, problem, device.name)
                for config in actual:
                    assert illegal(config, problem, device) == ""
                    assert config.splits <= max(1, math.ceil(problem.M / max(1, config.block_m)))

    @pytest.mark.parametrize(
        ("config", "problem", "device", "why"),
        [
            (replace(CONFIG, block_n=192), HEADLINE, "H200", "powers of two"),
            (replace(CONFIG, block_r=8), HEADLINE, "H200", "at least 16"),
            (CONFIG, HEADLINE, "A100", "sm_90, A100 is sm_80"),
            (CONFIG, replace(HEADLINE, dtype="float32"), "H200", "16-bit"),
            (CONFIG, replace(HEADLINE, aligned=False), "H200", "16-byte"),
            (CONFIG, replace(HEADLINE, K=4100), "H200", "16-byte"),
            (replace(CONFIG, warps=4), HEADLINE, "H200", "32768 accumulators.*4 warps"),
            (CONFIG, replace(HEADLINE, dropout=True, gradients=BACKWARD), "H200", "65536 accumulators"),
            (replace(CONFIG, stages=5), HEADLINE, "H200", r"shared memory.*232448 of H200"),
            (CONFIG, HEADLINE, "RTX 5090", r"101376 of RTX 5090"),
        ],
    )
    def test_what_is_illegal_says_why(self, config, problem, device, why):
        assert illegal(self.CONFIG, HEADLINE, find("H200")) == ""
        assert re.search(why, illegal(config, problem, find(device)))

    def test_shared_memory_grows_with_its_buffers(self):
        base = shared_memory(self.CONFIG, HEADLINE)
        # three stages of a 128x64 and a 256x64 tile, and half a tile of stores
        assert base >= 3 * (128 + 256) * 64 * 2 + 128 * 128 * 2
        assert shared_memory(replace(self.CONFIG, stages=4), HEADLINE) - base == (128 + 256) * 64 * 2

    @pytest.mark.parametrize(("R", "padded"), [(1, 16), (16, 16), (17, 32), (64, 64), (100, 128), (256, 256)])
    def test_padded_rank(self, R, padded):
        assert padded_rank(R) == padded


class TestSelect:
    def test_only_legal_configurations_of_the_kernels_it_needs(self):
        for problem, device in itertools.product(problems(), WITH_KERNELS):
            plan = select(problem, device, (("triton", ""),))
            kernels = [config.kernel for config in plan.configs]
            if problem.gradients:
                sums = {"dx": "matmul", "da": "outer"}
                assert kernels == ["project_outer", "reduce"] + [sums[g] for g in sums if g in problem.gradients]
            else:
                assert kernels == ["project", "matmul"]
            for config in plan.configs:
                assert plan.config(config.kernel) is config
                assert illegal(config, problem, device) == ""

    def test_the_least_modelled_time_wins(self):
        for problem, device in itertools.product(problems(), DEVICES.values()):
            plan = select(problem, device, ALL)
            (chosen,) = (candidate for candidate in plan.candidates if candidate.kernel == plan.kernel)
            others = [max(candidate.seconds, candidate.launch_seconds) for candidate in plan.candidates]
            assert chosen.step_seconds == min(others)

    def test_reasons_name_every_way_with_its_time(self):
        plan = select(HEADLINE, find("H200"), ALL)
        assert (plan.backend, plan.kernel) == ("triton", "two_kernel")
        assert plan.reasons[0] == "cuda: no extension"
        for candidate in ("eager aten_beta1: not chosen, model", "eager aten_addmm: not chosen, model"):
            assert any(reason.startswith(candidate) for reason in plan.reasons)
        assert plan.reasons[-1].startswith("triton: two_kernel, model")

    def test_small_problems_fall_back_to_eager(self):
        plan = select(replace(HEADLINE, M=64), find("H200"), ALL)
        assert plan.backend == "eager"
        assert any(reason.startswith("triton two_kernel: not chosen, model") for reason in plan.reasons)

    @pytest.mark.parametrize(
        ("problem", "reason"),
        [
            (replace(HEADLINE, M=0), "triton: there are no tokens"),
            (replace(HEADLINE, dtype="float64"), "triton: its kernels run bfloat16, float16, float32, not float64"),
            (replace(HEADLINE, format="nf3"), "triton: its kernels read dense weights, not nf3"),
        ],
    )
    def test_what_the_kernels_do_not_take(self, problem, reason):
        plan = select(problem, find("H200"), ALL)
        assert plan.backend == "eager"
        assert reason in plan.reasons

    def test_a_row_of_formats_is_all_that_a_format_needs(self, monkeypatch):
        monkeypatch.setitem(formats.FORMATS, "nf3", "lorafuse.formats.nf3")
        plan = select(replace(HEADLINE, format="nf3"), find("H200"), (*ALL[:2], ("cuda", "")))
        assert plan.kernel == "two_kernel"
        assert {one.backend for one in plan.candidates} == {"eager", "triton", "cuda"}

    def test_off_gpus(self):
        plan = select(HEADLINE, None, ALL)
        assert plan.backend == "eager"
        assert plan.reasons[0] == "triton: runs on CUDA devices, the input is not on one"

    def test_nobody_can(self):
        with pytest.raises(ValueError, match=r"no backend can run .*M=8192.*triton: broken"):
            select(HEADLINE, find("H200"), (("triton", "broken"), ("cuda", "no extension")))

    def test_a_constraint_holds_where_it_can(self):
        device = find("H200")
        able = (*ALL[:2], ("cuda", ""))
        with override(force_kernel="cuda fused_forward"):
            plan = select(HEADLINE, device, able)
            assert plan.kernel == "fused_forward"
            assert [(c.kernel, c.fused_forward) for c in plan.configs] == [("matmul", True)]
            assert "cuda fused_forward is forced" in plan.reasons[-1]
            assert select(replace(HEADLINE, R=128), device, able).kernel != "fused_forward"
            with override(force_kernel="aten_beta1"):
                assert select(HEADLINE, device, ALL).backend == "eager"
        assert select(HEADLINE, device, ALL).kernel == "two_kernel"
        with pytest.raises(ValueError, match=r"'fastest'.*two_kernel"), override(force_kernel="fastest"):
            pass

    def test_the_planner_needs_the_standard_library_only(self):
        code = "import sys, lorafuse.plan\nprint(*(n for n in sys.modules if n.split('.')[0] in ('torch', 'triton')))"
        # the package's __init__ imports torch; a bare parent shows the planner alone
        bare = (
            "import sys, types\nsys.modules['lorafuse'] = p = types.ModuleType('lorafuse')\np.__path__ = ['lorafuse']\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", bare + code], capture_output=True, text=True, check=True, timeout=300
        )
        assert done.stdout.strip() == ""


class TestTuned:
    ENTRY = {
        "N": 4096, "K": 4096, "R": [1, 16], "M": [1024, 16384], "dtype": "bfloat16", "dropout": False,
        "gradients": [], "kernel": "aten_beta1", "seconds": 0.00035, "commit": "abc", "date": "2026-11-24",
    }  # fmt: skip

    @pytest.fixture
    def file(self, tmp_path, monkeypatch):
        """Measurements of an H200 in a folder of their own; write them with the function it gives."""

        def write(content):
            (tmp_path / "h200.json").write_text(json.dumps(content))

        monkeypatch.setattr(tuned, "FOLDER", tmp_path)
        clear_cache()
        yield write
        clear_cache()

    def test_a_measurement_overrules_the_model(self, file):
        file({"version": 1, "entries": [self.ENTRY]})
        plan = select(HEADLINE, find("H200"), ALL)
        assert plan.kernel == "aten_beta1"
        assert "measured on H200: 350 us (2026-11-24, commit abc, shipped)" in plan.reasons[-1]

    @pytest.mark.parametrize(
        "change",
        [{"M": 512}, {"M": 20000}, {"R": 17}, {"N": 4104}, {"dtype": "float16"}, {"dropout": True},
         {"gradients": ("dx",)}, {"aligned": False}, {"groups": 2}],
    )  # fmt: skip
    def test_it_speaks_for_its_own_problems_only(self, file, change):
        # eager can run every one of them, and the model would take it for none
        file({"version": 1, "entries": [self.ENTRY | {"kernel": "aten_beta1"}]})
        assert "when measured on" in select(HEADLINE, find("H200"), ALL).reasons[-1]
        assert "when measured on" not in select(replace(HEADLINE, **change), find("H200"), ALL).reasons[-1]
        assert "when measured on" not in select(HEADLINE, find("H100"), ALL).reasons[-1]

    def test_gradients_are_matched_as_a_whole(self, file):
        file({"version": 1, "entries": [self.ENTRY | {"gradients": ["dx", "da", "db"], "kernel": "one_pass_backward"}]})
        device = find("H200")
        assert "when measured on" in select(replace(HEADLINE, gradients=BACKWARD), device, ALL).reasons[-1]
        assert "when measured on" not in select(replace(HEADLINE, gradients=("db",)), device, ALL).reasons[-1]

    @pytest.mark.parametrize(
        ("change", "message"),
        [({"M": [5, 1]}, r"M is \[5, 1\]"), ({"kernel": "fastest"}, "kernel is 'fastest'"),
         ({"N": "many"}, "N is 'many'"), ({"speed": 1}, "it has the fields")],
    )  # fmt: skip
    def test_a_broken_entry_is_named(self, file, change, message):
        file({"version": 1, "entries": [self.ENTRY, self.ENTRY | change]})
        with pytest.warns(UserWarning, match=rf"h200\.json: entry 1.*{message}"):
            plan = select(HEADLINE, find("H200"), ALL)
        assert "when measured on" not in plan.reasons[-1]

    def test_another_version_is_refused(self, file):
        file({"version": 5, "entries": []})
        with pytest.warns(UserWarning, match='"version": 4'):
            select(HEADLINE, find("H200"), ALL)
