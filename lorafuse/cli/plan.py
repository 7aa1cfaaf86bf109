"""Say how lorafuse would run a LoRA linear on a GPU, and why: candidates, the time of each part, what others cost.

Nothing runs. Every time comes from the cost model of lorafuse.plan and says "model"; no GPU is needed with --gpu.
"""

import argparse
import json
from dataclasses import asdict, replace
from typing import Any

from lorafuse.cli._plan_moe import print_experts
from lorafuse.plan import DeviceSpec, Plan, Problem, cost, find, select
from lorafuse.plan.experts import ExpertsProblem
from lorafuse.testing.cases import find as find_case
from lorafuse.testing.cases import find_moe

SUMMARY = "say how a layer would run on a GPU, and why, from the cost model"

__all__ = ["SUMMARY", "add_arguments", "run"]

_DTYPES = ("bfloat16", "float16", "float32")
# what would run if every backend this version holds could run
_AVAILABLE = (("eager", ""), ("triton", ""), ("cuda", "this version of lorafuse holds no CUDA kernels"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gpu", help="H200, A100, … (the one here)")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--shape", metavar="M,N,K", help="tokens, out features, in features")
    which.add_argument("--case", metavar="NAME", help="a layer by name, with --m tokens")
    which.add_argument("--moe", metavar="NAME", help="the experts of a block by name, with --m tokens")
    parser.add_argument("--m", type=int, default=8192, help="tokens of --case or --moe (8192)")
    parser.add_argument("--rank", type=int, default=16, help="of the adapter (16)")
    parser.add_argument("--dtype", default="bfloat16", choices=_DTYPES, help="of the base (bfloat16)")
    parser.add_argument("--adapter-dtype", default="float32", choices=_DTYPES, help="of the adapter (float32)")
    parser.add_argument("--bias", action="store_true", help="the layer has a bias")
    parser.add_argument("--dropout", action="store_true", help="the adapter has dropout")
    parser.add_argument("--backward", action="store_true", help="a training step: dx, da and db too")
    parser.add_argument("--json", action="store_true", help="the same as JSON, times under model_us")


def run(args: argparse.Namespace) -> int:
    """0; raises ValueError for a GPU, a case, a shape or a rank that cannot be."""
    device = _device(args.gpu)
    if args.moe:
        print_experts(_experts(args), device, args.backward, args.json)
        return 0
    forward = _problem(args)
    problems = {"forward": forward}
    if args.backward:
        problems["backward"] = replace(forward, gradients=("dx", "da", "db"))
    plans = {direction: select(problem, device, _AVAILABLE) for direction, problem in problems.items()}
    baselines = {
        name: {direction: model(problem, device) for direction, problem in problems.items()}
        for name, model in cost.BASELINES.items()
    }
    if args.json:
        print(json.dumps(_as_json(device, problems, plans, baselines), indent=1))
        return 0
    print(f"{device.name}: sm_{device.arch}, {device.sms} SMs, ", end="")
    print(
        f"{device.sustained_flops / 1e12:.0f} TFLOP/s and {device.sustained_bandwidth / 1e12:.2f} TB/s sustained",
        end="",
    )
    print(f" ({device.source})")
    print(", ".join(f"{name} {getattr(forward, name)}" for name in ("M", "N", "K", "R", "dtype", "adapter_dtype")))
    for direction, plan in plans.items():
        print()
        _print_direction(direction, plan, {name: parts[direction] for name, parts in baselines.items()})
    print()
    _print_tax(plans, baselines)
    return 0


def _device(name: str | None) -> DeviceSpec:
    if name is not None:
        return find(name)
    import torch

    if not torch.cuda.is_available():
        raise ValueError("torch sees no CUDA device here; name the GPU to plan for: --gpu H200")
    from lorafuse.backends.probe import device_spec

    found = device_spec(torch.device("cuda", torch.cuda.current_device()))
    assert found is not None
    return found


def _problem(args: argparse.Namespace) -> Problem:
    if args.case:
        case = find_case(args.case)
        sizes = [args.m, case.N, case.K]
    else:
        texts = args.shape.split(",")
        if len(texts) != 3 or not all(text.strip().isdecimal() for text in texts):
            raise ValueError(f"--shape {args.shape}: it must be tokens, out and in features: --shape 8192,4096,4096")
        sizes = [int(text) for text in texts]
    for name, size in zip(("M", "N", "K", "--rank"), (*sizes, args.rank), strict=True):
        if size < 1:
            raise ValueError(f"{name} is {size}; it must be at least 1")
    M, N, K = sizes
    return Problem(M, N, K, args.rank, args.dtype, args.adapter_dtype, bias=args.bias, dropout=args.dropout)


def _experts(args: argparse.Namespace) -> ExpertsProblem:
    for flag in ("bias", "dropout"):
        if getattr(args, flag):
            raise ValueError(f"--{flag}: the model of experts does not hold it; leave it out with --moe")
    for name in ("m", "rank"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} is {getattr(args, name)}; it must be at least 1")
    case = find_moe(args.moe)
    return ExpertsProblem(args.m, case.E, case.k, case.H, case.I, args.rank, args.dtype, args.adapter_dtype)


def _us(seconds: float) -> str:
    return f"{seconds * 1e6:9.1f} us (model)"


def _print_direction(direction: str, plan: Plan, baselines: dict[str, tuple[cost.Part, ...]]) -> None:
    print(f"{direction}: {plan.backend} {plan.kernel}")
    ways = {f"{way.backend} {way.kernel}": way.parts for way in plan.candidates}
    for name, parts in (baselines | ways).items():
        mark = "->" if name == f"{plan.backend} {plan.kernel}" else "  "
        print(f"  {mark} {name:<28}{_us(cost.total(parts))}")
        if len(parts) > 1:
            for part in parts:
                print(f"       {part.name:<25}{_us(part.seconds)}")
    for config in plan.configs:
        sizes = "x".join(str(size) for size in (config.block_m, config.block_n, config.block_k) if size)
        rank = f", {config.block_r} ranks at a time" if config.block_r else ""
        splits = f", rows in {config.splits} parts" if config.splits > 1 else ""
        pipeline = f"{config.stages} stages, {config.warps} warps"
        print(f"  {config.kernel}: {config.form}, tile {sizes}{rank}, {pipeline}{splits}")
    for reason in plan.reasons:
        print(f"  why: {reason}")


def _print_tax(plans: dict[str, Plan], baselines: dict[str, dict[str, tuple[cost.Part, ...]]]) -> None:
    base = sum(map(cost.total, baselines["frozen"].values()))
    rows = {name: sum(map(cost.total, parts.values())) for name, parts in baselines.items() if name != "frozen"}
    rows["eager"] = sum(w.seconds for plan in plans.values() for w in plan.candidates if w.backend == "eager")
    rows["this plan"] = _chosen_seconds(plans)
    print(f"LoRA tax, {' and '.join(plans)}:")
    for name, seconds in rows.items():
        print(f"     {name:<28}{seconds / base - 1:9.1%}    (model)")


def _chosen_seconds(plans: dict[str, Plan]) -> float:
    return sum(way.seconds for plan in plans.values() for way in plan.candidates if way.kernel == plan.kernel)


def _as_json(
    device: DeviceSpec,
    problems: dict[str, Problem],
    plans: dict[str, Plan],
    baselines: dict[str, dict[str, tuple[cost.Part, ...]]],
) -> dict[str, Any]:
    def parts_of(parts: tuple[cost.Part, ...]) -> dict[str, Any]:
        steps = [{"name": part.name, "model_us": part.seconds * 1e6} for part in parts]
        return {"model_us": cost.total(parts) * 1e6, "parts": steps}

    base = sum(map(cost.total, baselines["frozen"].values()))
    return {
        "device": asdict(device),
        "directions": {
            direction: {
                "problem": asdict(problems[direction]),
                "backend": plan.backend,
                "kernel": plan.kernel,
                "configs": [asdict(config) for config in plan.configs],
                "candidates": {f"{w.backend} {w.kernel}": parts_of(w.parts) for w in plan.candidates},
                "baselines": {name: parts_of(parts[direction]) for name, parts in baselines.items()},
                "reasons": list(plan.reasons),
            }
            for direction, plan in plans.items()
        },
        "lora_tax_model": _chosen_seconds(plans) / base - 1,
    }
