"""Models for `lorafuse bench model` of a few thousand parameters, in the form of its own table."""

from lorafuse.bench.transformer import Model

_DENSE = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
_EXPERTS = {"moe_intermediate_size": 32, "head_dim": 16, "num_experts": 8, "num_experts_per_tok": 2}
# whose in features are multiples of a block of 4 bits
TINY_64 = Model("tiny-64", "LlamaConfig", _DENSE | {"intermediate_size": 192})
TINY = Model("tiny", "LlamaConfig", _DENSE)
TINY_MOE = Model("tiny-moe", "Qwen3MoeConfig", _DENSE | _EXPERTS)
