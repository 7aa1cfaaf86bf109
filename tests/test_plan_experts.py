"""The plan of experts (T1): what is chosen and why, times worked out by hand, bounds no way can beat, the command."""

import json
import re
from dataclasses import replace

import pytest
import torch
from experts_reference import block, differentiated, fused
from lorafuse.plan.experts import BASELINES, WAYS

from lorafuse import cli
from lorafuse.backends import base, probe
from lorafuse.functional import lora_grouped_linear, plan_experts
from lorafuse.plan import DEVICES, ExpertsProblem, GroupedProblem, Plan, cost, find, select_experts

BLOCK = ExpertsProblem(8192, 128, 8, 2048, 768, 16, "bfloat16", "float32")
LAYER = GroupedProblem(65536, 128, 1536, 2048, 16, "bfloat16", "float32")
ALL = (("eager", ""), ("triton", ""))
NO_TRITON = (("eager", ""), ("triton", "Triton is not installed"))
H200 = find("H200")
NAMES = [name for name in DEVICES if find(name).arch >= 80]


def us(way, problem, backward, device=H200):
    return 1e6 * cost.total(WAYS[way](problem, device, backward))


def kernels(plan):
    return [f"{way.backend} {way.kernel}" for way in plan.candidates]


class TestTimes:
    """An H200 moves 4.3 TB/s and does 815 TFLOP/s. BLOCK has 65536 rows; its weights are 604e6 numbers, 1.208 GB."""

    @pytest.mark.parametrize("gpu", NAMES)
    @pytest.mark.parametrize("backward", [False, True])
    @pytest.mark.parametrize("tokens", [1, 7, 512, 8192])
    @pytest.mark.parametrize("gated", [False, True])
    def test_no_way_beats_the_hardware(self, gpu, backward, tokens, gated):
        device, problem = find(gpu), replace(BLOCK, T=tokens, gated=gated)
        per_expert = (3 if gated else 2) * 768 * 2048
        flops = 2 * tokens * 8 * per_expert
        # every expert that has a row is read
        weights = min(128, tokens * 8) * per_expert * 2
        floor = max(flops / device.sustained_flops, weights / device.sustained_bandwidth)
        seconds = {name: us(name, problem, backward, device) / 1e6 for name in WAYS}
        assert all(taken >= floor for taken in seconds.values()), seconds
        assert seconds["PEFT as shipped"] > seconds["frozen"]
        assert seconds["split grouped_mm"] > seconds["frozen"]
        assert (seconds["full fine-tuning"] > seconds["frozen"]) == backward

    def test_peft_forward(self):
        """Each stack read and written twice: 4 x 1.208 GB are 1124 us. The factors and the launches are little."""
        assert 1124 < us("PEFT as shipped", BLOCK, False) - us("frozen", BLOCK, False) < 1200

    def test_peft_backward(self):
        """dW of all rows, 618 GFLOP in 759 us, and read twice for da and db, 562 us; in tiles, so a little more."""
        assert 1321 < us("PEFT as shipped", BLOCK, True) - us("frozen", BLOCK, True) < 1450

    def test_full_fine_tuning(self):
        assert 759 < us("full fine-tuning", BLOCK, True) - us("frozen", BLOCK, True) < 830

    def test_two_tokens_read_sixteen_experts(self):
        """2 x 8 choices: 16 of 128 experts, 0.151 GB or 35 us; all would be 281 us. Launches take the rest."""
        two = replace(BLOCK, T=2)
        for way in ("frozen", "split grouped_mm", "lorafuse, eager", "lorafuse, Triton"):
            assert 35 < us(way, two, False) < 310, way
        # those without rows have a gradient too: zeros, which are written
        assert us("full fine-tuning", two, True) > 281 + 35
        assert us("PEFT as shipped", two, False) > 1124

    def test_experts_beyond_the_rows_cost_nothing(self):
        few, many = replace(BLOCK, T=2, R=1), replace(BLOCK, T=2, R=1, E=512)
        for way in ("frozen", "lorafuse, Triton"):
            assert us(way, many, False) == pytest.approx(us(way, few, False)), way

    def test_grouped_mm(self):
        """Beyond frozen: xa 2816 numbers a row, xa b 3584, their sum 10752, less the 4096 of y times the router weight:
        1.71 GB, 398 us. Casts 18 us, launches little.
        """
        assert 398 < us("lorafuse, eager", BLOCK, False) - us("frozen", BLOCK, False) < 450

    def test_a_loop_launches_for_every_expert(self):
        """An A100 has no grouped kernel of torch's: 2 x 128 products of 5 us each for the host, even frozen."""
        assert us("frozen", replace(BLOCK, T=512), False, find("A100")) > 1280
        assert us("frozen", replace(BLOCK, T=512), False) < 600


