"""The measured tables that ship (T1): made from bench/results/, and followed by plans before the model."""

import copy
import json
import sys
from dataclasses import replace
from itertools import chain
from pathlib import Path

import pytest
import torch

from lorafuse import functional as LF
from lorafuse.backends import problems
from lorafuse.bench import plugins
from lorafuse.bench.problem import Variant
from lorafuse.ops import layers
from lorafuse.plan import DEVICES, Problem, find, override, select, tuned
from lorafuse.tune.measure import PASSES

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "bench"))

import measured  # noqa: E402

AVAILABLE = (("eager", ""), ("triton", ""), ("cuda", ""))
Q = Problem(512, 4096, 4096, 16, "bfloat16", "float32", gradients=("dx", "da", "db"))


@pytest.fixture(scope="module")
def rows():
    """A result file of three row counts of one layer."""
    return json.loads((ROOT / "bench" / "results" / "h200-2026-11-26-rows.json").read_text())


def kernel(problem, available=AVAILABLE):
    plan = select(problem, find("H200"), available)
    return plan.chosen.name, plan.reasons[-1]


def test_what_ships_is_valid_and_not_empty():
    assert [path.stem for path in sorted((ROOT / measured.FOLDER).iterdir())] == ["h200"]
    for spec in DEVICES.values():
        entries = tuned.read(tuned.FOLDER / tuned.file_name(spec.model))
        assert bool(entries) == (spec.model == "H200")


@pytest.mark.parametrize(
    ("M", "winner"),
    [(512, "one_pass_backward"), (2048, "one_pass_backward"), (8192, "cuda one_pass_backward")],
)
def test_plans_take_what_was_measured_fastest(rows, M, winner):
    """At 512 rows Triton's backward took 51 us where that of the CUDA kernels took 59."""
    chosen, why = kernel(replace(Q, M=M))
    assert chosen == winner
    assert "when measured on H200" in why
    assert "commit 42a016e4784e, shipped" in why


@pytest.mark.parametrize("change", [{"M": 256}, {"M": 32768}, {"R": 8}, {"N": 4104}, {"dropout": True}])
def test_what_was_not_measured_follows_the_model(change):
    assert "when measured" not in kernel(replace(Q, **change))[1]


def test_a_winner_that_cannot_run_here_is_passed_over():
    assert kernel(replace(Q, M=8192), (("eager", ""), ("triton", ""), ("cuda", "not built")))[0] == "one_pass_backward"


def test_overlapping_spreads_leave_the_models_choice(rows):
    content = copy.deepcopy(rows)
    (result,) = [r for r in content["results"] if r["M"] == 512]
    content["results"] = [result]
    assert [e.kernel for e in measured.tables([content])["H200"]] == ["cuda two_kernel", "one_pass_backward"]
    result["variants"]["lorafuse-triton"]["backward"]["p80"] = result["variants"]["lorafuse"]["backward"]["p20"]
    assert [e.kernel for e in measured.tables([content])["H200"]] == ["cuda two_kernel"] + ["cuda one_pass_backward"]


def test_a_later_file_replaces_the_point_of_an_earlier_one(rows):
    later = copy.deepcopy(rows)
    later["conditions"]["commit"] = "later"
    for result in later["results"]:
        variants = result["variants"]
        variants["lorafuse-cuda"] = copy.deepcopy(variants["lorafuse-eager"])
        variants["lorafuse-eager"]["forward"] = {"median": 1e-6, "p20": 1e-6, "p80": 1e-6}
    (forward, *_) = measured.tables([rows, later])["H200"]
    assert (forward.kernel, forward.commit) == ("aten_beta1", "later")
    assert forward.M == (512, 16384)
    (forward, *_) = measured.tables([later, rows])["H200"]
    assert forward.commit == "42a016e4784e"


def test_what_names_no_known_gpu_or_kernel_gives_nothing(rows):
    other = copy.deepcopy(rows)
    other["conditions"]["device"] = "NVIDIA GeForce 9000"
    assert measured.tables([other, rows | {"kind": "memory"}]) == {}
    alone = copy.deepcopy(rows)
    for result in alone["results"]:
        result["variants"] = {"lorafuse-triton": result["variants"]["lorafuse-triton"]}
    assert measured.tables([alone]) == {"H200": ()}


def spread(microseconds):
    return {"median": microseconds * 1e-6, "p20": microseconds * 0.99e-6, "p80": microseconds * 1.01e-6}


