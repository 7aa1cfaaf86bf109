"""Where lorafuse meets other libraries. Each is imported when it is used, never before."""

from lorafuse.integrations.hf_adapt import adapt_experts
from lorafuse.integrations.hf_transformers import register_experts
from lorafuse.integrations.patching import patch, unpatch
from lorafuse.integrations.report import PatchReport

__all__ = ["PatchReport", "adapt_experts", "patch", "register_experts", "unpatch"]
