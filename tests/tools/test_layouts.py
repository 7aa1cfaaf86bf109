"""Layouts of several devices (T1): the model's figures against sizes counted by hand, and docs/scaling.md against it.

`python tests/tools/test_layouts.py` writes the figures of the page anew, for review.
"""

import dataclasses
import re
from pathlib import Path

import pytest
import torch
import transformers
from test_advise_pages import MODELS

from lorafuse import advise
from lorafuse.advise import Cluster, Links
from lorafuse.plan import find

PAGE = Path(__file__).parents[2] / "docs" / "scaling.md"
FIGURES = re.compile(r"(<!-- figures -->\n).*?(<!-- end of figures -->)", re.DOTALL)
# model, GPU, devices, nodes
CASES = [
    ("Llama-3.1-8B", "H200", 8, 1),
    ("Llama-3.1-8B", "RTX 4090", 8, 1),
    ("Llama-3.1-70B", "H200", 8, 1),
    ("Llama-3.1-70B", "H100", 16, 2),
    ("Llama-3.1-70B", "H100", 1024, 128),
    ("Qwen3-30B-A3B", "H200", 8, 1),
    ("Qwen3-30B-A3B", "H100", 64, 8),
]
RANK, LENGTH, MICRO_BATCH, BATCH = 16, 4096, 4, 32


def shapes_of(name):
    with torch.device("meta"):
        config = transformers.AutoConfig.for_model(**MODELS[name][1])
        return advise.shapes_of(transformers.AutoModelForCausalLM.from_config(config))


@pytest.fixture(scope="module")
def models():
    return {name: shapes_of(name) for name in {case[0] for case in CASES}}


def offered(shapes, gpu, devices, nodes, links=None, **changes):
    device = dataclasses.replace(find(gpu), **changes)
    cluster = advise.cluster_of(device, devices, nodes)
    cluster = Cluster(cluster.per_node, nodes, links or cluster.links)
    return {each.name: each for each in advise.layouts(shapes, RANK, LENGTH, MICRO_BATCH, BATCH, device, cluster)}


