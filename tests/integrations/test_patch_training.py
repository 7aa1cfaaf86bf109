"""Training a patched model (T1): the Trainer, gradient checkpointing and torch.compile see nothing unusual."""

import copy

import peft
import peft.utils.hotswap
import pytest
import torch
import transformers
from tiny_models import (
    adapted,
    assert_close,
    assert_same_model,
    counting_fused,
    inputs_of,
    patched_copy,
    run,
    tiny,
    token_ids,
    train_away_from_zero,
)
from torch import nn

import lorafuse
from lorafuse.testing.numerics import relative_l2, tolerance

STEPS = 8


def trained_by_trainer(model, folder):
    """Losses of each step, and the folder of the saved adapter."""
    examples = [{"input_ids": ids, "labels": ids} for ids in token_ids(4 * STEPS)]
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        seed=3,
    )
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=examples)
    trainer.train()
    trainer.save_model()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_trainer(tmp_path):
    stock = adapted()
    patched, _ = patched_copy(stock, strict=True)
    start = copy.deepcopy(stock)
    expected = trained_by_trainer(stock, tmp_path / "stock")
    with counting_fused() as calls:
        losses = trained_by_trainer(patched, tmp_path / "patched")
    assert calls.call_count == 14 * STEPS
    assert len(losses) == STEPS
    assert losses == pytest.approx(expected, rel=1e-6)
    assert len(set(losses)) == STEPS

    reloaded = peft.PeftModel.from_pretrained(tiny(), tmp_path / "patched", is_trainable=True)
    assert_same_model(patched.eval(), reloaded.eval())
    moved = 0
    before, after = dict(start.named_parameters()), dict(stock.named_parameters())
    for name, parameter in patched.named_parameters():
        if parameter.requires_grad:
            moved += (parameter - before[name]).norm().item() > 1e-3
            assert relative_l2(parameter, after[name]) < 1e-3, name
        else:
            assert torch.equal(parameter, before[name]), name
    assert moved == 28


class TestGradientCheckpointing:
    @pytest.mark.parametrize("reentrant", [False, True])
    @pytest.mark.parametrize("dropout", [0.0, 0.3])
    def test_same_gradients(self, reentrant, dropout):
        patched, _ = patched_copy(adapted(lora_dropout=dropout).train(), strict=True)
        expected = run(patched, seed=6)
        patched.enable_input_require_grads()
        patched.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        with counting_fused() as calls:
            got = run(patched, seed=6)
        # the forward of each block runs a second time
        assert calls.call_count == 28
        assert all(torch.equal(got[name], expected[name]) for name in expected)

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_as_peft(self, reentrant):
        stock = adapted().train()
        patched, _ = patched_copy(stock, strict=True)
        for model in (stock, patched):
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        assert_same_model(patched, stock)
        patched.gradient_checkpointing_disable()
        with counting_fused() as calls:
            assert_same_model(patched, stock)
        assert calls.call_count == 14


def test_gradients_accumulate():
    stock = adapted()
    patched, _ = patched_copy(stock)
    first, second = inputs_of(stock, batch=2), inputs_of(stock, batch=3)
    for model in (stock, patched):
        for inputs in (first, second):
            model(**inputs).logits.pow(2).sum().backward()
    expected = dict(stock.named_parameters())
    for name, parameter in patched.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.any()
            assert relative_l2(parameter.grad, expected[name].grad) <= tolerance(torch.float32), name


def test_backward_twice_through_a_kept_graph():
    patched, _ = patched_copy(adapted())
    loss = patched(**inputs_of(patched)).logits.pow(2).sum()
    loss.backward(retain_graph=True)
    first = {n: p.grad.clone() for n, p in patched.named_parameters() if p.requires_grad}
    loss.backward()
    assert all(torch.equal(p.grad, 2 * first[n]) for n, p in patched.named_parameters() if p.requires_grad)


