"""TRL's SFTTrainer with peft_config: the trainer makes the PEFT model, and the callback patches it.

python examples/trl_sft.py
"""

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from lorafuse.integrations.callback import LorafuseCallback


def tokenizer() -> PreTrainedTokenizerFast:
    """Of bytes, for want of a hub; in your code: AutoTokenizer.from_pretrained(…)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", pad_token="<|pad|>")


def base_model(vocabulary: int) -> torch.nn.Module:
    """In your code: the name of a model, which the trainer loads."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    ends = {"eos_token_id": vocabulary - 2, "pad_token_id": vocabulary - 1, "bos_token_id": vocabulary - 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **sizes, **heads, **ends))


def main(folder: str = "adapter", steps: int = 4) -> list[float]:
    torch.manual_seed(0)
    words = tokenizer()
    rows = [{"prompt": f"{n} + {n} = ", "completion": str(2 * n)} for n in range(32)]
    arguments = SFTConfig(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        use_cpu=not torch.cuda.is_available(),
        bf16=torch.cuda.is_available(),
        gradient_checkpointing=False,
    )
    trainer = SFTTrainer(
        model=base_model(len(words)),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=words,
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[LorafuseCallback()],
    )
    trainer.train()
    trainer.save_model(folder)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    main()
