"""Expert parallelism: each process holds some experts of every block, and transformers brings the tokens to them.

torchrun --nproc-per-node 2 examples/ep_qwen3.py
"""

import os
import tempfile

import torch
import torch.distributed as dist
from moe_qwen3 import CONFIG, base_model
from peft import get_peft_model
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import lorafuse


def average_gradients(parameters: list[torch.nn.Parameter]) -> None:
    """The adapters came after sharding: they are whole on every rank, and no wrapper averages their gradients."""
    for parameter in parameters:
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()


def main(folder: str = "adapter", steps: int = 4) -> list[float]:
    with tempfile.TemporaryDirectory() as name:
        # in your code name is that of your model; in a process group only one rank would write it
        torch.manual_seed(0)
        base_model().save_pretrained(name)
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        # of 8 GPUs in each of 4 nodes: fsdp_size=32, ep_size=8; tokens are then exchanged within a node
        layout = DistributedConfig(fsdp_size=dist.get_world_size(), ep_size=dist.get_world_size())
        base = AutoModelForCausalLM.from_pretrained(name, distributed_config=layout)
    # every rank must begin with the same adapters
    torch.manual_seed(0)
    model = get_peft_model(base, CONFIG)
    report = lorafuse.patch(model)
    if dist.get_rank() == 0:
        print(report)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    tokens = torch.randint(0, 128, (dist.get_world_size(), 4, 32))[dist.get_rank()].to(parameters[0].device)
    losses = []
    for step in range(steps):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        average_gradients(parameters)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if dist.get_rank() == 0:
            print(f"step {step}: loss {loss.item():.4f}")
    if dist.get_rank() == 0:
        print(lorafuse.status(model))
        # the adapters alone: without `state_dict` every rank would have to come here, and the base would be gathered
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        model.save_pretrained(folder, state_dict=trained)
    dist.destroy_process_group()
    return losses


if __name__ == "__main__":
    main()
