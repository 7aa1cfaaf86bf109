"""The advice as a page that a person reads."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

from lorafuse.advise.sources import FINDINGS

if TYPE_CHECKING:
    from lorafuse.advise.advice import Advice

__all__ = ["page"]

_NOTES = (
    "memory, where no other is named, is at micro-batch {0}, of one device, nothing sharded; what an allocator cannot "
    "use is left out",
    "step time is one optimizer step of a device, accumulation and fused AdamW included; generation, data and what "
    "devices wait for each other are not",
)


def page(a: Advice) -> str:
    """Sections of lines, `name  value  [how sure; source]`, the sources, and the snippet."""
    s = a.shapes
    experts = f", {s.experts} experts, {s.active_experts} active" if s.experts else ""
    head = f"{s.name}: {s.model_type or 'no model type'}, {s.parameters / 1e9:.2f} G parameters, hidden {s.hidden}"
    out = [f"{head}{experts}; goal {a.request.goal}"]
    lines = a.lines
    width = max(len(line.name) for line in lines)
    for section, group in groupby(lines, lambda line: line.section):
        out += ["", section]
        out += [f"  {line.name:<{width}}  {line.value}  [{line.sure}; {line.source}]" for line in group]
    out += ["", *(f"  {note.format(a.request.micro_batch)}" for note in _NOTES), "", "sources"]
    named = {key.strip() for line in lines for key in line.source.split(",")}
    out += [f"  {key:<8}{text}" for key, text in FINDINGS.items() if key in named]
    return "\n".join([*out, "", a.snippet.rstrip()])
