"""Markdown tables of the goals and of the grid to measure on an H200, with the results so far."""

from statistics import geometric_mean
from typing import Any

from headline import factors, losers, ours
from result_tables import Content, Result, has_own_floor, table, tax_text

from lorafuse.bench.moe import ROUTINGS
from lorafuse.bench.transformer import MODELS
from lorafuse.testing.cases import CASES, MOE_CASES

__all__ = ["BLOCKS", "DECODER", "RANKS", "ROWS", "SETTINGS", "find", "goals", "grid", "results_of"]

_GPU = "H200"
_MODEL = "llama-3.1-8b"
_LAYERS = [case for name, case in CASES.items() if name.startswith(f"{_MODEL}.")]
ROWS, RANKS = (512, 2048, 8192, 16384, 32768), (4, 8, 16, 64, 256)
_SQUARE = CASES[f"{_MODEL}.q"]
_HEADLINE = {"kind": "linear", "M": 8192, "N": _SQUARE.N, "K": _SQUARE.K, "R": 16}
DECODER = {"kind": "layer", "case": f"{_MODEL}.layer", "M": 8192, "R": 16}
BLOCKS = [case for name, case in MOE_CASES.items() if name != "moe-64"]
# micro-batches of a step, and whether activations are checkpointed
SETTINGS = [(accumulate, on) for accumulate in (1, 4, 16) for on in (False, True)]


def goals(contents: list[Content], absent: str) -> str:
    """The goals, with the measured figures or `absent`."""
    results = results_of(_GPU, contents)
    layers = [_tax(find(results, kind="linear", M=M, N=case.N, K=case.K, R=16)) for case in _LAYERS for M in ROWS]
    taxed = [1 + one for one in layers if one is not None]
    overall = f"{geometric_mean(taxed) - 1:.0%}, of {len(taxed)} of {len(layers)} cases" if taxed else absent
    blocks = [one for one in results if one["kind"] == "moe" and one["case"] == "qwen3-30b-a3b"]
    experts = _listed([_shown(one, absent) for one in blocks if has_own_floor(one)], absent)
    models = [one for one in results if one["kind"] == "model" and one["model"] == _MODEL]
    full = [own["ratio_to_full"] for one in models for own in _ours(one) if "ratio_to_full" in own]
    eight = find(models, layers=8, tokens_per_step=4096, accumulate=1, checkpointing=False)
    decoder = find(results, **DECODER)
    compared = [one for one in results if one["kind"] in ("linear", "group", "mlp", "layer", "moe")]
    behind = _listed(losers(compared), "none" if taxed else absent)
    rows = [
        (f"LoRA tax of a decoder layer of {_MODEL}, 8192 tokens, r 16", "≤ 4%", _shown(decoder, absent)),
        ("the same, over the frozen layer as transformers runs it", "≤ 0%", _shown(decoder, absent, "tax_over_frozen")),
        ("LoRA tax, 8192 × 4096 × 4096, r 16", "≤ 4%", _shown(find(results, **_HEADLINE), absent)),
        (f"its geometric mean over {_MODEL}'s layers, M 512 to 32768, r 16", "≤ 6%", overall),
        ("LoRA tax, experts of qwen3-30b-a3b, over the fastest frozen block", "≤ 8%", experts),
        (f"a step of 8 layers of {_MODEL}, 4096 tokens", "≤ 85 ms", _step(eight, "lorafuse", absent)),
        ("the same, with Liger's modules", "≤ 78 ms", _step(eight, "liger-lorafuse", absent)),
        (f"a step of {_MODEL} / full fine-tuning's", "≤ 0.70", _listed([f"{one:.2f}" for one in full], absent)),
        ("the same, times as fast as PEFT, adapters in the base's dtype", "≥ 1.5", _over(models, "peft-half", absent)),
        ("the same, times as fast as PEFT, autocast", "≥ 1.5", _over(models, "peft-autocast", absent)),
        (
            "the same, times as fast as PEFT's default, fp32 adapters without autocast",
            "≥ 1.5",
            _over(models, "peft", absent),
        ),
        ("the same, times as fast as Unsloth", "≥ 1.15", _over(models, "unsloth", absent)),
        ("layers and experts more than 2% behind a peer", "none", behind),
    ]
    return table(["", "goal", "measured"], [list(row) for row in rows])


def grid(contents: list[Content], absent: str) -> str:
    """The grid: LoRA tax by rows, rank and routing, steps of models; `absent` where nothing is measured."""
    results = results_of(_GPU, contents)
    layers = [
        [
            case.name,
            *(_shown(find(results, kind="linear", M=M, N=case.N, K=case.K, R=16), absent) for M in ROWS),
        ]
        for case in _LAYERS
    ]
    ranks = [_shown(find(results, **_HEADLINE | {"R": R}), absent) for R in RANKS]
    routed = [[find(results, kind="moe", case=case.name, routing=one) for one in ROUTINGS] for case in BLOCKS]
    experts = [
        [case.name, *(_shown(one if has_own_floor(one) else None, absent) for one in cells)]
        for case, cells in zip(BLOCKS, routed, strict=True)
    ]
    models = []
    for name in MODELS:
        cells = (find(results, kind="model", model=name, accumulate=many, checkpointing=on) for many, on in SETTINGS)
        models.append([name, *(_over([one] if one else [], "peft", absent) for one in cells)])
    heads = [f"accumulate {many}" + (", checkpointing" if on else "") for many, on in SETTINGS]
    return "\n\n".join(
        (
            "LoRA tax by rows, r 16; layers of one shape share what was measured:",
            table(["", *(f"M {M}" for M in ROWS)], layers),
            "LoRA tax by rank:",
            table([f"{_SQUARE.name}, M 8192", *(f"r {R}" for R in RANKS)], [["", *ranks]]),
            "LoRA tax of experts over the fastest frozen block, r 16:",
            table(["", *ROUTINGS], experts),
            "A training step, times as fast as PEFT's default, fp32 adapters without autocast:",
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
    return [] if result is None or not (own := ours(result)) else [own]


def _step(result: Result | None, name: str, absent: str) -> str:
    variants = {} if result is None else result["variants"]
    return f"{variants[name]['step']['median'] * 1e3:.0f} ms" if name in variants else absent


def _tax(result: Result | None) -> float | None:
    return next((own["tax"] for own in _ours(result)), None)


def _over(models: list[Result], name: str, absent: str) -> str:
    """How many times as fast as that variant the steps of those models are."""
    return _listed([f"{times[name]:.2f}" for times in map(factors, models) if name in times], absent)


def _shown(result: Result | None, absent: str, key: str = "tax") -> str:
    """lorafuse's tax of a result."""
    return next((tax_text(own, key) for own in _ours(result)), absent)


def _listed(values: list[str], otherwise: str) -> str:
    return "; ".join(dict.fromkeys(values)) or otherwise
