"""SmolLM2-135M-Instruct with its real weights, and text for it: templated word problems (gsm_symbolic), all tokens."""

import functools
from typing import Any

import torch
from torch import Tensor, nn

import lorafuse
from lorafuse.demo import data as demo_data
from lorafuse.demo import model as demo_model
from lorafuse.study.tasks import Data

__all__ = ["WIDTH", "Language", "load", "problems"]

WIDTH = 576
_TARGETS: dict[str, Any] = {
    "all": "all-linear",
    "attention": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "mlp": ["gate_proj", "up_proj", "down_proj"],
}
# the shortest of 2,000 generated problems has more tokens than this
_FEWEST_TOKENS = 40


class Language(nn.Module):
    """A causal language model as a function from `tokens [B, L]` to `logits [B, L, vocabulary]`."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(input_ids=tokens, use_cache=False).logits

    def adapt(self, rank: int, layers: str, alpha: float) -> None:
        """Freeze the model and put PEFT's adapters on it, drawn from torch's generator, run by `lorafuse.patch`."""
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=_TARGETS[layers])
        self.model = get_peft_model(self.model, config)
        lorafuse.patch(self.model, strict=True)


@functools.cache
def _loaded() -> tuple[Any, Any]:
    return demo_model.load(None, torch.float32, torch.device("cpu"))


def load() -> Language:
    """The weights in fp32, on the CPU; read once in a process. Raises MissingDependency without their package."""
    return Language(_loaded()[0])


def problems(count: int, length: int, seed: int) -> Data:
    """`count` rows of `length` tokens, of problems one after another; every token has its next one as its label."""
    needed = count * (length + 1)
    rows = demo_data.blocks(
        _loaded()[1], demo_data.generate(needed // _FEWEST_TOKENS + 1, seed), count, length + 1
    )  # fmt: skip
    return Data(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())
