"""Markdown tables of the goals and of the grid to measure on an H200, with the results so far."""

from collections.abc import Iterator
from statistics import geometric_mean
from typing import Any

from result_tables import Content, Result, table

from lorafuse.bench.moe import ROUTINGS
from lorafuse.bench.result import with_adapters
from lorafuse.bench.transformer import MODELS
from lorafuse.testing.cases import CASES, MOE_CASES

__all__ = ["BLOCKS", "RANKS", "ROWS", "SETTINGS", "find", "goals", "grid", "results_of"]

_GPU = "H200"
_MODEL = "llama-3.1-8b"
_LAYERS = [case for name, case in CASES.items() if name.startswith(f"{_MODEL}.")]
ROWS, RANKS = (512, 2048, 8192, 16384, 32768), (4, 8, 16, 64, 256)
_SQUARE = CASES[f"{_MODEL}.q"]
_HEADLINE = {"kind": "linear", "M": 8192, "N": _SQUARE.N, "K": _SQUARE.K, "R": 16}
BLOCKS = [case for name, case in MOE_CASES.items() if name != "moe-64"]
# micro-batches of a step, and whether activations are checkpointed
SETTINGS = [(accumulate, on) for accumulate in (1, 4, 16) for on in (False, True)]
# a case above this share of the best peer's time is behind
_BEHIND = 1.02


def goals(contents: list[Content], absent: str) -> str:
    """The goals, with the measured figures or `absent`."""
    results = results_of(_GPU, contents)
    layers = [_tax(find(results, kind="linear", M=M, N=case.N, K=case.K, R=16)) for case in _LAYERS for M in ROWS]
    taxed = [1 + one for one in layers if one is not None]
    overall = f"{geometric_mean(taxed) - 1:.0%}, of {len(taxed)} of {len(layers)} cases" if taxed else absent
    experts = [_tax(one) for one in results if one["kind"] == "moe" and one["case"] == "qwen3-30b-a3b"]
    models = [one for one in results if one["kind"] == "model" and one["model"] == _MODEL]
    full = [own["ratio_to_full"] for one in models for own in _ours(one) if "ratio_to_full" in own]
    peft = [_over_peft(one, absent) for one in models]
    behind = _listed(list(_behind(results)), "none" if taxed else absent)
    rows = [
        ("LoRA tax, 8192 × 4096 × 4096, r 16", "≤ 4%", _percent(_tax(find(results, **_HEADLINE)), absent)),
        (f"its geometric mean over {_MODEL}'s layers, M 512 to 32768, r 16", "≤ 6%", overall),
        ("LoRA tax, experts of qwen3-30b-a3b", "≤ 8%", _listed([_percent(one, absent) for one in experts], absent)),
        (f"a step of {_MODEL} / full fine-tuning's", "≤ 0.70", _listed([f"{one:.2f}" for one in full], absent)),
        ("the same, times as fast as PEFT", "≥ 1.5", _listed(peft, absent)),
        ("the same, times as fast as Unsloth", "≥ 1.15", absent),
        ("layers and experts more than 2% behind the best peer", "none", behind),
    ]
    return table(["", "goal", "measured"], [list(row) for row in rows])


def grid(contents: list[Content], absent: str) -> str:
    """The grid: LoRA tax by rows, rank and routing, steps of models; `absent` where nothing is measured."""
    results = results_of(_GPU, contents)
    layers = [
        [
            case.name,
            *(_percent(_tax(find(results, kind="linear", M=M, N=case.N, K=case.K, R=16)), absent) for M in ROWS),
        ]
        for case in _LAYERS
    ]
    ranks = [_percent(_tax(find(results, **_HEADLINE | {"R": R})), absent) for R in RANKS]
    routed = [[find(results, kind="moe", case=case.name, routing=one) for one in ROUTINGS] for case in BLOCKS]
    experts = [
        [case.name, *(_percent(_tax(one), absent) for one in found)] for case, found in zip(BLOCKS, routed, strict=True)
    ]
    models = []
    for name in MODELS:
        found = (find(results, kind="model", model=name, accumulate=many, checkpointing=on) for many, on in SETTINGS)
        models.append([name, *(_over_peft(one, absent) for one in found)])
    heads = [f"accumulate {many}" + (", checkpointing" if on else "") for many, on in SETTINGS]
    return "\n\n".join(
        (
            "LoRA tax by rows, r 16; layers of one shape share what was measured:",
            table(["", *(f"M {M}" for M in ROWS)], layers),
            "LoRA tax by rank:",
            table([f"{_SQUARE.name}, M 8192", *(f"r {R}" for R in RANKS)], [["", *ranks]]),
            "LoRA tax of experts over transformers' frozen block, r 16:",
            table(["", *ROUTINGS], experts),
            "A training step, times as fast as PEFT's:",
            table(["", *heads], models),
        )
    )


def results_of(device: str, contents: list[Content]) -> list[Result]:
    """The results of devices whose name contains `device`, newest file first."""
    return [
        {"kind": content["kind"]} | result
        for content in reversed(contents)
        if device in content["conditions"]["device"]
        for result in content["results"]
    ]


def find(results: list[Result], **fields: Any) -> Result | None:
    """The first result with those fields."""
    return next((one for one in results if all(one.get(key) == value for key, value in fields.items())), None)


def _ours(result: Result | None) -> list[dict[str, Any]]:
    return [] if result is None or "lorafuse" not in result["variants"] else [result["variants"]["lorafuse"]]


def _tax(result: Result | None) -> float | None:
    return next((own["tax"] for own in _ours(result)), None)


def _over_peft(result: Result | None, absent: str) -> str:
    peft = None if result is None else result["variants"].get("peft")
    return absent if peft is None else _listed([f"{_ratio(peft, own):.2f}" for own in _ours(result)], absent)


def _ratio(one: dict[str, Any], other: dict[str, Any]) -> float:
    ratio: float = one["step"]["median"] / other["step"]["median"]
    return ratio


def _behind(results: list[Result]) -> Iterator[str]:
    """Each layer or block where a peer is more than 2 % ahead of lorafuse, and by how much of its time."""
    for result in results:
        variants = {name: result["variants"][name] for name in with_adapters(result, "tax")}
        peers = {name: one["total"]["median"] for name, one in variants.items() if not name.startswith("lorafuse")}
        if peers and "total" in variants.get("lorafuse", {}):
            best = min(peers, key=peers.__getitem__)
            ratio = variants["lorafuse"]["total"]["median"] / peers[best]
            if ratio > _BEHIND:
                yield f"{result['case']}, M {result['M']}, r {result['R']}: {ratio - 1:.0%} behind {best}"


def _percent(tax: float | None, absent: str) -> str:
    return absent if tax is None else f"{tax:.0%}"


def _listed(values: list[str], otherwise: str) -> str:
    return "; ".join(dict.fromkeys(values)) or otherwise
