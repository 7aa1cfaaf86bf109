"""PEFT's LoRA layers over bitsandbytes' quantized ones, run by lorafuse; imported where PEFT has imported its own."""

from peft.tuners.lora.bnb import Linear4bit, Linear8bitLt

from lorafuse.integrations.hf_peft import fused

__all__ = ["FUSED", "FusedLinear4bit", "FusedLinear8bitLt"]


class FusedLinear4bit(Linear4bit):
    """`peft.tuners.lora.bnb.Linear4bit` whose forward is one lorafuse operator."""

    forward = fused(Linear4bit)


class FusedLinear8bitLt(Linear8bitLt):
    """`peft.tuners.lora.bnb.Linear8bitLt` whose forward is one lorafuse operator."""

    forward = fused(Linear8bitLt)


# PEFT's class: ours
FUSED: dict[type, type] = {Linear4bit: FusedLinear4bit, Linear8bitLt: FusedLinear8bitLt}
for _kind, _fused in FUSED.items():
    # PEFT knows a layer by this name; pickle goes by __module__ and __qualname__
    _fused.__name__ = _kind.__name__
