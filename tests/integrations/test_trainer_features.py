"""Features of transformers' Trainer (T1): with `LorafuseCallback` the losses are those of the run without it."""

import pytest
import torch
import transformers
from tiny_models import adapted, counting_fused, token_ids

from lorafuse.integrations.callback import LorafuseCallback

pytestmark = pytest.mark.no_poison
STEPS, LAYERS = 3, 14


def trainer_of(folder, model, *callbacks, **settings):
    rows = [{"input_ids": ids, "labels": ids} for ids in token_ids(4 * STEPS)]
    common = {
        "max_steps": STEPS, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "lr_scheduler_type": "constant",
        "logging_steps": 1, "save_strategy": "no", "use_cpu": True, "report_to": [], "disable_tqdm": True, "seed": 3,
    }  # fmt: skip
    arguments = transformers.TrainingArguments(output_dir=str(folder), **common | settings)
    data = {"train_dataset": rows, "eval_dataset": rows[:4]}
    return transformers.Trainer(model, arguments, callbacks=list(callbacks), **data)


def losses_of(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def stock(folder, resume=None, dtype=torch.float32, **settings):
    trainer = trainer_of(folder, adapted(dtype=dtype), **settings)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def fused(folder, resume=None, dtype=torch.float32, calls=None, **settings):
    """A trainer that has trained with the callback, every layer fused, by so many calls of a layer."""
    callback = LorafuseCallback(log=None, strict=True)
    trainer = trainer_of(folder, adapted(dtype=dtype), callback, **settings)
    with counting_fused() as counted:
        trainer.train(resume_from_checkpoint=resume)
    assert callback.training.status.fused == LAYERS
    assert calls is None or counted.call_count == calls * LAYERS
    return trainer


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Losses of stock PEFT with the common settings."""
    losses = losses_of(stock(tmp_path_factory.mktemp("plain")))
    assert len(set(losses)) == STEPS
    return losses


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
        {"optim": "adamw_torch_fused", "max_grad_norm": 0.01, "weight_decay": 0.3},
    ],
)
def test_settings(settings, tmp_path):
    calls = STEPS * settings.get("gradient_accumulation_steps", 1)
    assert losses_of(fused(tmp_path, calls=calls, **settings)) == pytest.approx(
        losses_of(stock(tmp_path, **settings)), rel=1e-6
    )


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant, tmp_path, plain):
    settings = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    assert losses_of(fused(tmp_path, calls=2 * STEPS, **settings)) == pytest.approx(plain, rel=1e-6)


@pytest.mark.parametrize("settings", [{"bf16": True}, {"dtype": torch.bfloat16}])
def test_half_precision(settings, tmp_path):
    """By autocast, or of the model: losses within bf16's rounding."""
    expected = losses_of(stock(tmp_path, **settings))
    assert losses_of(fused(tmp_path, calls=STEPS, **settings)) == pytest.approx(expected, rel=2e-3)


def test_fp16(tmp_path, plain):
    """On a CPU the Trainer's fp16 changes nothing."""
    assert losses_of(fused(tmp_path, calls=STEPS, fp16=True)) == pytest.approx(plain, rel=1e-6)


def test_torch_compile(tmp_path, plain):
    torch._dynamo.reset()
    callback = LorafuseCallback(log=None, strict=True)
    trainer = trainer_of(tmp_path, adapted(), callback, torch_compile=True, torch_compile_backend="aot_eager")
    trainer.train()
    assert losses_of(trainer) == pytest.approx(plain, rel=1e-6)
    rows = callback.training.status.layers
    assert [row.compiled and not row.compiled_reason for row in rows] == [True] * LAYERS


def test_checkpoints_are_resumed(tmp_path, plain):
    """The rest of a patched run, by a patched model and by stock PEFT."""
    fused(tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    checkpoint = str(tmp_path / "checkpoint-2")
    for run in (fused, stock):
        assert losses_of(run(tmp_path, resume=checkpoint)) == pytest.approx(plain, rel=1e-6)


def test_the_best_model_is_loaded(tmp_path):
    # the highest loss is the first: the model that is loaded is not the last
    best = {
        "save_strategy": "steps", "eval_strategy": "steps", "save_steps": 1, "eval_steps": 1, "learning_rate": 0.3,
        "load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True,
    }  # fmt: skip
    expected, actual = stock(tmp_path / "stock", **best), fused(tmp_path / "fused", **best)
    assert actual.state.best_global_step == expected.state.best_global_step == 1
    assert actual.state.best_metric == pytest.approx(expected.state.best_metric, rel=1e-5)
    assert actual.evaluate()["eval_loss"] == pytest.approx(expected.state.best_metric, rel=1e-5)


class OutOfMemory(transformers.TrainerCallback):
    """What a GPU that is too small says, once."""

    def __init__(self):
        self.sizes = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.sizes.append(state.train_batch_size)
        if len(self.sizes) == 1:
            raise RuntimeError("CUDA out of memory.")


def test_a_smaller_batch_after_running_out_of_memory(tmp_path):
    losses = []
    callback = LorafuseCallback(log=None, strict=True)
    for callbacks in ([], [callback]):
        simulated = OutOfMemory()
        trainer = trainer_of(tmp_path, adapted(), *callbacks, simulated, auto_find_batch_size=True)
        trainer.train()
        assert simulated.sizes[1] < simulated.sizes[0] == 4
        losses.append(losses_of(trainer))
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert callback.training.status.fused == LAYERS
