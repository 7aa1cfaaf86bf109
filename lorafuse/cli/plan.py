"""Say how lorafuse would run a layer with LoRA on a GPU, and why: candidates, the time of each part, the frozen layer.

Nothing runs. Every time comes from the cost model of lorafuse.plan and says "model"; no GPU is needed with --gpu.
Over a quantized base (--quant) the frozen layer decodes its weight too.
"""

import argparse
from dataclasses import replace

from lorafuse.cli import _common
from lorafuse.cli._plan_print import Direction, print_plans
from lorafuse.formats import FORMATS, load
from lorafuse.formats.sizes import LIBRARY_ROWS, is_decoded_in_loop, why_not_held
from lorafuse.plan import DeviceSpec, Problem, cost, find, select
from lorafuse.testing.cases import find as find_case
from lorafuse.testing.cases import find_moe, sizes

SUMMARY = "say how a layer would run on a GPU, and why, from the cost model"

__all__ = ["SUMMARY", "add_arguments", "run"]

_DTYPES = ("bfloat16", "float16", "float32")
_GRADIENTS = ("dx", "da", "db")
# what would run if every backend this version holds could run
_AVAILABLE = (("eager", ""), ("triton", ""), ("cuda", ""))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gpu", help="H200, A100, … (the one here)")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--shape", metavar="M,N,K", help="tokens, out features, in features")
    which.add_argument("--case", metavar="NAME", help="a layer by name, with --m tokens")
    which.add_argument("--moe", metavar="NAME", help="the experts of a block by name, with --m tokens")
    parser.add_argument("--m", type=int, default=8192, help="tokens of --case or --moe (8192)")
    parser.add_argument("--rank", type=int, default=16, help="of the adapter (16)")
    parser.add_argument("--dtype", default="bfloat16", choices=_DTYPES, help="of the base (bfloat16)")
    parser.add_argument("--quant", default="dense", choices=FORMATS, help="how the base is stored; --dtype computes")
    parser.add_argument("--adapter-dtype", default="float32", choices=_DTYPES, help="of the adapter (float32)")
    parser.add_argument("--bias", action="store_true", help="the layer has a bias")
    parser.add_argument("--dropout", action="store_true", help="the adapter has dropout")
    parser.add_argument("--backward", action="store_true", help="a training step: dx, da and db too")
    parser.add_argument("--json", action="store_true", help="the same as JSON, times under model_us")


def run(args: argparse.Namespace) -> int:
    """0; raises ValueError for a GPU, a case, a shape or a rank that cannot be."""
    device = _device(args.gpu)
    _common.check_numbers(args, "m", "rank")
    if args.moe is not None:
        case = find_moe(args.moe)
        forward: tuple[Problem, ...] = _experts(args)
        # the activation's epilogue is that of the projection before it: gate_up forward, down backward
        backward = tuple(
            replace(problem, gradients=_GRADIENTS, epilogue=other.epilogue)
            for problem, other in zip(forward, reversed(forward), strict=True)
        )
        named = {"T": args.m, "E": case.E, "k": case.k, "H": case.H, "I": case.I}
    else:
        forward = (_problem(args),)
        backward = (replace(forward[0], gradients=_GRADIENTS),)
        named = {name: getattr(forward[0], name) for name in "MNK"}
    operators = {"forward": forward, "backward": backward} if args.backward else {"forward": forward}
    directions = {
        name: Direction(problems, select(problems, device, _AVAILABLE), cost.frozen(problems, device))
        for name, problems in operators.items()
    }
    named |= {name: getattr(forward[0], name) for name in ("R", "dtype", "adapter_dtype")}
    named |= {"base": args.quant} if args.quant != "dense" else {}
    problem = ", ".join(f"{name} {value}" for name, value in named.items())
    print_plans(device, problem, directions, args.json, _notes(args, forward[0]))
    return 0


def _device(name: str | None) -> DeviceSpec:
    if name is not None:
        return find(name)
    import torch

    if not torch.cuda.is_available():
        raise ValueError("torch sees no CUDA device here; name the GPU to plan for: --gpu H200")
    from lorafuse.backends.problems import device_spec

    spec = device_spec(torch.device("cuda", torch.cuda.current_device()))
    assert spec is not None
    return spec


def _problem(args: argparse.Namespace) -> Problem:
    if args.case is not None:
        case = find_case(args.case)
        M, N, K = args.m, case.N, case.K
    else:
        M, N, K = sizes(args.shape, 3, 3, "tokens, out and in features", "8192,4096,4096")
    _check_quant(args, N, K)
    packed = is_decoded_in_loop(args.quant, K)
    return Problem(
        M, N, K, args.rank, args.dtype, args.adapter_dtype, args.bias, args.dropout, format=args.quant, packed=packed
    )


def _experts(args: argparse.Namespace) -> tuple[Problem, Problem]:
    for flag in ("bias", "dropout"):
        if getattr(args, flag):
            raise ValueError(f"--{flag}: the model of experts does not hold it; leave it out with --moe")
    case = find_moe(args.moe)
    for N, K in ((2 * case.I, case.H), (case.H, case.I)):
        _check_quant(args, N, K, is_stack=True)
    rest = args.rank, args.dtype, args.adapter_dtype
    up = Problem(
        args.m * case.k, 2 * case.I, case.H, *rest, groups=case.E, is_ragged=True, choices=case.k, format=args.quant
    )
    return replace(up, epilogue="gated"), replace(up, N=case.H, K=case.I)


def _check_quant(args: argparse.Namespace, N: int, K: int, is_stack: bool = False) -> None:
    if reason := why_not_held(args.quant, N, K, is_stack):
        raise ValueError(f"--quant {args.quant}: {reason}")


def _notes(args: argparse.Namespace, problem: Problem) -> list[str]:
    """What a plan over a quantized base does not say."""
    notes = []
    if args.quant in ("nf4", "fp4") and problem.M <= LIBRARY_ROWS and not problem.is_ragged:
        notes.append(
            f"without gradients a patched layer leaves up to {LIBRARY_ROWS} rows to bitsandbytes' kernel, which reads "
            "the weight as it is packed; with them, and through lorafuse.functional, it runs as above"
        )
    if args.quant != "dense" and not hasattr(load(args.quant), "kernel"):
        notes.append(f"{args.quant} has no decode kernel: its codec in torch passes over the weight several times")
    return notes
