"""The plan of experts (T1): what is chosen and why, times worked out by hand, bounds none can beat, the command."""

import json
import re
from dataclasses import replace

import pytest
import torch
from experts_reference import block, differentiated, fused
from plan_problems import BACKWARD, experts, grouped

from lorafuse import cli
from lorafuse.backends import problems
from lorafuse.functional import lora_grouped_linear, plan_experts
from lorafuse.operands import Weight
from lorafuse.ops import choose
from lorafuse.plan import DEVICES, Plan, Problem, cost, find, override, select

ALL = (("eager", ""), ("triton", ""))
EVERY = (*ALL, ("cuda", ""))
NO_TRITON = (("eager", ""), ("triton", "Triton is not installed"))
H200 = find("H200")
NAMES = [name for name in DEVICES if find(name).arch >= 80]


def us(problems, device=H200):
    """Modelled microseconds of every candidate, and of the frozen operator."""
    actual = {one.name: 1e6 * one.seconds for one in select(problems, device, EVERY).candidates}
    return actual | {"frozen": 1e6 * cost.frozen(problems, device).seconds}


def kernels(plan):
    return [f"{one.backend} {one.kernel}" for one in plan.candidates]


class TestTimes:
    """An H200 moves 4.3 TB/s and does 815 TFLOP/s. The block has 65536 rows and weights of 604e6 numbers, 1.208 GB."""

    @pytest.mark.parametrize("gpu", NAMES)
    @pytest.mark.parametrize("backward", [False, True])
    @pytest.mark.parametrize("tokens", [1, 7, 512, 8192])
    @pytest.mark.parametrize("gated", [False, True])
    def test_none_beats_the_hardware(self, gpu, backward, tokens, gated):
        device = find(gpu)
        per_expert = (3 if gated else 2) * 768 * 2048
        flops = 2 * tokens * 8 * per_expert
        # every expert that has a row is read
        weights = min(128, tokens * 8) * per_expert * 2
        floor = 1e6 * max(flops / device.sustained_flops, weights / device.sustained_bandwidth)
        actual = us(experts(T=tokens, gated=gated, backward=backward), device)
        assert len(actual) >= 3
        assert all(measured >= floor for measured in actual.values()), actual

    def test_two_tokens_read_sixteen_experts(self):
        """2 x 8 choices: 16 of 128 experts, 0.151 GB or 35 us; all would be 281 us. Gaps take the rest."""
        actual = us(experts(T=2))
        for name in ("frozen", "grouped_mm", "ragged", "cuda ragged"):
            assert 35 < actual[name] < 281, name

    def test_experts_beyond_the_rows_cost_nothing(self):
        few, many = us(experts(T=2, R=1)), us(experts(T=2, R=1, E=512))
        for name in ("frozen", "ragged"):
            assert many[name] == pytest.approx(few[name]), name

    def test_grouped_mm(self):
        """Beyond frozen: xa 2816 numbers a row, xa b 3584, their sum 10752: 2.25 GB, 523 us. Casts 18 us, gaps 20."""
        actual = us(experts())
        assert 541 < actual["grouped_mm"] - actual["frozen"] < 565

    def test_a_loop_launches_for_every_expert(self):
        """The host launches 128 products of either projection, and two of each with the rank, 12 us each."""
        (loop,) = (c for c in select(experts(T=512), find("A100"), ALL).candidates if c.kernel == "loop")
        assert loop.launch_seconds > 6 * 128 * 12e-6
        assert loop.step_seconds == loop.launch_seconds > loop.seconds


