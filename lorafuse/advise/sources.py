"""Where the advisor's figures come from, and how sure each of its lines can be."""

__all__ = ["FINDINGS", "SURE", "cite"]

_REGRET = "LoRA Without Regret, Schulman and Thinking Machines Lab 2025, doi 10.64434/tml.20250929"

FINDINGS = {
    "F1": f"small and medium sets: LoRA equals full fine-tuning, shown at rank 8 to 16 ({_REGRET})",
    "F2": "capacity: about 2 bits for each adapter parameter; at most 1 bit (0.69 nat) for each supervised token and 1 bit "
    "for each episode; beyond it 2 to 5 times the steps (LoRA Without Regret)",
    "F2b": "comfort: at least as many adapter parameters as supervised tokens (Tinker LoRA primer)",
    "F3": "large batches cost LoRA more than full fine-tuning, at every rank: sharply past about 512, 20 to 30% of loss "
    "past 1000 (LoRA Without Regret)",
    "F4": "adapt all layers, above all MLP and experts; attention alone is 3 to 7% worse (LoRA Without Regret)",
    "F5": "reinforcement learning: rank 4 to 8, even 1, equals full fine-tuning (LoRA Without Regret)",
    "F6": "adaptive rank per layer is an outlook of the findings, without a figure",
    "LR": "10 times the learning rate of full fine-tuning, about 15 times under some 100 steps; it moves less than 2 times "
    "from rank 4 to 512; 5e-5 (2000 / hidden)^P, P 0.781 for Llama and 0.0775 for Qwen (LoRA Without Regret; "
    "tinker_cookbook, hyperparam_utils)",
    "FORM": "W + (alpha / r) B A with alpha 32, A uniform with scale 1 / sqrt(in features), B zero, constant learning "
    "rate (LoRA Without Regret)",
    "FLOPS": "multiply-adds of a layer and token: full 3NK, LoRA 2NK + 3R(N + K) (LoRA Without Regret)",
    "MOE": "one adapter for each expert, of rank total / active experts (LoRA Without Regret)",
    "ZERO": "16 bytes for each trained parameter: half-precision weight and gradient, fp32 weight and Adam's two moments "
    "(ZeRO, Rajbhandari et al. 2020); an fp32 adapter with its gradient and moments takes 16 too",
    "NF4": "4.127 bits for each weight of a linear layer, double quantization included (QLoRA, Dettmers et al. 2023)",
    "PLAN": "the cost model of lorafuse.plan, as `lorafuse plan` prints it",
    "MODULES": "counted from the model's own modules",
    "GIVEN": "what was passed",
}

# how sure a line is, from most to least
SURE = ("measured here", "formula", "published figure", "model", "rule of thumb", "assumption")


def cite(keys: str) -> list[str]:
    """The texts of findings, by the keys that a line names ("F2, F3"). Raises KeyError for an unknown key."""
    return [FINDINGS[key.strip()] for key in keys.split(",")]
