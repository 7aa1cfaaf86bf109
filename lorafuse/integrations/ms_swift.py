"""ms-swift with lorafuse: a file of one line, and two options of `swift sft` or `swift rlhf`.

    # plugin.py
    import lorafuse.integrations.ms_swift

    swift sft ... --external_plugins plugin.py --callbacks lorafuse

ms-swift replaces the forward of every lora_A and lora_B by its `keep_device_forward`, which moves x to the weight's
device and does nothing else: a patched layer runs fused over it (`lorafuse.integrations.hf_common.altered`).
"""

from typing import Any

from lorafuse.errors import MissingDependency
from lorafuse.integrations.callback import LorafuseCallback

try:
    from swift.callbacks import callbacks_map
except ImportError as error:
    raise MissingDependency("ms-swift is not installed here: pip install ms-swift") from error

__all__ = ["SwiftCallback"]


class SwiftCallback(LorafuseCallback):
    """`LorafuseCallback` as ms-swift constructs callbacks: with its arguments and its trainer."""

    def __init__(self, args: Any, trainer: Any) -> None:
        super().__init__()


callbacks_map["lorafuse"] = SwiftCallback
