"""Axolotl's ScatterMoE-LoRA: PEFT's experts as shipped, run by its kernels through transformers' experts interface.

Adapters in fp32 in PEFT's packing; it casts and packs them anew in every call. Its kernels multiply float32 in TF32,
which the gate finds wrong.
"""

from lorafuse.bench.layers import peft_experts

LABEL = "Axolotl, ScatterMoE-LoRA"
REQUIRES = ("axolotl",)
# registering its experts patches PEFT and transformers
ISOLATED = True


def unavailable(kind, device):
    return "" if device.type == "cuda" else "needs a GPU"


def experts(given):
    from axolotl.integrations.kernels.libs.scattermoe_lora.experts import register_scattermoe_experts
    from peft.tuners.lora.layer import ParamWrapper

    before = ParamWrapper.forward
    register_scattermoe_experts()
    # it passes over a PEFT that it does not know without a word, and PEFT would build the whole W + delta
    if ParamWrapper.forward is before:
        raise RuntimeError("register_scattermoe_experts() did not patch PEFT: its fused path would not run")
    outer, trained = peft_experts(given)
    outer.base_layer.base_layer.config._experts_implementation = "scattermoe"
    return outer, trained