def content(rows, kind, variants, **sizes):
    """A result file of one result whose variants take so many microseconds forward and backward."""
    times = {name: {"forward": spread(f), "backward": spread(b)} for name, (f, b) in variants.items()}
    return rows | {"kind": kind, "results": [{"R": 16, "M": 8192, "dtype": "bfloat16"} | sizes | {"variants": times}]}


def chosen(tables, *problems):
    with override(measured=tables["H200"]):
        return [kernel(problem)[0] for problem in problems]


def test_forms_that_wait_for_a_measurement_are_learned_by_pass(rows):
    """The fastest of those that are candidates: a form of another pass or size ran as the plan's own choice."""
    variants = {
        "lorafuse-cuda": (400, 440), "lorafuse-triton": (410, 450), "lorafuse-cuda-tiles": (10, 10),
        "lorafuse-cuda-forward": (360, 1), "lorafuse-cuda-backward": (1, 370), "lorafuse-cuda-concurrent": (2, 380),
    }  # fmt: skip
    written = content(rows, "linear", variants, N=4096, K=4096)
    tables = measured.tables([written | {"conditions": rows["conditions"] | {"commit": "of the day"}}])
    assert chosen(tables, replace(Q, M=8192, gradients=()), replace(Q, M=8192)) == [
        "cuda fused_forward", "cuda fused_backward",
    ]  # fmt: skip


def test_a_backend_that_cannot_run_a_dtype_is_passed_over(rows):
    variants = {"lorafuse-triton": (400, 440), "lorafuse-cuda": (10, 10), "lorafuse-eager": (500, 500)}
    sizes = {"N": 4096, "K": 4096, "dtype": "float32"}
    entries = measured.tables([content(rows, "linear", variants, **sizes)])["H200"]
    assert {entry.kernel for entry in entries} == {"two_kernel", "one_pass_backward"}


def test_groups_are_learned(rows):
    qkv = Problem(8192, 6144, 4096, 48, "bfloat16", "float32", siblings=3)
    alone, back = replace(qkv, siblings=1), replace(qkv, gradients=("dx", "da", "db"))
    assert chosen({"H200": ()}, qkv, back) == ["cuda two_kernel", "cuda one_pass_backward"]
    variants = {
        "lorafuse-group-cuda": (600, 700),
        "lorafuse-group-triton": (620, 760),
        "lorafuse-group-siblings": (640, 780),
    }
    variants["lorafuse-group-cuda-siblings"] = (560, 650)
    tables = measured.tables([content(rows, "group", variants, N=[4096, 1024, 1024], K=4096)])
    assert chosen(tables, qkv, back) == ["cuda siblings"] * 2
    assert chosen(tables, alone) == ["cuda two_kernel"]
    variants["lorafuse-group-siblings"] = (500, 780)
    tables = measured.tables([content(rows, "group", variants, N=[4096, 1024, 1024], K=4096)])
    assert chosen(tables, qkv, back) == ["siblings", "cuda siblings"]


def test_gated_mlps_are_learned(rows):
    """Gate and up in forward, and in backward down with the activation too; down alone keeps its own entry."""
    gradients = ("dx", "da", "db")
    both = Problem(8192, 28672, 4096, 32, "bfloat16", "float32", siblings=2, epilogue="gated")
    down = Problem(8192, 4096, 14336, 16, "bfloat16", "float32", gradients=gradients)
    problems = both, replace(both, gradients=gradients, epilogue=""), replace(down, epilogue="gated"), down
    shipped = tuned.read(tuned.FOLDER / "h200.json")
    before = chosen({"H200": shipped}, *problems)
    assert before == ["cuda two_kernel"] + ["cuda one_pass_backward"] * 3
    variants = {"lorafuse-group-cuda": (3000, 4000), "lorafuse-group-cuda-siblings": (2700, 3300)}
    tables = measured.tables([content(rows, "mlp", variants, H=4096, I=14336)])
    learned = {"H200": (*shipped, *tables["H200"])}
    assert chosen(learned, *problems) == ["cuda siblings"] * 3 + ["cuda one_pass_backward"]


