"""Siblings and gated MLPs over quantized bases run as one operator each (T1), and give what PEFT gives."""

import copy
import weakref

import pytest
import quantized_models
import torch
from tiny_models import assert_close, counting_groups, counting_mlps, run, token_ids

import lorafuse
from lorafuse.backends import aten
from lorafuse.integrations import groups, hf_quantized
from lorafuse.testing.numerics import tolerance

IDS = {"input_ids": token_ids()}
pytestmark = pytest.mark.usefixtures("small_groups")


def pair(how="nf4", dtype=torch.float32, **settings):
    stock = quantized_models.family("llama", how, dtype, **settings)
    patched = copy.deepcopy(stock)
    return stock, patched, lorafuse.patch(patched)


@pytest.mark.parametrize("how", ["nf4", "int8", "torchao int8", "torchao int4"])
def test_a_format(how):
    stock, patched, report = pair(how)
    layers = len(stock.base_model.model.model.layers)
    assert sorted({group.kind for group in report.groups}) == ["gated_mlp", "siblings"]
    assert len(report.groups) == 2 * layers
    assert report.apart == []
    expected = run(stock, IDS)
    with counting_groups() as siblings, counting_mlps() as mlps:
        actual = run(patched, IDS)
    assert (siblings.call_count, mlps.call_count) == (layers, layers)
    assert_close(actual, expected)


def test_each_weight_is_decoded_once_a_direction(monkeypatch):
    _, patched, _ = pair()
    decoded, original = [], aten.BACKEND.decode

    def counted(w, dtype, out):
        decoded.append(w.data.data_ptr())
        return original(w, dtype, out)

    monkeypatch.setattr(aten.BACKEND, "decode", counted)
    run(patched, IDS)
    assert {decoded.count(one) for one in decoded} == {2}


def test_layers_of_another_dtype_are_called(monkeypatch):
    """bitsandbytes computes in bf16 here and returns fp32, which its activation reads."""
    monkeypatch.setitem(hf_quantized.HAS_PRODUCTS, torch.bfloat16, True)
    _, patched, _ = pair(compute_dtype=torch.bfloat16)
    apart = copy.deepcopy(patched)
    lorafuse.patch(apart, groups=False)
    expected = run(apart, IDS)
    with counting_groups() as siblings, counting_mlps() as mlps:
        actual = run(patched, IDS)
    assert mlps.call_count == 0
    assert siblings.call_count > 0
    assert_close(actual, expected, tolerance(torch.bfloat16))


def test_a_copy_has_groups_of_its_own():
    stock, patched, _ = pair()
    copied = copy.deepcopy(patched)
    del patched
    with counting_groups() as siblings:
        actual = run(copied, IDS)
    assert siblings.call_count > 0
    assert_close(actual, run(stock, IDS))


def test_some_bases_are_quantized():
    stock = quantized_models.family("llama")
    mlp = stock.base_model.model.model.layers[0].mlp
    mlp.up_proj.base_layer = torch.nn.Linear(64, 128, bias=False).requires_grad_(False)
    report = lorafuse.patch(stock)
    reasons = {one.reason.partition(" (")[0] for one in report.apart if one.name.endswith("layers.0.mlp")}
    assert reasons == {"some bases are quantized and others are not"}


def test_nothing_is_kept():
    _, patched, _ = pair()
    kept, original = weakref.WeakSet(), groups.run_linears

    def counted(*args):
        ys = original(*args)
        kept.update(ys)
        return ys

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(groups, "run_linears", counted)
        run(patched, IDS)
    assert len(kept) == 0
