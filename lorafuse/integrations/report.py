"""What `lorafuse.patch` did to a model, layer by layer."""

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

__all__ = ["Group", "PatchReport", "Patched", "Skipped"]


class Patched(NamedTuple):
    """A layer that runs fused: its name in the model, its kind ("linear", …) and the backend that runs it."""

    name: str
    kind: str
    backend: str


class Skipped(NamedTuple):
    """An adapted layer that was left to PEFT: its name, its kind and the reason."""

    name: str
    kind: str
    reason: str


class Group(NamedTuple):
    """Layers of one parent that run as one operator: the parent's name, a kind and their names in it.

    "siblings" are called with one x as their names tell; of "candidates" the first forward shows which are. The members
    of a "gated_mlp" are gate, up and down.
    """

    name: str
    kind: str
    members: tuple[str, ...]


@dataclass
class PatchReport:
    """`patched` and `skipped` list every adapted layer of the model; `str()` is a table of both.

    `bases` are the formats of quantized ones by the layer's name ("NF4, block 64, nested"), `notes` what is wrong with
    the model itself, each a sentence with the way out. `groups` are layers that run as one operator where they are
    called with one x, `apart` those that could but do not, with the reason. `library` is whose layers they are.
    """

    patched: list[Patched] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    bases: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    groups: list[Group] = field(default_factory=list)
    apart: list[Skipped] = field(default_factory=list)
    library: str = "PEFT"

    def summary(self) -> str:
        """One line: how many layers run fused, how many do not."""
        return f"lorafuse: {len(self.patched)} adapted layers patched, {len(self.skipped)} left to {self.library}"

    def __str__(self) -> str:
        lines = [self.summary()]
        rows = Counter((p.kind, p.backend, self.bases.get(p.name, "")) for p in self.patched)
        for (kind, backend, base), count in sorted(rows.items()):
            lines.append(f"  patched  {count:5d}  {kind:10s} {backend}" + f" over {base}" * bool(base))
        for (kind, reason), count in sorted(Counter((s.kind, s.reason) for s in self.skipped).items()):
            lines.append(f"  skipped  {count:5d}  {kind:10s} {reason}")
            names = [s.name for s in self.skipped if (s.kind, s.reason) == (kind, reason)]
            lines += [f"                   {name}" for name in names[:3]]
            if len(names) > 3:
                lines.append(f"                   … and {len(names) - 3} more")
        for (kind, members), count in sorted(Counter((g.kind, g.members) for g in self.groups).items()):
            lines.append(f"  grouped  {count:5d}  {kind:10s} {', '.join(members)}")
        for (kind, reason), count in sorted(Counter((s.kind, s.reason) for s in self.apart).items()):
            lines.append(f"  apart    {count:5d}  {kind:10s} {reason}")
        lines += [f"  note     {note}" for note in self.notes]
        return "\n".join(lines)
