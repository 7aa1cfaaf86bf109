"""FSDP2: the patched model's blocks sharded, the adapter gathered and saved by rank 0.

    torchrun --nproc-per-node 2 examples/fsdp2.py

On two machines, once on each, with its own --node-rank:

    torchrun --nnodes 2 --node-rank 0 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \\
        examples/fsdp2.py
"""

import os

import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel, get_peft_model
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

import lorafuse


def base_model() -> torch.nn.Module:
    """In your code: AutoModelForCausalLM.from_pretrained(…, dtype=torch.bfloat16)."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=128, num_attention_heads=4, num_key_value_heads=2, **sizes))


def sharded(model: PeftModel, device: torch.device) -> PeftModel:
    """Every block gathers its weights for its own forward and backward alone."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in model.base_model.model.model.layers:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def save(model: PeftModel, folder: str) -> None:
    """PEFT's files, written by rank 0; frozen weights are not gathered."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    state = get_model_state_dict(model, options=options)
    if dist.get_rank() == 0:
        model.save_pretrained(folder, state_dict=state)


def main(folder: str = "adapter", steps: int = 4) -> list[float]:
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # every rank must begin with the same adapters
    torch.manual_seed(0)
    model = get_peft_model(base_model().to(device), LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    report = lorafuse.patch(model)
    if dist.get_rank() == 0:
        print(report)
    model = sharded(model, device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    # and each reads its own part of the data
    tokens = torch.randint(0, 128, (dist.get_world_size(), 4, 32))[dist.get_rank()].to(device)
    losses = []
    for step in range(steps):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if dist.get_rank() == 0:
            print(f"step {step}: loss {loss.item():.4f}")
    if dist.get_rank() == 0:
        print(lorafuse.status(model))
    save(model, folder)
    dist.destroy_process_group()
    return losses


if __name__ == "__main__":
    main()
