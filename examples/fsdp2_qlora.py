"""FSDP2 over a base in NF4: the packed codes are sharded, decoded where a product reads them.

torchrun --nproc-per-node 2 examples/fsdp2_qlora.py
"""

import torch
import torch.distributed as dist
from fsdp2 import save, sharded
from peft import LoraConfig, get_peft_model
from quantized import load

import lorafuse


def main(folder: str = "adapter", steps: int = 4) -> list[float]:
    # FSDP2 shards the parameters of a block as one: codes, norms and adapters all have this dtype
    base = load(storage=torch.bfloat16)
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
    model = get_peft_model(base, config, autocast_adapter_dtype=False).to(torch.bfloat16)
    report = lorafuse.patch(model)
    if dist.get_rank() == 0:
        print(report)
    model = sharded(model, torch.device("cpu"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    tokens = torch.randint(0, 128, (dist.get_world_size(), 4, 32))[dist.get_rank()]
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
