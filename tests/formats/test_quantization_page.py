"""What docs/quantization.md states: every format has a row, and the errors of int8 are measured again."""

import re
from pathlib import Path

import pytest
import torch

from lorafuse import formats

PAGE = (Path(__file__).parents[2] / "docs" / "quantization.md").read_text()
ROWS = {
    (dtype, x): [float(cell) for cell in cells.split("|")]
    for dtype, x, cells in re.findall(r"^\| (fp16|bf16) \| (\w+) \| (.*) \|$", PAGE, re.MULTILINE)
}


def test_every_format_has_a_row():
    (table,) = re.findall(r"^\| format \|.*?\n\n", PAGE, re.MULTILINE | re.DOTALL)
    named = [name for row in table.strip().splitlines()[2:] for name in re.findall(r"`(\w+)`", row.split("|")[1])]
    assert sorted(named) == sorted(formats.FORMATS)


@pytest.mark.parametrize("x_is", ["randn", "outliers"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_errors_of_int8(dtype, x_is):
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    w, x = (torch.randn(1024, 1024) * 0.02).half(), torch.randn(512, 1024)
    if x_is == "outliers":
        x[:, :6] *= 20
    x = x.to(dtype)
    linear = bnb.nn.Linear8bitLt(1024, 1024, bias=False, has_fp16_weights=False, threshold=6.0)
    linear.weight = bnb.nn.Int8Params(w, requires_grad=False, has_fp16_weights=False)
    linear = linear.to("cpu").eval()
    adopted = formats.adopt(linear)
    with torch.no_grad():
        theirs = linear(x).double()
    ours = (x @ adopted.decoded(dtype).data.t()).double()
    actual = []
    for weight in (w.double(), adopted.decoded(torch.float64).data):
        exact = x.double() @ weight.t()
        actual += [float((y - exact).norm() / exact.norm()) for y in (theirs, ours)]
    assert actual[1] < actual[0]
    assert actual[3] < actual[2]
    # sums are split otherwise on another CPU
    assert actual == pytest.approx(ROWS[{torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype], x_is], rel=0.05)
