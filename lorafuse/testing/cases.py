"""The layer shapes that tests and benchmarks share: those of real models, by name, and those that bite."""

import difflib
from dataclasses import dataclass
from typing import TypeVar

__all__ = [
    "CASES",
    "DECODERS",
    "GROUPS",
    "MOE_CASES",
    "UGLY_M",
    "UGLY_NK",
    "UGLY_R",
    "Case",
    "DecoderCase",
    "MoECase",
    "find",
    "find_any",
    "find_decoder",
    "find_group",
    "find_moe",
    "sizes",
]

_Case = TypeVar("_Case")


@dataclass(frozen=True)
class Case:
    """A linear layer of a model: `N` out features, `K` in features."""

    name: str
    N: int
    K: int


# hidden, heads · head size, key-value heads · head size, intermediate: from the models' published configurations
_MODELS = {
    "smollm2-135m": (576, 576, 192, 1536),
    "llama-3.1-8b": (4096, 4096, 1024, 14336),
    "llama-3.1-70b": (8192, 8192, 1024, 28672),
    "qwen3-32b": (5120, 8192, 1024, 25600),
}


def _layers(model: str, hidden: int, query: int, key: int, inner: int) -> list[Case]:
    sizes = {
        "q": (query, hidden),
        "k": (key, hidden),
        "v": (key, hidden),
        "o": (hidden, query),
        "gate": (inner, hidden),
        "up": (inner, hidden),
        "down": (hidden, inner),
    }
    return [Case(f"{model}.{layer}", *size) for layer, size in sizes.items()]


CASES: dict[str, Case] = {
    case.name: case
    for case in (
        Case("square-2048", 2048, 2048),
        *(case for model, sizes in _MODELS.items() for case in _layers(model, *sizes)),
    )
}

# layers that read the same x as one case; "mlp" is gate and up with down behind them
GROUPS: dict[str, tuple[Case, ...]] = {
    f"{model}.{name}": tuple(CASES[f"{model}.{layer}"] for layer in layers)
    for model in _MODELS
    for name, layers in (
        ("qkv", ("q", "k", "v")),
        ("gate_up", ("gate", "up")),
        ("mlp", ("gate", "up", "down")),
    )
}


@dataclass(frozen=True)
class DecoderCase:
    """A decoder layer of a model: hidden size `H`, heads of `D` features, `Q` of all queries, `KV` of all keys, and the
    intermediate size `I`."""

    name: str
    H: int
    Q: int
    KV: int
    D: int
    I: int  # noqa: E741


# models with nothing between these layers but what Llama has; Qwen3 normalizes queries and keys too
DECODERS: dict[str, DecoderCase] = {
    f"{model}.layer": DecoderCase(f"{model}.layer", hidden, query, key, head, inner)
    for model, head in (("smollm2-135m", 64), ("llama-3.1-8b", 128), ("llama-3.1-70b", 128))
    for hidden, query, key, inner in (_MODELS[model],)
}


@dataclass(frozen=True)
class MoECase:
    """The experts of a model: `E` of them, `k` for each token, hidden size `H`, intermediate size `I`."""

    name: str
    E: int
    k: int
    H: int
    I: int  # noqa: E741


# from the models' published configurations; DeepSeek-V3 with an eighth of its 256 experts
MOE_CASES: dict[str, MoECase] = {
    case.name: case
    for case in (
        MoECase("moe-64", 64, 8, 2048, 768),
        MoECase("qwen3-30b-a3b", 128, 8, 2048, 768),
        MoECase("gpt-oss-20b", 32, 4, 2880, 2880),
        MoECase("mixtral-8x7b", 8, 2, 4096, 14336),
        MoECase("deepseek-v3-eighth", 32, 8, 7168, 2048),
    )
}

# off every block size, around them, and none at all
UGLY_M = (0, 1, 7, 63, 128, 257)
# (N, K): off every block on one side, on the other, on both
UGLY_NK = ((96, 67), (65, 96), (33, 130))
UGLY_R = (1, 2, 3, 4, 6, 8, 13, 16, 64, 128, 256)


def find(name: str) -> Case:
    """The linear layer of that name. Raises ValueError that lists the nearest and all known names."""
    return _find(name, CASES)


def find_group(name: str) -> tuple[Case, ...]:
    """The layers of that name which share x. Raises ValueError that lists the nearest and all known names."""
    return _find(name, GROUPS)


def sizes(text: str, least: int, most: int, meaning: str, example: str) -> list[int]:
    """The sizes of "4096,1024". Raises ValueError, with what they mean, for too few, too many, or one below 1 or with
    more than nine digits."""
    texts = [size.strip() for size in text.split(",")]
    if not least <= len(texts) <= most or not all(s.isdecimal() and len(s) < 10 and int(s) for s in texts):
        raise ValueError(f"--shape {text}: it must be {meaning}, each from 1 to 999999999: --shape {example}")
    return [int(size) for size in texts]


def find_any(name: str) -> str:
    """The kind of the case of that name: "linear", "group", "layer" or "moe". Raises ValueError as the others do."""
    kinds = dict.fromkeys(CASES, "linear") | dict.fromkeys(GROUPS, "group")
    return _find(name, kinds | dict.fromkeys(DECODERS, "layer") | dict.fromkeys(MOE_CASES, "moe"))


def find_decoder(name: str) -> DecoderCase:
    """The decoder layer of that name. Raises ValueError that lists the nearest and all known names."""
    return _find(name, DECODERS)


def find_moe(name: str) -> MoECase:
    """The experts of that name. Raises ValueError that lists the nearest and all known names."""
    return _find(name, MOE_CASES)


def _find(name: str, cases: dict[str, _Case]) -> _Case:
    if name in cases:
        return cases[name]
    near = difflib.get_close_matches(name, cases, n=3, cutoff=0.3)
    hint = f"; did you mean {', '.join(near)}?" if near else ""
    raise ValueError(f"case {name!r} is not known{hint} The known ones: {', '.join(cases)}")
