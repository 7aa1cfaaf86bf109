"""`patch` and `unpatch`: give the adapted layers of a model to lorafuse, and give them back."""

import warnings
from types import ModuleType
from typing import Any

from torch import nn

from lorafuse.backends import base
from lorafuse.errors import MissingDependency
from lorafuse.integrations.report import PatchReport
from lorafuse.ops.served import check_numerics
from lorafuse.philox import check_dropout_rng
from lorafuse.versions import MINIMUM, is_older

__all__ = ["patch", "patched_layers", "unpatch"]


def _hf_model() -> ModuleType:
    try:
        import peft
    except ImportError as error:
        oldest = f"pip install 'peft>={MINIMUM['peft']}'"
        raise MissingDependency(f"lorafuse.patch works on PEFT models: {oldest}") from error
    if is_older(peft.__version__, MINIMUM["peft"]):
        raise MissingDependency(
            f"lorafuse.patch needs peft >= {MINIMUM['peft']}, found {peft.__version__}: pip install -U peft"
        )
    from lorafuse.integrations import hf_model

    return hf_model


def patch(
    model: nn.Module, *, backend: str = "auto", strict: bool = False, groups: bool = True, dropout_rng: str = "philox",
    numerics: str = "fused",
) -> PatchReport:  # fmt: skip
    """Run every LoRA layer of a PEFT model fused, in place; the rest of the model and its files stay as they are.

    Parameters, state dict, configuration and adapter management remain PEFT's: train, save, load, merge, switch, add
    and delete adapters as before. Quantized bases are read where they lie. A layer that cannot run fused is left to
    PEFT and listed with the reason. Calling it again is safe: it takes in layers that came since (an adapter added on
    new target modules) and reports the present state.

    Args:
        model: a `PeftModel`, or any module that contains PEFT's LoRA layers.
        backend: the one every patched layer must use; "auto" follows `lorafuse.use_backend`, which chooses by itself
            unless told.
        strict: raise ValueError, leaving the model as it was, if no layer is adapted or any would be left to PEFT.
        groups: run layers of one parent that are called with one x (q, k and v) as one operator, and gated MLPs whole,
            in calls with gradients where x is not small. Names of known families tell which read one x; others are
            learned from one forward. An MLP is known by a run of its forward with small layers. False leaves layers
            and parents apart.
        dropout_rng: "torch" draws the masks that PEFT draws at the same seed, in the same calls, so that curves are
            PEFT's: each is saved for backward, a byte for each element of x, and backend "eager" runs the layers whose
            dropout is on, each alone. "philox" draws lorafuse's own, which no kernel has to read.
        numerics: "vllm" or "sglang" round as the LoRA kernels of those servers do, so that a policy trains on the
            numbers that it samples from (`lorafuse.functional.lora_linear`): layer by layer, plain LoRA without
            dropout on linear layers, at the cost of three products. The rest is left to PEFT. "fused" rounds once.

    Returns:
        a `PatchReport`; `print(report)` shows it as a table.

    Raises:
        TypeError: model is not an `nn.Module`.
        ValueError: unknown backend, dropout_rng or numerics, or "torch" with a backend of kernels; with `strict`, see
            above.
        BackendUnavailable: the backend cannot run here.
        MissingDependency: PEFT is missing or older than `lorafuse.versions.MINIMUM`.

    Warns (UserWarning) when nothing was patched, naming why, and of each of the report's notes: experts of a model
    loaded in 4 or 8 bits that are not quantized, or not adapted, and quantized weights whose scales are not finite.
    """
    base.require(backend)
    check_dropout_rng(dropout_rng, backend)
    check_numerics(numerics)
    if not isinstance(model, nn.Module):
        raise TypeError(f"lorafuse.patch got a {type(model).__name__}; it takes a torch.nn.Module, such as a PeftModel")
    hf_model = _hf_model()
    report, layers = hf_model.survey(model, backend, numerics)
    problem = ""
    if not report.patched and not report.skipped:
        problem = f"{type(model).__name__} has no adapted layer: {_advice(model)}"
    elif not report.patched or (strict and report.skipped):
        problem = str(report)
    if problem and strict:
        raise ValueError(f"lorafuse.patch(strict=True) changed nothing: {problem}")
    if problem:
        warnings.warn(f"lorafuse.patch patched nothing: {problem}", stacklevel=2)
    for note in report.notes:
        warnings.warn(f"lorafuse.patch: {note}", stacklevel=2)
    for layer in layers:
        hf_model.adopt(layer, backend, dropout_rng, numerics)
    if layers:
        hf_model.lift(model)
    hf_model.regroup(model, layers, report, groups and numerics == "fused")
    return report


def _advice(model: nn.Module) -> str:
    """What to do with a model without PEFT's layers: it may have another library's."""
    libraries = {kind.__module__.partition(".")[0] for module in model.modules() for kind in type(module).__mro__}
    for library, name in (("torchtune", "torchtune"), ("nemo_automodel", "automodel")):
        if library in libraries:
            return f"the layers that lorafuse.integrations.{name}.patch takes are no PEFT's"
    return "make it a PEFT model first (peft.get_peft_model), then patch it"


def patched_layers(model: nn.Module, caller: str) -> list[Any]:
    """The patched layers of a model; TypeError, naming the `caller`, when it is no `nn.Module`."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{caller} got a {type(model).__name__}; it takes a torch.nn.Module")
    return _hf_model().patched_layers(model)


def unpatch(model: nn.Module) -> int:
    """Give every patched layer back to PEFT, exactly as it was; returns how many there were.

    Raises TypeError when model is not an `nn.Module`, and RuntimeError, changing nothing, for a layer that was itself
    passed to `fully_shard` after patching.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"lorafuse.unpatch got a {type(model).__name__}; it takes a torch.nn.Module")
    return _hf_model().release(model)
