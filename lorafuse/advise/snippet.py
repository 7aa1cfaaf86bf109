"""The advice as code: a `LoraConfig` and a `TrainingArguments` that can be pasted and run."""

import importlib.util
from dataclasses import dataclass, field
from types import SimpleNamespace

from lorafuse.advise.capacity import rank_of
from lorafuse.advise.shapes import ModelShapes

__all__ = ["ALPHA", "Settings", "expert_ranks", "snippet", "target_parameters"]

# finding FORM
ALPHA = 32


@dataclass(frozen=True)
class Settings:
    """What the snippet writes beside the model's shapes; patterns come from a probe."""

    rank: int
    learning_rate: float
    micro_batch: int
    accumulation: int
    epochs: float
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, int] = field(default_factory=dict)


def target_parameters(shapes: ModelShapes) -> list[str]:
    """The stacks of experts as PEFT's `target_parameters` takes them: module and parameter."""
    return sorted({".".join(x.name.split(".")[-2:]) for x in shapes.adapted if x.parameter})


def expert_ranks(shapes: ModelShapes, rank: int) -> dict[str, int]:
    """`rank_pattern` for the experts, whose rank is the total over the active ones; empty where it is the same."""
    found = {}
    for linear in shapes.adapted:
        own = rank_of(linear, rank, shapes.active_experts)
        if own != rank:
            # PEFT matches a regular expression at the end of a name, of parameters without the model's prefix
            ending = ".".join(linear.name.split(".")[-2:]) if linear.parameter else r"experts\.\d+\..*"
            found[ending.replace(".", r"\.") if linear.parameter else ending] = own
    return found


def _taken_for_experts(names: list[str], model_type: str) -> set[str]:
    """The names of modules that PEFT takes for those of experts in transformers 4, and so leaves out of the others."""
    if importlib.util.find_spec("peft") is None:
        return set()
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    config = LoraConfig(target_modules=names)
    convert_peft_config_for_transformers(config, SimpleNamespace(config=SimpleNamespace(model_type=model_type)), None)
    return set(names) - set(config.target_modules)


def snippet(shapes: ModelShapes, settings: Settings) -> str:
    """Python source that defines `config` and `args`."""
    parameters = target_parameters(shapes)
    routers = sorted({x.name.rpartition(".")[2] for x in shapes.linears if x.kind == "router"})
    # with stacks, PEFT 0.21 resolves "all-linear" by the names of transformers 4: it would adapt routers too, and give
    # gate_up twice the rank
    names = sorted({x.name.rpartition(".")[2] for x in shapes.adapted if not x.parameter})
    # shared experts, most often; by their weights PEFT adapts them all the same
    taken = _taken_for_experts(names, shapes.model_type) if parameters else set()
    modules = [name for name in names if name not in taken] if parameters else "all-linear"
    parameters += [f"{name}.weight" for name in sorted(taken)]

    def of_weights(pattern: dict[str, int]) -> dict[str, int]:
        return {rf"{key}\.weight" if key.rpartition(r"\.")[2] in taken else key: own for key, own in pattern.items()}

    ranks = of_weights(settings.rank_pattern) | expert_ranks(shapes, settings.rank)
    alphas = of_weights(settings.alpha_pattern)
    lora = [
        f"r={settings.rank}",
        f"lora_alpha={ALPHA}",
        f"target_modules={modules!r}",
        *([f"exclude_modules={routers}"] if routers else []),
        *([f"target_parameters={parameters}"] if parameters else []),
        *([f"rank_pattern={ranks}"] if ranks else []),
        *([f"alpha_pattern={alphas}"] if alphas else []),
        "lora_dropout=0.0",
        *(['task_type="CAUSAL_LM"'] if shapes.vocabulary else []),
    ]
    train = [
        'output_dir="adapter"',
        f"per_device_train_batch_size={settings.micro_batch}",
        f"gradient_accumulation_steps={settings.accumulation}",
        f"learning_rate={settings.learning_rate:.3e}",
        'lr_scheduler_type="constant"',
        f"num_train_epochs={settings.epochs:g}",
        "bf16=torch.cuda.is_available()",
    ]

    def call(name: str, arguments: list[str]) -> str:
        return f"{name}(\n" + "".join(f"    {argument},\n" for argument in arguments) + ")\n"

    return (
        "import torch\nfrom peft import LoraConfig\nfrom transformers import TrainingArguments\n\n"
        + call("config = LoraConfig", lora)
        + call("args = TrainingArguments", train)
    )
