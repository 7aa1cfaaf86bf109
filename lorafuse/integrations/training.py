"""What the callbacks of all trainers do: patch before training, and show what ran after the first step."""

import sys
import warnings
from collections.abc import Callable
from typing import Any

from torch import nn

from lorafuse.integrations.patching import patch
from lorafuse.integrations.report import PatchReport
from lorafuse.integrations.status import Status, status

__all__ = ["Training"]


class Training:
    """One model in the hands of a trainer, from its patch to its first step.

    Args:
        backend, strict, groups, dropout_rng, numerics: as in `lorafuse.patch`. With `strict`, a first step in which a
            layer did not run fused raises RuntimeError too.
        log: is given the report and the status as text, on the process whose turn it is; None for neither.
    """

    def __init__(
        self,
        backend: str = "auto",
        strict: bool = False,
        groups: bool = True,
        log: Callable[[str], object] | None = print,
        dropout_rng: str = "philox",
        numerics: str = "fused",
    ) -> None:
        self.strict, self.log = strict, log
        self.options: dict[str, Any] = {
            "backend": backend, "strict": strict, "groups": groups, "dropout_rng": dropout_rng, "numerics": numerics
        }  # fmt: skip
        self.report: PatchReport | None = None
        self.status: Status | None = None

    def early(self, model: nn.Module | None) -> None:
        """Patch a model that a trainer was just given, before it wraps it; one without adapters yet stays as it is."""
        if model is not None and _has_adapters(model):
            self.report = patch(model, **self.options)

    def begin(self, model: nn.Module, shows: bool = True) -> None:
        """Patch what is trained: a model that came since, and layers that were not there. `shows` is False on processes
        that log nothing.

        Raises ValueError for a model without adapted layers. Warns of those whose adapters are merged or disabled.
        """
        if not _has_adapters(model):
            raise ValueError(
                f"lorafuse's callback has nothing to patch: {type(model).__name__} has no adapted layer when training "
                "begins; give the trainer a peft_config or a PEFT model, or remove the callback"
            )
        if off := _off(model):
            warnings.warn(
                f"lorafuse: the adapters of {off} layers are merged or disabled and train nothing: "
                "model.unmerge_adapter() or model.enable_adapter_layers() comes before training",
                stacklevel=2,
            )
        self.status = None
        self.report = patch(model, **self.options)
        if shows and self.log is not None:
            self.log(str(self.report))

    def stepped(self, model: nn.Module, shows: bool = True) -> None:
        """After a step: the first time, what it ran. Warns (UserWarning) when no layer ran fused.

        Raises RuntimeError with `strict` when a layer did not.
        """
        if self.status is not None:
            return
        self.status = status(model)
        if shows and self.log is not None:
            self.log(str(self.status))
        # layers that the first batch does not reach have no say
        others = [row for row in self.status.layers if row.fallbacks or row.reason or row.compiled_reason]
        if self.strict and any(not row.fused for row in others):
            raise RuntimeError(f"lorafuse is to be strict, and a layer did not run fused:\n{self.status}")
        if not self.status.fused:
            warnings.warn(f"lorafuse: no layer ran fused in the first step\n{self.status}", stacklevel=2)


def _has_adapters(model: nn.Module) -> bool:
    """Whether the model has a layer of one of PEFT's tuners; nobody can have made one without importing PEFT."""
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    return tuners is not None and any(isinstance(module, tuners.BaseTunerLayer) for module in model.modules())


def _off(model: nn.Module) -> int:
    """How many adapted layers have no adapter of their own to train."""
    tuner = sys.modules["peft.tuners.tuners_utils"].BaseTunerLayer
    return sum(isinstance(m, tuner) and bool(m.merged or m.disable_adapters) for m in model.modules())
