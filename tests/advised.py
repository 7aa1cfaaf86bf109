"""What the advisor's snippet configures, read without TRL: its configuration of PEFT, and the trainer's arguments."""

import sys
from types import SimpleNamespace

import pytest


def configured(source):
    """`(config, args)` of a snippet: PEFT's configuration, and the trainer's arguments as attributes."""
    actual = {}

    def config(**arguments):
        return SimpleNamespace(**arguments)

    trl = dict.fromkeys(("SFTConfig", "DPOConfig", "GRPOConfig"), config)
    trl = SimpleNamespace(**trl, SFTTrainer=None, DPOTrainer=None, GRPOTrainer=None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "trl", trl)
        patch.setitem(sys.modules, "datasets", SimpleNamespace(Dataset=None))
        exec(source.partition("tokenizer = ")[0], actual)
    return actual["config"], actual["args"]