class TestChoice:
    @pytest.mark.parametrize("gpu", NAMES)
    @pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
    @pytest.mark.parametrize("backward", [False, True])
    @pytest.mark.parametrize("problem", [BLOCK, replace(BLOCK, T=16), LAYER, replace(LAYER, S=5)])
    def test_the_fastest_and_never_the_loop(self, gpu, dtype, backward, problem):
        plan = select_experts(replace(problem, dtype=dtype, backward=backward), find(gpu), ALL)
        ways = {way.kernel: way.seconds for way in plan.candidates}
        assert ("grouped_mm" in ways) == (gpu in ("H100", "H200", "B200") and dtype == "bfloat16")
        assert plan.kernel == min((k for k in ways if k != "loop"), key=ways.__getitem__)
        said = [reason for reason in plan.reasons if reason.startswith("eager loop")]
        assert len(said) == 1
        assert "waits for the device" in said[0]
        assert plan.reasons[-1].startswith(f"{plan.backend}: {plan.kernel}")
        assert bool(plan.configs) is (plan.backend == "triton")

    @pytest.mark.parametrize(
        ("gpu", "kernel", "said"), [("H200", "grouped_mm", ""), ("A100", "loop", "sm_90 and sm_100, this is sm_80")]
    )
    @pytest.mark.parametrize("problem", [BLOCK, LAYER])
    def test_without_triton(self, gpu, kernel, said, problem):
        plan = select_experts(problem, find(gpu), NO_TRITON)
        assert (plan.backend, plan.kernel) == ("eager", kernel)
        assert "triton: Triton is not installed" in plan.reasons
        assert said in " ".join(plan.reasons)

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"dtype": "float16"}, "for bfloat16, not float16"),
            ({"aligned": False}, "16-byte boundaries"),
            ({"E": 1024}, "up to 1023 groups, there are 1024"),
        ],
    )
    def test_why_not_grouped_mm(self, changes, said):
        plan = select_experts(replace(BLOCK, **changes), H200, ALL)
        assert "eager grouped_mm" not in kernels(plan)
        (reason,) = (r for r in plan.reasons if r.startswith("eager grouped_mm: "))
        assert said in reason

    @pytest.mark.parametrize(
        ("problem", "device", "said"),
        [
            (BLOCK, None, "triton: runs on CUDA devices, the input is not on one"),
            (replace(BLOCK, T=0), H200, "triton: there are no rows"),
            (replace(LAYER, S=0), H200, "triton: there are no rows"),
            (replace(BLOCK, dtype="float64"), H200, "do not run float64"),
        ],
    )
    def test_where_only_eager_can(self, problem, device, said):
        plan = select_experts(problem, device, ALL)
        assert (plan.backend, plan.kernel) == ("eager", "loop")
        assert said in " ".join(plan.reasons)
        assert plan.reasons[-1].startswith("eager: runs every problem")

    def test_a_backend_for_linear_layers_only(self):
        plan = select_experts(BLOCK, H200, (*ALL, ("cuda", "")))
        assert "cuda: it has no kernels for groups of rows" in plan.reasons
        assert not any(way.backend == "cuda" for way in plan.candidates)

    def test_no_backend(self):
        with pytest.raises(ValueError, match="no backend can run .*Triton is not installed"):
            select_experts(BLOCK, H200, NO_TRITON[1:])

    def test_it_is_cached(self):
        assert select_experts(BLOCK, H200, ALL) is select_experts(replace(BLOCK), H200, ALL)


