"""What `lorafuse.patch` did to a model, layer by layer."""

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

__all__ = ["PatchReport", "Patched", "Skipped"]


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


@dataclass
class PatchReport:
    """`patched` and `skipped` list every adapted layer of the model; `str()` is a table of both."""

    patched: list[Patched] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)

    def summary(self) -> str:
        """One line: how many layers run fused, how many do not."""
        return f"lorafuse: {len(self.patched)} adapted layers patched, {len(self.skipped)} left to PEFT"

    def __str__(self) -> str:
        lines = [self.summary()]
        for (kind, backend), count in sorted(Counter((p.kind, p.backend) for p in self.patched).items()):
            lines.append(f"  patched  {count:5d}  {kind:10s} {backend}")
        for (kind, reason), count in sorted(Counter((s.kind, s.reason) for s in self.skipped).items()):
            lines.append(f"  skipped  {count:5d}  {kind:10s} {reason}")
            names = [s.name for s in self.skipped if (s.kind, s.reason) == (kind, reason)]
            lines += [f"                   {name}" for name in names[:3]]
            if len(names) > 3:
                lines.append(f"                   … and {len(names) - 3} more")
        return "\n".join(lines)
