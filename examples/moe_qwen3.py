"""A mixture-of-experts model: attention and experts adapted, one training loop, the adapter saved.

python examples/moe_qwen3.py
"""

import torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import lorafuse

# PEFT adapts the stacks of experts by the names of their parameters
CONFIG = LoraConfig(
    r=4,
    lora_alpha=8,
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
    target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
)


def base_model() -> torch.nn.Module:
    """In your code: AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-30B-A3B", dtype=torch.bfloat16)."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    experts = {"num_experts": 8, "num_experts_per_tok": 2}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(vocab_size=128, **sizes, **heads, **experts))


def main(folder: str = "adapter", steps: int = 4) -> list[float]:
    torch.manual_seed(0)
    model = get_peft_model(base_model(), CONFIG)
    print(lorafuse.patch(model))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    tokens = torch.randint(0, 128, (4, 32))
    losses = []
    for step in range(steps):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        print(f"step {step}: loss {loss.item():.4f}")
    # what ran, where the report above is what can
    print(lorafuse.status(model))
    model.save_pretrained(folder)
    return losses


if __name__ == "__main__":
    main()
