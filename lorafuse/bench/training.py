"""One variant of training a model: timed optimizer steps of several micro-batches, their memory, their correctness."""

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lorafuse import formats
from lorafuse.bench.plugins import Baseline
from lorafuse.testing.memory import peak_bytes
from lorafuse.testing.numerics import relative_l2, rounding, tolerance

__all__ = [
    "Seen", "Trainee", "batches", "built", "compare", "half_adapters", "input_gradient", "loss_bound", "observe",
    "without_adapters",
]  # fmt: skip

# large enough that losses move, small enough that they stay finite
_LEARNING_RATE = {"base": 1e-5, "adapters": 1e-4}
# relative L2 of logits and gradients in float32, and of every loss: as in Hugging Face's own tests of two
# implementations
_FP32_BOUND = 1e-3
# number of tokens whose logits are compared, over the whole vocabulary
_POSITIONS = 64


def batches(vocabulary: int, size: tuple[int, int, int], step: int, device: torch.device) -> Tensor:
    """Token ids `[accumulate, batch, tokens]` of a step, the same ones for the same step."""
    generator = torch.Generator().manual_seed(1000 + step)
    return torch.randint(vocabulary, size, generator=generator).to(device)


@dataclass
class Trainee:
    """A model in training, with the mean loss and the seconds of each step; `trains`: "nothing", "base" or "adapters".

    A step of a frozen model is forward, and backward to its embedded tokens. Every other one has fused AdamW, with
    moments in each parameter's dtype. `rate` is 0 for the usual one, at which timed steps change losses a little.
    """

    name: str
    model: Any
    trains: str = "adapters"
    rate: float = 0.0
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        rate = self.rate or _LEARNING_RATE.get(self.trains, 0.0)
        self.optimizer = (
            torch.optim.AdamW(self.trained, lr=rate, weight_decay=0.0, fused=True) if self.trained else None
        )

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.model.parameters()).device
        return device

    def evaluate(self, ids: Tensor) -> float:
        """Loss of token ids `[batch, tokens]`; parameters keep no gradient."""
        loss: float = self.model(input_ids=ids, labels=ids).loss.item()
        return loss

    def backward(self, ids: Tensor) -> Tensor:
        """Mean loss of the micro-batches `[accumulate, batch, tokens]`; its gradients accumulate."""
        total = torch.zeros((), device=ids.device)
        for micro in ids:
            loss: Tensor = self.model(input_ids=micro, labels=micro).loss / len(ids)
            loss.backward()
            total += loss.detach()
        return total

    def update(self, ids: Tensor) -> Tensor:
        """One optimizer step; its loss."""
        loss = self.backward(ids)
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()
        return loss

    def step(self, ids: Tensor) -> None:
        """One optimizer step, timed from an idle device to an idle device."""
        _synchronize(ids.device)
        start = time.perf_counter()
        loss = self.update(ids)
        _synchronize(ids.device)
        self.seconds.append(time.perf_counter() - start)
        self.losses.append(loss.item())

    def memory(self, ids: Tensor) -> dict[str, int]:
        """Bytes of weights, gradients and optimizer state, the peak of a step beyond weights and state, and their sum.

        The measured step has two micro-batches at most: from the second on, each starts with gradients in memory.
        """
        step = peak_bytes(lambda: self.update(ids[:2]), ids.device)
        weights = _bytes(_stored(self.model))
        states = self.optimizer.state.values() if self.optimizer is not None else ()
        state = _bytes([v for s in states for v in s.values() if isinstance(v, Tensor)])
        return {
            "weights_bytes": weights,
            "gradient_bytes": _bytes(self.trained),
            "optimizer_bytes": state,
            "step_peak_bytes": step,
            "peak_bytes": weights + state + step,
        }


def _stored(model: Any) -> list[Tensor]:
    """The parameters of a model; instead of a quantized weight of a linear layer its codes and what scales them."""
    adopted = {m.weight: formats.adopt(m) for m in model.modules() if isinstance(m, nn.Linear)}
    tensors = []
    for parameter in model.parameters():
        weight = adopted.get(parameter)
        tensors += [parameter] if weight is None else [weight.data, *weight.statistics]
    return tensors


def built(baseline: Baseline, given: Any) -> tuple[Trainee, dict[str, Any]]:
    """The model of a baseline in training, and what is noted of it.

    Autocast is put around forward alone, as accelerate does for `bf16=True`; accelerate's copy of the logits to fp32
    after the loss is left out, in favour of what runs so.
    """
    model, facts = baseline.module.model(given, **baseline.options)
    if facts.get("autocast"):
        model.forward = torch.autocast(given.device.type, dtype=given.dtype)(model.forward)
    return Trainee(baseline.name, model, baseline.trains), facts