def mlp(**settings):
    """A small model whose layers are all adapted, with a residual and an activation between them."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.gate, self.down = nn.Linear(32, 40), nn.Linear(32, 40, bias=False), nn.Linear(40, 32)

        def forward(self, x):
            return x + self.down(nn.functional.silu(self.gate(x)) * self.up(x))

    torch.manual_seed(8)
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["up", "gate", "down"], **settings)
    return train_away_from_zero(peft.get_peft_model(nn.Sequential(Block(), Block()), config))


def step(function, model, x):
    """`{name: tensor}`: the output, the input gradient and each adapter gradient."""
    model.zero_grad(set_to_none=True)
    x = x.clone().requires_grad_()
    torch.manual_seed(4)
    y = function(x)
    y.pow(2).sum().backward()
    grads = {f"d {n}": p.grad for n, p in model.named_parameters() if p.requires_grad}
    return {"y": y.detach(), "dx": x.grad, **grads}


# the compiler allocates by other means, and traces through none of the poison
@pytest.mark.no_poison
class TestCompile:
    @pytest.fixture(autouse=True)
    def _fresh(self):
        torch.compiler.reset()
        yield
        torch.compiler.reset()

    @pytest.mark.parametrize("dropout", [0.0, 0.3])
    def test_one_layer(self, dropout):
        model, _ = patched_copy(mlp(lora_dropout=dropout).train(), strict=True)
        layer = model.base_model.model[0].up
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        x = torch.randn(2, 5, 32)
        assert_close(step(compiled, layer, x), step(layer, layer, x))

    def test_mlp(self):
        stock = mlp()
        patched, _ = patched_copy(stock, strict=True)
        compiled = torch.compile(patched, backend="aot_eager", fullgraph=True)
        x = torch.randn(2, 5, 32)
        expected = step(stock, stock, x)
        assert_close(step(compiled, patched, x), expected)
        assert_close(step(patched, patched, x), expected)

    def test_a_changed_state_is_compiled_again(self):
        model, _ = patched_copy(mlp(), strict=True)
        layer = model.base_model.model[0].up
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        x = torch.randn(2, 5, 32)
        with torch.no_grad():
            first = compiled(x)
            layer.set_scale("default", 3.0)
            scaled = compiled(x)
            assert_close({"y": scaled}, {"y": layer(x)})
            assert relative_l2(scaled, first) > 0.1
            layer.enable_adapters(False)
            assert torch.equal(compiled(x), layer.base_layer(x))
            layer.enable_adapters(True)
            layer.merge()
            assert torch.equal(compiled(x), layer.base_layer(x))

    def test_a_hot_swapped_adapter_compiles_once(self, tmp_path):
        donor = mlp()
        train_away_from_zero(donor).base_model.model[0].up.lora_alpha["default"] = 9
        donor.save_pretrained(tmp_path)
        stock = mlp()
        patched, _ = patched_copy(stock, strict=True)
        for model in (stock, patched):
            peft.utils.hotswap.prepare_model_for_compiled_hotswap(model, target_rank=8, config=model.peft_config)
        compiled = torch.compile(patched, backend="aot_eager", fullgraph=True)
        x = torch.randn(2, 5, 32)
        assert_close(step(compiled, patched, x), step(stock, stock, x))
        before = compiled(x)
        for model in (stock, patched):
            peft.utils.hotswap.hotswap_adapter(model, tmp_path, adapter_name="default", torch_device="cpu")
        with torch._dynamo.config.patch(error_on_recompile=True):
            got = step(compiled, patched, x)
        assert_close(got, step(stock, stock, x))
        assert relative_l2(got["y"], before) > 0.1

    def test_a_layer_that_falls_back(self):
        stock, patched = mlp(), mlp()
        lorafuse.patch(patched, strict=True)
        for model in (stock, patched):
            model.base_model.model[0].up.base_layer.weight.requires_grad_(True)
        layer = patched.base_model.model[0].up
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        x = torch.randn(2, 5, 32)
        reference = stock.base_model.model[0].up
        assert_close(step(compiled, layer, x), step(reference, reference, x))
