"""Liger's RMSNorm, rotary embedding, SwiGLU and fused cross entropy in a whole model, as `use_liger_kernel=True` of the
Hugging Face Trainer puts them there, under autocast: around PEFT's adapters as shipped, or patched by lorafuse.

Liger's SwiGLU is a forward on each MLP, which leaves gate and up a group of two; "lorafuse-mlp" leaves it out, so that
the whole MLP is one operator.
"""

import lorafuse

LABEL = "Liger"
REQUIRES = ("liger_kernel",)
# it replaces the rotary embedding of transformers' module, for every model of the process
ISOLATED = True
FORMS = {"peft": {}, "lorafuse": {"patched": True}, "lorafuse-mlp": {"patched": True, "swiglu": False}}


def unavailable(kind, device, patched=False, swiglu=True):
    return "" if device.type == "cuda" else "needs a GPU"


def model(given, patched=False, swiglu=True):
    # what the Trainer calls: no public function takes a model of any family
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    whole = given.adapted()
    _apply_liger_kernel_to_instance(model=whole.get_base_model(), swiglu=swiglu)
    facts = {"autocast": True}
    if patched:
        report = lorafuse.patch(whole)
        facts |= {"patched": len(report.patched), "skipped": len(report.skipped)}
    return whole, facts
