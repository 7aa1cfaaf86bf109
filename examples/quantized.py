"""A tiny Llama in NF4, as the examples over quantized bases load it."""

import tempfile

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM


def load(storage: torch.dtype = torch.uint8) -> torch.nn.Module:
    """In your code: from_pretrained with the name of your model, and the same `quantization_config`.

    `storage` is the dtype under which the packed codes lie; FSDP2 shards floating ones alone.
    """
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_quant_storage=storage,
    )
    # K of every layer is a multiple of bitsandbytes' block of 64
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    config = LlamaConfig(vocab_size=128, num_attention_heads=2, num_key_value_heads=2, **sizes)
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
        return AutoModelForCausalLM.from_pretrained(folder, quantization_config=nf4, dtype=torch.bfloat16)
