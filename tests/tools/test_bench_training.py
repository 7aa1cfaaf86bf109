"""Training in `lorafuse bench model`: batches, accumulation, PEFT's adapters in half precision as the yardstick."""

from dataclasses import replace

import torch
from tiny_transformers import TINY

from lorafuse.bench import training, transformer
from lorafuse.bench.training import Trainee
from lorafuse.bench.transformer_cost import Sizes

CPU = torch.device("cpu")


def test_every_variant_and_run_gets_the_same_batches():
    first, second = (training.batches(256, (2, 1, 8), step, CPU) for step in (0, 1))
    assert torch.equal(first, training.batches(256, (2, 1, 8), 0, CPU))
    assert not torch.equal(first, second)


def test_four_micro_batches_are_one_of_four_times_the_size():
    sizes = replace(Sizes.of(TINY.config()), layers=2)
    one = Trainee("peft", transformer.adapted(transformer.build(TINY, sizes, torch.float32, CPU), 4))
    ids = training.batches(256, (4, 2, 8), 0, CPU)
    actual = []
    for given in (ids, ids.flatten(0, 1)[None]):
        loss = one.backward(given)
        actual.append((loss, [p.grad.clone() for p in one.trained]))
        one.optimizer.zero_grad()
    torch.testing.assert_close(actual[0], actual[1], rtol=1e-5, atol=1e-7)
    # and each of them counts
    assert not torch.allclose(one.backward(ids[:1]), actual[0][0], rtol=1e-5)


def test_adapters_are_float32_again_after_the_yardstick():
    sizes = replace(Sizes.of(TINY.config()), layers=1)
    peft = transformer.adapted(transformer.build(TINY, sizes, torch.bfloat16, CPU), 4)
    before = {name: p.detach().clone() for name, p in peft.named_parameters() if p.requires_grad}
    assert {p.dtype for p in before.values()} == {torch.float32}
    micro = training.batches(256, (1, 1, 8), 0, CPU)[0]
    half, whole = training.half_adapters(peft, micro, torch.bfloat16), training.observe(peft, micro)
    assert not torch.equal(half.logits, whole.logits)
    after = {name: p for name, p in peft.named_parameters() if p.requires_grad}
    assert all(torch.equal(before[name], after[name]) and after[name].dtype is torch.float32 for name in before)
    assert all(p.grad is None for p in after.values())
