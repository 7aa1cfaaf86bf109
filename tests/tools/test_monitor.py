"""LoRAMonitor (T1): simulated runs judged rightly at every logging interval, each beside one judged the other way."""

import math
import warnings
from types import SimpleNamespace

import peft
import pytest
import torch
import transformers
from tiny_models import tiny
from torch import nn

from lorafuse import advise
from lorafuse.advise import monitor as monitor_module

TOKENS = torch.arange(8 * 12).reshape(8, 12) % 60 + 3
MILLION = 10**6
# of a simulated run: steps, and the supervised tokens of one pass over its data
STEPS, DATA = 1600, 10 * MILLION


class Adapted(nn.Module):
    """As many adapter parameters as it is told, without memory for them."""

    def __init__(self, parameters):
        super().__init__()
        self.lora_A = nn.Parameter(torch.empty(parameters, device="meta"))


def simulated(losses, parameters, every, *, epochs=1, reference=None):
    """What the monitor says of a run whose steps have these losses, logged as their means over `every` steps."""
    monitor = advise.LoRAMonitor(tokens=DATA, reference=reference)
    args = SimpleNamespace(world_size=1, gradient_accumulation_steps=1)
    state = SimpleNamespace(epoch=0.0, num_input_tokens_seen=0)
    monitor.on_train_begin(args, state, None, model=Adapted(parameters))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", advise.LoRAWarning)
        for end in range(every, len(losses) + 1, every):
            state.epoch = epochs * end / len(losses)
            monitor.on_log(args, state, None, logs={"loss": sum(losses[end - every : end]) / every})
    assert monitor.watches_capacity
    return monitor


def noise(scale, seed):
    return (scale * torch.randn(STEPS, generator=torch.Generator().manual_seed(seed))).tolist()


def plateau(step):
    """A level that is reached early: what is left is the data's own entropy."""
    return 1.6 + 0.6 * math.exp(-40 * step / STEPS)


def slow(step):
    """Half a percent less for every 40th of the run, to the end."""
    return 1.9 * 0.995 ** (40 * step / STEPS)


def log_linear(step):
    """From 1.65 to 1.49, a straight line over the logarithm of the steps."""
    return 1.65 - 0.16 * math.log(step + 1) / math.log(STEPS)


def fast(step):
    """Falls by more than a tenth for every doubling of the tokens: what a run's start looks like."""
    return 4.0 * (step + STEPS / 20) ** -0.25


def above_reference(step):
    return plateau(step) + 0.2


