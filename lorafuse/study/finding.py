"""What a study found: claims with their outcomes, and the lines of its plot."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lorafuse.study.runner import Swept
from lorafuse.study.train import DIVERGED
from lorafuse.study.verdict import Claim, overall

__all__ = ["Finding", "Line", "Panel", "curve", "line", "panel_of_rates", "row"]


@dataclass(frozen=True)
class Line:
    """`y` over `x`, the mean of seeds, between `low` and `high`."""

    name: str
    x: list[float]
    y: list[float]
    low: list[float]
    high: list[float]


@dataclass(frozen=True)
class Panel:
    title: str
    x: str
    y: str
    lines: list[Line]
    log_x: bool = False
    log_y: bool = False


@dataclass(frozen=True)
class Finding:
    """`conditions` are the rows of the study's table: what was trained, its best rate, its result."""

    claims: list[Claim]
    panels: list[Panel]
    conditions: list[dict[str, Any]]

    @property
    def outcome(self) -> str:
        return overall(self.claims)

    def as_dict(self) -> dict[str, Any]:
        return {"outcome": self.outcome, **asdict(self)}


def line(name: str, x: Sequence[float], values: Sequence[Sequence[float]]) -> Line:
    """A line from the values of every seed at each x."""
    means = [sum(seeds) / len(seeds) for seeds in values]
    return Line(
        name, [float(at) for at in x], means, [min(seeds) for seeds in values], [max(seeds) for seeds in values]
    )


def curve(swept: Swept, name: str = "", shown: Callable[[float], float] = lambda value: value) -> Line:
    """`shown` of what was evaluated over the steps at the best rate; named as the side.

    It ends where the first of its runs did: one that diverged is shorter.
    """
    points = list(zip(*(run["curve"] for run in swept.runs), strict=False))
    steps = [at[0][0] for at in points]
    return line(name or swept.spec.side, steps, [[shown(value) for _, value in at] for at in points])


def row(swept: Swept, **more: Any) -> dict[str, Any]:
    """A row of the study's table."""
    return {
        "trained": swept.spec.side,
        **more,
        "parameters": swept.runs[0]["trained"],
        "best rate": swept.best,
        "rates": f"{swept.rates[0]:.3g} to {swept.rates[-1]:.3g}" + (", best at the edge" if swept.at_edge else ""),
        "loss": sum(swept.losses) / len(swept.losses),
        "low": min(swept.losses),
        "high": max(swept.losses),
    }


def panel_of_rates(swept: Sequence[Swept], names: Sequence[str] = (), y: str = "validation loss, nats") -> Panel:
    """The sweeps themselves, without rates at which a run diverged."""
    lines = []
    for one, name in zip(swept, names or [one.spec.side for one in swept], strict=True):
        kept = [pair for pair in zip(one.rates, one.validation, strict=True) if max(pair[1]) < DIVERGED]
        lines.append(line(name, *(list(column) for column in zip(*kept, strict=True))) if kept else line(name, [], []))
    return Panel("learning rates", "learning rate", y, lines, log_x=True, log_y=True)
