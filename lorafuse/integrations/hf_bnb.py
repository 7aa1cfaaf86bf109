"""PEFT's LoRA layers over bitsandbytes' quantized ones, run by lorafuse; imported where PEFT has imported its own."""

from peft.tuners.lora.bnb import Linear4bit, Linear8bitLt

from lorafuse.integrations.hf_peft import Member, fused, rejoins

__all__ = ["SHIPPED", "FusedLinear4bit", "FusedLinear8bitLt"]


class FusedLinear4bit(Linear4bit, Member):
    """`peft.tuners.lora.bnb.Linear4bit` whose forward is one lorafuse operator."""

    _lorafuse_kind = Linear4bit
    forward = fused(Linear4bit)
    __setstate__ = rejoins(Linear4bit)


class FusedLinear8bitLt(Linear8bitLt, Member):
    """`peft.tuners.lora.bnb.Linear8bitLt` whose forward is one lorafuse operator."""

    _lorafuse_kind = Linear8bitLt
    forward = fused(Linear8bitLt)
    __setstate__ = rejoins(Linear8bitLt)


# our class: PEFT's
SHIPPED: dict[type, type] = {FusedLinear4bit: Linear4bit, FusedLinear8bitLt: Linear8bitLt}
for _ours, _shipped in SHIPPED.items():
    # PEFT knows a layer by this name; pickle goes by __module__ and __qualname__
    _ours.__name__ = _shipped.__name__