def passes(step):
    """A plateau in the first of three passes, from which each later one goes down a little."""
    return plateau(step) - 0.06 * (3 * step // STEPS)


# loss, parameters, reference, passes over the data: a run that is beyond capacity and its counter-run, which is not
RUNS = {
    "the loss falls slowly beyond capacity; a plateau with room": (
        (slow, MILLION, None, 1), (plateau, 10 * MILLION, None, 1)),
    "the same slow fall, with room for it": ((slow, MILLION, None, 1), (slow, 10 * MILLION, None, 1)),
    "a small adapter falls slowly; the same one has reached its plateau": (
        (slow, MILLION, None, 1), (plateau, MILLION // 2, None, 1)),
    "a small adapter falls on a line; a comfortable one does": (
        (log_linear, MILLION // 5, None, 1), (log_linear, 10 * MILLION, None, 1)),
    "above the reference of a model with room; at the reference": (
        (above_reference, MILLION, 1.6, 1), (plateau, MILLION, 1.6, 1)),
    "later passes learn the first one by heart; with room for it": (
        (passes, MILLION // 2, None, 3), (passes, 10 * MILLION, None, 3)),
}  # fmt: skip


@pytest.mark.parametrize("every", [1, 10, 100])
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", RUNS)
def test_a_simulated_run_is_judged_rightly_and_so_is_its_counter_run(name, seed, every):
    for (loss, parameters, reference, epochs), warned in zip(RUNS[name], (True, False), strict=True):
        losses = [loss(step) + extra for step, extra in enumerate(noise(0.02, seed))]
        monitor = simulated(losses, parameters, every, epochs=epochs, reference=reference)
        assert len(monitor.messages) == warned, (monitor.messages, monitor.learned_bits)
        assert all("beyond the adapter's capacity" in message for message in monitor.messages)
        assert warned or monitor.learned_bits < 2 * parameters


@pytest.mark.parametrize("every", [1, 10, 100])
def test_the_fast_fall_of_a_runs_start_is_not_called_slow(every):
    assert simulated([fast(step) for step in range(STEPS)], MILLION, every).messages == []


@pytest.mark.parametrize("seed", range(20))
def test_a_noisy_plateau_is_silent_however_small_the_adapter(seed):
    assert simulated([1.6 + extra for extra in noise(0.2, seed)], 1000, 1).messages == []


def test_bits_are_those_of_the_excess_whatever_the_interval():
    losses = [1.8] * (STEPS // 2) + [1.6] * (STEPS // 2)
    expected = 0.2 * DATA / 2 / math.log(2)
    for every in (10, 100):
        assert simulated(losses, MILLION, every, reference=1.6).learned_bits == pytest.approx(expected)
        # a second pass over the same data adds none
        twice = simulated([*losses, *[1.6] * STEPS], MILLION, every, epochs=2, reference=1.6)
        assert twice.learned_bits == pytest.approx(expected)


def batched(noise_of_a_token, tokens, *, accumulated=8, labels=True, clip=1.0, processes=1):
    """A run whose gradients are a constant one and noise, so that its noise scale is `noise_of_a_token`^2."""
    monitor = advise.LoRAMonitor()
    args = SimpleNamespace(world_size=processes, gradient_accumulation_steps=accumulated)
    state = SimpleNamespace(epoch=0.0, num_input_tokens_seen=0)
    model = nn.Module()
    model.lora_A = nn.Parameter(torch.zeros(400))
    model.forward = lambda labels: None
    monitor.on_train_begin(args, state, None, model=model)
    generator = torch.Generator().manual_seed(5)
    signal = torch.full((400,), 400**-0.5)
    given = torch.zeros(1, tokens + 1, dtype=torch.long) if labels else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", advise.LoRAWarning)
        for step in range(40):
            monitor.on_step_begin(args, state, None)
            model.lora_A.grad = torch.zeros(400)
            for index in range(accumulated):
                model(labels=given)
                per_token = noise_of_a_token * torch.randn(400, generator=generator) * (tokens / 400) ** 0.5
                model.lora_A.grad += (tokens * signal + per_token) / (tokens * accumulated)
                if index < accumulated - 1:
                    monitor.on_substep_end(args, state, None, model=model)
            model.lora_A.grad *= clip
            monitor.on_pre_optimizer_step(args, state, None, model=model)
            state.epoch = (step + 1) / 40
            monitor.on_log(args, state, None, logs={"loss": 1.0})
    return monitor


@pytest.mark.parametrize("clip", [1.0, 0.01])
def test_the_noise_scale_is_measured_in_tokens(clip):
    for tokens in (50, 200):
        assert batched(30.0, tokens, clip=clip).noise_scale == pytest.approx(900, rel=0.2)


@pytest.mark.parametrize(
    ("large", "small"),
    [
        # the same noise, and more tokens in as many sequences: packing
        ({"noise_of_a_token": 30.0, "tokens": 1000}, {"noise_of_a_token": 30.0, "tokens": 50}),
        # as many tokens, and more noise in them
        ({"noise_of_a_token": 10.0, "tokens": 200}, {"noise_of_a_token": 60.0, "tokens": 200}),
        # more processes
        ({"noise_of_a_token": 30.0, "tokens": 100, "processes": 8}, {"noise_of_a_token": 30.0, "tokens": 100}),
        # labels that never reach the model: micro-batches are what is counted
        ({"noise_of_a_token": 10.0, "tokens": 200, "labels": False},
         {"noise_of_a_token": 60.0, "tokens": 200, "labels": False}),
    ],
)  # fmt: skip
def test_a_batch_far_above_the_noise_scale_is_warned_of(large, small):
    monitor = batched(**large)
    assert len(monitor.messages) == 1
    assert "gradient-noise scale" in monitor.messages[0]
    assert ("supervised tokens" in monitor.messages[0]) == large.get("labels", True)
    silent = batched(**small)
    assert silent.watches_batch
    assert silent.messages == []


def test_two_micro_batches_do_not_measure_the_noise():
    monitor = batched(10.0, 1000, accumulated=2)
    assert (monitor.watches_batch, monitor.noise_scale, monitor.messages) == (False, None, [])


def trained(tmp_path, monitor, *, steps=12, batch=2, spoil=None, loss=None, rows=None, **settings):
    """Train a tiny adapted model by transformers' Trainer with the monitor, and give what it warned of."""
    model = peft.get_peft_model(tiny("llama"), peft.LoraConfig(r=4, lora_alpha=32, target_modules="all-linear"))
    if spoil:
        spoil(model)
    args = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=steps,
        per_device_train_batch_size=batch,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **settings,
    )
    rows = rows or [{"input_ids": row, "labels": row} for row in TOKENS]
    more = {"compute_loss_func": loss} if loss else {}
    trainer = transformers.Trainer(model=model, args=args, train_dataset=rows, callbacks=[monitor], **more)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    message = [str(w.message) for w in caught if issubclass(w.category, advise.LoRAWarning)]
    assert message == monitor.messages
    assert not model._forward_pre_hooks
    return message


def test_a_healthy_run_is_silent_and_its_supervised_tokens_are_counted(tmp_path):
    rows = [{"input_ids": row, "labels": torch.cat([torch.full((5,), -100), row[5:]])} for row in TOKENS]
    monitor = advise.LoRAMonitor()
    assert trained(tmp_path, monitor, rows=rows) == []
    assert monitor.watches_capacity
    assert not monitor.watches_batch
    # 12 steps of two rows, whose last 7 of 12 tokens are targets
    assert int(monitor._counted) == 12 * 2 * 7


def test_trainers_accumulated_gradients_are_seen_before_they_are_clipped(tmp_path):
    """The norms are those of one and of three micro-batches, whose noise is what rows with random labels have."""
    generator = torch.Generator().manual_seed(0)
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(3, 63, (96, 12), generator=generator)]
    noisy = advise.LoRAMonitor()
    assert trained(tmp_path, noisy, steps=24, rows=rows, gradient_accumulation_steps=4, max_grad_norm=1e-3) == []
    assert noisy.watches_batch
    # every micro-batch the same: no noise at all, so that any batch is too large
    same = advise.LoRAMonitor()
    message = trained(tmp_path, same, steps=24, rows=rows[:1] * 96, gradient_accumulation_steps=4, max_grad_norm=1e-3)
    assert len(message) == 1
    assert "a step takes 88 supervised tokens, the gradient-noise scale is 0" in message[0]
    assert noisy.noise_scale > 88


def test_zero_gradients_are_warned_of_by_name(tmp_path):
    def detach(model):
        layer = model.base_model.model.model.layers[1].mlp.down_proj
        layer.lora_B["default"].register_forward_hook(lambda module, inputs, y: y.detach())

    message = trained(tmp_path, advise.LoRAMonitor(), spoil=detach, steps=4)
    assert len(message) == 1
    assert "layers.1.mlp.down_proj.lora_A" in message[0]
    assert "layers.0" not in message[0]


def test_vanishing_gradients_are_warned_of(tmp_path):
    calls = 0

    def loss(outputs, labels, num_items_in_batch=None):
        nonlocal calls
        calls += 1
        return outputs.logits.float().square().mean() * (1.0 if calls <= 10 else 1e-7)

    message = trained(tmp_path, advise.LoRAMonitor(), loss=loss)
    assert len(message) == 1
    assert "vanished" in message[0]


def test_without_tokens_or_labels_capacity_cannot_be_watched(tmp_path):
    def loss(outputs, labels, num_items_in_batch=None):
        return outputs.logits.float().square().mean()

    blind, counting = advise.LoRAMonitor(), advise.LoRAMonitor()
    trained(tmp_path, blind, loss=loss)
    trained(tmp_path, counting, loss=loss, include_num_input_tokens_seen=True)
    assert (blind.watches_capacity, counting.watches_capacity) == (False, True)


def test_the_trend_is_that_of_a_line_over_the_logarithm_of_the_tokens():
    # the exact mean of 3 - 0.2 ln t over each interval is at its middle up to the curvature
    logs = [(3 - 0.2 * math.log(at + 0.5), 1.0) for at in range(400)]
    level, level_error, slope, slope_error = monitor_module.trend_of(logs)
    assert level == pytest.approx(3 - 0.2 * math.log(400))
    assert slope == pytest.approx(-0.2)
    assert max(level_error, slope_error) < 1e-6
    assert monitor_module.trend_of(logs[:12]) is not None
    assert monitor_module.trend_of(logs[:10]) is None


@pytest.mark.parametrize(("name", "value"), [("tokens", 0), ("reference", 0.0), ("reference", float("nan"))])
def test_the_monitor_refuses_what_it_cannot_use(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        advise.LoRAMonitor(**{name: value})
