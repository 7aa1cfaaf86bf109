"""Adapted layers that another library's kernels bypass: these read the weights and never call the layers."""

from torch import nn

__all__ = ["bypassed"]

# attribute that the kernel replaces: the children whose weights it reads; those of linear attention (Qwen3.5) are there
# for kernels alone
_LINEAR_ATTENTION = {
    "apply_in_proj_fused": ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"),
    "apply_out_proj": ("out_proj",),
}
_READS = {
    "apply_qkv": ("q_proj", "k_proj", "v_proj"),
    "apply_o": ("o_proj",),
    "forward": ("gate_proj", "up_proj", "down_proj"),
    **_LINEAR_ATTENTION,
}
_ADVICE = {
    "unsloth": "Unsloth and lorafuse exclude each other, load the model by transformers and PEFT",
    "axolotl": "set lora_mlp_kernel, lora_qkv_kernel and lora_o_kernel to false, as lorafuse's plugin for Axolotl does",
}


_FUSED_LOSS = (
    "liger_kernel's fused cross entropy reads its weight and never calls it in training, so that its adapter learns "
    'nothing, in PEFT too: liger_kernel_config={"fused_linear_cross_entropy": False}, or no adapter on lm_head'
)


def bypassed(module: nn.Module) -> dict[nn.Module, str]:
    """The children of an attention, MLP or language model that another library's kernel reads, with the reason; empty
    for most."""
    reasons: dict[nn.Module, str] = {}
    for attribute, children in _READS.items():
        function = getattr(module.__dict__.get(attribute), "__func__", None)
        name, library = getattr(function, "__name__", ""), getattr(function, "__module__", "").partition(".")[0]
        # the same attributes hold functions that do call the layers, where an adapter has what the kernels lack
        if library in _ADVICE and (name.startswith("apply_lora") or attribute in _LINEAR_ATTENTION):
            reason = f"{library}'s {name} reads its weights and never calls it: {_ADVICE[library]}"
            reasons |= {module._modules[child]: reason for child in children if child in module._modules}
    head = module._modules.get("lm_head")
    if head is not None and _has_fused_loss(module):
        reasons[head] = _FUSED_LOSS
    return reasons


def _has_fused_loss(module: nn.Module) -> bool:
    """Whether the forward of a language model is one of Liger's, on the object or on its class."""
    function = getattr(module.forward, "__func__", None)
    is_its = getattr(function, "__module__", "").startswith("liger_kernel.")
    return is_its and getattr(function, "__name__", "").startswith("lce_forward")
