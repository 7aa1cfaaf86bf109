"""Many adapters resident on one model: allocated, trained in mixed batches, stepped and exported one by one."""

from lorafuse.adapters.optimizer import AdamParams, MultiAdamW, Step
from lorafuse.adapters.pool import AdapterPool

__all__ = ["AdamParams", "AdapterPool", "MultiAdamW", "Step"]
