"""What training a model costs, by arithmetic: against models that are built, and the FLOPs that torch counts."""

from dataclasses import replace

import pytest
import torch
from tiny_transformers import TINY, TINY_MOE
from torch.utils.flop_counter import FlopCounterMode

from lorafuse.bench import transformer
from lorafuse.bench.training import Trainee
from lorafuse.bench.transformer_cost import (
    VARIANTS,
    Sizes,
    Training,
    fitting,
    kept_bytes,
    step_flops,
    together_bytes,
    training_bytes,
)

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tiny", [TINY, TINY_MOE], ids=lambda tiny: tiny.name)
def test_sizes_are_those_of_the_model(tiny, dtype):
    sizes = Sizes.of(tiny.config())
    built = transformer.build(tiny, sizes, dtype, CPU)
    # norms are left out
    norms = sum(p.numel() for p in built.parameters() if p.dim() == 1)
    assert sum(p.numel() for p in built.parameters()) - norms == sizes.weights()
    peft = transformer.adapted(built, 4)
    assert sum(p.numel() for p in peft.parameters() if p.requires_grad) == sizes.adapter_weights(4, sizes.E)
    twin = transformer.twin(peft)
    for (name, one), (_, other) in zip(peft.named_parameters(), twin.named_parameters(), strict=True):
        assert (one is other) == (not one.requires_grad), name
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["smollm2-135m", "llama-3.1-8b", "qwen3-30b-a3b"])
def test_published_sizes(name):
    sizes = Sizes.of(transformer.MODELS[name].config())
    # billions, as the models' cards give them; Qwen's name rounds its active ones up
    published = {"smollm2-135m": (0.1345, 0.1345), "llama-3.1-8b": (8.03, 7.50), "qwen3-30b-a3b": (30.5, 3.04)}[name]
    assert (sizes.weights() / 1e9, sizes.active_weights() / 1e9) == pytest.approx(published, rel=2e-3)


# PEFT's experts are left out: it builds W + ΔW of every one, which the formula does not ask for
@pytest.mark.parametrize(
    ("name", "tiny"), [("full", TINY), ("peft", TINY), ("frozen", TINY), ("full", TINY_MOE), ("frozen", TINY_MOE)]
)
def test_flops_are_those_that_torch_counts(name, tiny):
    sizes, tokens, sequence, rank = Sizes.of(tiny.config()), 64, 32, 4
    built = transformer.build(tiny, sizes, torch.float32, CPU)
    # as plain matrix products, attention of whole squares, which is what the counter knows
    built.set_attn_implementation("eager")
    if sizes.E:
        built.set_experts_implementation("eager")
    made = {"frozen": transformer.frozen, "peft": lambda base: transformer.adapted(base, rank)}
    one = Trainee(name, made[name](built) if name in made else built)
    with FlopCounterMode(display=False) as counter:
        one.backward(torch.randint(sizes.vocabulary, (1, tokens // sequence, sequence)))
    expected = step_flops(sizes, name, rank, tokens, sequence)
    # 3 %: LoRA's first of four layers needs no input gradient of q, k and v
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.03)


def test_lora_counts_no_gradient_of_frozen_weights():
    sizes = Sizes.of(TINY.config())
    difference = step_flops(sizes, "full", 4, 64, 32) - step_flops(sizes, "lorafuse", 4, 64, 32)
    assert difference == 64 * (2 * sizes.active_weights() - 6 * sizes.adapter_weights(4, 0))


def test_as_many_layers_as_fit():
    sizes = Sizes(32, 128256, 4096, 4096, 1024, 14336)

    def needed(cut):
        return 10 * cut.vocabulary + 1_000_000 * cut.layers

    # 0.8 of what is free: the vocabulary, and so many layers
    assert fitting(sizes, needed, 100_000_000) == sizes
    assert fitting(sizes, needed, 10_000_000) == replace(sizes, layers=6)
    assert fitting(sizes, needed, 2_853_200) == replace(sizes, layers=1)
    assert fitting(sizes, needed, 2_853_199) == replace(sizes, layers=1, vocabulary=64128)
    assert fitting(sizes, needed, 1_000_000).layers == 0


def test_variants_together_hold_one_frozen_base():
    """What each keeps between steps, the base once, and the largest step beyond that: they take turns."""
    sizes, setting = Sizes.of(TINY.config()), Training(4, 96, 4, False)
    kept = {name: kept_bytes(sizes, name, setting) for name in VARIANTS}
    step = {name: training_bytes(sizes, name, setting) - kept[name] for name in VARIANTS}
    weights = 4 * sizes.weights()
    assert together_bytes(sizes, ["full", "peft"], setting) == kept["full"] + kept["peft"] + step["full"]
    assert together_bytes(sizes, ["peft", "lorafuse"], setting) == kept["peft"] + kept["lorafuse"] - weights + max(
        step["peft"], step["lorafuse"]
    )
    every = sum(kept.values()) + max(step.values())
    assert together_bytes(sizes, list(VARIANTS), setting) == every - 2 * weights
    # a process of its own has a base of its own
    assert together_bytes(sizes, list(VARIANTS), setting, ["lorafuse"]) == every - weights
    assert kept["full"] == 3 * weights
    assert kept["peft"] == weights + 3 * 4 * sizes.adapter_weights(4, 0)


def test_a_tied_embedding_has_two_gradients_at_once_and_an_update_no_fifth_tensor():
    sizes, setting = Sizes.of(TINY.config()), Training(4, 96, 4, False)
    tied = replace(sizes, tied=True)
    assert training_bytes(tied, "full", setting) - training_bytes(sizes, "full", setting) == (
        # one matrix less, with its gradient and two moments, and a gradient more
        (1 - 4) * 4 * sizes.vocabulary * sizes.H
    )
    assert training_bytes(sizes, "full", setting) - training_bytes(sizes, "frozen", setting) == 3 * 4 * sizes.weights()
