"""LLaMA-Factory with lorafuse: `python -m lorafuse.integrations.llamafactory train.yaml`, or by torchrun.

It is `llamafactory-cli train` with one callback more, which LLaMA-Factory's own command has no option for. The other
arguments and the YAML stay as they are.
"""

from typing import Any

from lorafuse.errors import MissingDependency
from lorafuse.integrations.callback import LorafuseCallback

__all__ = ["train"]


def train(args: dict[str, Any] | None = None, **options: Any) -> None:
    """Run a training of LLaMA-Factory with its model patched.

    Args:
        args: the settings of the YAML; None reads the file, or the flags, that the process was started with.
        options: of `LorafuseCallback`.

    Raises MissingDependency without LLaMA-Factory. `use_unsloth: true` ends when training begins, with the reason.
    """
    try:
        from llamafactory.train.tuner import run_exp
    except ImportError as error:
        raise MissingDependency("LLaMA-Factory is not installed here: pip install llamafactory") from error
    run_exp(args, callbacks=[LorafuseCallback(**options)])


if __name__ == "__main__":
    train()
