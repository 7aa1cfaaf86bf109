"""`lorafuse.nn.LoRAExperts` over experts modules of transformers: for owners of a model, and where PEFT adapts none."""

import torch
from torch import nn

from lorafuse.integrations.hf_transformers import FLAGS, adopted_stack, base_stacks, block_operands
from lorafuse.nn import LoRAExperts

__all__ = ["adapt_experts", "from_experts"]


def from_experts(
    module: nn.Module,
    r: int,
    *,
    alpha: float | None = None,
    shared_outer: bool = False,
    adapter_dtype: torch.dtype | None = None,
) -> LoRAExperts:
    """A `LoRAExperts` over one experts module of transformers, whose stacks and biases are shared and frozen.

    Layout and activation are read from what transformers declares of the module: transposed stacks (GPT-OSS), gate and
    up that alternate, biases, clamped gates, experts without a gate. Quantized stacks are held as they are.

    Args:
        module: an experts module of transformers >= 5.7, such as `Qwen3MoeExperts` or `GptOssExperts`.
        r, alpha, shared_outer, adapter_dtype: as of `LoRAExperts`.

    Raises ValueError, changing nothing, for a module that holds no such stacks, with the reason.
    """
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    module.requires_grad_(False)
    operands = block_operands(module, base_stacks(module))
    if isinstance(operands, str):
        for parameter in trained:
            parameter.requires_grad_()
        raise ValueError(f"lorafuse.integrations.from_experts: {operands}")
    stacks = operands.pop("gate_up"), operands.pop("down")
    layer = LoRAExperts.from_stacks(
        *stacks, r, alpha=alpha, shared_outer=shared_outer, adapter_dtype=adapter_dtype, **operands
    )
    return layer.train(module.training)


def adapt_experts(
    model: nn.Module,
    r: int,
    *,
    alpha: float | None = None,
    shared_outer: bool = False,
    adapter_dtype: torch.dtype | None = None,
) -> list[str]:
    """Put a `lorafuse.nn.LoRAExperts` in the place of every experts module of a transformers' model, over its stacks.

    The stacks are shared, not copied, and frozen: dense parameters, those that
    `bitsandbytes.nn.parametrize.replace_parameter_4bit` quantized, and transformers' `FP8Experts`, whose products
    quantize x too (a `LoRAExperts` decodes the weights). The model starts as it was (B is zero). Call it
    after `peft.get_peft_model`, which freezes whatever is no adapter of its own. The factors are yours:
    `model.state_dict()` holds them by `…experts.gate_up_lora_A` and so on, PEFT's adapter files do not.

    Args:
        model: any module that holds experts modules of transformers >= 5.7.
        r, alpha, shared_outer, adapter_dtype: of every `LoRAExperts`.

    Returns the names of the modules that were replaced.

    Raises ValueError, changing nothing, for a model without experts modules, and for one whose stacks cannot be held,
    with the reason.
    """
    layers: dict[str, LoRAExperts] = {}
    problems: list[str] = []
    trained: list[nn.Parameter] = []
    for name, module in model.named_modules():
        if not all(hasattr(module, flag) for flag in FLAGS) or isinstance(module, LoRAExperts):
            # stacks in the order of a library's kernels, which no implementation of transformers runs
            if isinstance(refusal := adopted_stack(module, "down_proj"), str):
                problems.append(f"{name}: its down_proj {refusal}")
            continue
        trained += [parameter for parameter in module.parameters() if parameter.requires_grad]
        try:
            layers[name] = from_experts(module, r, alpha=alpha, shared_outer=shared_outer, adapter_dtype=adapter_dtype)
        except ValueError as error:
            problems.append(f"{name}: {error}")
    if problems:
        for parameter in trained:
            parameter.requires_grad_()
        raise ValueError("lorafuse.integrations.adapt_experts changed nothing: " + "; ".join(problems))
    if not layers:
        raise ValueError(
            f"lorafuse.integrations.adapt_experts got a {type(model).__name__} without experts modules of transformers "
            ">= 5.7, which hold one stack for all experts"
        )
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    return list(layers)
