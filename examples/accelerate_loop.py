"""A plain loop under Accelerate, by the configuration of two machines.

    accelerate launch --config_file examples/accelerate_two_nodes.yaml examples/accelerate_loop.py

on each machine, with its own machine_rank. FSDP2 is what the configuration says; on CPUs accelerate 1.15 wraps with DDP
instead.
"""

import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

import lorafuse


def base_model() -> torch.nn.Module:
    """In your code: AutoModelForCausalLM.from_pretrained(…, dtype=torch.bfloat16)."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=128, num_attention_heads=4, num_key_value_heads=2, **sizes))


def main(folder: str = "adapter") -> list[float]:
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    torch.manual_seed(0)
    model = get_peft_model(base_model(), LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    # before prepare, which wraps the model
    accelerator.print(lorafuse.patch(model))
    loader = DataLoader(torch.randint(0, 128, (32, 32)), batch_size=4)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses = []
    for step, tokens in enumerate(loader):
        loss = model(input_ids=tokens, labels=tokens).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        accelerator.print(f"step {step}: loss {loss.item():.4f}")
    accelerator.print(lorafuse.status(model))
    state = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(folder, state_dict=state)
    accelerator.end_training()
    return losses


if __name__ == "__main__":
    main()
