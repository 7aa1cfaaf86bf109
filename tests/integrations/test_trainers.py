"""lorafuse in other trainers (T1): each integration against its package where that is installed, else its interface."""

import importlib
import sys
import types
import warnings

import accelerate
import fake_trainers
import peft
import pytest
import torch
import transformers
from fake_trainers import module_of, provide
from tiny_models import adapted, assert_close, counting_fused, lora_config, run, tiny, token_ids, train_away_from_zero
from torch import nn

import lorafuse
from lorafuse.integrations.bypassed import bypassed
from lorafuse.integrations.callback import LorafuseCallback

STEPS = 2


class AdaptingTrainer(transformers.Trainer):
    """As TRL's trainers do with a `peft_config`: the PEFT model is made inside the constructor."""

    def __init__(self, model, args, peft_config=None, **options):
        if peft_config is not None:
            model = train_away_from_zero(peft.get_peft_model(model, peft_config))
        super().__init__(model, args, **options)


def arguments(folder, **settings):
    return transformers.TrainingArguments(
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
        **settings,
    )


def examples():
    return [{"input_ids": ids, "labels": ids} for ids in token_ids(4 * STEPS)]


def trainer_with(folder, *callbacks, kind=AdaptingTrainer, model=None, **options):
    return kind(model, arguments(folder), callbacks=list(callbacks), train_dataset=examples(), **options)


