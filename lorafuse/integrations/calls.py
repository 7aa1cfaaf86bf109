"""What the calls of a patched layer ran: counted in the layer, for `lorafuse.status`.

A call costs 0.2 µs more for it. Calls inside a graph of torch.compile cannot be counted; that the layer was traced, and
how, is noted when it is.
"""

from collections import defaultdict
from typing import Any

from torch import compiler, nn

from lorafuse.ops import choose

__all__ = ["OFF", "Calls", "begin", "end", "fell_back", "is_tracing", "ran", "ran_grouped"]

OFF = "its adapters are disabled, merged, elsewhere or given for each row: the path that it shipped with"

is_tracing = compiler.is_dynamo_compiling


class Calls:
    """Counts of one layer's calls: `fused` by backend, `grouped` of those in one operator with others, `fallbacks` by
    reason. `traced` holds the reason for which a graph of torch.compile has PEFT's path, "" where it is fused.
    """

    def __init__(self) -> None:
        self.fused: defaultdict[str, int] = defaultdict(int)
        self.fallbacks: defaultdict[str, int] = defaultdict(int)
        self.grouped = 0
        self.traced: str | None = None


def begin(layer: nn.Module) -> None:
    """Count a layer's calls from here on; a layer that is counted already keeps its counts."""
    if "_lorafuse_calls" not in layer.__dict__:
        layer.__dict__["_lorafuse_calls"] = Calls()


def end(layer: nn.Module) -> None:
    """Count no more, and drop the counts."""
    layer.__dict__.pop("_lorafuse_calls", None)


def ran(layer: Any) -> None:
    """Count a call that ran fused, by the backend that this thread ran last."""
    if is_tracing():
        _note(layer, "")
    else:
        layer._lorafuse_calls.fused[choose.latest.name] += 1


def ran_grouped(layer: Any) -> None:
    """Count a call whose output one operator computed for several layers."""
    if is_tracing():
        _note(layer, "")
    else:
        calls = layer._lorafuse_calls
        calls.fused[choose.latest.name] += 1
        calls.grouped += 1


def fell_back(layer: Any, reason: str) -> None:
    """Count a call that runs as the layer ships it."""
    if is_tracing():
        _note(layer, reason)
    else:
        layer._lorafuse_calls.fallbacks[reason] += 1


def _note(layer: Any, reason: str) -> None:
    """Note in `layer` that torch.compile traces it, when it does: nothing of this is in the graph, and no guard is."""
    from torch._dynamo.comptime import comptime

    comptime(_noted)


def _noted(context: Any) -> None:
    # the layer itself, which Dynamo has no public name for (torch 2.1 to 2.13)
    layer = getattr(context.get_local("layer")._i_will_not_complain_if_bc_breaks_VariableTracker(), "value", None)
    if isinstance(layer, nn.Module) and "_lorafuse_calls" in layer.__dict__:
        layer.__dict__["_lorafuse_calls"].traced = context.get_local("reason").as_python_constant()
