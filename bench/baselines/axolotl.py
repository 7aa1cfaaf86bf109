"""Axolotl's LoRA kernels, handed PEFT's layers as its patched models hand them: adapters in fp32.

Gate and up without the down projection, which it never runs apart, go through the kernel of a single layer one by one.
"""

import tempfile
from types import SimpleNamespace

from lorafuse.bench.layers import peft_linear
from lorafuse.bench.problem import numbered
from lorafuse.bench.result import Failed

# of one projection it has a function for o_proj only: q, k and v, and the MLP's three, run as groups
LABEL = {
    "linear": "Axolotl, o_proj's apply_lora_o",
    "group": "Axolotl, apply_lora_qkv",
    "mlp": "Axolotl, apply_lora_mlp",
    "layer": "Axolotl",
    "model": "Axolotl",
}
REQUIRES = ("axolotl",)
# its imports register operators and bring bitsandbytes
ISOLATED = True


def unavailable(kind, device):
    return "" if device.type == "cuda" else "needs a GPU"


def _block(*names, given):
    """The module with the projections that its functions expect, and the trained tensors of each projection."""
    built = [peft_linear(one) for one in given]
    block = SimpleNamespace(training=True, **dict(zip(names, (layer for layer, _ in built), strict=True)))
    return block, [trained for _, trained in built]


def linear(given):
    from axolotl.kernels.lora import apply_lora_o

    block, (trained,) = _block("o_proj", given=[given])
    # its backward takes [batch, tokens, features] only
    return (lambda x: apply_lora_o(block, x[None])[0]), trained


def group(given):
    from axolotl.kernels.lora import apply_lora_o, apply_lora_qkv

    if len(given) == 3:
        block, every = _block("q_proj", "k_proj", "v_proj", given=given)

        # not in place: versions before July 2026 write dx over x then, and the next call would read that
        def call(x):
            return [y[0] for y in apply_lora_qkv(block, x[None], inplace=False)]
    else:
        blocks, trained = zip(*(_block("o_proj", given=[one]) for one in given), strict=True)
        every = [one for (one,) in trained]

        def call(x):
            return [apply_lora_o(block, x[None])[0] for block in blocks]

    return call, numbered(every)


def mlp(given):
    from axolotl.kernels.lora import apply_lora_mlp_swiglu

    block, every = _block("gate_proj", "up_proj", "down_proj", given=given)
    return (lambda x: apply_lora_mlp_swiglu(block, x[None], inplace=False)[0]), numbered(every)


def model(given):
    """PEFT's model with its patches of attention and MLP, as its configuration turns them on, under autocast."""
    from axolotl.monkeypatch.lora_kernels import apply_lora_kernel_patches, patch_self_attn_lora
    from axolotl.utils.dict import DictDefault

    if given.has_experts:
        raise Failed("its patches of experts are the baseline axolotl-scattermoe")
    with tempfile.TemporaryDirectory() as folder:
        # it reads the model's class from there
        given.base.config.save_pretrained(folder)
        kernels = {f"lora_{name}_kernel": True for name in ("mlp", "qkv", "o")}
        settings = DictDefault({"base_model": folder, **kernels})
        patch_self_attn_lora(settings)
        return apply_lora_kernel_patches(given.adapted(), settings), {"autocast": True}
