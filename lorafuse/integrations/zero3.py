"""Patched models under DeepSpeed's ZeRO-3, which holds a part of each weight and gathers it around a module's call."""

from torch import nn

from lorafuse.errors import MissingDependency
from lorafuse.integrations.patching import patched_layers
from lorafuse.integrations.report import PatchReport

__all__ = ["prepare_zero3"]


def prepare_zero3(model: nn.Module) -> int:
    """Make every patched layer one that ZeRO-3 gathers as a whole; returns how many.

    Call it after `lorafuse.patch` and before `deepspeed.initialize` (before `Trainer.train`). ZeRO-3 gathers a weight
    for the call of the module that holds it. A fused layer never calls the modules inside it, so without this its
    weights would be empty and it would run as PEFT ships it. DeepSpeed then gathers base, A and B together around the
    layer's forward and again around its backward, and calls no hook of the modules inside. Groups are taken apart: one
    operator would read the weights of all its layers at once.

    DeepSpeed sums the gradients of such a layer once those of its inputs are there, and at once where no input has one.
    So the model's embeddings are made to require a gradient (`enable_input_require_grads` of transformers; another
    model's input must). Of activation checkpointing the reentrant kind works (`use_reentrant=True`): the other computes
    a layer again after its weights were gathered for backward, which frees them.

    Stages 1 and 2 hold whole weights and need no call.

    Raises TypeError when model is not an `nn.Module`; ValueError when it has no patched layer; RuntimeError after
    `deepspeed.initialize`; MissingDependency without DeepSpeed.
    """
    layers = patched_layers(model, "prepare_zero3")
    try:
        from deepspeed.utils import set_z3_leaf_module
    except ImportError as error:
        raise MissingDependency("prepare_zero3 prepares a model for DeepSpeed: pip install deepspeed") from error
    if not layers:
        raise ValueError(
            f"prepare_zero3 got a {type(model).__name__} without a patched layer: call lorafuse.patch(model) first"
        )
    # DeepSpeed's mark of a module that has its hooks
    if any(hasattr(layer, "ds_id") for layer in layers):
        raise RuntimeError(
            "prepare_zero3 came after deepspeed.initialize, which has already put hooks on the modules inside the "
            "patched layers: call it before"
        )
    if callable(enable := getattr(model, "enable_input_require_grads", None)):
        enable()
    for layer in layers:
        set_z3_leaf_module(layer, True)
    # not at the top: it imports PEFT
    from lorafuse.integrations.hf_model import regroup

    regroup(model, layers, PatchReport(), False)
    return len(layers)
