"""PEFT's adapters on experts that transformers spreads over devices (`DistributedConfig(ep_size=…)`).

transformers replaces the forward of such an experts module: an `EPImplementation` brings each token to the ranks of its
experts, runs the module's own forward there on local stacks, and brings results back. A fused module keeps all of that,
hooks of FSDP included, and has the implementation run lorafuse's operator in place of the module's own forward.

PEFT makes the adapters of all experts on every rank, and each rank runs and trains those of its experts: the gradient
of the others is zero there. They are parameters like any adapter's, and whoever averages those over data-parallel ranks
averages these, which makes each the gradient of the mean loss. Experts whose ranks share their tokens (`tp_size` above
1) are left alone: PEFT adapts no experts of such a model.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

__all__ = ["experts_here", "implementation_of", "running"]


def implementation_of(base: nn.Module) -> Any:
    """The `EPImplementation` that runs an experts module over ranks with tokens of their own; None for any other."""
    shipped, forward = sys.modules.get("transformers.distributed.expert_parallel"), base.__dict__.get("forward")
    if shipped is None or getattr(forward, "__globals__", None) is not vars(shipped):
        return None
    cells = dict(zip(forward.__code__.co_freevars, forward.__closure__ or (), strict=True))
    implementation = cells["implementation"].cell_contents if "implementation" in cells else None
    return None if implementation is None or implementation.tp_mesh.size() > 1 else implementation


@contextlib.contextmanager
def running(implementation: Any, run: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Iterator[None]:
    """Inside the block the implementation runs `run(rows, local index, weight)` as the forward of its experts."""
    # "auto" holds those between which it chooses
    parts = (implementation, *(getattr(implementation, name, None) for name in ("all_to_all", "all_reduce")))
    own = [(part, part.experts_forward) for part in parts if part is not None]
    try:
        for part, _ in own:
            part.experts_forward = run
        yield
    finally:
        for part, forward in own:
            part.experts_forward = forward


def experts_here(implementation: Any, factor: Tensor) -> Tensor:
    """Of a factor `[E, …]` of all experts those of this rank `[E/P, …]`."""
    count = implementation.num_local_experts
    return factor.narrow(0, implementation.ep_mesh.get_local_rank() * count, count)
