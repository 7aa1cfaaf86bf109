"""Adapters by the names and in the layouts of vLLM and SGLang.

| layer | modules, each with `lora_A.weight` and `lora_B.weight`, after `base_model.model.` |
|---|---|
| linear x, the head too | `x`: A `[r, in]`, B `[out, r]` |
| embedding x, without `.weight` | `x`, `lora_embedding_A` `[r, vocabulary]` and `lora_embedding_B` `[H, r]` |
| experts x, expert e | `x.e.gate_proj`, `x.e.up_proj`, `x.e.down_proj`, as linear layers; gate and up have one A |
| experts x, SGLang's shared outer | `x.w1` (gate), `x.w3` (up): A `[1, r, H]`, B `[E, I, r]` |
| | `x.w2` (down): A `[E, r, I]`, B `[1, H, r]` |

Servers scale every layer by one lora_alpha / r: what differs from it is multiplied into B. vLLM takes ranks up to r.
SGLang copies every tensor into a buffer of rank r and asserts its shape, stacks q, k and v, and gate and up, and drops
what lies in no `layers.N` and is neither embed_tokens nor lm_head: for it ranks are padded by zeros, and a stack that
is adapted in part is completed by adapters of zeros. vLLM adapts embed_tokens and lm_head of models whose class lists
them (Llama's and Qwen's do, Gemma's does not), and refuses the file for others.

Read in the sources of vLLM (`lora/utils.py`, `lora/lora_model.py`, `lora/worker_manager.py`) and SGLang
(`srt/lora/lora.py`, `srt/lora/mem_pool.py`, `srt/lora/utils.py`), 2026-11; nothing was loaded into a running server.
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorafuse.adapters import AdapterPool
from lorafuse.adapters.files import changes_base
from lorafuse.errors import MissingDependency
from lorafuse.nn import LoRAExperts, LoRALinear
from lorafuse.nn.peft_layout import target_modules, unpacked

__all__ = ["to_sglang", "to_vllm"]

_PREFIX = "base_model.model."
_A, _B = ".lora_A.weight", ".lora_B.weight"
_EMBEDDING = ".lora_embedding_A", ".lora_embedding_B"
_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
# what SGLang stacks, and fails on where one of the names is missing
_STACKED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
# of `layers.N` are the names that it reads; of the others these
_HEADS = ("embed_tokens", "lm_head")


@dataclass
class _Experts:
    """A and B of gate_up, `[E, r, H]` and `[E, 2I, r]` (I without a gate), of down, `[E, r, I]` and `[E, H, r]`.

    A factor that all experts share has E = 1.
    """

    gate_up: tuple[Tensor, Tensor]
    down: tuple[Tensor, Tensor]
    scales: tuple[float, float]
    count: int
    has_gate: bool


@dataclass
class _Adapter:
    """`linear` are `(A, B, scale)` of embeddings too, whose names are in `embeddings`; `modules` is the whole model."""

    modules: tuple[str, ...]
    linear: dict[str, tuple[Tensor, Tensor, float]] = field(default_factory=dict)
    embeddings: set[str] = field(default_factory=set)
    experts: dict[str, _Experts] = field(default_factory=dict)
    base: str | None = None


def to_vllm(
    model: nn.Module | AdapterPool, folder: str | Path | None = None, *, adapter_name: str | int = "default",
    projections: tuple[str, str, str] = _PROJECTIONS,
) -> dict[str, Tensor]:  # fmt: skip
    """The tensors of a model's adapters by the names under which vLLM loads them; with `folder`, its two files too.

    Experts are written one by one, factors that they share once for each.

    Args:
        model: a `PeftModel`, patched or not, a model with `lorafuse.nn.LoRALinear` and `LoRAExperts`, or a pool.
        folder: made if it is not there.
        adapter_name: of a `PeftModel`; of a pool the slot.
        projections: what vLLM's model calls the gate, up and down projection of an expert ("w1", "w3", "w2" in
            Mixtral).

    Raises ValueError, writing nothing, for a model without adapters and for what vLLM does not load: DoRA and other
    variants, biases, other modules and tokens, convolutions, and adapters of a base that their initialization changed
    (PiSSA).
    """
    adapter = _read(model, adapter_name)
    pairs = _tensors(adapter, projections, is_shared=False, alone=projections[1])
    return _finished(adapter, pairs, folder, projections)


def to_sglang(
    model: nn.Module | AdapterPool, folder: str | Path | None = None, *, adapter_name: str | int = "default",
    shared_outer: bool = False,
    projections: tuple[str, str, str] = _PROJECTIONS,
) -> dict[str, Tensor]:  # fmt: skip
    """As `to_vllm`, for SGLang: every tensor has the rank of adapter_config.json, and q, k and v, or gate and up, of a
    parent are written together, zeros for those without an adapter.

    `shared_outer` writes experts as the stacks that its experts_shared_outer_loras reads, and raises ValueError where a
    model's experts do not share their outer factors. ValueError too for layers outside of `layers.N` that are neither
    embed_tokens nor lm_head, which it drops.
    """
    adapter = _read(model, adapter_name)
    dropped = [n for n in adapter.linear if not re.search(r"layers\.\d+\.", n) and not any(h in n for h in _HEADS)]
    if dropped:
        raise ValueError(
            f"SGLang reads adapters of layers.N alone, and would drop that of {dropped[0]} (but for "
            f"{' and '.join(_HEADS)})"
        )
    _complete(adapter, model.model if isinstance(model, AdapterPool) else model)
    if shared_outer:
        apart = [n for n, one in adapter.experts.items() if one.gate_up[0].shape[0] > 1 or one.down[1].shape[0] > 1]
        if apart:
            raise ValueError(f"to_sglang: the experts of {apart[0]} share no outer factors: pass shared_outer=False")
    pairs = _tensors(adapter, projections, shared_outer, alone=projections[0])
    return _finished(adapter, pairs, folder, projections, is_padded=True)


def _read(model: nn.Module | AdapterPool, adapter_name: str | int) -> _Adapter:
    if isinstance(model, AdapterPool):
        return _read_pool(model, adapter_name)
    adapter = _adapter_of(model)
    # a module that stands in several places is one of each for a server
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, LoRALinear):
            adapter.linear[name] = module.lora_A.weight, module.lora_B.weight, module.scale
        elif isinstance(module, LoRAExperts):
            of = [getattr(module, f"{p}_lora_{letter}") for p in ("gate_up", "down") for letter in "AB"]
            of = [t if t.dim() == 3 else t[None] for t in of]
            adapter.experts[name] = _Experts(
                (of[0], of[1]), (of[2], of[3]), (module.scale, module.scale), module.num_experts, module.has_gate
            )
        elif any(adapter_name in getattr(module, held, {}) for held in ("lora_A", "lora_embedding_A")):
            _read_peft(adapter, name.removeprefix(_PREFIX), module, adapter_name)
    if not adapter.linear and not adapter.experts:
        raise ValueError(f"a {type(model).__name__} has no adapter {adapter_name!r}, and no lorafuse.nn layers")
    config = getattr(model, "peft_config", {}).get(adapter_name)
    if config is not None:
        if config.modules_to_save:
            raise ValueError(f"servers load no modules_to_save ({', '.join(config.modules_to_save)}): merge them")
        for setting, plain in (("bias", "none"), ("trainable_token_indices", None), ("layer_replication", None)):
            if getattr(config, setting, None) not in (None, plain):
                raise ValueError(f"the adapter has {setting}={getattr(config, setting)!r}, which servers do not load")
        if reason := changes_base(config.init_lora_weights):
            raise ValueError(f"the adapter {reason}")
        adapter.base = config.base_model_name_or_path or adapter.base
    return adapter


def _adapter_of(model: nn.Module) -> _Adapter:
    every = tuple(name.removeprefix(_PREFIX) for name, _ in model.named_modules(remove_duplicate=False))
    return _Adapter(every, base=getattr(getattr(model, "config", None), "name_or_path", None) or None)


def _read_pool(pool: AdapterPool, slot: str | int) -> _Adapter:
    if slot not in pool.slots:
        raise ValueError(f"the pool has no slot {slot!r}, only {list(pool.slots)}: pass one as adapter_name")
    named, scale = pool.parameters(int(slot)), pool.scale(int(slot))
    adapter = _adapter_of(pool.model)
    for name in (n.removesuffix(_A) for n in named if n.endswith(_A)):
        a, b = named[name + _A], named[name + _B]
        module = name.rpartition(".")[0]
        for place in pool.places(name):
            if name in pool.layers:
                adapter.linear[place] = a, b, scale
            else:
                of, _, parameter = place.rpartition(".")
                _add_experts(adapter, of, parameter, pool.experts[module].base, (a, b), scale)
    return adapter


def _read_peft(adapter: _Adapter, name: str, module: Any, which: str | int) -> None:
    if which in getattr(module, "lora_variant", {}):
        kind = type(module.lora_variant[which]).__name__.removesuffix("LinearVariant")
        # what is LoRA in forward
        if kind not in ("MiCA", "Velora"):
            raise ValueError(f"{name} is a variant of LoRA ({kind}), which servers do not load: merge it into the base")
    scale = float(module.scaling[which])
    if which in module.lora_embedding_A:
        adapter.linear[name] = module.lora_embedding_A[which], module.lora_embedding_B[which], scale
        adapter.embeddings.add(name)
        return
    a, b = module.lora_A[which], module.lora_B[which]
    if getattr(a, "bias", None) is not None or getattr(b, "bias", None) is not None:
        raise ValueError(f"{name} has an adapter with a bias, which servers do not load")
    if not isinstance(a, nn.Linear) or not isinstance(b, nn.Linear):
        raise ValueError(f"{name} adapts a {type(module.get_base_layer()).__name__}; servers load linear layers")
    # the weight of an nn.Linear may be adapted as a parameter, as that of a layer is
    if getattr(module, "parameter_name", "weight") == "weight":
        adapter.linear[name] = a.weight, b.weight, scale
        return
    pair = unpacked(a.weight, b.weight, module.num_experts)
    _add_experts(adapter, name.removesuffix(".base_layer"), module.parameter_name, module.get_base_layer(), pair, scale)


def _add_experts(
    adapter: _Adapter, name: str, parameter: str, base: Any, pair: tuple[Tensor, Tensor], scale: float
) -> None:  # fmt: skip
    """Add the factors A `[E, r, in]` and B `[E, out, r]` of one of the stacks of a module of transformers."""
    if getattr(base, "is_transposed", False) or not getattr(base, "is_concatenated", True):
        raise ValueError(f"{name} stores its experts transposed or gate and up in turns; no server's layout has that")
    nothing = pair[0][:0]
    former = adapter.experts.get(name) or _Experts(
        (nothing, nothing), (nothing, nothing), (1.0, 1.0), len(pair[0]), True
    )
    has_gate = parameter != "up_proj" and former.has_gate
    if parameter == "down_proj":
        adapter.experts[name] = _Experts(former.gate_up, pair, (former.scales[0], scale), former.count, has_gate)
    else:
        adapter.experts[name] = _Experts(pair, former.down, (scale, former.scales[1]), former.count, has_gate)


def _complete(adapter: _Adapter, model: nn.Module) -> None:
    """Give the layers that SGLang stacks with adapted ones adapters of zeros."""
    layers = {name.removeprefix(_PREFIX): module for name, module in model.named_modules(remove_duplicate=False)}
    for name, (a, b, scale) in list(adapter.linear.items()):
        parent, _, last = name.rpartition(".")
        for other in (o for stack in _STACKED if last in stack for o in stack):
            layer: Any = layers.get(f"{parent}.{other}")
            if layer is not None and f"{parent}.{other}" not in adapter.linear:
                zeros = a.new_zeros(a.shape[0], layer.in_features), b.new_zeros(layer.out_features, a.shape[0])
                adapter.linear[f"{parent}.{other}"] = *zeros, scale


def _tensors(
    adapter: _Adapter, projections: tuple[str, str, str], is_shared: bool, alone: str
) -> dict[str, tuple[Tensor, Tensor, float]]:
    """`{module: (A, B, scale)}` by the names of a server, which calls what has no gate beside it `alone`."""
    pairs = dict(adapter.linear)
    for name, one in adapter.experts.items():
        (gate_a, gate_b), (down_a, down_b) = one.gate_up, one.down
        parts = []
        if gate_a.numel():
            halves = gate_b.chunk(2, dim=1) if one.has_gate else (gate_b,)
            names = projections[:2] if one.has_gate else (alone,)
            stacked = ("w1", "w3") if one.has_gate else ("w1",)
            parts += [(n, s, gate_a, half, one.scales[0]) for n, s, half in zip(names, stacked, halves, strict=True)]
        if down_a.numel():
            parts.append((projections[2], "w2", down_a, down_b, one.scales[1]))
        for projection, stack, a, b, scale in parts:
            if is_shared:
                pairs[f"{name}.{stack}"] = a, b, scale
                continue
            for e in range(one.count):
                of_a, of_b = (t[e if t.shape[0] > 1 else 0] for t in (a, b))
                pairs[f"{name}.{e}.{projection}"] = of_a, of_b, scale
    return pairs


@torch.no_grad()
def _finished(
    adapter: _Adapter, pairs: dict[str, tuple[Tensor, Tensor, float]], folder: str | Path | None,
    projections: tuple[str, str, str], is_padded: bool = False,
) -> dict[str, Tensor]:  # fmt: skip
    rank = max(a.shape[-2] for a, _, _ in pairs.values())
    # of the layers of that rank, so that in most adapters no B is multiplied
    scale = next((s for a, _, s in pairs.values() if a.shape[-2] == rank and s), 0.0)
    scale = scale or next((s for _, _, s in pairs.values() if s), 1.0)
    tensors = {}
    patterns: dict[str, dict[str, Any]] = {"rank_pattern": {}, "alpha_pattern": {}}
    for name, (a, b, own) in pairs.items():
        # PEFT, which reads vLLM's files too, has one rank for all experts
        if is_padded or name not in adapter.linear:
            missing = rank - a.shape[-2]
            a, b = nn.functional.pad(a, (0, 0, 0, missing)), nn.functional.pad(b, (0, missing))
        elif a.shape[-2] != rank:
            # vLLM ignores these, and PEFT needs them: B holds what makes the scale that of all
            # it matches a pattern at the end of names too, where no ^ is
            patterns["rank_pattern"][f"^{name}"] = a.shape[-2]
            patterns["alpha_pattern"][f"^{name}"] = scale * a.shape[-2]
        of_a, of_b = _EMBEDDING if name in adapter.embeddings else (_A, _B)
        tensors[f"{_PREFIX}{name}{of_a}"] = a.detach().contiguous()
        factor = own / scale
        tensors[f"{_PREFIX}{name}{of_b}"] = (b.detach() if factor == 1.0 else b.detach() * factor).contiguous()
    if folder is not None:
        try:
            from safetensors.torch import save_file
        except ImportError as error:
            raise MissingDependency("adapter files need safetensors: pip install safetensors") from error
        Path(folder).mkdir(parents=True, exist_ok=True)
        contents = {key: t.cpu().clone() for key, t in tensors.items()}
        save_file(contents, Path(folder) / "adapter_model.safetensors", metadata={"format": "pt"})
        # PEFT finds experts by the ends of names alone
        ends = {name.rpartition(".")[2] for name in adapter.linear} | set(projections)
        targets = sorted(ends) if adapter.experts else target_modules(adapter.linear, adapter.modules)
        if is_padded and isinstance(targets, str):
            # SGLang reads no pattern
            targets = sorted(adapter.linear)
        config = {
            "base_model_name_or_path": adapter.base, "bias": "none", "inference_mode": True, "lora_alpha": scale * rank,
            "lora_dropout": 0.0, "modules_to_save": None, "peft_type": "LORA", "r": rank,
            "target_modules": targets, "task_type": "CAUSAL_LM", "use_dora": False, "use_rslora": False,
            **patterns,
        }  # fmt: skip
        (Path(folder) / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return tensors
