"""Realistic cases as whole pages, compared with pages that were reviewed line by line.

`python tests/tools/test_advise_pages.py` writes the pages in `advise_pages` anew, for review.
"""

import json
import sys
import tempfile
from pathlib import Path

import pytest

from lorafuse import advise

PAGES = Path(__file__).parent / "advise_pages"

_LLAMA = {"model_type": "llama", "vocab_size": 128256, "num_key_value_heads": 8}
_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def sized(*sizes, **more):
    return dict(zip(_SIZES, sizes, strict=True)) | more


# sizes are those of the models' published config.json; parameters in billions as their model cards give them
MODELS = {
    "Llama-3.1-8B": (8.03, sized(4096, 14336, 32, 32, **_LLAMA)),
    "Llama-3.1-70B": (70.6, sized(8192, 28672, 80, 64, **_LLAMA)),
    "Qwen3-8B": (
        8.19,
        sized(4096, 12288, 36, 32, model_type="qwen3", num_key_value_heads=8, head_dim=128, vocab_size=151936),
    ),
    "Qwen2.5-0.5B": (
        0.494,
        sized(896, 4864, 24, 14, model_type="qwen2", num_key_value_heads=2, vocab_size=151936)
        | {"tie_word_embeddings": True},
    ),
    "Qwen3-30B-A3B": (
        30.5,
        sized(2048, 6144, 48, 32, model_type="qwen3_moe", num_key_value_heads=4, head_dim=128, vocab_size=151936)
        | {"moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8},
    ),
    "gpt-oss-20b": (
        20.9,
        sized(2880, 2880, 24, 64, model_type="gpt_oss", num_key_value_heads=8, head_dim=64, vocab_size=201088)
        | {"num_local_experts": 32, "num_experts_per_tok": 4},
    ),
    "DeepSeek-V3": (
        671,
        sized(7168, 18432, 61, 128, model_type="deepseek_v3", num_key_value_heads=128, vocab_size=129280)
        | {"moe_intermediate_size": 2048, "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8}
        | {"q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64}
        | {"v_head_dim": 128, "first_k_dense_replace": 3, "n_group": 8, "topk_group": 4},
    ),
    "SmolLM2-135M": (
        0.135,
        sized(576, 1536, 30, 9, model_type="llama", num_key_value_heads=3, vocab_size=49152)
        | {"tie_word_embeddings": True},
    ),
    "Mistral-7B-v0.3": (
        7.25,
        sized(4096, 14336, 32, 32, model_type="mistral", num_key_value_heads=8, vocab_size=32768),
    ),
    "phi-4": (
        14.7,
        sized(5120, 17920, 40, 40, model_type="phi3", num_key_value_heads=10, vocab_size=100352)
        | {"pad_token_id": 100349},
    ),
    "gemma-3-4b": (
        4.30,
        {
            "model_type": "gemma3",
            "architectures": ["Gemma3ForConditionalGeneration"],
            "text_config": sized(2560, 10240, 34, 8, model_type="gemma3_text", num_key_value_heads=4)
            | {"head_dim": 256, "vocab_size": 262208},
            "vision_config": sized(1152, 4304, 27, 16, model_type="siglip_vision_model")
            | {"image_size": 896, "patch_size": 14, "vision_use_head": False},
        },
    ),
}
CASES = {
    "sft-llama-8b-h200": ("Llama-3.1-8B", {"tokens": 10**7, "gpu": "H200"}),
    "rl-llama-8b-a100": ("Llama-3.1-8B", {"episodes": 320_000, "gpu": "A100", "length": 4096, "micro_batch": 2}),
    "few-tokens-llama-8b-l4": ("Llama-3.1-8B", {"tokens": 50_000, "gpu": "L4", "epochs": 3}),
    "does-not-fit-llama-70b-rtx4090": ("Llama-3.1-70B", {"tokens": 10**8, "gpu": "RTX 4090"}),
    "qlora-llama-70b-h100": ("Llama-3.1-70B", {"tokens": 10**8, "gpu": "H100", "micro_batch": 2}),
    "sft-qwen3-8b-rtx3090": ("Qwen3-8B", {"tokens": 7 * 10**6, "gpu": "RTX 3090"}),
    "loss-qwen2.5-0.5b-a10g": ("Qwen2.5-0.5B", {"tokens": 3 * 10**7, "loss": 1.3, "batch": 1024, "gpu": "A10G"}),
    "sft-qwen3-30b-a3b-h200": ("Qwen3-30B-A3B", {"tokens": 10**7, "gpu": "H200"}),
    "sft-gpt-oss-20b-h100": ("gpt-oss-20b", {"tokens": 5 * 10**6, "gpu": "H100", "devices": 2}),
    "sft-deepseek-v3-b200": ("DeepSeek-V3", {"tokens": 5 * 10**7, "gpu": "B200"}),
    "sft-smollm2-t4": ("SmolLM2-135M", {"tokens": 2 * 10**6, "gpu": "T4", "length": 1024}),
    "text-gemma-3-4b-l40s": ("gemma-3-4b", {"tokens": 5 * 10**6, "gpu": "L40S", "length": 4096}),
    "too-much-mistral-7b-a6000": ("Mistral-7B-v0.3", {"tokens": 5 * 10**9, "gpu": "RTX A6000", "micro_batch": 8}),
    "fsdp-llama-70b-16-h100": ("Llama-3.1-70B", {"tokens": 10**8, "gpu": "H100", "devices": 16, "length": 4096}),
    "rl-qwen3-8b-24-a100": ("Qwen3-8B", {"episodes": 10**5, "gpu": "A100", "devices": 24}),
    "ep-qwen3-30b-a3b-64-h100": ("Qwen3-30B-A3B", {"tokens": 10**8, "gpu": "H100", "devices": 64}),
    "sft-phi-4-rtx5090": ("phi-4", {"tokens": 2 * 10**7, "gpu": "RTX 5090", "rank": 16}),
}


def written(case, folder):
    """The page of a case without the sources' texts, which are the same on all, and its advice."""
    name, options = CASES[case]
    model = folder / name
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text(json.dumps(MODELS[name][1]))
    advice = advise.plan_adapter(model, **options)
    head, rest = str(advice).split("\n\nsources\n")
    page = f"{head}\n\n{rest.partition(chr(10) * 2)[2]}\n".replace(str(model), name)
    return page, advice


@pytest.mark.parametrize("case", CASES)
def test_the_page_is_the_reviewed_one(case, tmp_path):
    page, advice = written(case, tmp_path)
    assert advice.shapes.parameters / 1e9 == pytest.approx(MODELS[CASES[case][0]][0], rel=0.005)
    assert page == (PAGES / f"{case}.txt").read_text()


def test_no_page_is_left_over():
    assert {page.stem for page in PAGES.glob("*")} == set(CASES)


if __name__ == "__main__":
    PAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        for each in sys.argv[1:] or CASES:
            (PAGES / f"{each}.txt").write_text(written(each, Path(place))[0])
