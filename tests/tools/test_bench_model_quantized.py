"""`lorafuse bench model --quant`: what trains over a base that bitsandbytes or torchao stores."""

from dataclasses import replace
from unittest import mock

import pytest
from test_bench_model import _tiny_models, options, run  # noqa: F401 (a fixture)
from tiny_transformers import TINY_64

from lorafuse.bench import model, transformer
from lorafuse.bench.transformer_cost import VARIANTS, Sizes
from lorafuse.demo.quantized import TYPES
from lorafuse.integrations import hf_quantized


@pytest.mark.parametrize("quant", TYPES)
def test_a_quantized_base(quant, monkeypatch):
    """Without its training, and with its memory; parameters are those of the dense base."""
    pytest.importorskip("torchao" if quant == "int8_torchao" else "bitsandbytes")
    monkeypatch.setitem(transformer.MODELS, "tiny-64", TINY_64)
    with mock.patch.object(hf_quantized, "run_linear", wraps=hf_quantized.run_linear) as calls:
        result = run(quant=quant, variants=list(VARIANTS), case=["tiny-64"])
    assert calls.call_count == 14 * (1 + 3 + 1)
    assert result["case"] == f"tiny-64 over {quant}, accumulate 1, checkpointing off"
    assert (result["quant"], result["failed"]) == (quant, {})
    assert result["absent"] == {"full": f"it does not run over a base in {quant}"}
    frozen, peft, ours = (result["variants"][name] for name in ("frozen", "peft", "lorafuse"))
    sizes = replace(Sizes.of(TINY_64.config()), layers=2)
    packed = sizes.active_weights() - sizes.vocabulary * sizes.H
    rest = frozen["weights_bytes"] - 4 * (frozen["parameters"] - packed)
    # absmax, code and nested statistics of small weights; of int8 a scale for each of at most 192 rows
    least, most = (packed, packed + 14 * 4 * 192) if "int8" in quant else (packed / 2, packed * 0.56 + 14 * 2000)
    assert least < rest <= most
    assert ours["weights_bytes"] == peft["weights_bytes"] == frozen["weights_bytes"] + 4 * peft["trained"]
    assert ours["last_loss"] == pytest.approx(peft["last_loss"], abs=1e-5)
    assert result["parity"]["first_micro_batch"]["lorafuse"]["adapters_effect"] > 0.1
    assert {"tax", "peak_bytes"} <= ours.keys()


def test_what_rounds_x_on_a_gpu_is_not_compared():
    with pytest.raises(ValueError, match="--quant int8: bitsandbytes rounds x to 8 bits on this device"):
        model.cases(options(quant="int8", device="cuda"))
