"""The CUDA kernels in the planner (T1): what is legal, what they cost, and that nobody takes them on trust."""

import itertools
import re
from dataclasses import replace

import pytest
from plan_problems import BACKWARD, HEADLINE, problems

from lorafuse.plan import DEVICES, clear_cache, configs_cuda, cost, find, override, select, tuned

pytestmark = pytest.mark.no_poison

EVERY = (("eager", ""), ("triton", ""), ("cuda", ""))
HOPPER = ("H100", "H200")
DX = replace(HEADLINE, gradients=BACKWARD)


def candidates(problem, device):
    return {
        candidate.kernel: candidate
        for candidate in select(problem, device, EVERY).candidates
        if candidate.backend == "cuda"
    }


class TestLegal:
    def test_every_problem_runs_or_has_a_reason(self):
        for problem, device in itertools.product(problems(), DEVICES.values()):
            reason = configs_cuda.refusal(problem, device)
            plan = select(problem, device, EVERY)
            # of older GPUs than any kernel runs on there is one reason for all
            early = f"its kernels need sm_80, {device.name} is sm_{device.arch}" if device.arch < 80 else reason
            assert bool(reason) == (f"cuda: {early}" in plan.reasons)
            assert bool(reason) != bool(candidates(problem, device))
            for candidate in candidates(problem, device).values():
                for config in candidate.configs[0]:
                    assert config.form == "mma" or configs_cuda.illegal(config, problem, device) == ""

    @pytest.mark.parametrize(
        ("problem", "device", "why"),
        [
            (HEADLINE, "A100", "for sm_90, A100 is sm_80"),
            # sm_90a is its own instruction set: no later GPU runs it
            (HEADLINE, "B200", "for sm_90, B200 is sm_100"),
            (replace(HEADLINE, dtype="float32"), "H200", "bfloat16 and float16, not float32"),
            (replace(HEADLINE, aligned=False), "H200", "16-byte boundaries"),
            (replace(HEADLINE, dtype="float16", wide=True), "H200", "round xa and dyb to float16"),
            (replace(HEADLINE, K=4100), "H200", "K 4100 to be multiples of 8"),
            (replace(HEADLINE, N=4097), "H200", "N 4097 and K"),
            (replace(HEADLINE, M=2**31), "H200", "M 2147483648 is not below 2\\^31"),
        ],
    )
    def test_what_is_refused_says_why(self, problem, device, why):
        assert configs_cuda.refusal(HEADLINE, find("H200")) == ""
        assert re.search(why, configs_cuda.refusal(problem, find(device)))
        assert configs_cuda.matmuls(problem, find(device)) == ()

    @pytest.mark.parametrize(
        ("change", "problem", "why"),
        [
            ({"block_n": 192}, HEADLINE, "128 x 128 or 128 x 256"),
            ({"block_m": 64}, HEADLINE, "128 x 128 or 128 x 256"),
            ({"cluster": 4}, HEADLINE, "cluster of 4 blocks"),
            ({"stages": 4}, HEADLINE, "4 stages need .* of 232448"),
            ({"stages": 1}, HEADLINE, "2 or more"),
            ({"xa_in_tiles": True, "cluster": 1}, replace(HEADLINE, R=33), "up to 32 ranks"),
            ({"xa_in_tiles": True, "cluster": 1}, replace(HEADLINE, dropout=True), "without a mask"),
            ({"xa_in_tiles": True, "cluster": 1}, DX, "tiles of y compute xa"),
            ({"xa_in_tiles": True}, HEADLINE, "in clusters of 1"),
            ({"splits": 4}, HEADLINE, "2 or 4 blocks divide K, in tiles of 128 x 128 and for 32 ranks"),
            (
                {"splits": 4, "block_n": 128, "stages": 4, "cluster": 1},
                replace(HEADLINE, K=192),
                "a part of K 192 each",
            ),
            ({"fused_backward": True}, replace(DX, R=65), "up to 64 ranks, in clusters of 1"),
            ({"fused_backward": True}, DX, "in clusters of 1"),
            ({"fused_backward": True}, HEADLINE, "one launch computes dx"),
            ({"fused_backward": True, "cluster": 1}, replace(DX, dropout=True), "no mask"),
            ({"sum_blocks": 4, "cluster": 1}, HEADLINE, "concurrent with dx are of up to 64 ranks, in clusters of 1"),
            ({"sum_blocks": 4, "cluster": 2}, DX, "clusters of 1"),
            ({"sum_blocks": 4, "cluster": 1}, replace(DX, R=65), "up to 64 ranks"),
            ({"sum_blocks": 4, "cluster": 1}, replace(DX, dropout=True), "draw no mask"),
        ],
    )
    def test_what_is_illegal_says_why(self, change, problem, why):
        config = configs_cuda.matmuls(HEADLINE, find("H200"))[0]
        assert re.search(why, configs_cuda.illegal(replace(config, **change), problem, find("H200")))


