"""What `lorafuse plan --moe` prints: the modelled time of a block's experts, part by part, in every way."""

import json
from dataclasses import asdict

from lorafuse.plan import DeviceSpec, cost
from lorafuse.plan.experts import WAYS, ExpertsProblem, configs

__all__ = ["print_experts"]


def print_experts(problem: ExpertsProblem, device: DeviceSpec, backward: bool, as_json: bool) -> None:
    """Print every way's parts, forward and backward if asked for, the kernels' configurations and the tax."""
    directions = {"forward": False} | ({"backward": True} if backward else {})
    found = {d: {name: way(problem, device, which) for name, way in WAYS.items()} for d, which in directions.items()}
    kernels = configs(problem, device)
    seconds = {name: sum(cost.total(ways[name]) for ways in found.values()) for name in WAYS}
    if as_json:
        parts = {
            d: {n: [{"name": p.name, "model_us": p.seconds * 1e6} for p in ways[n]] for n in ways}
            for d, ways in found.items()
        }
        tax = {name: taken / seconds["frozen"] - 1 for name, taken in seconds.items()}
        given = {"device": asdict(device), "problem": asdict(problem), "directions": parts}
        print(json.dumps(given | {"configs": {n: asdict(c) for n, c in kernels.items()}, "tax_model": tax}, indent=1))
        return
    print(f"{device.name}: " + ", ".join(f"{name} {value}" for name, value in asdict(problem).items()))
    for direction, ways in found.items():
        print(f"\n{direction}:")
        for name, steps in ways.items():
            print(f"  {name:<35}{cost.total(steps) * 1e6:9.1f} us (model)")
            for step in steps:
                print(f"     {step.name:<32}{step.seconds * 1e6:9.1f} us (model)")
    print()
    for name, config in kernels.items():
        sizes = "x".join(str(size) for size in (config.block_m, config.block_n, config.block_k) if size)
        print(f"  {name}: {config.form}, tile {sizes}, {config.stages} stages, {config.warps} warps")
    print("  why: rows are assumed to be spread evenly; each kernel takes its legal tile of least time by the model")
    best = min(("split grouped_mm", "lorafuse, Triton"), key=seconds.__getitem__)
    if best != "lorafuse, Triton":
        print(
            "  why: the model puts split grouped_mm ahead; lorafuse has no such path and would run its Triton kernels"
        )
    print(f"LoRA tax, {' and '.join(found)}:")
    for name, taken in seconds.items():
        if name != "frozen":
            print(f"     {name:<28}{taken / seconds['frozen'] - 1:9.1%}    (model)")
