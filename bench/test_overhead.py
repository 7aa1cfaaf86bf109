"""What a patched layer adds to `nn.Linear` before arithmetic counts: M = 1, K = N = 64, one thread, microseconds."""

import statistics
import time

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import lorafuse

# chosen from what a bare operator with one autograd.Function costs (13 to 15 us) plus the layer's own checks
BUDGET_US = 18.0


@pytest.fixture(scope="module")
def layers():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def adapted():
        model = get_peft_model(nn.Sequential(nn.Linear(64, 64)), LoraConfig(r=16, target_modules=["0"]))
        return model.base_model.model

    peft, patched = adapted(), adapted()
    lorafuse.patch(patched, strict=True)
    plain = nn.Linear(64, 64).requires_grad_(False)
    yield {"nn.Linear": plain, "peft": peft[0], "lorafuse": patched[0]}
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def x():
    return torch.randn(1, 64, requires_grad=True)


@pytest.mark.parametrize("name", ["nn.Linear", "peft", "lorafuse"])
def test_forward(benchmark, layers, x, name):
    layer = layers[name]
    benchmark(lambda: layer(x))


def test_overhead_within_budget(layers, x):
    calls, seconds = 2000, {name: [] for name in layers}
    for _ in range(30):
        for name, layer in layers.items():
            start = time.perf_counter()
            for _ in range(calls):
                layer(x)
            seconds[name].append((time.perf_counter() - start) / calls)
    # the machine only ever adds time, so the quickest fifth of the rounds is nearest to the cost
    cost = {name: statistics.median(sorted(times)[:6]) * 1e6 for name, times in seconds.items()}
    over = {name: us - cost["nn.Linear"] for name, us in cost.items()}
    print(
        f"\nus above nn.Linear ({cost['nn.Linear']:.1f} us): peft {over['peft']:.1f}, lorafuse {over['lorafuse']:.1f}"
    )
    assert over["lorafuse"] <= BUDGET_US, over
    assert over["lorafuse"] < over["peft"], over