class TestCost:
    def test_a_main_loop_like_cublas(self):
        """A read of x for xa, at 0.7 of a copy's rate; cuBLAS's time for R more columns of x; a gap of 2 us."""
        actual = candidates(HEADLINE, find("H200"))["two_kernel"]
        assert actual.seconds * 1e6 == pytest.approx(15.6 / 0.7 + 2 + 347.9 * (1 + 16 / 4096), rel=0.005)

    def test_a_backward_pass_reads_dy_once_beside_the_product(self):
        actual = candidates(replace(HEADLINE, gradients=BACKWARD), find("H200"))["one_pass_backward"]
        names = [part.name for part in actual.parts]
        assert names == ["dyb, db from one read of dy, a rounded", "dx = dy w + dyb a", "da = dybᵀ x", "launch gaps"]
        assert [c.kernel for c in actual.configs[0]] == ["project_outer", "matmul", "outer"]

    def test_da_and_db_beside_dx(self, monkeypatch):
        """Four blocks take 128 stages of 32 column blocks through shared memory, longer than eight waves of tiles; one
        read of dy."""
        backward, device = replace(HEADLINE, gradients=BACKWARD), find("H200")

        def actual(**change):
            return candidates(replace(backward, **change), device)["concurrent_backward"]

        monkeypatch.setattr(configs_cuda, "CONCURRENT", configs_cuda.CONCURRENT[:1])
        clear_cache()
        assert [c.kernel for c in actual().configs[0]] == ["project", "matmul"]
        assert actual().configs[0][1].sum_blocks == 4
        assert actual().seconds * 1e6 == pytest.approx(15.6 / 0.7 + 4 + 8 * 128 * 2 * 40960 / 217.6e3, rel=0.01)
        # a short product is better off with fewer tiles at a time
        assert actual(N=1024).configs[0][1].sum_blocks > 4
        monkeypatch.undo()
        clear_cache()
        # where four blocks are too few for both, da alone
        assert [c.kernel for c in actual().configs[0]] == ["project_outer", "matmul"]
        assert [c.kernel for c in actual(K=14336).configs[0]] == ["project", "matmul"]
        assert [c.kernel for c in actual(gradients=(*BACKWARD, "dbias")).configs[0]] == ["project_outer", "matmul"]
        for change in ({"R": 65}, {"dropout": True}, {"gradients": ("dx",)}, {"gradients": ("dx", "db", "dbias")}):
            assert set(candidates(replace(backward, **change), device)) == {"one_pass_backward"}

    def test_a_backward_in_one_launch(self):
        """What 32 SMs have no time for in the last of eight waves, on all: 1.3 of 2.7 ms of an SM."""
        backward, device = replace(HEADLINE, gradients=BACKWARD), find("H200")
        actual = candidates(backward, device)["fused_backward"]
        (config,) = actual.configs[0]
        assert (config.fused_backward, config.cluster, config.group_m, config.splits) == (True, 1, 8, 4)
        assert [part.launches for part in actual.parts] == [1]
        streamed = 8192 * 3 * 4096 * 2 / 75e9
        tiles = cost.tile_seconds(config, backward, device)
        expected = tiles + (streamed - 32 * tiles / 8) * 1.15 / 132 + 1.5e-6
        assert actual.seconds == pytest.approx(expected, rel=0.001)
        others = candidates(backward, device)
        assert all(actual.seconds < others[name].seconds for name in ("one_pass_backward", "concurrent_backward"))
        # partial sums of 64 MiB at most
        large = replace(backward, M=131072, N=28672, K=8192, R=64)
        (config,) = candidates(large, device)["fused_backward"].configs[0]
        assert config.splits == 7
        for change in ({"gradients": ("dx",)}, {"gradients": (*BACKWARD, "dbias")}, {"dropout": True}, {"R": 65}):
            assert "fused_backward" not in candidates(replace(backward, **change), device)

    def test_xa_in_tiles_where_y_has_few_columns(self):
        """Of four columns of tiles: a tenth of one tile and a flag, less than a pass over x and its launch."""
        k, device = replace(HEADLINE, N=1024), find("H200")
        actual = candidates(k, device)
        (config,) = actual["xa_in_tiles"].configs[0]
        assert config.xa_in_tiles
        assert config.cluster == 1
        assert actual["two_kernel"].seconds - actual["xa_in_tiles"].seconds > 12e-6
        bare = replace(config, xa_in_tiles=False)
        added = cost.kernel_seconds(config, k, device) - cost.kernel_seconds(bare, k, device)
        # a tile of 128 x 256 is an eighth of the headline's product
        assert added == pytest.approx(0.1 * 348e-6 / 8 + 1.5e-6, rel=0.05)
        for change in ({"N": 1032}, {"R": 33}, {"dropout": True}):
            assert "xa_in_tiles" not in candidates(replace(k, **change), device)

    def test_k_is_divided_where_tiles_are_few(self):
        """k at 512 rows, 32 tiles: a quarter of K each and a tenth of 256 columns more, instead of 16 or 32 SMs."""
        k, device = replace(HEADLINE, M=512, N=1024), find("H200")
        actual = candidates(k, device)
        (config,) = actual["split_k"].configs[0]
        assert (config.block_n, config.stages, config.cluster, config.splits) == (128, 4, 1, 4)
        assert [part.launches for part in actual["split_k"].parts] == [1]
        assert actual["split_k"].seconds < 0.4 * actual["two_kernel"].seconds
        (config,) = candidates(replace(k, M=1024), device)["split_k"].configs[0]
        assert config.splits == 2
        (config,) = candidates(replace(k, K=128), device)["split_k"].configs[0]
        assert config.splits == 2
        for change in ({"M": 2048}, {"R": 33}, {"dropout": True}, {"K": 64}):
            assert "split_k" not in candidates(replace(k, **change), device)

    def test_siblings_together(self):
        """q, k and v: a pass over x, a rounding of all b, y; all dyb, a rounding of all a, dx, a pass over x."""
        qkv, device = replace(HEADLINE, N=6144, siblings=3), find("H200")
        forward, backward = candidates(qkv, device), candidates(replace(qkv, gradients=BACKWARD), device)
        assert [part.launches for part in forward["siblings"].parts] == [1, 1, 1, 0]
        assert [part.launches for part in backward["siblings"].parts] == [2, 1, 1, 2, 0]
        layers = [replace(HEADLINE, N=n) for n in (4096, 1024, 1024)]
        alone = sum(candidates(layer, device)["two_kernel"].seconds for layer in layers)
        assert forward["siblings"].seconds < 0.95 * alone
        for gradients in ((), BACKWARD):
            assert "siblings" in candidates(replace(qkv, gradients=gradients, dropout=True), device)
        for change in ({"siblings": 1}, {"siblings": 5}, {"format": "nf4"}, {"gradients": ("da", "db")}):
            assert "siblings" not in candidates(replace(qkv, **change), device)
        for problem in (qkv, replace(qkv, gradients=BACKWARD)):
            plan = select(problem, device, EVERY)
            assert plan.kernel != "siblings"
            assert any("cuda siblings is chosen only where measured" in reason for reason in plan.reasons)

    def test_gate_and_up_with_their_activation(self):
        """The launches of siblings in forward; down's backward goes on to gate and up where dx and da are needed."""
        device, up = find("H200"), replace(HEADLINE, N=28672, siblings=2, epilogue="gated")
        down = replace(HEADLINE, K=14336, gradients=BACKWARD, epilogue="gated")
        assert [part.launches for part in candidates(up, device)["siblings"].parts] == [1, 1, 1, 0]
        assert [part.launches for part in candidates(down, device)["siblings"].parts] == [2, 1, 1, 2, 0]
        assert "siblings" in candidates(replace(down, dropout=True), device)
        for change in ({"format": "nf4"}, {"gradients": ("dx", "db")}, {"gradients": ("da", "db")}):
            assert "siblings" not in candidates(replace(down, **change), device)
        assert select(up, device, EVERY).kernel not in ("siblings", "siblings_ha")
        assert select(down, device, EVERY).kernel != "siblings"

    def test_xa_of_down_with_h(self):
        """In forward of gate and up alone; by its name backward runs as siblings do."""
        device, up = find("H200"), replace(HEADLINE, N=28672, siblings=2, epilogue="gated")
        down = replace(HEADLINE, K=14336, gradients=BACKWARD, epilogue="gated")
        both = candidates(up, device)
        assert [part.launches for part in both["siblings_ha"].parts] == [1, 1, 1, 1, 0]
        for problem in (replace(up, epilogue=""), replace(up, gradients=BACKWARD), down):
            assert "siblings_ha" not in candidates(problem, device)
        with override(force_kernel="cuda siblings_ha"):
            names = [select(problem, device, EVERY).kernel for problem in (up, replace(up, epilogue=""), down)]
        assert names == ["siblings_ha", "siblings", "siblings"]

    @pytest.mark.parametrize(("R", "M", "less"), [(16, 8192, 0.5), (16, 2048, 0.8), (32, 2048, 0.9), (64, 8192, None)])
    def test_what_xa_of_down_costs(self, R, M, less):
        """Of Llama-3.1-8B, over a pass over h: partial sums of 64 ranks are as large as h."""
        device, up = find("H200"), replace(HEADLINE, M=M, N=28672, R=2 * R, siblings=2, epilogue="gated")
        *_, ha, _ = candidates(up, device)["siblings_ha"].parts
        h = candidates(replace(HEADLINE, M=M, K=14336, R=R), device)["two_kernel"].parts[0]
        assert ha.name == "ha of down"
        assert (ha.seconds < less * h.seconds) if less else (ha.seconds > h.seconds)

    def test_clusters_where_l2_would_be_the_limit(self):
        """Blocks that share w; not where the second would have no rows."""
        config = {M: candidates(replace(HEADLINE, M=M), find("H200"))["two_kernel"].configs[0][1] for M in (100, 8192)}
        assert (config[8192].block_n, config[8192].cluster) == (256, 2)
        assert config[100].cluster == 1

    @pytest.mark.parametrize("gradients", [(), BACKWARD])
    def test_an_adapter_never_costs_less_than_no_adapter(self, gradients):
        for problem, name in itertools.product(problems(), HOPPER):
            problem, device = replace(problem, gradients=gradients), find(name)
            base = cost.frozen((problem,), device).seconds
            for candidate in candidates(problem, device).values():
                assert candidate.seconds >= base * 0.999, (problem, name, candidate.kernel)


