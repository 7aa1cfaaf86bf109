"""Where lorafuse meets other libraries. Each is imported when it is used, never before."""

from lorafuse.integrations.hf_adapt import adapt_experts
from lorafuse.integrations.hf_transformers import register_experts
from lorafuse.integrations.merging import ExactMerge, merge_exact
from lorafuse.integrations.patching import patch, unpatch
from lorafuse.integrations.report import PatchReport

__all__ = ["ExactMerge", "PatchReport", "adapt_experts", "merge_exact", "patch", "register_experts", "unpatch"]
