"""Unsloth's own `LoRA_W`, `LoRA_QKV` and `LoRA_MLP`, called as its patched models call them; and its whole model.

Adapters in fp32, as it trains them; its kernels cast them to x's dtype in every call. Gate and up without the down
projection, which it never runs apart, go through `LoRA_W` one by one.
"""

import tempfile

from lorafuse.bench.problem import SCALE, numbered
from lorafuse.bench.result import Failed
from lorafuse.bench.transformer import set_adapters

# of one projection it has a function for o_proj only: q, k and v, and the MLP's three, run as groups
LABEL = {
    "linear": "Unsloth, o_proj's LoRA_W",
    "group": "Unsloth, LoRA_QKV",
    "mlp": "Unsloth, LoRA_MLP",
    "layer": "Unsloth",
    "model": "Unsloth",
}
REQUIRES = ("unsloth",)
# its import replaces parts of torch, transformers and PEFT
ISOLATED = True


def unavailable(kind, device):
    return "" if device.type == "cuda" else "needs a GPU"


def _kernels():
    # the package before its parts: it refuses to be imported in pieces
    import unsloth
    from unsloth.kernels import fast_lora

    assert unsloth is not None
    return fast_lora


def _projection(given):
    """Weight, its quantization state (none), A, B and scale: the arguments of a projection in all of its functions."""
    a, b = given.a.clone().requires_grad_(), given.b.clone().requires_grad_()
    return given.w, None, a, b, SCALE


def _trained(projections):
    return numbered([{"da": a, "db": b} for _, _, a, b, _ in projections])


def linear(given):
    function, projection = _kernels().LoRA_W, _projection(given)
    # its backward takes [batch, tokens, features] only
    return (lambda x: function.apply(x[None], *projection)[0]), {"da": projection[2], "db": projection[3]}


def group(given):
    kernels, projections = _kernels(), [_projection(one) for one in given]
    if len(given) == 3:
        flat = [part for projection in projections for part in projection]

        # not in place, a switch of its own: in place it writes dx over x, and the next call would read that
        def call(x):
            return [y[0] for y in kernels.LoRA_QKV.apply(x[None], *flat, False)]
    else:

        def call(x):
            return [kernels.LoRA_W.apply(x[None], *projection)[0] for projection in projections]

    return call, _trained(projections)


def mlp(given):
    kernels, projections = _kernels(), [_projection(one) for one in given]
    flat = [part for projection in projections for part in projection]
    swiglu = kernels.swiglu_fg_kernel, kernels.swiglu_DWf_DW_dfg_kernel
    # not in place, as above
    return (lambda x: kernels.LoRA_MLP.apply(x[None], *flat, *swiglu, False)[0]), _trained(projections)


def model(given):
    """A whole model as its users get one: loaded and adapted by its own functions, under autocast like in a Trainer."""
    if given.has_experts:
        raise Failed("its adapters on experts are other work: it takes none on stacked ones")
    _kernels()
    from unsloth import FastLanguageModel

    with tempfile.TemporaryDirectory() as folder:
        given.save(folder)
        whole, _ = FastLanguageModel.from_pretrained(
            folder, max_seq_length=given.sequence, dtype=given.dtype, load_in_4bit=False
        )
    whole = FastLanguageModel.get_peft_model(
        whole, r=given.rank, lora_alpha=int(SCALE * given.rank), target_modules=given.targets, lora_dropout=0,
        bias="none", use_gradient_checkpointing=given.checkpointing, random_state=0, max_seq_length=given.sequence,
    )  # fmt: skip
    set_adapters(whole)
    return whole.train(), {"autocast": True}
