"""Which linear layers and experts a model has: from its configuration, on the meta device, or from loaded modules."""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from lorafuse.advise.configuration import load_config, on_meta

__all__ = ["KINDS", "LAST", "Linear", "ModelShapes", "Scores", "shapes_of"]

KINDS = ("mlp", "attention", "experts", "other", "router", "tower", "unembedding")
# none is adapted: PEFT's "all-linear" leaves the unembedding out, no finding speaks of routers, and text gives the
# tower of another modality no gradient
_NOT_ADAPTED = ("router", "tower", "unembedding")
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_MLP = re.compile(r"mlp|feed_?forward|ffn|intermediate|shared_expert|dense|\bfc\d|\bwi_?\d?\b|\bwo\b", re.IGNORECASE)
# an expert of a list of experts, with linear layers of its own
_LISTED_EXPERT = re.compile(r"^(.*experts)\.\d+\.")
# what projects an attention's heads back
LAST = ("o_proj", "out_proj", "c_proj", "dense", "wo")
_ROUTERS = {"gate", "router", "shared_expert_gate", "wg"}
_ACTIVE = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "top_k_experts", "top_k")


@dataclass(frozen=True)
class Linear:
    """One linear layer, `N` out and `K` in features, or one stack of `experts` such layers in a 3-D parameter.

    `active` is how many layers of it each token passes through: 1, or the active experts of a stack, or their share
    where every expert is a layer of its own. `parameter` says that it is a parameter, which PEFT takes by
    `target_parameters`.
    """

    name: str
    kind: str
    N: int
    K: int
    experts: int = 1
    active: float = 1.0
    parameter: bool = False

    @property
    def adapted(self) -> bool:
        """Whether the advised adapter includes it."""
        return self.kind not in _NOT_ADAPTED

    @property
    def per_rank(self) -> int:
        """Adapter parameters for each unit of rank: a row of a and a column of b, of every expert."""
        return self.experts * (self.N + self.K)

    @property
    def weights(self) -> int:
        """Parameters of the weight itself."""
        return self.experts * self.N * self.K


@dataclass(frozen=True)
class Scores:
    """Scores of eager attention, a number for each head and pair of tokens of a sequence: `heads` of all blocks, 0
    where a fused kernel keeps no scores; bytes of one score that autograd keeps, and that forward and backward move."""

    heads: int = 0
    kept: int = 0
    moved: int = 0


@dataclass(frozen=True)
class ModelShapes:
    """What the advisor knows of a model. `parameters` counts all of the base, a tied embedding once; `experts` and
    `active_experts` are 0 for a dense model; `normed` is the number of features of a token that go through norms."""

    name: str
    model_type: str
    hidden: int
    vocabulary: int
    layers: int
    parameters: int
    linears: tuple[Linear, ...]
    experts: int = 0
    active_experts: int = 0
    normed: int = 0
    scores: Scores = Scores()

    @property
    def adapted(self) -> tuple[Linear, ...]:
        """The linear layers that the advised adapter includes."""
        return tuple(linear for linear in self.linears if linear.adapted)


def shapes_of(model: Any, *, active_experts: int | None = None) -> ModelShapes:
    """The shapes of a loaded model, or of a directory or `config.json`, which needs no weights.

    Raises FileNotFoundError for a path without a configuration, ValueError for a model without linear layers, or with
    experts where neither configuration nor router says how many are active, MissingDependency without transformers.
    """
    if isinstance(model, nn.Module):
        return _of_modules(model, type(model).__name__, active_experts)
    path = Path(model)
    config = load_config(path)
    module = on_meta(config, path)
    if module is None:
        raise ValueError(
            f"--model {path}: transformers has no model for {config.model_type!r}; load it and pass it to plan_adapter"
        )
    folder = path if path.is_dir() else path.parent
    return _of_modules(module, folder.resolve().name, active_experts)


def _plain(name: str) -> str:
    """A module's name as in the base model, without what PEFT puts around and between."""
    return re.sub(r"\.base_layer\b|^base_layer\.|^base_model\.model\.", "", name)


def _of_modules(model: nn.Module, name: str, active_experts: int | None) -> ModelShapes:
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "get_text_config"):
        config = config.get_text_config()
    head = _unembedding(model)
    stacks = list(_stacks(model))
    modules = [(_plain(at), module) for at, module in model.named_modules() if "lora_" not in at]
    layers = [(at, module, *sizes) for at, module in modules if (sizes := _sizes(module))]
    listed = Counter(match[1] for at, *_ in layers if (match := _LISTED_EXPERT.match(at)))
    distinct = {match[0] for at, *_ in layers if (match := _LISTED_EXPERT.match(at))}
    counts = {group: sum(1 for prefix in distinct if prefix.startswith(f"{group}.")) for group in listed}
    experts = max([stack.experts for stack in stacks] + list(counts.values()), default=0)
    active = _active(config, modules, active_experts, experts) if experts else 0
    linears = []
    towers = _towers(model, config)
    for at, module, N, K in layers:
        match = _LISTED_EXPERT.match(at)
        kind = _kind(at, module is head, bool(match), bool(experts) and experts >= N)
        kind = "tower" if at.startswith(towers) else kind
        linears.append(Linear(at, kind, N, K, active=active / counts[match[1]] if match else 1.0))
    linears += [Linear(s.name, s.kind, s.N, s.K, s.experts, float(active), True) for s in stacks]
    if not any(linear.adapted for linear in linears):
        raise ValueError(f"{name} has no linear layer that an adapter could go to")
    parameters = sum(p.numel() for n, p in model.named_parameters() if "lora_" not in n)
    parameters += sum(_unpacked(module) for _, module in modules)
    hidden = getattr(config, "hidden_size", None) or Counter(linear.K for linear in linears).most_common(1)[0][0]
    vocabulary = next((linear.N for linear in linears if linear.kind == "unembedding"), 0)
    depth = getattr(config, "num_hidden_layers", None) or _depth([at for at, *_ in layers])
    model_type = getattr(config, "model_type", "")
    normed = _normed(modules, {at: N for at, _, N, _ in layers}, int(hidden), towers)
    return ModelShapes(
        name, model_type, int(hidden), vocabulary, int(depth), parameters, tuple(linears), experts, active, normed,
        _scores(config, linears, modules),
    )  # fmt: skip


