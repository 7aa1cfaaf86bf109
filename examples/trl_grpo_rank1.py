"""GRPO with an adapter of rank 1: policy gradient learns about a bit an episode, which rank 1 holds.

python examples/trl_grpo_rank1.py
"""

import torch
from datasets import Dataset
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer
from trl_sft import base_model, tokenizer

from lorafuse.integrations.callback import LorafuseCallback


def reward(completions: list[str], **columns: list[str]) -> list[float]:
    """How many of a completion's characters are digits; in your code: whether the answer is right."""
    return [sum(letter.isdigit() for letter in text) / max(len(text), 1) for text in completions]


def main(folder: str = "adapter", steps: int = 2) -> list[float]:
    torch.manual_seed(0)
    words = tokenizer()
    arguments = GRPOConfig(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=8,
        learning_rate=1e-2,
        beta=0.01,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        use_cpu=not torch.cuda.is_available(),
        bf16=torch.cuda.is_available(),
        gradient_checkpointing=False,
    )
    trainer = GRPOTrainer(
        model=base_model(len(words)),
        reward_funcs=reward,
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": f"{n} + {n} = "} for n in range(16)]),
        processing_class=words,
        peft_config=LoraConfig(r=1, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[LorafuseCallback()],
    )
    trainer.train()
    trainer.save_model(folder)
    return [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]


if __name__ == "__main__":
    main()
