"""The studies' verdicts (T1): Student's t, power, what is held, not held and not decidable, planted findings."""

import importlib
import json
import math

import pytest
import torch
from planted_studies import plant, planted, planted_lab

from lorafuse.study import STUDIES, student, verdict
from lorafuse.study.equivalence import sft
from lorafuse.study.rate import slope, vertex
from lorafuse.study.runner import Lab
from lorafuse.study.verdict import EDGE, FAILED, HELD, UNDECIDED

# quantiles of Student's t as printed tables have them
TABLE = [(0.95, 1, 6.3138), (0.95, 3, 2.3534), (0.95, 4, 2.1318), (0.975, 10, 2.2281), (0.995, 1, 63.657),
         (0.95, 7, 1.8946), (0.99, 15, 2.6025), (0.975, 120, 1.9799)]  # fmt: skip


@pytest.mark.parametrize(("p", "freedom", "expected"), TABLE)
def test_quantiles_are_those_of_the_tables(p, freedom, expected):
    assert student.quantile(p, freedom) == pytest.approx(expected, abs=6e-5 * max(1, expected / 10))
    assert student.cdf(-student.quantile(p, freedom), freedom) == pytest.approx(1 - p, abs=1e-12)


def draws(mean, spread, count, times=20000, seed=0):
    return mean + spread * torch.randn(times, count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def share_held(values, low, high):
    """Of rows of values, how many have their interval between the bounds: plain torch, beside `verdict.claim`."""
    half = student.quantile(0.95, values.shape[1] - 1) * values.std(1) / values.shape[1] ** 0.5
    return ((values.mean(1) - half > low) & (values.mean(1) + half < high)).double().mean().item()


@pytest.mark.parametrize("count", [2, 4, 8, 16])
@pytest.mark.parametrize(("low", "high", "expected"), [(-1, 1, 0), (-1, 1, 0.5), (0, math.inf, 0.7), (-1, 1, 1)])
def test_the_power_is_how_often_simulated_seeds_hold(count, low, high, expected):
    simulated = share_held(draws(expected, 0.8, count), low, high)
    assert student.power(0.8, count, low, high, expected, 0.05) == pytest.approx(simulated, abs=0.012)


def test_a_truth_at_the_margin_holds_at_most_once_in_twenty():
    for count in (2, 4, 8):
        for spread in (0.1, 0.5, 3.0):
            assert student.power(spread, count, -1, 1, 1, 0.05) < 0.0501
    # and that is reached where the other margin is far
    assert student.power(0.1, 8, -1, 1, 1, 0.05) == pytest.approx(0.05, abs=1e-4)


def test_needed_is_the_first_count_with_that_power():
    count = student.needed(0.036, -0.05, 0.05, 0, 0.05)
    assert student.power(0.036, count, -0.05, 0.05, 0, 0.05) >= 0.8
    assert student.power(0.036, count - 1, -0.05, 0.05, 0, 0.05) < 0.8
    assert student.needed(100.0, -0.05, 0.05, 0, 0.05) is None
    assert student.needed(0.0, -1, 1, 0, 0.05) == 2
    assert student.needed(0.0, -1, 1, 5, 0.05) is None


def outcome(values, low, high, **more):
    return verdict.claim("x", values, low, high, expected=0.0, margin="m", source="s", **more)


def test_verdicts_of_planted_values():
    assert outcome([-0.01, 0.0, 0.01, 0.02], -0.05, 0.05).outcome == HELD
    assert outcome([0.2, 0.21, 0.19, 0.2], -0.05, 0.05).outcome == FAILED
    # every seed inside, yet the interval is not
    assert outcome([-0.04, 0.045, -0.03, 0.04], -0.05, 0.05).outcome == UNDECIDED
    # pairs that all grow a little, which unpaired spreads would not show
    assert outcome([0.0095, 0.0145, 0.027], 0.0, math.inf).outcome == HELD
    assert outcome([-0.0095, -0.0145, -0.027], 0.0, math.inf).outcome == FAILED
    # the policy gradients of an earlier run, every one of its five seeds but one inside
    assert outcome([-0.017, 0.034, 0.039, 0.078, 0.005], -0.05, 0.05).outcome == UNDECIDED


def test_a_failure_is_corrected_for_the_number_of_claims_and_a_success_is_not():
    values = [0.06, 0.09, 0.12, 0.15]
    assert outcome(values, -0.05, 0.06).outcome == UNDECIDED
    assert outcome(values, -0.05, 0.069).outcome == FAILED or outcome(values, -0.05, 0.05).outcome == FAILED
    assert outcome(values, -0.05, 0.05, claims=100).outcome == UNDECIDED
    assert outcome([0.0, 0.01], -0.05, 0.06, claims=100).outcome == HELD


@pytest.mark.parametrize("values", [[0.0], [math.nan, 0.0, 0.0], [math.inf, 0.0]])
def test_what_has_no_interval_is_not_decidable(values):
    actual = outcome(values, -1, 1)
    assert (actual.outcome, actual.power, actual.needed) == (UNDECIDED, 0.0, None)


def test_a_bar_is_not_decidable_whatever_was_found():
    for values in ([0.0, 0.01], [5.0, 5.1]):
        actual = outcome(values, -1, 1, bar=EDGE)
        assert actual.outcome == UNDECIDED
        assert EDGE in actual.shown


def test_a_claim_states_its_power_and_what_would_do():
    weak = outcome([-0.04, 0.045, -0.03, 0.04], -0.05, 0.05)
    assert weak.power < 0.8 < student.power(0.0435, weak.needed, -0.05, 0.05, 0, 0.05) + 0.01
    assert f"80% with {weak.needed} seeds" in weak.shown
    assert "power 100% if it is 0" in outcome([-0.001, 0.0, 0.001], -0.05, 0.05).shown


def test_a_study_holds_only_when_all_of_it_does():
    held, failed = outcome([0.0, 0.01], -1, 1), outcome([2.0, 2.01], -1, 1)
    open_ = outcome([-2.0, 2.0], -1, 1)
    assert [one.outcome for one in (held, failed, open_)] == [HELD, FAILED, UNDECIDED]
    assert verdict.overall([held, held]) == HELD
    assert verdict.overall([held, open_]) == UNDECIDED
    assert verdict.overall([held, open_, failed]) == FAILED
    assert verdict.overall([]) == UNDECIDED


def test_the_vertex_of_a_parabola_is_found_within_its_points():
    rates = [1.0, 2.0, 4.0]
    assert vertex(rates, [(math.log2(rate) - 1.3) ** 2 for rate in rates]) == pytest.approx(2**1.3)
    assert vertex(rates, [0.0, 1.0, 2.5]) == 1.0
    # no valley: the better end
    assert vertex(rates, [0.0, 3.0, 1.0]) == 1.0
    assert vertex(rates, [1.0, 3.0, 0.0]) == 4.0


def test_the_slope_is_that_of_a_line():
    assert slope([1.0, 2.0, 4.0], [5.0, 7.0, 11.0]) == pytest.approx(2)


@pytest.fixture
def run_study(monkeypatch, tmp_path):
    return planted_lab(monkeypatch, tmp_path)


def lora(amount):
    """A floor of LoRA's losses above full fine-tuning's."""
    return lambda spec: 0.1 + (spec.rank > 0) * amount


@pytest.mark.parametrize(
    ("name", "floor", "expected"),
    [
        ("equivalence", lora(0.01), HELD),
        ("equivalence", lora(0.2), FAILED),
        # LoRA that is better by more than the margin is not equal either
        ("equivalence", lambda spec: 0.1 + (spec.rank == 0) * 0.2, FAILED),
        ("equivalence", lambda spec: 0.1 + (spec.rank > 0) * (spec.seed % 2 - 0.5) * 0.4, UNDECIDED),
        ("rl", lora(0.01), HELD),
        ("rl", lora(0.2), FAILED),
        # nothing was learned
        ("rl", lambda spec: 0.95, UNDECIDED),
        ("batch", lambda spec: 0.1 + (spec.rank > 0) * spec.batch / 2000, HELD),
        ("batch", lambda spec: 0.3 - (spec.rank > 0) * spec.batch / 2000, FAILED),
        ("batch", lambda spec: 0.1, UNDECIDED),
        # not equal at the smallest batch: the growth says nothing
        ("batch", lambda spec: 0.1 + (spec.rank > 0) * (0.2 + spec.batch / 2000), UNDECIDED),
        ("layers", lambda spec: 0.1 + 0.3 * (spec.layers == "attention"), HELD),
        ("layers", lambda spec: 0.5 - 0.3 * (spec.layers == "attention"), FAILED),
        ("capacity", lambda spec: max(0.0, 2.77 - 0.97e3 * (spec.rank or 100) / spec.count / 8), HELD),
        ("capacity", lambda spec: 0.1 + 0.01 * (spec.rank or 100), FAILED),
        ("rank", lora(0.01), HELD),
    ],
)
def test_a_planted_finding_is_found(run_study, name, floor, expected):
    finding = run_study(name, lambda spec, base, device: planted(spec, floor=floor))
    assert finding["outcome"] == expected, json.dumps(finding["claims"], indent=1)


@pytest.mark.parametrize(
    ("times", "ratio", "slopes"),
    [
        (lambda width: 10, HELD, HELD),
        # the source's own argument, which what it measured did not follow
        (lambda width: width / 64, HELD, FAILED),
        (lambda width: 2, FAILED, HELD),
    ],
)
def test_the_ratio_of_rates_and_its_slope_are_measured(run_study, times, ratio, slopes):
    def best(spec):
        width = 576 if spec.task == "problems" else spec.size.width
        return (3e-4 if spec.rank == 0 else 3e-4 * times(width)) * 2 ** (0.1 * (spec.seed % 3))

    finding = run_study("rate", lambda spec, base, device: planted(spec, best=best))
    assert [claim["outcome"] for claim in finding["claims"]] == [ratio, slopes]
    assert finding["claims"][0]["value"] == pytest.approx(math.log(times(576)), abs=0.05)


def test_a_rank_that_starts_elsewhere_and_wants_another_rate_is_seen(run_study):
    def run(spec, base, device):
        actual = planted(spec, best=lambda spec: 2e-3 * (8 if spec.rank > 16 else 1))
        return actual | {"early": [value + (spec.rank > 16) for value in actual["early"]]}

    finding = run_study("rank", run)
    assert [claim["outcome"] for claim in finding["claims"]] == [FAILED, FAILED]


@pytest.mark.parametrize("name", STUDIES)
def test_a_best_rate_that_never_comes_is_not_decidable(run_study, name):
    """At an end of the grid nothing is decided, but for the start of the curve, at whatever rate."""
    finding = run_study(name, lambda spec, base, device: planted(spec, best=lambda spec: 1e6))
    barred = [claim for claim in finding["claims"] if "the first" not in claim["claim"]]
    assert barred
    assert all((claim["outcome"], claim["bar"]) == (UNDECIDED, EDGE) or "not equal" in claim["bar"] for claim in barred)


@pytest.mark.parametrize(
    ("name", "claims"),
    [("equivalence", 2), ("capacity", 4), ("batch", 3), ("layers", 4), ("rl", 3), ("rate", 2), ("rank", 4)],
)
def test_the_full_size_makes_its_claims_with_the_seeds_that_were_fixed(monkeypatch, name, claims):
    plant(monkeypatch, lambda spec, base, device: planted(spec))
    module = importlib.import_module(f"lorafuse.study.{name}")
    finding = module.conduct(Lab(list(range(module.SEEDS[1]))), False)
    assert [len(claim.values) for claim in finding.claims] == [16 if name == "rl" else 8] * claims


def test_smollm2_trains_what_the_page_says():
    tokens = {}
    for size, (device, quick) in {"quick": ("cpu", True), "cpu": ("cpu", False), "gpu": ("cuda", False)}.items():
        spec = sft(Lab([0, 1], device), 16, quick)
        # one epoch: no row is seen twice
        assert spec.count == spec.steps * spec.batch
        tokens[size] = (spec.steps, spec.batch * spec.length)
    assert tokens == {"quick": (5, 128), "cpu": (128, 256), "gpu": (200, 4096)}