def losses_of(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture
def texts():
    return []


class TestCallback:
    def test_a_trainer_that_makes_the_peft_model_itself(self, tmp_path, texts):
        def build(*callbacks):
            torch.manual_seed(0)
            return trainer_with(tmp_path, *callbacks, model=tiny(), peft_config=lora_config())

        stock = build()
        stock.train()
        callback = LorafuseCallback(log=texts.append)
        fused = build(callback)
        # before anything wraps the model
        assert len(callback.training.report.patched) == 14
        with counting_fused() as calls:
            fused.train()
        assert calls.call_count == 14 * STEPS
        assert losses_of(fused) == pytest.approx(losses_of(stock), rel=1e-6)
        assert len(set(losses_of(fused))) == STEPS
        assert "14 adapted layers patched" in texts[0]
        assert "14 of 14 adapted layers ran fused (14 calls counted)" in texts[1]
        assert len(texts) == 2

    def test_a_model_that_comes_when_training_begins(self, tmp_path, texts):
        callback = LorafuseCallback(log=texts.append)
        trainer = trainer_with(tmp_path, callback, kind=transformers.Trainer, model_init=lambda: adapted())
        trainer.train()
        assert callback.training.status.fused == 14
        # a second run reports anew, of a model of its own
        trainer.train()
        assert len(texts) == 4
        assert "(14 calls counted)" in texts[3]

    def test_nothing_to_patch_ends_the_run(self, tmp_path):
        trainer = trainer_with(tmp_path, LorafuseCallback(), model=tiny())
        with pytest.raises(ValueError, match="LlamaForCausalLM has no adapted layer when training begins"):
            trainer.train()

    @pytest.mark.parametrize("off", ["merge_adapter", "disable_adapter_layers"])
    def test_adapters_that_train_nothing_are_told(self, off):
        model = adapted()
        getattr(model, off)()
        with pytest.warns(UserWarning, match="adapters of 14 layers are merged or disabled"):
            LorafuseCallback(log=None).training.begin(model)

    @pytest.mark.parametrize("strict", [False, True])
    def test_nothing_that_ran_fused_is_told(self, tmp_path, texts, strict):
        model = adapted()
        callback = LorafuseCallback(strict=strict, log=texts.append)
        trainer = trainer_with(tmp_path, callback, model=model)
        for layer in model.modules():
            if isinstance(layer, peft.tuners.lora.Linear):
                layer.base_layer.register_forward_hook(lambda module, args, y: None)
        callback.training.begin = lambda model, shows: None
        reason = "its base layer has hooks or a replaced forward"
        if strict:
            with pytest.raises(RuntimeError, match=reason):
                trainer.train()
        else:
            with pytest.warns(UserWarning, match="no layer ran fused in the first step"):
                trainer.train()
        assert reason in texts[0]


def test_accelerate(texts):
    stock, model = adapted().train(), adapted().train()
    accelerator = accelerate.Accelerator(cpu=True)
    lorafuse.patch(model, strict=True)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    ids = token_ids()
    for one in (stock, model):
        loss = one(input_ids=ids, labels=ids).loss
        accelerator.backward(loss)
    optimizer.step()
    expected = {name: p.grad for name, p in stock.named_parameters() if p.requires_grad}
    assert_close(
        {n: p.grad for n, p in accelerator.unwrap_model(model).named_parameters() if p.requires_grad}, expected
    )
    assert lorafuse.status(model).fused == 14


class TestAxolotl:
    @pytest.fixture
    def plugin(self, monkeypatch):
        provide(monkeypatch, "axolotl")
        pytest.importorskip("pydantic")
        return module_of("axolotl", monkeypatch).LorafusePlugin()

    def test_its_own_kernels_stay_off(self, plugin):
        cfg = {"adapter": "lora"}
        plugin.register(cfg)
        # Axolotl switches on what is None
        assert cfg == {"adapter": "lora", "lora_mlp_kernel": False, "lora_qkv_kernel": False, "lora_o_kernel": False}

    def test_kernels_that_were_switched_on_are_refused(self, plugin):
        with pytest.raises(ValueError, match="lora_qkv_kernel and lorafuse exclude each other"):
            plugin.register({"lora_qkv_kernel": True, "lora_mlp_kernel": False})

    def test_the_model_trains_fused(self, plugin, tmp_path):
        cfg = {"lorafuse_strict": True}
        (callback,) = plugin.add_callbacks_pre_trainer(cfg, model=None)
        assert callback.training.strict
        trainer_with(tmp_path, callback, model=adapted()).train()
        assert callback.training.status.fused == 14

    def test_keys_are_checked(self, plugin):
        name = plugin.get_input_args()
        assert name == "lorafuse.integrations.axolotl.LorafuseArgs"
        with pytest.raises(ValueError, match="lorafuse_strict"):
            plugin.add_callbacks_pre_trainer({"lorafuse_strict": "maybe"}, None)


def test_llamafactory(monkeypatch, tmp_path, texts):
    if provide(monkeypatch, "llamafactory"):
        pytest.skip("LLaMA-Factory's run_exp needs a model and data from disk")
    llamafactory = module_of("llamafactory", monkeypatch)
    llamafactory.train(
        {"trainer": lambda callbacks: trainer_with(tmp_path, *callbacks, model=adapted())}, log=texts.append
    )
    assert "14 of 14 adapted layers ran fused" in texts[1]


class TestSwift:
    @pytest.fixture
    def replaced(self, monkeypatch):
        """A model whose lora_A and lora_B ms-swift has put its forward on, and the same without."""
        provide(monkeypatch, "swift")
        function = importlib.import_module("swift.tuners.peft").keep_device_forward
        models = adapted(), adapted()
        for module in models[0].modules():
            if isinstance(module, peft.tuners.lora.LoraLayer):
                for factor in [*module.lora_A.values(), *module.lora_B.values()]:
                    factor.forward_origin = factor.forward
                    factor.forward = types.MethodType(function, factor)
        return models

    def test_its_forward_of_adapters_is_understood(self, replaced):
        patched, stock = replaced
        assert len(lorafuse.patch(patched, strict=True).patched) == 14
        with counting_fused() as calls:
            assert_close(run(patched), run(stock))
        assert calls.call_count == 14

    def test_another_forward_of_that_name_is_not(self, replaced):
        patched, _ = replaced
        layer = next(m for m in patched.modules() if isinstance(m, peft.tuners.lora.Linear))
        factor = layer.lora_A["default"]
        factor.forward_origin = types.MethodType(lambda self, x: 2 * nn.Linear.forward(self, x), factor)
        (skipped,) = lorafuse.patch(patched).skipped
        assert "not a plain nn.Linear without hooks" in skipped.reason

    def test_the_callback_is_registered(self, monkeypatch, tmp_path):
        provide(monkeypatch, "swift")
        module = module_of("ms_swift", monkeypatch)
        kind = importlib.import_module("swift.callbacks").callbacks_map["lorafuse"]
        assert kind is module.SwiftCallback
        callback = kind(arguments(tmp_path), None)
        trainer_with(tmp_path, callback, model=adapted()).train()
        assert callback.training.status.fused == 14


class TestLightning:
    @pytest.mark.parametrize("late", [False, True])
    def test_fit(self, monkeypatch, tmp_path, texts, late):
        provide(monkeypatch, "lightning")
        pl = importlib.import_module("lightning.pytorch")
        callback = module_of("lightning", monkeypatch).LorafuseCallback(log=texts.append)

        class Module(pl.LightningModule):
            def __init__(self):
                super().__init__()
                self.model = None if late else adapted().train()

            def configure_model(self):
                if self.model is None:
                    self.model = adapted().train()

            def training_step(self, batch, index):
                return self.model(input_ids=batch, labels=batch).loss

            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), lr=0.1)

        trainer = pl.Trainer(
            max_steps=STEPS,
            callbacks=[callback],
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=str(tmp_path),
        )
        batches = torch.utils.data.DataLoader([token_ids(seed=i) for i in range(STEPS)], batch_size=None)
        module = Module()
        if not late:
            # what validates or tests before training
            callback.setup(trainer, module, stage="validate")
            assert len(callback.training.report.patched) == 14
        trainer.fit(module, batches)
        assert callback.training.status.fused == 14
        assert "14 of 14 adapted layers ran fused (14 calls counted)" in texts[1]


