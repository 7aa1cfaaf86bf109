"""Where lorafuse meets other libraries. Each is imported when it is used, never before."""

from lorafuse.integrations.hf_adapt import adapt_experts
from lorafuse.integrations.hf_transformers import register_experts
from lorafuse.integrations.patching import patch, unpatch
from lorafuse.integrations.report import PatchReport
from lorafuse.integrations.zero3 import prepare_zero3

__all__ = ["PatchReport", "adapt_experts", "patch", "prepare_zero3", "register_experts", "unpatch"]
