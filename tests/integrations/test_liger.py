"""Liger's modules and lorafuse in one model, in both orders (T1): Liger's own kernels need a GPU, so that here torch
functions stand for them; and a LoRA on lm_head with a chunked cross entropy.
"""

import copy
import re

import pytest
import torch
from tiny_models import adapted, assert_close, counting_fused, counting_groups, counting_mlps, run, token_ids
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.models.llama import modeling_llama

import lorafuse

pytestmark = pytest.mark.usefixtures("small_groups")


def loss_and_gradients(model, has_logits=True):
    model.zero_grad()
    output = model(input_ids=token_ids(), labels=token_ids())
    assert (output.logits is not None) == has_logits
    output.loss.backward()
    gradients = {f"d {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": output.loss.detach()} | gradients


class Norm(torch.autograd.Function):
    """Liger's RMSNorm, which writes dx into dy."""

    @staticmethod
    def forward(ctx, x, weight, epsilon, *_):
        ctx.save_for_backward(x, weight)
        ctx.epsilon = epsilon
        return weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        r = torch.rsqrt(x.square().mean(-1, keepdim=True) + ctx.epsilon)
        dn = dy * weight
        dy.copy_(r * (dn - x * r.square() * (dn * x).mean(-1, keepdim=True)))
        return (dy, *[None] * 6)


class Swiglu(torch.autograd.Function):
    """Liger's product, which writes the gradients of gate and up into these."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx, dh):
        gate, up = (saved.detach() for saved in ctx.saved_tensors)
        of_gate, of_up = torch.ops.aten.silu_backward(dh * up, gate), dh * F.silu(gate)
        return gate.copy_(of_gate), up.copy_(of_up)


# what transformers ships, which Liger replaces
rotated = modeling_llama.apply_rotary_pos_emb


class FusedLoss:
    """Liger's cross entropy of the product of x and a weight."""

    @staticmethod
    def apply(x, weight, target, bias, ce_weight, ignore_index, *_):
        return F.cross_entropy(x @ weight.t(), target, ignore_index=ignore_index), None, None, None


class TestLiger:
    @pytest.fixture(autouse=True)
    def liger(self, monkeypatch):
        monkeypatch_of_liger = pytest.importorskip("liger_kernel.transformers.monkey_patch")
        from liger_kernel.transformers import functional, rms_norm, rope, swiglu

        monkeypatch.setattr(swiglu, "_swiglu_dispatch", Swiglu.apply)
        monkeypatch.setattr(rms_norm, "LigerRMSNormFunction", Norm)
        monkeypatch.setattr(rope, "dispatch", lambda _, q, k, cos, sin, *more: rotated(q, k, cos, sin))
        monkeypatch.setattr(functional, "LigerFusedLinearCrossEntropyFunction", FusedLoss)
        # restored after the test
        for name in ("apply_rotary_pos_emb", "LlamaRMSNorm", "LlamaMLP"):
            monkeypatch.setattr(modeling_llama, name, getattr(modeling_llama, name))
        monkeypatch.setattr(modeling_llama.LlamaForCausalLM, "forward", modeling_llama.LlamaForCausalLM.forward)

        def apply(others=False, **settings):
            names = ("rope", "rms_norm", "fused_linear_cross_entropy")
            monkeypatch_of_liger.apply_liger_kernel_to_llama(**dict.fromkeys(names, others), **settings)

        return apply

    @pytest.mark.parametrize("order", ["liger first", "lorafuse first"])
    @pytest.mark.parametrize("swiglu", [True, False])
    def test_all_of_it(self, liger, order, swiglu):
        """As `use_liger_kernel=True` of the Trainer: norms, rotary embedding and the loss too, without logits."""
        stock = adapted().train()
        expected = loss_and_gradients(stock)
        patched = copy.deepcopy(stock)
        if order == "lorafuse first":
            assert lorafuse.patch(patched).skipped == []
        liger(True, model=patched.base_model.model, swiglu=swiglu)
        if order == "liger first":
            assert lorafuse.patch(patched).skipped == []
        for _ in range(2):
            with counting_mlps() as mlps, counting_groups() as siblings:
                assert_close(loss_and_gradients(patched, has_logits=False), expected)
            assert (mlps.call_count, siblings.call_count) == ((0, 4) if swiglu else (2, 2))

    @pytest.mark.parametrize("of_class", [False, True])
    def test_an_adapter_on_lm_head_is_not_trained_by_its_loss(self, liger, of_class):
        """By PEFT's own layers neither; the report says so."""
        model = adapted(target_modules=["q_proj", "lm_head"]).train()
        liger(True, model=None if of_class else model.base_model.model)
        gradients = loss_and_gradients(model, has_logits=False)
        assert gradients["d base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"].any()
        assert not any("lm_head" in name for name in gradients)
        (skipped,) = lorafuse.patch(model).skipped
        assert skipped.name == "base_model.model.lm_head"
        assert re.search("fused cross entropy reads its weight and never calls it.*in PEFT too", skipped.reason)

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