def figures(models):
    """The table of the page."""
    lines = [
        "| model | devices | layout | fits | GiB a device | GB sent a step | waits | sequences/s (model) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, gpu, devices, nodes in CASES:
        every = offered(models[name], gpu, devices, nodes)
        best = advise.fastest(every.values())
        for each in every.values():
            shown = f"{each.name}{', fastest' if each is best else ''}"
            where = f"{devices} {gpu} in {nodes} node{'s' * (nodes > 1)}"
            numbers = f"{each.memory / 2**30:.0f} | {each.sent / 1e9:.3g} | {each.waited / each.seconds:.1%}"
            lines.append(
                f"| {name} | {where} | {shown} | {'yes' if each.fits else 'no'} | {numbers} | {each.rate:.3g} |"
            )
    return "\n".join([*lines, ""])


def test_the_page_has_the_figures_of_the_model(models):
    page = PAGE.read_text()
    assert FIGURES.search(page)[0].count("\n| Llama-3.1-70B |") > 10
    assert FIGURES.sub(lambda m: m[1] + figures(models) + m[2], page) == page


def test_ddp_sends_the_gradients_of_the_adapters_once(models):
    shapes = models["Llama-3.1-8B"]
    each = offered(shapes, "H200", 8, 1)["DDP"]
    assert each.sent == round(2 * 7 / 8 * 4 * advise.trainable(shapes, RANK))
    one = advise.memory(shapes, "lora", RANK, each.micro_batch * LENGTH, checkpointing=each.checkpointing)
    assert each.memory == one.total


def test_what_is_sharded_is_held_in_parts(models):
    """All of a model that fits nowhere whole: the base, its adapters and their optimizer over all devices."""
    shapes = models["Llama-3.1-70B"]
    frozen, trained = 2 * shapes.parameters, 16 * advise.trainable(shapes, RANK)
    small, large = (offered(shapes, "H200", devices, devices // 8, memory_bytes=1e9) for devices in (8, 64))
    for name, parts in (("FSDP2", 8), ("ZeRO-3", 8)):
        assert small[name].memory - large[name].memory == pytest.approx((frozen + trained) / parts * 7 / 8, rel=1e-6)
    assert large["HSDP"].memory == small["FSDP2"].memory
    assert not any(each.fits for each in large.values())
    assert advise.fastest(large.values()) is None
    assert large["DDP"].memory > frozen > large["TP"].memory > frozen / 8


def test_fsdp2_gathers_the_base_twice_a_micro_batch(models):
    shapes = models["Llama-3.1-8B"]
    each = offered(shapes, "H200", 8, 1)["FSDP2"]
    base, adapters = 2 * shapes.parameters, 4 * advise.trainable(shapes, RANK)
    embeddings = 2 * 2 * shapes.vocabulary * shapes.hidden
    # blocks and adapters twice, the embeddings and the last norm once, the adapters' gradients once
    moved = 2 * (base - embeddings) + embeddings + 3 * adapters
    assert each.micro_batch * 8 == each.batch
    assert each.sent == pytest.approx(7 / 8 * moved, rel=1e-3)


def test_a_slow_network_is_for_hsdp_and_a_slow_node_for_ddp(models):
    shapes = models["Llama-3.1-8B"]
    fast, slow = 450e9, 0.5e9
    between = offered(shapes, "H200", 16, 2, Links(fast, slow))
    assert between["HSDP"].rate > 1.5 * between["FSDP2"].rate
    assert between["HSDP"].waited < between["FSDP2"].waited
    within = offered(shapes, "H200", 8, 1, Links(slow, slow))
    assert advise.fastest(within.values()).name == "DDP"
    assert within["TP"].waited > within["FSDP2"].waited > within["DDP"].waited


def test_expert_parallelism_divides_experts_alone(models):
    shapes = models["Qwen3-30B-A3B"]
    each = offered(shapes, "H200", 8, 1, memory_bytes=0.0)["EP"]
    experts = sum(2 * x.weights for x in shapes.adapted if x.parameter)
    of_one = sum(16 * x.per_rank * 2 for x in shapes.adapted if x.parameter)
    whole = advise.memory(shapes, "lora", RANK, each.micro_batch * LENGTH, checkpointing=each.checkpointing).total
    assert advise.expert_rank(RANK, shapes.active_experts) == 2
    assert each.memory == pytest.approx(whole - 7 / 8 * (experts + of_one), rel=1e-6)
    assert "DDP, QLoRA" not in offered(shapes, "H200", 8, 1)


@pytest.mark.parametrize("devices", [1, 8])
def test_one_device_waits_for_nobody(models, devices):
    for each in offered(models["Llama-3.1-8B"], "H200", devices, 1).values():
        assert (each.sent == 0) is (devices == 1)
        assert (each.waited == 0) is (devices == 1)


def test_collectives_by_hand():
    """A GB among two nodes of 4: rings inside carry 7/8 of it, each network card a quarter of what the other has."""
    cluster = Cluster(4, 2, Links(100e9, 10e9))
    sent, seconds = cluster.all_gather(1e9, 4, 2)
    assert sent == 7e8 + 1.75e8
    assert seconds == pytest.approx(max(8.75e-3, 0.5e9 / 40e9) / 0.8 + 30e-6)
    assert cluster.all_reduce(1e9, 4, 2) == (2 * sent, 2 * seconds)
    assert cluster.all_to_all(1e9, 4, 2) == (sent, pytest.approx(0.5e9 / 10e9 / 0.8 + 30e-6))
    assert cluster.all_gather(1e9, 1, 1, 5) == (0.0, 0.0)


def test_the_page_of_an_advice_says_what_fits_and_is_fastest():
    with torch.device("meta"):
        config = transformers.AutoConfig.for_model(**MODELS["Llama-3.1-70B"][1])
        model = transformers.AutoModelForCausalLM.from_config(config)
    given = {"tokens": 10**7, "length": LENGTH, "gpu": "H100"}
    page = str(advise.plan_adapter(model, **given, devices=1024, nodes=128, micro_batch=1, batch=1024))
    lines = page[page.index("layouts of 1024 devices") :].splitlines()
    assert re.match(r"  DDP +0?[\d.]+ sequences/s, [\d.]+ GiB a device, does not fit, .*\(model\)", lines[1])
    assert "fastest that fits" in page
    assert "1024 sequences a step, above 512" in page
    assert "not measured on several devices" in page
    assert "name a GPU" in str(advise.plan_adapter(model, tokens=10**7, devices=2, batch=8))
    with pytest.raises(ValueError, match="--devices 3 --nodes 2: every node must have as many devices"):
        advise.plan_adapter(model, tokens=10**7, devices=3, nodes=2, batch=12)


if __name__ == "__main__":
    every = {name: shapes_of(name) for name in {case[0] for case in CASES}}
    PAGE.write_text(FIGURES.sub(lambda m: m[1] + figures(every) + m[2], PAGE.read_text()))
