"""How far a patched layer and PEFT's are from fp64, for every combination of dtypes.

python bench/precision.py            write docs/precision.md between its markers
python bench/precision.py --check    exit status 1 where it says more than a factor of two else than measured now
"""

import argparse
import re
import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import lorafuse
from lorafuse.testing.numerics import lora_formula, relative_l2

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "precision.md"
BEGIN, END = "<!-- precision -->\n", "<!-- /precision -->"
M, N, K, R, SCALE = 256, 192, 256, 8, 2.0
NAMES = ("y", "dx", "da", "db")
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
DTYPES = HALF | {"fp32": torch.float32}
# base, adapters, autocast
COMBINATIONS = (
    ("fp32", "fp32", ""),
    ("bf16", "fp32", ""),
    ("bf16", "bf16", ""),
    ("fp16", "fp32", ""),
    ("fp16", "fp16", ""),
    ("fp32", "fp32", "bf16"),
    ("bf16", "fp32", "bf16"),
    ("fp32", "fp32", "fp16"),
    ("fp16", "fp32", "fp16"),
)


def layer(base: str, adapter: str) -> nn.Module:
    """PEFT's layer over a random base, B not zero."""
    torch.manual_seed(0)
    linear = nn.Linear(K, N, bias=False)
    config = LoraConfig(r=R, lora_alpha=SCALE * R, target_modules=["0"])
    model = get_peft_model(nn.Sequential(linear).to(DTYPES[base]), config)
    adapted = model.base_model.model[0]
    nn.init.normal_(adapted.lora_B["default"].weight, std=R**-0.5)
    for factor in (adapted.lora_A, adapted.lora_B):
        factor.to(DTYPES[adapter])
    return model


def errors(model: nn.Module, base: str, autocast: str) -> dict[str, float]:
    """Relative L2 errors of y and the gradients against fp64, by name."""
    torch.manual_seed(1)
    x = torch.randn(M, K).to(DTYPES[base]).requires_grad_()
    with torch.autocast("cpu", HALF.get(autocast, torch.bfloat16), enabled=bool(autocast)):
        y = model(x)
    dy = torch.randn(M, N).to(y.dtype)
    adapted = model.base_model.model[0]
    a, b = (getattr(adapted, name)["default"].weight for name in ("lora_A", "lora_B"))
    gradients = torch.autograd.grad(y, (x, a, b), dy)
    expected = lora_formula(x, adapted.base_layer.weight, a, b, dy, SCALE)
    return {name: relative_l2(t, expected[name]) for name, t in zip(NAMES, (y, *gradients), strict=True)}


def measure() -> dict[tuple[str, str, str], tuple[dict[str, float], dict[str, float]]]:
    """`(PEFT's, lorafuse's)` errors by combination."""
    rows = {}
    for base, adapter, autocast in COMBINATIONS:
        model = layer(base, adapter)
        stock = errors(model, base, autocast)
        report = lorafuse.patch(model, strict=True)
        assert len(report.patched) == 1
        rows[base, adapter, autocast] = stock, errors(model, base, autocast)
    return rows


def rounded(base: str, adapter: str, autocast: str) -> str:
    """What the low-rank path is computed in: the dtype of xa and dyb."""
    compute = autocast or base
    return "fp32" if compute == "fp32" or (compute == "fp16" != adapter and not autocast) else compute


def table(rows: dict) -> str:
    """The Markdown table."""
    lines = [
        "| base | adapters | autocast | xa, dyb | y, dx | "
        + " | ".join(f"{name}: PEFT | lorafuse" for name in NAMES)
        + " |",
        "|---|---|---|---|---|" + "---:|" * 2 * len(NAMES),
    ]
    for (base, adapter, autocast), (stock, ours) in rows.items():
        cells = [base, adapter, autocast or "–", rounded(base, adapter, autocast), autocast or base]
        cells += [f"{error:.1e}" for name in NAMES for error in (stock[name], ours[name])]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def published(text: str) -> list[float]:
    """The errors of a document's table, row by row."""
    inside = text[text.index(BEGIN) : text.index(END)]
    return [float(number) for number in re.findall(r"\d\.\de[+-]\d\d", inside)]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args(argv)
    text, now = DOCUMENT.read_text(), table(measure())
    if args.check:
        pairs = list(zip(published(text), published(BEGIN + now + END), strict=True))
        differing = [(old, new) for old, new in pairs if not old / 2 <= new <= 2 * old]
        print("\n".join(f"published {old:.1e}, measured {new:.1e}" for old, new in differing) or "in step")
        return bool(differing)
    DOCUMENT.write_text(text[: text.index(BEGIN) + len(BEGIN)] + now + text[text.index(END) :])
    return 0


if __name__ == "__main__":
    sys.exit(main())
