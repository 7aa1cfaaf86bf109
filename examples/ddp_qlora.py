"""DDP over a resident base in NF4: every rank holds the packed base, and only adapter gradients are communicated.

torchrun --nproc-per-node 2 examples/ddp_qlora.py
"""

import os

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from quantized import load
from torch.nn.parallel import DistributedDataParallel

import lorafuse


def main(folder: str = "adapter", steps: int = 4) -> list[float]:
    base = load()
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    torch.manual_seed(0)
    model = get_peft_model(base.to(device), LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    report = lorafuse.patch(model)
    communicated = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    if dist.get_rank() == 0:
        print(report)
        print(f"a step communicates {communicated / 2**20:.2f} MiB of gradients")
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    tokens = torch.randint(0, 128, (dist.get_world_size(), 4, 32))[dist.get_rank()].to(device)
    losses = []
    for step in range(steps):
        loss = wrapped(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if dist.get_rank() == 0:
            print(f"step {step}: loss {loss.item():.4f}")
    if dist.get_rank() == 0:
        print(lorafuse.status(model))
        model.save_pretrained(folder)
    dist.destroy_process_group()
    return losses


if __name__ == "__main__":
    main()
