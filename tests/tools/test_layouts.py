"""Layouts of several devices (T1): the model's figures against sizes counted by hand, and docs/scaling.md against it.

`python tests/tools/test_layouts.py` writes the figures of the page anew, for review.
"""

import dataclasses
import functools
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import transformers
from accelerate.commands import launch
from test_advise_pages import MODELS

from lorafuse import advise, functional, parallel
from lorafuse.advise import Cluster, Links, links
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
    assert each.memory == one.total + 4 * advise.trainable(shapes, RANK)


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
    tokens = each.micro_batch * LENGTH
    whole = advise.memory(shapes, "lora", RANK, tokens, checkpointing=each.checkpointing).total
    assert advise.expert_rank(RANK, shapes.active_experts) == 2
    # 8 rows of each token come and go back, in bf16, in the place of one
    rows = 2 * (2 * 8 - 1) * tokens * shapes.hidden * (1 if each.checkpointing else shapes.layers)
    assert each.memory == pytest.approx(whole - 7 / 8 * (experts + of_one) + rows, rel=1e-6)
    assert "DDP, QLoRA" not in offered(shapes, "H200", 8, 1)


@pytest.mark.parametrize("devices", [1, 8])
def test_one_device_waits_for_nobody(models, devices):
    for each in offered(models["Llama-3.1-8B"], "H200", devices, 1).values():
        assert (each.sent == 0) is (devices == 1)
        assert (each.waited == 0) is (devices == 1)


@pytest.mark.parametrize(("devices", "nodes"), [(2, 1), (8, 1), (12, 2), (16, 2), (17, 17), (1024, 128)])
def test_nodes_have_at_most_eight_devices(devices, nodes):
    assert links.nodes_for(devices) == nodes


@pytest.mark.parametrize(
    ("devices", "expected"), [(8, (4, 8, 1, 32)), (16, (2, 16, 1, 32)), (24, (1, 24, 1, 24)), (64, (1, 64, 1, 64))]
)
def test_the_batch_is_kept_with_smaller_micro_batches(models, devices, expected):
    """Where losses are best, 32 sequences a step; more only where every device has one already."""
    for each in offered(models["Llama-3.1-8B"], "H200", devices, devices // 8).values():
        if each.name != "TP":
            assert (each.micro_batch, each.copies, each.accumulation, each.batch) == expected
        else:
            # three groups take 4 sequences each, twice
            assert (each.copies, each.batch) == (devices // 8, 24 if devices == 24 else 32)


@pytest.mark.parametrize("given", [{"devices": 16}, {"devices": 24, "episodes": 10**5}, {"devices": 16, "batch": 64}])
def test_schedule_and_script_are_those_of_the_fastest_layout(given):
    options = {"length": LENGTH, "gpu": "H100"} | ({} if "episodes" in given else {"tokens": 10**7}) | given
    with torch.device("meta"):
        config = transformers.AutoConfig.for_model(**MODELS["Llama-3.1-70B"][1])
        model = transformers.AutoModelForCausalLM.from_config(config)
    advice = advise.plan_adapter(model, **options)
    best = advise.fastest(advice.layouts)
    assert best.name in ("FSDP2", "HSDP")
    assert (advice.fit.layout, advice.fit.micro_batch, advice.fit.total) == (best.name, best.micro_batch, best.memory)
    assert advice.request.batch == best.batch == best.micro_batch * given["devices"] * advice.accumulation
    assert advice.request.batch == {16: 32, 24: 480}[given["devices"]] if "batch" not in given else 64
    assert advice.request.nodes == given["devices"] // 8
    assert f"per_device_train_batch_size={best.micro_batch}," in advice.snippet
    assert f"gradient_accumulation_steps={advice.accumulation}," in advice.snippet
    assert f"gradient_checkpointing={best.checkpointing}," in advice.snippet
    assert "load_in_4bit" not in advice.snippet
    (line,) = [line for line in advice.snippet.splitlines() if "accelerate launch" in line]
    settings = PAGE.parents[1] / "examples" / "accelerate_two_nodes.yaml"
    words = line.replace("FILE.yaml", str(settings)).replace("_rank N", "_rank 0").split("launch ")[1].split()
    parsed, _, _ = launch._validate_launch_command(launch.launch_command_parser().parse_args(words))
    assert (parsed.num_processes, parsed.num_machines) == (given["devices"], given["devices"] // 8)
    assert int(parsed.fsdp_version) == 2
    one = named_line(advice, "step on H100, lorafuse")
    assert one.endswith("full fine-tuning does not fit on one")


def named_line(advice, name):
    (line,) = [line for line in advice.lines if line.name == name]
    return line.value


def test_what_expert_parallel_experts_save():
    """The rows that came and those that came back, of each choice, where experts of one device save x."""
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        T, k, H, I, E, R = 24, 3, 16, 4, 8, 2
        x, weight = torch.randn(T, H, requires_grad=True), torch.rand(T, k, requires_grad=True)
        index, stacks = torch.rand(T, E).topk(k).indices, (torch.randn(E, 2 * I, H), torch.randn(E, H, I))
        sizes = {"gate_up_a": (R, H), "gate_up_b": (2 * I, R), "down_a": (R, I), "down_b": (H, R)}
        adapters = {name: torch.randn(E, *size, requires_grad=True) for name, size in sizes.items()}
        given = {t.untyped_storage().data_ptr() for t in (*stacks, weight, *adapters.values())}
        bytes_saved = []
        for run in (
            functools.partial(parallel.expert_parallel_experts, group=dist.group.WORLD),
            functional.lora_experts,
        ):
            saved = {}
            with torch.autograd.graph.saved_tensors_hooks(
                lambda t, saved=saved: saved.setdefault(t.untyped_storage().data_ptr(), t), lambda t: t
            ):
                run(x, index, weight, *stacks, **adapters)
            mine = [t.untyped_storage() for key, t in saved.items() if key not in given and t.is_floating_point()]
            bytes_saved.append(sum(storage.nbytes() for storage in mine))
        rows = 4 * T * k * H
        # and two weights for each row
        assert bytes_saved[0] - bytes_saved[1] == 2 * rows - 4 * T * H + 2 * 4 * T * k
    finally:
        dist.destroy_process_group()


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