class TestBypassed:
    """Kernels of other libraries that read adapted layers and never call them."""

    def kernel(self, library):
        function = types.FunctionType(
            fake_trainers.apply_lora_mlp_swiglu.__code__, vars(fake_trainers), "apply_lora_mlp_swiglu"
        )
        function.__module__ = f"{library}.kernels.lora"
        function.__defaults__ = (True,)
        return function

    @pytest.mark.parametrize("library", ["unsloth", "axolotl"])
    def test_before_patch(self, library):
        model = adapted()
        mlp = model.base_model.model.model.layers[0].mlp
        mlp.forward = types.MethodType(self.kernel(library), mlp)
        report = lorafuse.patch(model)
        assert [s.name.rpartition(".")[2] for s in report.skipped] == ["gate_proj", "up_proj", "down_proj"]
        assert all(f"{library}'s apply_lora_mlp_swiglu reads its weights" in s.reason for s in report.skipped)
        with pytest.raises(ValueError, match="never calls it"):
            lorafuse.patch(adapted_with(model), strict=True)

    def test_linear_attention(self):
        """Axolotl's functions for Qwen3.5, which have other names."""
        parts = nn.Module()
        for name in ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj", "norm"):
            parts.add_module(name, nn.Linear(2, 2))
        assert bypassed(parts) == {}
        for attribute in ("apply_in_proj_fused", "apply_out_proj"):
            function = types.FunctionType((lambda self, x: x).__code__, {}, "apply_in_proj")
            function.__module__ = "axolotl.monkeypatch.lora_kernels"
            setattr(parts, attribute, types.MethodType(function, parts))
        assert list(bypassed(parts)) == list(parts.children())[:-1]

    def test_after_patch(self):
        model = adapted()
        lorafuse.patch(model, strict=True)
        mlp = model.base_model.model.model.layers[0].mlp
        mlp.forward = types.MethodType(self.kernel("unsloth"), mlp)
        run(model)
        status = lorafuse.status(model)
        assert status.fused == 11
        assert "unsloth's apply_lora_mlp_swiglu reads its weights and never calls it: Unsloth and lorafuse" in str(
            status
        )


def adapted_with(model):
    """The model, unpatched."""
    lorafuse.unpatch(model)
    return model


def test_without_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(lorafuse.MissingDependency, match="LorafuseCallback needs transformers"):
        module_of("callback", monkeypatch)


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        yield
