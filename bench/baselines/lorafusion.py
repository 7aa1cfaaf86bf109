"""LoRAFusion's kernels. It has no licence, so its source is not read here, and its documentation names no call."""

from lorafuse.bench.result import Failed

LABEL = "LoRAFusion"
REQUIRES = ("lorafusion",)
ISOLATED = True

_UNKNOWN = "installed, but its call is not known from its documentation"


def unavailable(kind, device):
    return _UNKNOWN


def linear(given):
    raise Failed(_UNKNOWN)