class TestChoice:
    @pytest.mark.parametrize("gpu", NAMES)
    @pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
    @pytest.mark.parametrize("backward", [False, True])
    @pytest.mark.parametrize("make", [experts, lambda **c: experts(T=16, **c), grouped, lambda **c: grouped(5, **c)])
    def test_the_fastest_and_never_the_loop(self, gpu, dtype, backward, make):
        plan = select(make(dtype=dtype, backward=backward), find(gpu), ALL)
        seconds = {one.kernel: max(one.seconds, one.launch_seconds) for one in plan.candidates}
        assert ("grouped_mm" in seconds) == (gpu in ("H100", "H200", "B200") and dtype == "bfloat16")
        assert plan.kernel == min((k for k in seconds if k != "loop"), key=seconds.__getitem__)
        reasons = [reason for reason in plan.reasons if reason.startswith("eager loop")]
        assert len(reasons) == 1
        assert "waits until the host has read" in reasons[0]
        assert plan.reasons[-1].startswith(f"{plan.backend}: {plan.kernel}")
        assert bool(plan.configs) is (plan.backend == "triton")

    @pytest.mark.parametrize(
        ("gpu", "kernel", "reason"), [("H200", "grouped_mm", ""), ("A100", "loop", "sm_90 and sm_100, this is sm_80")]
    )
    @pytest.mark.parametrize("problems", [experts(), grouped()], ids=["experts", "grouped"])
    def test_without_triton(self, gpu, kernel, reason, problems):
        plan = select(problems, find(gpu), NO_TRITON)
        assert (plan.backend, plan.kernel) == ("eager", kernel)
        assert "triton: Triton is not installed" in plan.reasons
        assert reason in " ".join(plan.reasons)

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"dtype": "float16"}, "for bfloat16, not float16"),
            ({"aligned": False}, "16-byte boundaries"),
            ({"E": 1024}, "up to 1023 groups, there are 1024"),
        ],
    )
    def test_why_not_grouped_mm(self, changes, reason):
        plan = select(experts(**changes), H200, ALL)
        assert "eager grouped_mm" not in kernels(plan)
        (actual,) = (r for r in plan.reasons if r.startswith("eager grouped_mm: "))
        assert reason in actual

    @pytest.mark.parametrize(
        ("problems", "device", "reason"),
        [
            (experts(), None, "triton: runs on CUDA devices, the input is not on one"),
            (experts(T=0), H200, "triton: there are no rows"),
            (grouped(0), H200, "triton: there are no rows"),
            (experts(dtype="float64"), H200, "its kernels run bfloat16, float16, float32, not float64"),
        ],
    )
    def test_where_only_eager_can(self, problems, device, reason):
        plan = select(problems, device, ALL)
        assert (plan.backend, plan.kernel) == ("eager", "loop")
        assert reason in " ".join(plan.reasons)
        assert plan.reasons[-1].startswith("eager: runs every problem")

    @pytest.mark.parametrize("backward", [False, True])
    def test_the_grouped_cuda_kernel_is_chosen_by_name_only(self, backward):
        problems = experts(backward=backward)
        plan = select(problems, H200, EVERY)
        assert plan.backend == "triton"
        assert "cuda ragged" in kernels(plan)
        with override(force_kernel="cuda ragged"):
            plan = select(problems, H200, EVERY)
            assert (plan.backend, plan.kernel) == ("cuda", "ragged")
            assert plan.of(1).config("matmul").form == "wgmma"
        named = select(problems, H200, EVERY[2:])
        assert (named.backend, named.kernel) == ("cuda", "ragged")
        with override(force_kernel="cuda gathered"):
            plan = select(problems, H200, EVERY)
            assert (plan.backend, plan.kernel) == ("cuda", "gathered")
            # by the model neither copies of rows nor passes of the activation are left
            assert plan.chosen.seconds < named.chosen.seconds
            assert not [part.name for part in plan.chosen.parts if "gather" in part.name.replace("gate_up", "")]
        plan = select(experts(I=772, backward=backward), H200, EVERY)
        assert "cuda: TMA needs N 2048 and K 772 to be multiples of 8" in plan.reasons

    @pytest.mark.parametrize("gated", [False, True])
    @pytest.mark.parametrize("backward", [False, True])
    def test_each_projection_has_its_configurations(self, gated, backward):
        problems = experts(R=16, gated=gated, backward=backward)
        problems = problems[0], replace(problems[1], R=64)
        plan = select(problems, H200, ALL)
        for i, problem in enumerate(problems):
            expected = ["project", "matmul", "outer"] if backward else ["project", "matmul"]
            assert [config.kernel for config in plan.of(i).configs] == expected
            assert plan.of(i).config("project").block_r == problem.R
        assert plan.configs == plan.of(0).configs + plan.of(1).configs
        # du takes registers of its own
        assert plan.of(1).config("matmul").block_n == (128 if backward else 256)

    def test_no_backend(self):
        with pytest.raises(ValueError, match=r"no backend can run .*Triton is not installed"):
            select(experts(), H200, NO_TRITON[1:])

    def test_it_is_cached(self):
        assert select(experts(), H200, ALL) is select(experts(), H200, ALL)


