"""Where lorafuse meets other libraries. Each is imported when it is used, never before."""

from lorafuse.integrations.hf_adapt import adapt_experts
from lorafuse.integrations.hf_transformers import register_experts
from lorafuse.integrations.patching import patch, unpatch
from lorafuse.integrations.report import PatchReport
from lorafuse.integrations.status import Status, status

__all__ = ["PatchReport", "Status", "adapt_experts", "patch", "register_experts", "status", "unpatch"]