def _scores(config: Any, linears: list[Linear], modules: list[tuple[str, nn.Module]]) -> Scores:
    """The scores of transformers' eager attention: softmax in fp32 and its copy in bf16; with attention sinks a softmax
    in bf16 alone, with capped scores their tanh too. Bytes as operators of tiny models keep and move them, in tests."""
    if getattr(config, "_attn_implementation", None) != "eager":
        return Scores()
    layers = sum(x.kind == "attention" and x.name.endswith(LAST) for x in linears)
    heads = layers * (getattr(config, "num_attention_heads", None) or 0)
    if any(hasattr(module, "sinks") for _, module in modules):
        return Scores(heads, 2, 66)
    return Scores(heads, 8, 94) if getattr(config, "attn_logit_softcapping", None) else Scores(heads, 6, 68)


def _towers(model: nn.Module, config: Any) -> tuple[str, ...]:
    """Beginnings of the names of modules that no text goes through: the siblings of a language model among others."""
    whole = getattr(model, "config", None)
    if not any(getattr(whole, f"{other}_config", None) for other in ("vision", "audio")) or config is whole:
        return ()
    decoder = model.get_decoder()
    at = next((name for name, module in model.named_modules() if module is decoder), "")
    parent, _, own = at.rpartition(".")
    siblings = [name for name, _ in model.get_submodule(parent).named_children() if name not in (own, "lm_head")]
    within = _plain(f"{parent}." if parent else "")
    return tuple(f"{within}{name}." for name in siblings) if at else ()


def _normed(modules: list[tuple[str, nn.Module]], sizes: dict[str, int], hidden: int, towers: tuple[str, ...]) -> int:
    """Features of a token through all norms: those of q and k are as wide as all heads together."""
    features = 0
    for at, module in modules:
        weight = getattr(module, "weight", None)
        if "norm" in type(module).__name__.lower() and weight is not None and not at.startswith(towers):
            projection = at.replace("_layernorm", "_proj").replace("_norm", "_proj")
            features += hidden if weight.numel() == hidden else sizes.get(projection, weight.numel())
    return features


def _unembedding(model: nn.Module) -> nn.Module | None:
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    return getattr(head, "base_layer", head)


def _sizes(module: nn.Module) -> tuple[int, int] | None:
    """`(N, K)` of a linear layer, a quantized one or GPT-2's Conv1D included; None for anything else."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        return int(module.nf), int(module.weight.shape[0])  # type: ignore[arg-type,union-attr,index]
    return None


def _unpacked(module: nn.Module) -> int:
    """What a 4-bit linear layer holds more than the elements of its packed weight say."""
    if not isinstance(module, nn.Linear) or module.weight.is_floating_point():
        return 0
    return module.out_features * module.in_features - module.weight.numel()


def _stacks(model: nn.Module) -> Iterator[Linear]:
    """3-D parameters `[E, N, K]`, or `[E, K, N]` where the module says that it is transposed, of experts modules."""
    for at, module in model.named_modules():
        plain = _plain(at)
        if "lora_" in at or "expert" not in plain.rpartition(".")[2].lower() or hasattr(module, "base_layer"):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() == 3:
                E, N, K = parameter.shape
                if getattr(module, "is_transposed", False):
                    N, K = K, N
                yield Linear(f"{plain}.{name}", "experts", N, K, experts=E, parameter=True)


def _active(config: Any, modules: list[tuple[str, nn.Module]], given: int | None, experts: int) -> int:
    """How many experts a token goes to: as given, as the configuration says, or as a router's top_k says."""
    values = [given] if given is not None else [getattr(config, name, None) for name in _ACTIVE]
    values += [getattr(module, "top_k", None) for _, module in modules]
    number = next((value for value in values if isinstance(value, int)), None)
    if number is None:
        raise ValueError("neither configuration nor routers say how many experts are active; give --active-experts")
    if not 1 <= number <= experts:
        raise ValueError(f"--active-experts {number}: it must be from 1 to the model's {experts} experts")
    return number


def _kind(at: str, head: bool, listed: bool, narrow: bool) -> str:
    leaf = at.rpartition(".")[2]
    if head:
        return "unembedding"
    if listed:
        return "experts"
    if narrow and leaf in _ROUTERS:
        return "router"
    if _ATTENTION.search(at):
        # BERT names its attention's output projection attention.output.dense
        return "attention"
    return "mlp" if _MLP.search(at) else "other"


def _depth(names: list[str]) -> int:
    """How many blocks the names of layers lie in, by their first number; at least 1."""
    blocks = {match[0] for name in names if (match := re.match(r"^\D*\d+(?=\.)", name))}
    return max(len(blocks), 1)
