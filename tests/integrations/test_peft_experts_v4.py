"""Adapters saved under transformers 4, one for each expert's own linear layers: PEFT converts them when it loads them.

gate and up become one parameter, their adapters one of twice the rank with lora_B block-diagonal.
"""

import copy

import moe_models
import peft
import pytest
import torch
from safetensors.torch import save_file
from test_peft_experts import check, step

from lorafuse.testing.numerics import relative_l2, tolerance

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::RuntimeWarning:peft")
R, EXPERTS, INNER = 3, 4, 24


@pytest.fixture
def saved(tmp_path):
    """`(folder, {layer, expert, name: (lora_A, lora_B)})` of a Mixtral adapter as transformers 4 had it saved."""
    generator = torch.Generator().manual_seed(4)
    sizes = {"w1": (INNER, moe_models.HIDDEN), "w2": (moe_models.HIDDEN, INNER), "w3": (INNER, moe_models.HIDDEN)}
    factors, state = {}, {}
    for layer in range(2):
        for expert in range(EXPERTS):
            for name, (rows, columns) in sizes.items():
                a = torch.randn(R, columns, generator=generator)
                b = torch.randn(rows, R, generator=generator)
                factors[layer, expert, name] = a, b
                prefix = f"base_model.model.model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}"
                state |= {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}
    config = peft.LoraConfig(r=R, lora_alpha=2 * R, target_modules=["w1", "w2", "w3"], task_type="CAUSAL_LM")
    config.save_pretrained(tmp_path)
    save_file(state, tmp_path / "adapter_model.safetensors")
    return tmp_path, factors


def merged(factors):
    """The base with every expert's W + 2 · B A written into its stacks: what such an adapter means."""
    model = moe_models.base("mixtral")
    for layer, block in enumerate(model.model.layers):
        stacks = block.mlp.experts
        for expert in range(EXPERTS):
            delta = {name: 2 * b @ a for (i, e, name), (a, b) in factors.items() if (i, e) == (layer, expert)}
            stacks.gate_up_proj.data[expert] += torch.cat([delta["w1"], delta["w3"]])
            stacks.down_proj.data[expert] += delta["w2"]
    return model


def test_a_converted_adapter_runs_fused_and_means_what_it_meant(saved):
    folder, factors = saved
    model = peft.PeftModel.from_pretrained(moe_models.base("mixtral"), folder, is_trainable=True)
    ranks = {m.r["default"] for m in model.modules() if isinstance(m, peft.tuners.lora.ParamWrapper)}
    assert ranks == {R, 2 * R}
    patched = check(copy.deepcopy(model))
    with torch.no_grad():
        expected = merged(factors)(input_ids=moe_models.token_ids()).logits
    assert relative_l2(step(patched)["logits"], expected) <= tolerance(torch.float32)
