"""A model's configuration: where it is, what it says, and the model that it describes, on the meta device."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorafuse.errors import MissingDependency

__all__ = ["config_file", "load_config", "on_meta"]


def config_file(path: Path, must_be: str = "a model's directory or its config.json") -> Path:
    """The `config.json` in a directory, or `path` itself. Raises FileNotFoundError, with what `path` must be."""
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"--model {path}: no config.json there; it must be {must_be}")
    return file


def load_config(path: Path) -> Any:
    """The transformers configuration of a directory or file.

    Raises FileNotFoundError where there is none, ValueError where it is not one that transformers knows.
    """
    file = config_file(path)
    try:
        from transformers import AutoConfig
    except ImportError as error:
        raise MissingDependency(
            "a model's configuration needs transformers: pip install 'transformers>=5.7'"
        ) from error
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        model_type = settings.pop("model_type")
    except (ValueError, KeyError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"--model {file}: it must be a JSON object with a model_type ({reason})") from error
    try:
        return AutoConfig.for_model(model_type, **settings)
    except ValueError as error:
        raise ValueError(
            f"--model {file}: transformers here does not know the model_type {model_type!r}; load the model with its "
            "own code and pass it to lorafuse.advise.plan_adapter, which counts its modules"
        ) from error


def on_meta(config: Any) -> nn.Module | None:
    """The model that a transformers configuration describes, without weights; None where transformers has none."""
    import transformers

    named = (getattr(transformers, name, None) for name in config.architectures or ())
    build = next((model for model in named if model is not None), None)
    for auto in (transformers.AutoModelForCausalLM, transformers.AutoModel):
        if build is None and type(config) in auto._model_mapping:
            build = auto.from_config
    if build is None:
        return None
    with torch.device("meta"):
        return build(config)