def test_experts_are_learned(rows):
    """Of both projections together; another routing of the same sizes says nothing."""
    gradients = ("dx", "da", "db")
    up = Problem(65536, 1536, 2048, 16, "bfloat16", "float32", groups=128, is_ragged=True, choices=8)
    down = replace(up, N=2048, K=768)
    forward = replace(up, epilogue="gated"), down
    backward = replace(up, gradients=gradients), replace(down, gradients=gradients, epilogue="gated")
    assert chosen({"H200": ()}, forward, backward) == ["ragged"] * 2
    variants = {"lorafuse-triton": (1400, 1800), "lorafuse-cuda": (2500, 3000), "lorafuse-cuda-gathered": (1200, 1300)}
    sizes = {"E": 128, "k": 8, "H": 2048, "I": 768}
    tables = measured.tables([content(rows, "moe", variants, **sizes, routing="balanced")])
    assert chosen(tables, forward, backward) == ["cuda gathered"] * 2
    assert chosen({"H200": tables["H200"][:1]}, forward) == ["ragged"]
    assert measured.tables([content(rows, "moe", variants, **sizes, routing="zipf")]) == {"H200": ()}


def test_problems_are_those_of_calls(monkeypatch):
    seen = set()

    def note(module, name, many):
        made = getattr(module, name)

        def noted(*args, **more):
            result = made(*args, **more)
            seen.update(result if many else (result,))
            return result

        monkeypatch.setattr(module, name, noted)

    note(layers, "siblings_problem", False)
    note(problems, "experts_problems", True)
    sizes = {"M": 16, "R": 8, "dtype": "float32"}
    x = torch.randn(16, 32, requires_grad=True)

    def layer(N, K):
        a, b = torch.randn(8, K, requires_grad=True), torch.randn(N, 8, requires_grad=True)
        return LF.Projection(torch.randn(N, K), a, b, 2.0)

    up, down = torch.randn(4, 64, 32), torch.randn(4, 32, 32)
    shapes = {"gate_up_a": (4, 8, 32), "gate_up_b": (4, 64, 8), "down_a": (4, 8, 32), "down_b": (4, 32, 8)}
    factors = {name: torch.randn(shape, requires_grad=True) for name, shape in shapes.items()}
    LF.lora_gated_mlp(x, layer(64, 32), layer(64, 32), layer(32, 64), backend="triton").sum().backward()
    index = torch.tensor([[0, 1], [3, 2], [1, 0], [2, 3]])
    LF.lora_experts(x[:4], index, torch.rand(4, 2), up, down, **factors, backend="triton").sum().backward()
    sum(y.sum() for y in LF.lora_linears(x, [layer(32, 32), layer(16, 32)], backend="triton")).backward()
    cases = {
        "mlp": {"H": 32, "I": 64},
        "group": {"N": [32, 16], "K": 32},
        "moe": {"M": 4, "E": 4, "k": 2, "H": 32, "I": 32},
    }
    for kind, more in cases.items():
        for name in PASSES:
            assert seen >= set(chain(*measured._operators(sizes | more, kind, name))), (kind, name, seen)


@pytest.mark.parametrize(
    ("kind", "file"),
    [("linear", "lorafuse.py"), ("group", "lorafuse_group.py"), ("mlp", "lorafuse_group.py"), ("moe", "lorafuse.py")],
)
def test_variants_are_those_of_the_baselines(kind, file):
    built = {one.name: one.options for one in plugins.load_file(plugins.folder() / file, kind, torch.device("cuda"))}
    for name, (backend, kernel) in measured._VARIANTS[kind].items():
        # experts have no order of base and low-rank product
        forced = "" if (kind, name) == ("moe", "lorafuse-eager") else built[name].get("kernel", "")
        assert (built[name]["backend"], forced) == (backend, kernel), name
    # what is a candidate of the other kind alone
    others = {
        "linear": {"lorafuse-cuda-gathered"},
        "group": set(measured._VARIANTS["mlp"]),
        "moe": set(measured._VARIANTS["linear"]),
    }
    named = {name for name, options in built.items() if "backend" in options}
    assert named - set(measured._VARIANTS[kind]) <= others.get(kind, set())


@pytest.mark.parametrize(
    ("options", "choice"),
    [
        ({}, "one_pass_backward"),
        ({"backend": "cuda"}, "cuda one_pass_backward"),
        ({"kernel": "aten_beta1"}, "aten_beta1"),
    ],
)
def test_variants_that_are_named_follow_no_table(options, choice):
    """Their times are what tables are made from."""
    leaf, seen = torch.ones(1, requires_grad=True), []

    class Noting:
        def variant(self, name, baseline, given, **_):
            def call():
                seen.append(kernel(Q)[0])
                return (2 * leaf,)

            return Variant(name, call, ("y",), (torch.ones(1),), {"dx": leaf})

    plugins.Baseline("one", "one", "adapters", ROOT, plugins, options).variant(Noting(), None).results()
    assert kernel(Q)[0] == "one_pass_backward"
    assert seen == [choice]
