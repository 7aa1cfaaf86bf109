"""`status`: what the adapted layers of a model ran since they were patched, where `PatchReport` is what can run."""

import re
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import nn

from lorafuse.integrations.calls import Calls

__all__ = ["LayerStatus", "Status", "status"]

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
NOT_PATCHED = "not patched: lorafuse.patch(model) takes it"


class LayerStatus(NamedTuple):
    """What one adapted layer ran.

    `fused` are its calls by the backend that ran them, `grouped` how many of these ran in one operator with other
    layers, those of the parent `group`. `fallbacks` are the other calls by reason. `compiled` tells that a graph of
    torch.compile holds the layer: its calls cannot be counted, and `compiled_reason` is "" where they run fused there.
    `reason` is why a layer is not patched, or is never called.
    """

    name: str
    kind: str
    fused: dict[str, int]
    fallbacks: dict[str, int]
    grouped: int = 0
    group: str = ""
    compiled: bool = False
    compiled_reason: str = ""
    reason: str = ""

    def outcome(self) -> str:
        """One line: what it ran."""
        if self.reason:
            return f"as shipped: {self.reason}"
        parts = []
        if self.fused:
            text = f"fused, {', '.join(sorted(self.fused))}"
            grouped = f" ({'all' if self.grouped == sum(self.fused.values()) else 'some'} with its group)"
            parts.append(text + grouped * bool(self.grouped))
        if self.compiled:
            parts.append("compiled" + (f", as shipped: {self.compiled_reason}" if self.compiled_reason else ""))
        parts += [f"as shipped: {reason}" for reason in sorted(self.fallbacks)]
        return "; ".join(parts) or "never called: the model has not run, or another library's kernel reads its weights"


@dataclass
class Status:
    """`layers` are the adapted layers of a model in its order; `str()` is a table of what they ran, with counts of
    calls.

    Calls inside a graph of torch.compile, and replays of a CUDA graph, are not counted: Python does not run there.
    """

    layers: list[LayerStatus] = field(default_factory=list)

    @property
    def fused(self) -> int:
        """How many layers ran fused, in a call or in a compiled graph."""
        return sum(bool(layer.fused) or (layer.compiled and not layer.compiled_reason) for layer in self.layers)

    @property
    def fallbacks(self) -> int:
        """How many layers ran as they were shipped, in every call or some."""
        return sum(bool(layer.fallbacks or layer.compiled_reason or layer.reason) for layer in self.layers)

    def summary(self) -> str:
        """One line: how many layers ran fused, how many otherwise."""
        calls = sum(sum(layer.fused.values()) for layer in self.layers)
        others = sum(sum(layer.fallbacks.values()) for layer in self.layers)
        text = f"lorafuse: {self.fused} of {len(self.layers)} adapted layers ran fused ({calls} calls counted)"
        if self.fallbacks:
            text += f"; {self.fallbacks} ran as they were shipped, always or at times ({others} calls)"
        return text

    def __str__(self) -> str:
        rows = Counter((layer.kind, layer.outcome()) for layer in self.layers)
        lines = [self.summary(), *["  layers      calls  kind       ran"] * bool(rows)]
        for (kind, outcome), count in sorted(rows.items()):
            members = [layer for layer in self.layers if (layer.kind, layer.outcome()) == (kind, outcome)]
            calls = sum(sum(m.fused.values()) + sum(m.fallbacks.values()) for m in members)
            lines.append(f"  {count:6d} {calls:10d}  {kind:10s} {outcome}")
            if any(m.fallbacks or m.reason or m.compiled_reason or not (m.fused or m.compiled) for m in members):
                lines += [f"                     {m.name}" for m in members[:3]]
                if count > 3:
                    lines.append(f"                     … and {count - 3} more")
        return "\n".join(lines)


def status(model: nn.Module) -> Status:
    """What every adapted layer of a model ran since `lorafuse.patch`: fused calls with their backend, fallbacks with
    their reasons. Print it after the first step: what was adopted (`PatchReport`) may run otherwise, under a wrapper
    that came later.

    Args:
        model: the model that was patched, or what wraps it (DDP, FSDP, `torch.compile`).

    Raises TypeError when model is not an `nn.Module`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"lorafuse.status got a {type(model).__name__}; it takes a torch.nn.Module")
    rows: dict[str, LayerStatus] = {}
    modules = dict(model.named_modules())
    counted = {name: m.__dict__["_lorafuse_calls"] for name, m in modules.items() if "_lorafuse_calls" in m.__dict__}
    graphs = _shared_graphs(counted)
    unpatched: dict[str, tuple[str, str]] = {}
    skipped: dict[str, str] = {}
    # whoever has one of PEFT's layers has imported it
    if "peft" in sys.modules:
        from lorafuse.integrations import hf_model

        report, _ = hf_model.survey(model, "auto")
        skipped = {row.name: row.reason for row in report.skipped}
        unpatched = {row.name: (row.kind, row.reason) for row in report.skipped}
        unpatched |= {row.name: (row.kind, NOT_PATCHED) for row in report.patched}
    for name, module in modules.items():
        if name in counted:
            kind = unpatched[name][0] if name in unpatched else "linear"
            calls, reason = counted[name], counted[name].traced
            if not _ran(calls) and name not in skipped:
                reason = graphs.get(_NUMBER.sub("#", name))
            # another library's kernel, or a state that is older than the first call
            idle = not (calls.fused or calls.fallbacks or reason is not None)
            rows[name] = LayerStatus(
                name,
                kind,
                dict(calls.fused),
                dict(calls.fallbacks),
                calls.grouped,
                name.rpartition(".")[0] if calls.grouped or "_lorafuse_siblings" in module.__dict__ else "",
                reason is not None,
                reason or "",
                skipped.get(name, "") if idle else "",
            )
        elif name in unpatched:
            rows[name] = LayerStatus(name, unpatched[name][0], {}, {}, reason=unpatched[name][1])
    return Status(list(rows.values()))


def _ran(calls: Calls) -> bool:
    return bool(calls.fused or calls.fallbacks) or calls.traced is not None


def _shared_graphs(counted: Mapping[str, Calls]) -> dict[str, str]:
    """What traced layers run, by their names without the numbers of blocks.

    Of equal blocks, or parts of them between graph breaks, torch.compile traces the first, and all run its graph. A
    block of which a layer did not run tells nothing of others: that layer alone was compiled.
    """
    idle = {_block(name) for name, calls in counted.items() if not _ran(calls)}
    return {
        _NUMBER.sub("#", name): calls.traced
        for name, calls in counted.items()
        if calls.traced is not None and _block(name) not in idle
    }


def _block(name: str) -> str:
    """The name up to the number of the block that a layer lies in."""
    return name[: max((match.end() for match in _NUMBER.finditer(name)), default=0)]
