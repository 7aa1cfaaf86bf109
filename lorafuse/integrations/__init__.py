"""Where lorafuse meets other libraries. Each is imported when it is used, never before."""

from lorafuse.integrations.hf_adapt import adapt_experts, from_experts
from lorafuse.integrations.hf_transformers import register_experts
from lorafuse.integrations.merging import ExactMerge, merge_exact
from lorafuse.integrations.patching import patch, unpatch
from lorafuse.integrations.peft_files import load_adapter, save_adapter
from lorafuse.integrations.report import PatchReport
from lorafuse.integrations.serving import check_for_serving
from lorafuse.integrations.status import Status, status

__all__ = [
    "ExactMerge",
    "PatchReport",
    "Status",
    "adapt_experts",
    "check_for_serving",
    "from_experts",
    "load_adapter",
    "merge_exact",
    "patch",
    "register_experts",
    "save_adapter",
    "status",
    "unpatch",
]
