"""Patched NF4 layers under FSDP2 (T1): two gloo processes on the CPU, weights sharded as bfloat16 that holds codes."""

import warnings

import pytest
import tiny_families
import torch
from quantized_models import SIZES, adapted, quantize
from test_patch_distributed import fsdp2
from test_patch_quantized import counting
from two_processes import joined, measure, spawn

import lorafuse

pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.no_poison
STEPS = 2


def model():
    """Llama in bf16 over NF4; the dtype of the codes' storage is that of all parameters, which FSDP2 shards as one."""
    warnings.simplefilter("ignore")
    model_class = tiny_families.model_classes("llama")[0]
    sizes = {key: SIZES[key] for key in SIZES if hasattr(tiny_families.tiny_config(model_class.config_class), key)}
    base = tiny_families.tiny_model(model_class, **sizes)
    base = quantize(base.to(torch.bfloat16), "nf4", torch.bfloat16, storage=torch.bfloat16)
    return adapted(base).to(torch.bfloat16)


def train(rank, one):
    optimizer = torch.optim.SGD([p for p in one.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for step in range(STEPS):
        ids = torch.randint(64, (2, 7), generator=torch.Generator().manual_seed(10 * step + rank))
        loss = one(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def train_three(rank, folder):
    results = {"stock": train(rank, fsdp2(model()))}
    for order in ("before", "after"):
        patched = model()
        if order == "before":
            lorafuse.patch(patched, strict=True)
        patched = fsdp2(patched)
        if order == "after":
            lorafuse.patch(patched, strict=True)
        with counting() as alone, measure() as counted:
            results[order] = train(rank, patched)
        results[f"seen {order}"] = alone.call_count, counted["grouped"], counted["warned"]
    torch.save(results, f"{folder}/{rank}.pt")


def test_trains_as_peft_does(tmp_path):
    spawn(joined, str(tmp_path), train_three)
    for rank in range(2):
        results = torch.load(tmp_path / f"{rank}.pt")
        for order in ("before", "after"):
            # o alone; q, k and v, and the three of an MLP, in groups
            assert results[f"seen {order}"] == (STEPS * 2, STEPS * 12, [])
            assert len(set(results[order])) == STEPS
            assert results[order] == pytest.approx(results["stock"], rel=2e-2)
