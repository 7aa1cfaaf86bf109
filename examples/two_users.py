"""A service for two users: one resident base, an adapter for each, their samples in one batch, steps of their own.

python examples/two_users.py
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lorafuse.adapters import AdamParams, AdapterPool, MultiAdamW

VOCABULARY = 64


def base_model() -> torch.nn.Module:
    """In your code: AutoModelForCausalLM.from_pretrained, quantized or not."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, num_attention_heads=4, num_key_value_heads=2, **sizes))


def samples(count: int, step: int, length: int = 12) -> torch.Tensor:
    """What a user sends: token ids `[count, length]`; here one counts up by 1, the other by 3."""
    first = torch.randint(0, VOCABULARY, (count, 1))
    return (first + step * torch.arange(length)) % VOCABULARY


def main(folder: str = "adapters", steps: int = 20) -> dict[str, list[float]]:
    torch.manual_seed(0)
    model = base_model()
    pool = AdapterPool(model, ["q_proj", "v_proj", "up_proj", "down_proj"])
    optimizer = MultiAdamW(pool)
    # ranks, targets and settings are each user's own
    users = {
        "ann": (pool.allocate(8, alpha=16, seed=1), AdamParams(lr=2e-2, max_grad_norm=1.0)),
        "bob": (pool.allocate(1, alpha=32, seed=2, targets=["v_proj", "down_proj"]), AdamParams(lr=1e-2)),
    }
    losses: dict[str, list[float]] = {name: [] for name in users}
    for step in range(steps):
        # one forward and one backward for both: 2 samples of ann, 3 of bob
        batch = {"ann": samples(2, 1), "bob": samples(3, 3)}
        tokens = torch.cat(list(batch.values()))
        with pool.use_adapters([users[name][0] for name, ids in batch.items() for _ in ids]):
            logits = model(input_ids=tokens).logits[:, :-1]
            nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none").sum(1)
            mine = dict(zip(batch, nll.split([len(ids) for ids in batch.values()]), strict=True))
            # a weight that bob computed wrong: his step is skipped, ann's is what it is without him
            weights = {"ann": 1.0, "bob": float("inf") if step == 3 else 1.0}
            torch.stack([weights[name] * one.sum() for name, one in mine.items()]).sum().backward()
        # gradients are sums over tokens; each user divides by his own
        sizes = {name: ids[:, 1:].numel() for name, ids in batch.items()}
        settings = {slot: AdamParams(**vars(own) | {"grad_scale": 1 / sizes[n]}) for n, (slot, own) in users.items()}
        results = optimizer.step(settings)
        for name, (slot, _) in users.items():
            losses[name].append(mine[name].sum().item() / sizes[name])
            if results[slot].is_skipped:
                print(f"step {step}: the gradient of {name} is not finite; his adapter stays as it was")
    for name, (slot, _) in users.items():
        # PEFT's files: vLLM and PeftModel.from_pretrained read them
        pool.export(slot, f"{folder}/{name}")
        pool.release(slot)
        print(f"{name}: loss {losses[name][0]:.3f} to {losses[name][-1]:.3f}")
    pool.close()
    return losses


if __name__ == "__main__":
    main()