class TestWhatItIsTold:
    @pytest.mark.parametrize("transposed", [False, True])
    @pytest.mark.parametrize("gate", [False, True])
    def test_the_problem_of_operands(self, transposed, gate, monkeypatch):
        seen = []
        monkeypatch.setattr(probe, "select_experts", lambda *told: seen.append(told))
        o, _ = block(H=16, gate=gate, transposed=transposed, dtype=torch.bfloat16, adapter_dtype=torch.float32)
        given = [o[name] for name in ("x", "topk_index", "gate_up", "down")]
        for backward in (False, True):
            plan_experts(
                *given, gate_up_a=o["gate_up_a"], down_a=o["down_a"][0], is_transposed=transposed, backward=backward
            )
            problem, device, available = seen.pop()
            expected = ExpertsProblem(23, 5, 2, 16, 8, 3, "bfloat16", "float32", gated=gate, backward=backward)
            assert problem == expected
            assert device is None
            assert [name for name, _ in available] == list(base.BACKENDS)

    def test_without_adapters_and_off_boundaries(self, monkeypatch):
        seen = []
        monkeypatch.setattr(probe, "select_experts", lambda *told: seen.append(told))
        o, _ = block(dtype=torch.bfloat16, adapters=())
        plan_experts(*[o[name] for name in ("x", "topk_index", "gate_up", "down")])
        assert seen[0][0] == ExpertsProblem(23, 5, 2, 12, 8, 1, "bfloat16", "bfloat16", aligned=False)

    def test_a_cpu(self):
        o, _ = block()
        plan = plan_experts(*[o[name] for name in ("x", "topk_index", "gate_up", "down")])
        assert (plan.backend, plan.kernel) == ("eager", "loop")
        assert any("the input is not on one" in reason for reason in plan.reasons)

    @pytest.fixture
    def told(self, monkeypatch):
        """What is planned where several backends can run: forward on eager, backward too."""
        seen = []
        monkeypatch.setattr(base, "candidates", lambda device: ("triton", "eager"))
        monkeypatch.setattr(probe, "plan_grouped", lambda p, device: seen.append(p) or Plan("eager", "loop"))
        return seen

    def test_auto_follows_the_plan_in_each_direction(self, told):
        o, settings = block()
        differentiated(lambda o, s: fused(o, s, "auto"), o, settings)
        assert [p.backward for p in told] == [False, True]
        assert {replace(p, backward=False) for p in told} == {ExpertsProblem(23, 5, 2, 12, 8, 3, "float64", "float64")}

    def test_an_activation_of_ones_own_runs_backward_where_it_ran_forward(self, told):
        o, settings = block(activation=lambda u: u[:, :8] * u[:, 8:])
        differentiated(lambda o, s: fused(o, s, "auto"), o, settings)
        assert [p.backward for p in told] == [False]

    def test_auto_of_a_grouped_layer(self, told):
        x, w, a, b = torch.ones(9, 4).requires_grad_(), torch.ones(3, 8, 4), torch.ones(3, 2, 4), torch.ones(3, 8, 2)
        lora_grouped_linear(x, torch.tensor([2, 2, 9]), w, a, b, backend="auto").sum().backward()
        assert told == [
            GroupedProblem(9, 3, 8, 4, 2, "float32", "float32", backward=backward) for backward in (False, True)
        ]

    def test_nothing_is_planned_where_only_eager_can_run(self, monkeypatch):
        monkeypatch.setattr(probe, "plan_grouped", lambda *told: pytest.fail("there is no choice on a CPU"))
        o, settings = block()
        fused(o, settings, "auto")


class TestCommand:
    ASK = ("plan", "--gpu", "H200", "--moe", "qwen3-30b-a3b")

    def test_every_number_says_model(self, capsys):
        assert cli.main([*self.ASK, "--backward"]) == 0
        lines = capsys.readouterr().out.splitlines()
        numbers = [line for line in lines if re.search(r"\d us\b|\d%", line)]
        assert len(numbers) > 40
        assert all("model" in line for line in numbers)
        for name in BASELINES:
            assert any(line.strip().startswith(name) for line in lines), name

    @pytest.mark.parametrize("gpu", DEVICES)
    def test_it_prints_the_planners_choice(self, gpu, capsys):
        assert cli.main(["plan", "--gpu", gpu, "--moe", "qwen3-30b-a3b", "--backward"]) == 0
        out = capsys.readouterr().out
        available = (*ALL, ("cuda", ""))
        for direction in ("forward", "backward"):
            plan = select_experts(replace(BLOCK, backward=direction == "backward"), find(gpu), available)
            assert f"{direction}: {plan.backend} {plan.kernel}\n" in out
            assert re.search(rf"-> {plan.backend} {plan.kernel} +\d", out)
            for reason in plan.reasons:
                assert f"why: {reason}" in out
            for way in plan.candidates:
                assert re.search(rf"{way.backend} {way.kernel} +{way.seconds * 1e6:.1f} us \(model\)", out)
        assert re.search(r"this plan +-?\d+\.\d% +\(model\)", out)

    def test_json_holds_the_same(self, capsys):
        assert cli.main([*self.ASK, "--backward", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert list(found["directions"]) == ["forward", "backward"]
        base = mine = 0
        for name, direction in found["directions"].items():
            assert direction["problem"]["backward"] is (name == "backward")
            assert direction["reasons"]
            assert set(direction["baselines"]) == set(BASELINES)
            for way in [*direction["candidates"].values(), *direction["baselines"].values()]:
                assert way["model_us"] == pytest.approx(sum(part["model_us"] for part in way["parts"]))
            base += direction["baselines"]["frozen"]["model_us"]
            mine += direction["candidates"][f"{direction['backend']} {direction['kernel']}"]["model_us"]
        assert found["lora_tax_model"] == pytest.approx(mine / base - 1)

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (["--dropout"], "does not hold it"),
            (["--rank", "0"], "--rank 0: it must be at least 1"),
            (["--m", "0"], "--m 0: it must be at least 1"),
        ],
    )
    def test_what_cannot_be_is_one_clear_line(self, flags, message, capsys):
        assert cli.main([*self.ASK, *flags]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1

    def test_an_unknown_block_lists_the_known_ones(self, capsys):
        assert cli.main(["plan", "--gpu", "H200", "--moe", "qwen3"]) == 2
        assert "qwen3-30b-a3b" in capsys.readouterr().err
