"""Adapted layers whose weights lie on several devices: by columns or rows (tensor parallel), by experts."""

from lorafuse.parallel.ep import expert_parallel_experts
from lorafuse.parallel.tp import column_parallel_linear, row_parallel_linear

__all__ = ["column_parallel_linear", "expert_parallel_experts", "row_parallel_linear"]
