"""Adapters for servers: their names and layouts, one flat buffer for weight sync, and whether they were applied."""

from lorafuse.export.applied import NoEffect, check_applied
from lorafuse.export.flat import Flat, flatten
from lorafuse.export.layouts import to_sglang, to_vllm

__all__ = ["Flat", "NoEffect", "check_applied", "flatten", "to_sglang", "to_vllm"]
