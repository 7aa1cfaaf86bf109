"""lorafuse: LoRA layers that cost what their arithmetic costs.

`lorafuse.patch(model)` makes every adapted layer of a PEFT model run fused; `lorafuse.unpatch(model)` takes it back.
`lorafuse.functional` and `lorafuse.nn` are for code that owns its model.
"""

from lorafuse import functional, nn
from lorafuse.backends.base import use_backend
from lorafuse.backends.workspace import clear_workspace
from lorafuse.errors import BackendUnavailable, MissingDependency
from lorafuse.integrations import PatchReport, Status, patch, status, unpatch

__version__ = "0.1.0"

__all__ = [
    "BackendUnavailable",
    "MissingDependency",
    "PatchReport",
    "Status",
    "clear_workspace",
    "functional",
    "nn",
    "patch",
    "status",
    "unpatch",
    "use_backend",
]
