"""A model's configuration: where it is, what it says, the model that it describes, on the meta device or with weights.

No code of a model's directory is run, no pickle is read, and of transformers only what is a model is built.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorafuse.errors import MissingDependency, one_line
from lorafuse.files import read_json

__all__ = ["config_file", "load_config", "load_model", "load_pretrained", "on_meta"]


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
        from transformers import CONFIG_MAPPING, AutoConfig
    except ImportError as error:
        raise MissingDependency(
            "a model's configuration needs transformers: pip install 'transformers>=5.7'"
        ) from error
    try:
        settings = read_json(file)
        model_type = settings.pop("model_type")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"--model {file}: it must be a JSON object with a model_type ({_reason(error)})") from error
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"--model {file}: transformers here does not know the model_type {model_type!r}; load the model with its "
            "own code and pass it to lorafuse.advise.plan_adapter, which counts its modules"
        )
    try:
        with _quiet():
            return AutoConfig.for_model(model_type, **settings)
    except Exception as error:
        # whatever a configuration's class raises for what it does not expect
        raise ValueError(f"--model {file}: transformers refuses it ({_reason(error)})") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers reports each oddity of a configuration by a line of its own; here its error, if any, says it all."""
    from transformers.utils import logging

    former = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(former)


def on_meta(config: Any, path: Path) -> nn.Module | None:
    """The model that a transformers configuration, that of `path`, describes, without weights.

    None where transformers has none.
    Of its `architectures` the first that is a model of this configuration's kind counts. Raises
    ValueError where the model cannot be built, or a size is 0.
    """
    import transformers

    try:
        build = next(filter(None, (_model_class(name, config) for name in _architectures(config))), None)
        for auto in (transformers.AutoModelForCausalLM, transformers.AutoModel):
            if build is None and type(config) in auto._model_mapping:
                build = auto.from_config
        if build is None:
            return None
        with torch.device("meta"), _quiet():
            model: nn.Module = build(config)
    except Exception as error:
        # whatever a model raises for sizes that it does not expect
        raise ValueError(f"--model {path}: transformers cannot build a model of it ({_reason(error)})") from error
    for name, parameter in model.named_parameters():
        if not parameter.numel():
            raise ValueError(f"--model {path}: {name} would be {list(parameter.shape)}; no size of a model may be 0")
    return model


def _architectures(config: Any) -> list[str]:
    named = config.architectures
    return [name for name in named if isinstance(name, str)] if isinstance(named, list) else []


def _model_class(name: str, config: Any) -> Any:
    """The model class of transformers of that name; None for anything else, and for the model of another kind."""
    import transformers

    cls = getattr(transformers, name, None)
    if not isinstance(cls, type) or not issubclass(cls, transformers.PreTrainedModel):
        return None
    kind = getattr(cls, "config_class", None)
    return cls if kind is not None and isinstance(config, kind) else None


def load_model(directory: Path, **options: Any) -> Any:
    """The causal language model of a directory, with its weights. Raises ValueError where it cannot be loaded."""
    from transformers import AutoModelForCausalLM

    if "gguf_file" not in options:
        options["use_safetensors"] = True
        pickles = sorted(file.name for end in ("bin", "pt", "pth", "ckpt") for file in directory.glob(f"*.{end}"))
        if pickles and not any(directory.glob("*.safetensors")):
            raise ValueError(
                f"--model {directory}: its weights are pickles ({', '.join(pickles)}), which can run any code when "
                "they are read; save them as safetensors: save_pretrained does"
            )
    return load_pretrained(AutoModelForCausalLM, directory, **options)


def load_pretrained(auto: Any, directory: Path, **options: Any) -> Any:
    """`auto.from_pretrained` of a directory, without its own code. Raises ValueError, with the reason."""
    try:
        return auto.from_pretrained(str(directory), trust_remote_code=False, **options)
    except Exception as error:
        # of transformers, tokenizers, safetensors, for whatever the files hold
        raise ValueError(f"--model {directory}: transformers cannot load it ({_reason(error)})") from error


def _reason(error: Exception) -> str:
    text = one_line(str(error))
    return f"{type(error).__name__}: {text if len(text) <= 400 else text[:400] + '…'}"