def _bytes(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass
class Seen:
    """The results of one micro-batch: loss, logits `[positions, vocabulary]` in float32, gradients by name."""

    loss: float
    logits: Tensor
    gradients: dict[str, Tensor]

    def unused(self) -> list[str]:
        """Names of trained parameters whose gradient is zero, missing or not finite."""
        return [name for name, grad in self.gradients.items() if not (grad.any() and grad.isfinite().all())]


def observe(model: Any, micro: Tensor, gradients: bool = True) -> Seen:
    """Loss, logits and gradients of token ids `[batch, tokens]`; the parameters keep no gradient."""
    with nullcontext() if gradients else torch.no_grad():
        out = model(input_ids=micro, labels=micro)
    logits = out.logits.detach().flatten(0, 1)
    stride = -(-len(logits) // _POSITIONS)
    seen = Seen(out.loss.item(), logits[::stride].float(), {})
    if gradients:
        out.loss.backward()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                grad = parameter.grad
                seen.gradients[name] = torch.zeros(()) if grad is None else grad.float().clone()
                parameter.grad = None
    return seen


def input_gradient(model: Any, micro: Tensor) -> tuple[float, Tensor | None]:
    """Loss of token ids `[batch, tokens]`, and the gradient that reaches a frozen model's embedded tokens."""
    embedded: list[Tensor] = []
    hook = model.get_input_embeddings().register_forward_hook(lambda module, args, out: embedded.append(out))
    loss = model(input_ids=micro, labels=micro).loss
    hook.remove()
    loss.backward()
    return loss.item(), embedded[0].grad


def without_adapters(model: Any, micro: Tensor) -> Seen:
    """The results of a PEFT model without its adapters, and without gradients."""
    with model.disable_adapter():
        return observe(model, micro, gradients=False)


def half_adapters(model: Any, micro: Tensor, dtype: torch.dtype) -> Seen:
    """The results of a PEFT model with its adapters in the base's dtype; they are float32 again afterwards."""
    kept = {p: p.data for p in model.parameters() if p.requires_grad}
    try:
        for parameter in kept:
            parameter.data = parameter.data.to(dtype)
        return observe(model, micro)
    finally:
        for parameter, data in kept.items():
            parameter.data = data


def loss_bound(dtype: torch.dtype, loss: float) -> float:
    """The largest difference between the losses of two correct runs, at a loss of that size.

    1e-3 of it in float32. In bfloat16 and float16 the table's `tolerance`: the rounding errors of a step enter the
    weights of the next, so two correct runs differ by more than one pass does. `compare` applies the three-way rule to
    one forward and backward pass.
    """
    return (_FP32_BOUND if dtype is torch.float32 else tolerance(dtype)) * max(1.0, abs(loss))


def compare(ours: Seen, peft: Seen, base: Seen, half: Callable[[], Seen], dtype: torch.dtype) -> dict[str, float | str]:
    """Patched against PEFT on one micro-batch: relative L2 errors of logits and gradients, their bounds, "wrong".

    The bound is 1e-3 in float32. In bfloat16 and float16 it is the three-way rule: twice the distance between PEFT with
    adapters in that dtype (`half`), which rounds as ours does, and PEFT as shipped, plus one rounding; twice follows
    from the triangle inequality. A bound of the logits above the adapters' own effect could show nothing, and is wrong.
    """
    names = list(peft.gradients)

    def apart(one: Seen) -> dict[str, float]:
        return {
            "logits": relative_l2(one.logits, peft.logits),
            "gradients": relative_l2(_flat(one, names), _flat(peft, names)),
        }

    errors = apart(ours)
    if dtype is torch.float32:
        bounds = dict.fromkeys(errors, _FP32_BOUND)
    else:
        bounds = {name: 2 * error + rounding(dtype) for name, error in apart(half()).items()}
    effect = relative_l2(base.logits, peft.logits)
    wrong = [
        f"{name} of the first micro-batch are {error:.1e} from PEFT's, above {bounds[name]:.1e}"
        for name, error in errors.items()
        if not error <= bounds[name]
    ]
    if not effect > bounds["logits"]:
        wrong.append(f"the adapters change the logits by {effect:.1e} only, below the bound {bounds['logits']:.1e}")
    if unused := ours.unused() + peft.unused():
        wrong.append(f"no gradient reaches {', '.join(unused[:3])}, {len(unused)} parameters in all")
    return {
        "wrong": "; ".join(wrong),
        "adapters_effect": effect,
        **{f"{name}_error": error for name, error in errors.items()},
        **{f"{name}_bound": bound for name, bound in bounds.items()},
    }


def _flat(seen: Seen, names: list[str]) -> Tensor:
    """All gradients as one vector, in PEFT's order. Patching renames nothing."""
    return torch.cat([seen.gradients[name].flatten() for name in names])
