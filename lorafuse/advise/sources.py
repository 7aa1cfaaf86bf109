"""Where the advisor's figures come from, and how sure each of its lines can be."""

__all__ = ["FINDINGS", "SURE", "cite"]

_REGRET = "LoRA Without Regret, Schulman and Thinking Machines Lab 2025, doi 10.64434/tml.20250929"

FINDINGS = {
    "F1": f"small and medium sets: full fine-tuning and high-rank LoRA learn alike; lower ranks leave the common curve when their capacity is used up ({_REGRET})",
    "F2": "capacity: about 2 bits for each adapter parameter in long training; usually around 1 bit (0.69 nat) for each token, which the loss of a first epoch measures, and about 1 bit for each episode; beyond it learning is less efficient, without a floor; an open question (LoRA Without Regret)",
    "F2b": "comfort: at least as many adapter parameters as supervised tokens (Tinker LoRA primer)",
    "F3": "in some settings large batches cost LoRA more than full fine-tuning, at every rank; both learn best at smaller ones, and are close at 32 (LoRA Without Regret; TRL's guide to it stays below 32)",
    "F4": "adapt all layers, above all MLP and experts: attention alone at rank 256 is behind MLP alone at rank 128 (LoRA Without Regret)",
    "F5": "reinforcement learning: rank 1 equals full fine-tuning on GSM8K and MATH (LoRA Without Regret)",
    "F6": "adaptive rank per layer is an outlook of the findings, without a figure",
    "NOTE": "an AI-generated digest of LoRA Without Regret, for figures that are in no publication: rank 8 to 16 for instruction sets, batches above 512 sharply worse",
    "LR": "10 times the learning rate of full fine-tuning (fitted, 9.8), about 15 times in runs of some 100 steps or fewer, said in passing; it moves less than 2 times from rank 4 to 512; 5e-5 (2000 / hidden)^P, P 0.781 for Llama and 0.0775 for Qwen (LoRA Without Regret; tinker_cookbook, hyperparam_utils)",
    "FORM": "W + (alpha / r) B A with alpha 32, A uniform with scale 1 / sqrt(in features), B zero, constant learning rate (LoRA Without Regret)",
    "FLOPS": "multiply-adds of a layer and token: full 3NK, LoRA 2NK + 3R(N + K) (LoRA Without Regret)",
    "MOE": "one adapter for each expert, of rank total / active experts (LoRA Without Regret; Tinker shares the outer factor of all experts since)",
    "R1": "a step of 32 questions with 16 answers each (DeepSeek-R1, Guo et al. 2025)",
    "ADAM": "bytes of a trained parameter with gradient and Adam's two moments: 8 all in bf16, 16 with an fp32 weight and moments (ZeRO, Rajbhandari et al. 2020), 16 for an fp32 adapter; fused AdamW, no copies",
    "SAVED": "activations, eager attention's scores among them, as autograd saves them, tested against its hooks; the peak against bench/results/h200-2026-11-26-model.json (LoRA and full within 2%)",
    "NF4": "4.127 bits for each weight of a linear layer, double quantization included (QLoRA, Dettmers et al. 2023)",
    "BASES": "bytes of a weight as lorafuse.formats holds it with its scales, which a test counts; lorafuse reads them and writes 2 before each product, at the bandwidth of the cost model",
    "CARD": "95% of the memory in the GPU's datasheet, whose GB are 10^9 bytes",
    "PLAN": "the cost model of lorafuse.plan, as `lorafuse plan` prints it; attention, loss, optimizer, and the rest calibrated on one run: 8 layers of Llama-3.1-8B on an H200 (full fine-tuning of it within 10%)",
    "MODULES": "counted from the model's own modules",
    "TRL": "counted as TRL 1.16 trains it: end of sequence included, cut at the sequence's length",
    "GIVEN": "what was passed",
}

# how sure a line is, from most to least; a secondary digest is somebody's summary that its source does not bear out
SURE = (
    "measured here", "formula", "published figure", "model", "rule of thumb", "secondary digest", "assumption",
)  # fmt: skip


def cite(keys: str) -> list[str]:
    """The texts of findings, by the keys that a line names ("F2, F3"). Raises KeyError for an unknown key."""
    return [FINDINGS[key.strip()] for key in keys.split(",")]
