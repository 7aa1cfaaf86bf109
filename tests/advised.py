"""What the advisor's snippet configures, read without TRL: its configuration of PEFT, and the trainer's arguments."""

import sys
from types import SimpleNamespace
from unittest import mock


def configured(source):
    """`(config, args)` of a snippet: PEFT's configuration, and the trainer's arguments as attributes."""
    actual = {}

    def config(**arguments):
        return SimpleNamespace(**arguments)

    trl = dict.fromkeys(("SFTConfig", "DPOConfig", "GRPOConfig"), config)
    trl = SimpleNamespace(**trl, SFTTrainer=None, DPOTrainer=None, GRPOTrainer=None)
    with mock.patch.dict(sys.modules, {"trl": trl, "datasets": SimpleNamespace(Dataset=None)}):
        exec(source.partition("tokenizer = ")[0], actual)
    return actual["config"], actual["args"]
