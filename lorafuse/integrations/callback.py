"""`LorafuseCallback` for transformers' Trainer and what derives from it: TRL, LLaMA-Factory, Axolotl, ms-swift.

    trainer = SFTTrainer(model, args, peft_config=LoraConfig(...), callbacks=[LorafuseCallback()])

A trainer that is given a `peft_config` makes the PEFT model itself, so there is nothing to patch before it. The
callback patches at the end of the trainer's constructor, before the model is wrapped or sharded, and again when
training begins, for models that come later (`model_init`, hyperparameter search).
"""

from collections.abc import Callable
from typing import Any

from lorafuse.errors import MissingDependency
from lorafuse.integrations.training import Training

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise MissingDependency("LorafuseCallback needs transformers: pip install 'lorafuse[peft]'") from error

__all__ = ["LorafuseCallback"]


class LorafuseCallback(TrainerCallback):
    """Patches the model that a Trainer trains, and shows after the first step what ran.

    Args:
        backend, strict, groups, dropout_rng, numerics: as in `lorafuse.patch`. With `strict`, a first step in which an
            adapted layer did not run fused raises RuntimeError.
        log: is called with the texts on the first process; None for none.

    `training.report` and `training.status` hold what was patched and what ran. Training a model without adapted layers
    raises ValueError, and a first step in which nothing ran fused warns.
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

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.training.early(model)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.training.begin(model, state.is_world_process_zero)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.training.stepped(model, state.is_world_process_zero)
