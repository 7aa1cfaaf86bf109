"""The advice as code: a training script for TRL that runs as it is, with the data as it was counted."""

import importlib.util
from dataclasses import dataclass, field
from types import SimpleNamespace

from lorafuse.advise.capacity import rank_of
from lorafuse.advise.shapes import ModelShapes

__all__ = ["ALPHA", "Settings", "expert_ranks", "launch", "snippet", "target_parameters", "weights_of_linears"]

# finding FORM
ALPHA = 32


@dataclass(frozen=True)
class Settings:
    """What the snippet writes beside the model's shapes; patterns come from a probe.

    `trainer` is one of `TRAINERS`; `length` is the most tokens of a sequence, of a completion for rl; `rollouts` are
    completions of a prompt. `launch` are the lines of `launch`.
    """

    rank: int
    learning_rate: float
    micro_batch: int
    accumulation: int
    epochs: float
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, int] = field(default_factory=dict)
    trainer: str = "SFT"
    model: str = "MODEL"
    data: str = "data.jsonl"
    length: int = 2048
    packing: bool = False
    rollouts: int = 1
    checkpointing: bool = False
    quantized: bool = False
    half: str = "bfloat16"
    launch: str = ""


_REWARD = '''def reward(completions, answer, **columns):
    """1 where the record's answer stands in the completion: an example, to be replaced by your own rule."""
    texts = [text if isinstance(text, str) else text[-1]["content"] for text in completions]
    return [float(str(right) in text) for text, right in zip(texts, answer)]


'''


def launch(layout: str, per_node: int, nodes: int) -> str:
    """Comments that say how several devices run the snippet under a layout; "" for one device."""
    if not layout:
        return ""
    if layout in ("DDP", "DDP, QLoRA"):
        several = f" --nnodes {nodes} --rdzv-backend c10d --rdzv-endpoint HOST:29500" if nodes > 1 else ""
        return f"# {layout}; on each machine: torchrun --nproc-per-node {per_node}{several} FILE\n"
    if layout in ("FSDP2", "HSDP"):
        sizes = {"replicate": nodes, "shard": per_node} if layout == "HSDP" else {}
        more = " --use_fsdp --fsdp_version 2 --use_parallelism_config" if sizes else ""
        more += "".join(f" --parallelism_config_dp_{name}_size {size}" for name, size in sizes.items())
        number = f"--num_machines {nodes} --num_processes {per_node * nodes}"
        return (
            f"# {layout}; on each machine, with the settings of lorafuse's examples/accelerate_two_nodes.yaml:\n"
            f"# accelerate launch --config_file FILE.yaml {number} --machine_rank N{more} FILE\n"
        )
    how = {"EP": "examples/ep_qwen3.py", "ZeRO-3": "docs/trainers.md", "TP": "docs/scaling.md"}[layout]
    return f"# the script of one device; {layout} takes more: {how} of lorafuse\n"


def target_parameters(shapes: ModelShapes) -> list[str]:
    """The stacks of experts as PEFT's `target_parameters` takes them: module and parameter."""
    return sorted({".".join(x.name.split(".")[-2:]) for x in shapes.adapted if x.parameter})


def expert_ranks(shapes: ModelShapes, rank: int) -> dict[str, int]:
    """`rank_pattern` for the experts, whose rank is the total over the active ones; empty where it is the same."""
    pattern = {}
    for linear in shapes.adapted:
        own = rank_of(linear, rank, shapes.active_experts)
        if own != rank:
            # PEFT matches a regular expression at the end of a name, of parameters without the model's prefix
            ending = ".".join(linear.name.split(".")[-2:]) if linear.parameter else r"experts\.\d+\..*"
            pattern[ending.replace(".", r"\.") if linear.parameter else ending] = own
    return pattern


def weights_of_linears(shapes: ModelShapes) -> set[str]:
    """The names of linear layers that PEFT takes for those of experts in transformers 4, and so leaves out of
    `target_modules`, in a list or in a pattern: `target_parameters` reach their weights. Shared experts, most often."""
    if importlib.util.find_spec("peft") is None or not target_parameters(shapes):
        return set()
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    names = _modules(shapes)
    config = LoraConfig(target_modules=names)
    model = SimpleNamespace(config=SimpleNamespace(model_type=shapes.model_type))
    convert_peft_config_for_transformers(config, model, None)
    return set(names) - set(config.target_modules)


def _modules(shapes: ModelShapes) -> list[str]:
    return sorted({x.name.rpartition(".")[2] for x in shapes.adapted if not x.parameter})


def _excluded(shapes: ModelShapes) -> list[str] | str:
    """What PEFT's `exclude_modules` must hold: routers by name, the towers of other modalities by where they are."""
    routers = sorted({x.name.rpartition(".")[2] for x in shapes.linears if x.kind == "router"})
    adapted = {x.name.split(".")[i] for x in shapes.adapted for i in range(x.name.count("."))}
    towers = [x.name.split(".") for x in shapes.linears if x.kind == "tower"]
    heads = sorted({next((part for part in name if part not in adapted), name[-1]) for name in towers})
    if not heads:
        return routers
    return "|".join([rf"(.*\.)?({'|'.join(heads)})(\..*)?", *(rf".*\.{name}" for name in routers)])


