"""What `lorafuse plan` prints of a linear layer or of experts: every candidate with its parts, the choice, why."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lorafuse.plan import Candidate, DeviceSpec, KernelConfig, Plan, Problem

__all__ = ["Direction", "print_plans"]


@dataclass(frozen=True)
class Direction:
    """One direction: a problem for each projection, their plan, and the frozen operator."""

    problems: tuple[Problem, ...]
    plan: Plan
    frozen: Candidate

    def configs(self) -> Iterator[tuple[str, KernelConfig]]:
        """The plan's kernels by what they compute."""
        names = ("gate_up", "down") if len(self.problems) == 2 else ("",)
        for i, name in enumerate(names):
            for config in self.plan.of(i).configs:
                yield f"{name} {config.kernel}".strip(), config


def print_plans(
    device: DeviceSpec, sizes: str, directions: Mapping[str, Direction], as_json: bool, notes: Sequence[str] = ()
) -> None:
    """Print the plans of all directions and what holds for both, or the same as JSON."""
    if as_json:
        plans = {name: _as_json(direction) for name, direction in directions.items()}
        tax = _tax(directions)["this plan"]
        written = {"device": asdict(device), "directions": plans, "lora_tax_model": tax, "notes": list(notes)}
        print(json.dumps(written, indent=1))
        return
    rates = f"{device.sustained_flops / 1e12:.0f} TFLOP/s and {device.sustained_bandwidth / 1e12:.2f} TB/s sustained"
    print(f"{device.name}: sm_{device.arch}, {device.sms} SMs, {rates} ({device.source})")
    print(sizes)
    for name, direction in directions.items():
        print()
        _print_direction(name, direction)
    for note in notes:
        print(f"\nnote: {note}")
    print(f"\nLoRA tax, {' and '.join(directions)}:")
    for name, tax in _tax(directions).items():
        print(f"     {name:<28}{tax:9.1%}    (model)")


def _tax(directions: Mapping[str, Direction]) -> dict[str, float]:
    """LoRA tax of the eager backend and of the plans, over all directions."""
    every = directions.values()
    base = sum(direction.frozen.seconds for direction in every)
    # of eager's two ways of experts, the one it takes comes first
    eager = sum(next(w.seconds for w in d.plan.candidates if w.backend == "eager") for d in every)
    seconds = {"eager": eager, "this plan": sum(direction.plan.chosen.seconds for direction in every)}
    return {name: total / base - 1 for name, total in seconds.items()}


def _us(seconds: float) -> str:
    return f"{seconds * 1e6:9.1f} us (model)"


def _print_direction(name: str, direction: Direction) -> None:
    plan = direction.plan
    chosen = f"{plan.backend} {plan.kernel}"
    print(f"{name}: {chosen}")
    named = {"frozen": direction.frozen} | {f"{one.backend} {one.kernel}": one for one in plan.candidates}
    printed = {name: one.parts if len(one.parts) > 1 else () for name, one in named.items()}
    width = max(25, *(len(part.name) + 1 for parts in printed.values() for part in parts))
    for name, one in named.items():
        launched = f", {one.launch_seconds * 1e6:.0f} us to launch (model)" if one.launch_seconds > one.seconds else ""
        print(f"  {'->' if name == chosen else '  '} {name:<{width + 3}}{_us(one.seconds)}{launched}")
        for part in printed[name]:
            print(f"       {part.name:<{width}}{_us(part.seconds)}")
    for of, config in direction.configs():
        sizes = "x".join(str(size) for size in (config.block_m, config.block_n, config.block_k) if size)
        rank = f", {config.block_r} ranks at a time" if config.block_r else ""
        splits = f", rows in {config.splits} parts" if config.splits > 1 else ""
        pipeline = f"{config.stages} stages, {config.warps} warps"
        print(f"  {of}: {config.form}, tile {sizes}{rank}, {pipeline}{splits}")
    for reason in plan.reasons:
        print(f"  why: {reason}")


def _as_json(direction: Direction) -> dict[str, Any]:
    def figures(one: Candidate) -> dict[str, Any]:
        steps = [{"name": part.name, "model_us": part.seconds * 1e6} for part in one.parts]
        return {"model_us": one.seconds * 1e6, "launch_model_us": one.launch_seconds * 1e6, "parts": steps}

    plan = direction.plan
    return {
        "problems": [asdict(problem) for problem in direction.problems],
        "backend": plan.backend,
        "kernel": plan.kernel,
        "configs": {of: asdict(config) for of, config in direction.configs()},
        "candidates": {f"{one.backend} {one.kernel}": figures(one) for one in plan.candidates},
        "frozen": figures(direction.frozen),
        "reasons": list(plan.reasons),
    }