class TestSelect:
    def test_the_least_modelled_time_wins_but_not_in_one_launch(self):
        one_launch = "xa_in_tiles", "split_k", "fused_forward", "concurrent_backward", "fused_backward"
        for problem, device in itertools.product(problems(), DEVICES.values()):
            plan = select(problem, device, EVERY)
            plain = [candidate for candidate in plan.candidates if candidate.kernel not in one_launch]
            assert plan.kernel not in one_launch
            best = min(plain, key=lambda candidate: max(candidate.seconds, candidate.launch_seconds))
            assert (plan.backend, plan.kernel) == (best.backend, best.kernel)
        assert select(HEADLINE, find("H200"), EVERY).backend == "cuda"
        assert select(replace(HEADLINE, gradients=BACKWARD), find("H200"), EVERY).backend == "cuda"

    def test_by_name_they_run_without_xa_and_y_in_one_launch(self):
        for problem, device in itertools.product(problems(), map(find, HOPPER)):
            if not configs_cuda.refusal(problem, device):
                plan = select(problem, device, (("cuda", ""),))
                expected = "one_pass_backward" if problem.gradients else "two_kernel"
                assert (plan.backend, plan.kernel) == ("cuda", expected)

    def test_a_constraint_names_them(self):
        device = find("H200")
        with override(force_kernel="cuda fused_forward"):
            plan = select(HEADLINE, device, EVERY)
            assert (plan.backend, plan.kernel) == ("cuda", "fused_forward")
            assert plan.config("matmul").fused_forward
            assert select(HEADLINE, device, (("cuda", ""),)).kernel == "fused_forward"

    def test_a_measurement_chooses_them(self):
        entry = tuned.Tuned(
            4096,
            4096,
            (1, 16),
            (1024, 16384),
            "bfloat16",
            False,
            (),
            "cuda fused_forward",
            0.00035,
            "abc",
            "2026-11-25",
        )
        with override(measured=[entry]):
            plan = select(HEADLINE, find("H200"), EVERY)
            assert (plan.backend, plan.kernel) == ("cuda", "fused_forward")
            assert "cuda fused_forward was fastest within noise when measured on H200" in plan.reasons[-1]
            # it counts for nothing where they cannot run
            without = select(HEADLINE, find("H200"), (*EVERY[:2], ("cuda", "not built")))
            assert without.backend == "triton"
