"""`LorafuseCallback` for Lightning: `Trainer(callbacks=[LorafuseCallback()])` over a module that holds a PEFT model."""

from collections.abc import Callable
from typing import Any

from lorafuse.errors import MissingDependency
from lorafuse.integrations.training import Training

try:
    from lightning.pytorch import Callback
except ImportError:
    try:
        from pytorch_lightning import Callback
    except ImportError as error:
        raise MissingDependency("this callback needs Lightning: pip install lightning") from error

__all__ = ["LorafuseCallback"]


class LorafuseCallback(Callback):
    """Patches before the strategy wraps the module, to validate or test it too, and again when training begins; shows
    what the first step ran.

    Args as of `lorafuse.integrations.callback.LorafuseCallback`.
    """

    def __init__(
        self,
        *,
        backend: str = "auto",
        strict: bool = False,
        groups: bool = True,
        log: Callable[[str], object] | None = print,
        dropout_rng: str = "philox",
        numerics: str = "fused",
    ) -> None:
        self.training = Training(backend, strict, groups, log, dropout_rng, numerics)

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.training.early(pl_module)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        # a module that builds its model in configure_model has none in setup
        self.training.begin(pl_module, trainer.is_global_zero)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.training.stepped(pl_module, trainer.is_global_zero)