def problems_of_block(gate, backward, **fields):
    """Those of `block(H=16)`, or with other fields."""
    kind = {"groups": 5, "is_ragged": True, "choices": 2, "gradients": BACKWARD if backward else ()} | fields
    epilogue = "gated" if gate else "activation"
    up = Problem(46, 16 if gate else 8, 16, 3, "bfloat16", "float32", epilogue="" if backward else epilogue, **kind)
    return up, replace(up, N=16, K=8, epilogue=epilogue if backward else "")


class TestWhatItIsTold:
    @pytest.fixture
    def plans(self, monkeypatch):
        """The problems that are planned; the plans are of eager."""
        seen = []

        def planned(problems, *rest):
            seen.append(problems)
            return Plan("eager", "loop")

        monkeypatch.setattr("lorafuse.ops.choose.select", planned)
        return seen

    @pytest.fixture
    def chosen(self, plans, monkeypatch):
        """The same where several backends can run."""
        monkeypatch.setattr(choose, "SOLE_BACKEND", {})
        return plans

    @pytest.mark.parametrize("transposed", [False, True])
    @pytest.mark.parametrize("gate", [False, True])
    def test_the_problems_of_operands(self, transposed, gate, plans):
        o, _ = block(H=16, gate=gate, transposed=transposed, dtype=torch.bfloat16, adapter_dtype=torch.float32)
        given = [o[name] for name in ("x", "topk_index", "gate_up", "down")]
        for backward in (False, True):
            plan_experts(
                *given, gate_up_a=o["gate_up_a"], down_a=o["down_a"][0], is_transposed=transposed, backward=backward
            )
            (one, other), expected = plans.pop(), problems_of_block(gate, backward)
            # one adapter for all experts has its own rank
            assert (one, replace(other, R=3)) == expected

    def test_without_adapters_and_off_boundaries(self, plans):
        o, _ = block(dtype=torch.bfloat16, adapters=())
        plan_experts(*[o[name] for name in ("x", "topk_index", "gate_up", "down")])
        ((up, down),) = plans
        assert (up.K, up.R, up.adapter_dtype, up.aligned) == (12, 1, "bfloat16", False)
        assert (down.N, down.R, down.adapter_dtype, down.aligned) == (12, 1, "bfloat16", False)

    @pytest.mark.parametrize(("inner", "aligned"), [(16, True), (12, False)])
    def test_halves_of_gate_up_start_on_boundaries(self, plans, inner, aligned):
        """24 columns of gate and up are aligned together, 12 of each are not."""
        x, index = torch.zeros(3, 16).bfloat16(), torch.zeros(3, 1, dtype=torch.int64)
        up, down = torch.zeros(2, 16, 2 * inner).bfloat16(), torch.zeros(2, inner, 16).bfloat16()
        plan_experts(x, index, up, down, is_transposed=True)
        assert {problem.aligned for problem in plans[0]} == {aligned}

    def test_one_matrix_for_all_groups_has_no_descriptor(self):
        x, w = torch.zeros(3, 16).bfloat16(), torch.zeros(1, 8, 16).bfloat16()
        for weights, aligned in ((w, True), (w.repeat(4, 1, 1), True), (w.expand(4, 8, 16), False)):
            assert problems.grouped_problem(x, Weight(weights), None, False).aligned is aligned

    def test_a_cpu(self):
        o, _ = block()
        plan = plan_experts(*[o[name] for name in ("x", "topk_index", "gate_up", "down")])
        assert (plan.backend, plan.kernel) == ("eager", "loop")
        assert any("the input is not on one" in reason for reason in plan.reasons)

    def test_auto_follows_the_plan_in_each_direction(self, chosen):
        o, settings = block()
        differentiated(lambda o, s: fused(o, s, "auto"), o, settings)
        assert [[p.gradients for p in problems] for problems in chosen] == [[(), ()], [BACKWARD, BACKWARD]]
        assert [[p.epilogue for p in problems] for problems in chosen] == [["gated", ""], ["", "gated"]]
        for up, down in chosen:
            assert (up.M, up.N, up.K, up.R, up.groups, up.choices, up.dtype) == (46, 16, 12, 3, 5, 2, "float64")
            assert (down.M, down.N, down.K, down.R, down.groups, down.choices) == (46, 12, 8, 3, 5, 2)

    def test_an_activation_of_ones_own_runs_backward_where_it_ran_forward(self, chosen):
        o, settings = block(activation=lambda u: u[:, :8] * u[:, 8:])
        differentiated(lambda o, s: fused(o, s, "auto"), o, settings)
        assert [[(p.gradients, p.epilogue) for p in problems] for problems in chosen] == [[((), ""), ((), "")]]

    def test_auto_of_a_grouped_layer(self, chosen):
        x, w, a, b = torch.ones(9, 4).requires_grad_(), torch.ones(3, 8, 4), torch.ones(3, 2, 4), torch.ones(3, 8, 2)
        lora_grouped_linear(x, torch.tensor([2, 2, 9]), w, a, b, backend="auto").sum().backward()
        forward = Problem(9, 8, 4, 2, "float32", "float32", groups=3, is_ragged=True)
        assert chosen == [forward, replace(forward, gradients=BACKWARD)]

    def test_nothing_is_planned_where_only_eager_can_run(self, monkeypatch):
        monkeypatch.setattr(choose, "plan_for", lambda *plans: pytest.fail("there is no choice on a CPU"))
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
        assert any(line.strip().startswith("frozen") for line in lines)

    @pytest.mark.parametrize("gpu", DEVICES)
    def test_it_prints_the_planners_choice(self, gpu, capsys):
        assert cli.main(["plan", "--gpu", gpu, "--moe", "qwen3-30b-a3b", "--backward"]) == 0
        out = capsys.readouterr().out
        for direction in ("forward", "backward"):
            plan = select(experts(backward=direction == "backward"), find(gpu), EVERY)
            assert f"{direction}: {plan.backend} {plan.kernel}\n" in out
            assert re.search(rf"-> {plan.backend} {plan.kernel} +\d", out)
            for reason in plan.reasons:
                assert f"why: {reason}" in out
            for variant in plan.candidates:
                assert re.search(rf"{variant.backend} {variant.kernel} +{variant.seconds * 1e6:.1f} us \(model\)", out)
        assert re.search(r"this plan +-?\d+\.\d% +\(model\)", out)

    def test_json_holds_the_same(self, capsys):
        assert cli.main([*self.ASK, "--backward", "--json"]) == 0
        actual = json.loads(capsys.readouterr().out)
        assert list(actual["directions"]) == ["forward", "backward"]
        base = mine = 0
        for name, direction in actual["directions"].items():
            assert [bool(problem["gradients"]) for problem in direction["problems"]] == [name == "backward"] * 2
            assert direction["reasons"]
            for variant in [*direction["candidates"].values(), direction["frozen"]]:
                assert variant["model_us"] == pytest.approx(sum(part["model_us"] for part in variant["parts"]))
            base += direction["frozen"]["model_us"]
            mine += direction["candidates"][f"{direction['backend']} {direction['kernel']}"]["model_us"]
        assert actual["lora_tax_model"] == pytest.approx(mine / base - 1)

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