def _config(shapes: ModelShapes, settings: Settings) -> str:
    parameters = target_parameters(shapes)
    # with stacks, PEFT 0.21 resolves "all-linear" by the names of transformers 4: it would adapt routers too, and give
    # gate_up twice the rank
    skipped = weights_of_linears(shapes)
    modules = [name for name in _modules(shapes) if name not in skipped] if parameters else "all-linear"
    parameters += [f"{name}.weight" for name in sorted(skipped)]

    def of_weights(pattern: dict[str, int]) -> dict[str, int]:
        return {rf"{key}\.weight" if key.rpartition(r"\.")[2] in skipped else key: own for key, own in pattern.items()}

    ranks = of_weights(settings.rank_pattern) | expert_ranks(shapes, settings.rank)
    alphas = of_weights(settings.alpha_pattern)
    excluded = _excluded(shapes)
    lora = [
        f"r={settings.rank}",
        f"lora_alpha={ALPHA}",
        f"target_modules={modules!r}",
        *([f"exclude_modules={excluded!r}"] if excluded else []),
        *([f"target_parameters={parameters}"] if parameters else []),
        *([f"rank_pattern={ranks}"] if ranks else []),
        *([f"alpha_pattern={alphas}"] if alphas else []),
        "lora_dropout=0.0",
        *(['task_type="CAUSAL_LM"'] if shapes.vocabulary else []),
    ]
    return _call("config = LoraConfig", lora)


def _call(name: str, arguments: list[str]) -> str:
    return f"{name}(\n" + "".join(f"    {argument},\n" for argument in arguments) + ")\n"


def _arguments(settings: Settings) -> str:
    kinds = {
        "SFT": [f"max_length={settings.length}", f"packing={settings.packing}"],
        "DPO": [f"max_length={settings.length}"],
        "GRPO": [f"num_generations={settings.rollouts}", f"max_completion_length={settings.length}"],
    }
    half = "bf16" if settings.half == "bfloat16" else "fp16"
    checkpointing = [f"gradient_checkpointing={settings.checkpointing}"]
    if settings.checkpointing:
        checkpointing.append('gradient_checkpointing_kwargs={"use_reentrant": False}')
    train = [
        'output_dir="adapter"',
        f"per_device_train_batch_size={settings.micro_batch}",
        f"gradient_accumulation_steps={settings.accumulation}",
        f"learning_rate={settings.learning_rate:.3e}",
        'lr_scheduler_type="constant"',
        f"num_train_epochs={settings.epochs:g}",
        *kinds[settings.trainer],
        *checkpointing,
        'optim="adamw_torch_fused"',
        f"{half}=torch.cuda.is_available()",
        *([] if half == "bf16" else ["bf16=False"]),
        'report_to="none"',
    ]
    return _call(f"args = {settings.trainer}Config", train)


def snippet(shapes: ModelShapes, settings: Settings) -> str:
    """Python source that defines `config` and `args`, loads model and data, trains and saves the adapter."""
    auto = "AutoModelForImageTextToText" if any(x.kind == "tower" for x in shapes.linears) else "AutoModelForCausalLM"
    trainer = settings.trainer
    reader = "labelled" if trainer == "SFT" else "examples"
    more = {"SFT": f'"length": {settings.length}', "DPO": '"goal": "sft"', "GRPO": '"goal": "rl"'}[trainer]
    quantization = ", BitsAndBytesConfig" if settings.quantized else ""
    packed = [
        "load_in_4bit=True",
        'bnb_4bit_quant_type="nf4"',
        "bnb_4bit_use_double_quant=True",
        f"bnb_4bit_compute_dtype=torch.{settings.half}",
    ]
    load = f"dtype=torch.{settings.half}" + (", quantization_config=quantization" if settings.quantized else "")
    return (
        f"{settings.launch}import tempfile\n\nimport torch\nfrom datasets import Dataset\n"
        "from peft import LoraConfig, get_peft_model\n"
        f"from transformers import {auto}, AutoTokenizer{quantization}\n"
        f"from trl import {trainer}Config, {trainer}Trainer\n\nimport lorafuse\n"
        f"from lorafuse.advise.data import {reader}\n\nMODEL, DATA = {settings.model!r}, {settings.data!r}\n\n"
        + (f"\n{_REWARD}" if trainer == "GRPO" else "")
        + _config(shapes, settings)
        + _arguments(settings)
        + (_call("quantization = BitsAndBytesConfig", packed) if settings.quantized else "")
        + "tokenizer = AutoTokenizer.from_pretrained(MODEL)\n"
        + f"model = {auto}.from_pretrained(MODEL, {load})\n"
        + "model = get_peft_model(model, config)\nprint(lorafuse.patch(model))\n"
        + f'source = {{"path": DATA, "tokenizer": tokenizer, {more}}}\n'
        + f"data = Dataset.from_generator({reader}, gen_kwargs=source, cache_dir=tempfile.mkdtemp())\n"
        + f"trainer = {trainer}Trainer(\n    model,\n"
        + ("    reward_funcs=reward,\n" if trainer == "GRPO" else "")
        + "    args=args,\n    train_dataset=data,\n    processing_class=tokenizer,\n)\n"
        + "trainer.train()\ntrainer.save_model()\n"
    )
