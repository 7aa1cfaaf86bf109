"""The decode kernels on a GPU: rates of quantized weights that are decoded, as shares of a copy's.

    python bench/decode.py [--json FILE] [--rounds 50] [--shape 4096,14336]

By csrc's kernel where lorafuse._cuda is built (`make cuda`), by Triton's, and by bitsandbytes where it is installed.
Every result is compared with the format's codec first, bit for bit; none is timed that differs. Times are medians of
interleaved calls with L2 filled by a read before each; a rate counts the stored bytes and those of the bf16 result.
"""

import argparse
import importlib.util
import json
import statistics
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorafuse.backends import base, native
from lorafuse.backends.protocol import Backend
from lorafuse.files import write_text
from lorafuse.operands import Weight
from lorafuse.testing.conditions import conditions, describe
from lorafuse.testing.timing import measure_calls, percentile

# of one projection of Llama 3.1 8B: the widest weight, and one that L2 holds in part
SHAPES = ((4096, 14336), (4096, 4096))
DTYPE = torch.bfloat16
BLOCK, NESTED_BLOCK = 64, 256
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip

Call = Callable[[], Tensor]


def weights(N: int, K: int, device: torch.device) -> dict[str, Weight]:
    """Random weights by the name of how they are stored."""
    generator = torch.Generator(device).manual_seed(0)

    def uniform(*sizes: int) -> Tensor:
        return torch.rand(sizes, generator=generator, device=device)

    def bytes_of(*sizes: int) -> Tensor:
        return torch.randint(0, 256, sizes, generator=generator, device=device, dtype=torch.uint8)

    blocks = -(-N * K // BLOCK)
    packed, code = bytes_of(-(-N * K // 2)), torch.tensor(NF4, device=device)
    text = f"nf4:{N},{K};block={BLOCK};dtype=bfloat16"
    nested = uniform(-(-blocks // NESTED_BLOCK)), uniform(256) * 2 - 1, torch.tensor(0.5, device=device)
    return {
        "NF4": Weight(packed, statistics=(uniform(blocks), code), format=text),
        "NF4, nested": Weight(packed, statistics=(bytes_of(blocks), code, *nested), format=text),
        "FP8, 128 x 128": Weight(
            (uniform(N, K) * 2 - 1).to(torch.float8_e4m3fn), statistics=(uniform(-(-N // 128), -(-K // 128)) * 0.1,),
            format="fp8:block=128x128;scale=rounded",
        ),
    }  # fmt: skip


def stored_bytes(w: Weight) -> int:
    return sum(t.numel() * t.element_size() for t in (w.data, *w.statistics))


def bitsandbytes(w: Weight) -> Call:
    """Its own decoding of the same tensors, into memory of its choice as its layers call it."""
    import bitsandbytes.functional as F

    absmax, code, *nested = w.statistics
    given: dict[str, Any] = {"shape": w.stored, "code": code, "blocksize": BLOCK, "quant_type": "nf4", "dtype": DTYPE}
    if nested:
        outer, outer_code, given["offset"] = nested
        given["state2"] = F.QuantState(outer, code=outer_code, blocksize=NESTED_BLOCK, dtype=torch.float32)
    state = F.QuantState(absmax, **given)
    return lambda: F.dequantize_4bit(w.data.view(-1, 1), state)


def calls(w: Weight, out: Tensor, backends: dict[str, Backend]) -> dict[str, Call]:
    """Every decoder of a weight; those of `backends` write into `out`."""
    decoders: dict[str, Call] = {
        name: (lambda run=run: run.decode(w, out.dtype, out)) for name, run in backends.items()
    }  # fmt: skip
    if w.format_name == "nf4" and importlib.util.find_spec("bitsandbytes") is not None:
        decoders["bitsandbytes"] = bitsandbytes(w)
    return decoders


def differing(decoders: dict[str, Call], w: Weight, out: Tensor) -> list[str]:
    """The decoders that do not give the codec's bits."""
    expected, wrong = w.decoded(out.dtype).data, []
    for name, call in decoders.items():
        out.fill_(float("nan"))
        if not torch.equal(call().view(torch.int16), expected.view(torch.int16)):
            wrong.append(name)
    return wrong


def run_shape(N: int, K: int, rounds: int, backends: dict[str, Backend]) -> tuple[list[dict[str, Any]], list[str]]:
    """`(figures, what is wrong)` of all weights of a shape."""
    device = torch.device("cuda")
    out, source = torch.empty(2, N, K, dtype=DTYPE, device=device).normal_()
    copied = out.numel() * out.element_size()
    figures, problems = [], []
    for storage, w in weights(N, K, device).items():
        decoders = calls(w, out, backends)
        wrong = differing(decoders, w, out)
        problems += [f"{name} decodes {storage} {N} x {K} differently from its codec" for name in wrong]
        timed = {name: call for name, call in decoders.items() if name not in wrong}
        seconds = measure_calls({"copy": lambda: out.copy_(source), **timed}, rounds, 10, device)
        rates = {}
        for name, values in seconds.items():
            median = statistics.median(values)
            moved = 2 * copied if name == "copy" else copied + stored_bytes(w)
            rates[name] = {
                "median": median, "p20": percentile(values, 0.2), "p80": percentile(values, 0.8),
                "bytes_per_s": moved / median,
            }  # fmt: skip
        for one in rates.values():
            one["of_copy"] = one["bytes_per_s"] / rates["copy"]["bytes_per_s"]
        figures.append({"N": N, "K": K, "storage": storage, "rounds": rounds, "decoders": rates})
    return figures, problems


def main() -> int:
    """0 when every result was the codec's; 1 when one was not, or nothing can run here."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every median and spread there")
    parser.add_argument("--rounds", type=int, default=50, help="timed calls of each decoder (50)")
    parser.add_argument("--shape", action="append", metavar="N,K", help="may be repeated (two of Llama 3.1 8B)")
    args = parser.parse_args()
    try:
        shapes = [tuple(map(int, text.split(","))) for text in args.shape or ()] or list(SHAPES)
        if args.rounds < 1 or any(len(shape) != 2 or min(shape) < 1 for shape in shapes):
            raise ValueError
    except ValueError:
        parser.error("--rounds must be at least 1, --shape out and in features: --shape 4096,14336")
    if not torch.cuda.is_available():
        print("torch sees no CUDA device: nothing is decoded")
        return 1
    backends = {}
    # its decode kernels run on every GPU from sm_80 on, its products on Hopper alone
    if native.built("_cuda") and not native.stale("_cuda"):
        from lorafuse.backends import cuda

        backends["csrc"] = cuda.backend()
    if base.availability("triton").ok:
        backends["Triton"] = base.load("triton")
    if not backends:
        print("neither lorafuse._cuda is built from the sources here nor is Triton installed: nothing is decoded")
        return 1
    setting = conditions(torch.device("cuda"))
    if importlib.util.find_spec("bitsandbytes") is not None:
        setting["bitsandbytes"] = metadata.version("bitsandbytes")
    print(describe(setting))
    results, problems = [], []
    for N, K in shapes:
        figures, wrong = run_shape(N, K, args.rounds, backends)
        results += figures
        problems += wrong
        for figure in figures:
            print(f"\n{figure['storage']}, {N} x {K}, bf16 out")
            for name, one in figure["decoders"].items():
                print(
                    f"  {name:<14}{one['median'] * 1e6:9.1f} us [{one['p20'] * 1e6:.1f}-{one['p80'] * 1e6:.1f}]"
                    f"  {one['bytes_per_s'] / 1e12:6.2f} TB/s  {one['of_copy']:6.3f} of a copy"
                )
    if args.json:
        write_text(args.json, json.dumps({"conditions": setting, "results": results}, indent=1) + "\n")
    print("\n".join(problems))
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
