"""Liger's modules and lorafuse in one model, in both orders (T1): Liger's own kernels need a GPU, so that here a torch
function stands for its SwiGLU; and a LoRA on lm_head with a chunked cross entropy.
"""

import copy

import pytest
from tiny_models import adapted, assert_close, counting_fused, counting_groups, counting_mlps, run, token_ids
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.models.llama import modeling_llama

import lorafuse

pytestmark = pytest.mark.usefixtures("small_groups")


class TestLiger:
    @pytest.fixture(autouse=True)
    def liger(self, monkeypatch):
        monkeypatch_of_liger = pytest.importorskip("liger_kernel.transformers.monkey_patch")
        swiglu = pytest.importorskip("liger_kernel.transformers.swiglu")
        monkeypatch.setattr(swiglu, "_swiglu_dispatch", lambda gate, up: F.silu(gate) * up)
        # restored after the test
        for name in ("apply_rotary_pos_emb", "LlamaRMSNorm", "LlamaMLP"):
            monkeypatch.setattr(modeling_llama, name, getattr(modeling_llama, name))

        def apply(**settings):
            others = {"rope": False, "rms_norm": False, "fused_linear_cross_entropy": False}
            monkeypatch_of_liger.apply_liger_kernel_to_llama(**others, **settings)

        return apply

    @pytest.mark.parametrize("order", ["liger first", "lorafuse first"])
    def test_an_instance(self, liger, order):
        """Liger's forward on the object is in front of ours; gate and up are siblings there."""
        stock = adapted()
        patched = copy.deepcopy(stock)
        if order == "liger first":
            liger(model=patched.base_model.model)
        report = lorafuse.patch(patched, groups=True)
        if order == "lorafuse first":
            liger(model=patched.base_model.model)
        else:
            assert {one.reason for one in report.apart} == {
                "its forward was replaced by LigerSwiGLUMLP.forward (gate_proj, up_proj, down_proj)"
            }
        with counting_mlps() as mlps, counting_groups() as siblings:
            assert_close(run(patched), run(stock))
        assert (mlps.call_count, siblings.call_count) == (0, 4)
        lorafuse.unpatch(patched)
        assert_close(run(patched), run(stock))

    def test_the_class(self, liger):
        """A model that is made of Liger's modules has gated MLPs like any other."""
        stock = adapted()
        liger()
        model = adapted()
        assert "Liger" in str(model)
        assert type(model.base_model.model.model.layers[0].mlp).__name__ == "LigerSwiGLUMLP"
        lorafuse.patch(model, groups=True)
        with counting_mlps() as mlps:
            assert_close(run(model), run(stock))
        assert mlps.call_count == 2


def chunked_loss(model, ids, chunks):
    """The mean cross entropy of next tokens; logits of a chunk of tokens at a time, computed again in backward."""
    base = model.base_model.model
    hidden = base.model(input_ids=ids).last_hidden_state[:, :-1].flatten(0, 1)
    labels = ids[:, 1:].flatten()

    def loss(hidden, labels):
        return F.cross_entropy(base.lm_head(hidden).float(), labels, reduction="sum")

    parts = zip(hidden.chunk(chunks), labels.chunk(chunks), strict=True)
    return sum(checkpoint(loss, *part, use_reentrant=False) for part in parts) / labels.numel()


@pytest.mark.parametrize("has_groups", [False, True])
def test_an_adapter_on_lm_head_with_a_chunked_loss(has_groups):
    settings = {"target_modules": ["q_proj", "k_proj", "up_proj", "gate_proj", "down_proj", "lm_head"]}
    stock = adapted(**settings)
    patched = copy.deepcopy(stock)
    assert "base_model.model.lm_head" in [one.name for one in lorafuse.patch(patched, groups=has_groups).patched]
    ids = token_ids(3, 9)
    results, rows = [], []
    for model in (patched, stock):
        model.zero_grad()
        with counting_fused() as calls:
            loss = chunked_loss(model, ids, 4) if model is patched else model(input_ids=ids, labels=ids).loss
            loss.backward()
        rows.append([call.args[0].shape[0] for call in calls.call_args_list if call.args[1].shape[0] == 64])
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append({"loss": loss.detach()} | gradients)
    assert_close(*results)
    # 24 tokens in chunks of 6, each twice: logits are never whole
    assert rows == [[6] * 8, []]
