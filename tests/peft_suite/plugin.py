"""A pytest plugin that takes the place of PEFT's conftest: every model with adapters is patched as it is made.

`make test-peft` loads it with `-p`. Each test ends with how often a fused operator ran in it, and for how many modules.
"""

import contextlib
import json
import random
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftConfig
from peft.tuners import tuners_utils
from peft_suite.results import Result, passed

import lorafuse
from lorafuse.integrations import hf_experts, hf_peft

# stock: as PEFT ships it. cycled: unpatched and patched again when a model is made and before each of its forwards.
MODES = "stock", "patched", "cycled"
MARKERS = "single_gpu_tests", "multi_gpu_tests", "regression", "bitsandbytes"


class Fused:
    """Counts the calls of the two operators that patched layers run, and the base weights they ran for."""

    def __init__(self):
        self.calls, self.modules = 0, set()
        hf_peft.run_linear = self.counted(hf_peft.run_linear, lambda args, operands: args[1])
        hf_experts.lora_experts = self.counted(hf_experts.lora_experts, lambda args, operands: operands["down"])

    def counted(self, operator, weight_of):
        def call(*args, **operands):
            # Dynamo would trace the counting too
            if not torch.compiler.is_compiling():
                self.calls += 1
                self.modules.add(id(weight_of(args, operands)))
            return operator(*args, **operands)

        return call

    def take(self):
        """`(calls, modules)` since the last time."""
        counts = self.calls, len(self.modules)
        self.calls, self.modules = 0, set()
        return counts


def _patch(model, cycled):
    with warnings.catch_warnings():
        # most models of a suite of every method have no LoRA layer over nn.Linear, and it counts warnings
        warnings.filterwarnings("ignore", "lorafuse.patch patched nothing", UserWarning)
        lorafuse.patch(model)
        if cycled:
            lorafuse.unpatch(model)
            lorafuse.patch(model)


def patch_every_model(cycled):
    """Patch a model whenever PEFT has put adapters into it, by whatever function that was requested."""
    inject, forward = tuners_utils.BaseTuner.inject_adapter, tuners_utils.BaseTuner.forward

    def inject_and_patch(self, model, *args, **kwargs):
        inject(self, model, *args, **kwargs)
        _patch(model, cycled)

    def cycle_and_forward(self, *args, **kwargs):
        if not torch.compiler.is_compiling():
            _patch(self.model, cycled)
        return forward(self, *args, **kwargs)

    tuners_utils.BaseTuner.inject_adapter = inject_and_patch
    if cycled:
        tuners_utils.BaseTuner.forward = cycle_and_forward


def stay_offline():
    """PEFT's tests go online the first time that they name a model of the hub, and try again for half a minute."""
    for module in list(sys.modules.values()):
        if "hub_online_once" in getattr(module, "__dict__", {}):
            module.hub_online_once = contextlib.nullcontext


def config_classes(value):
    """The configuration classes and the classes of the configurations in a parameter of a test."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [actual for one in value for actual in config_classes(one)]
    kind = value if isinstance(value, type) else type(value)
    return [kind] if issubclass(kind, PeftConfig) else []


def is_about_lora(item):
    """Whether a test is not parametrized by other methods alone."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    kinds = config_classes(parameters)
    return not kinds or any(issubclass(kind, LoraConfig) for kind in kinds)


class Plugin:
    def __init__(self, config):
        self.results_file = Path(config.getoption("results"))
        self.is_worker = hasattr(config, "workerinput")
        only = config.getoption("only")
        self.only = passed({k: Result(*v) for k, v in json.loads(Path(only).read_text()).items()}) if only else None
        self.results = {}
        self.fused = Fused()
        mode = config.getoption("mode")
        if mode != "stock":
            patch_every_model(cycled=mode == "cycled")

    def pytest_collection_modifyitems(self, config, items):
        stay_offline()
        kept, left_out = [], []
        for item in items:
            runs = is_about_lora(item) if self.only is None else item.nodeid in self.only
            (kept if runs else left_out).append(item)
        items[:] = kept
        config.hook.pytest_deselected(items=left_out)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item):
        # a test starts from the same numbers in every mode, whatever ran before it
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        self.fused.take()
        try:
            return (yield)
        finally:
            item.user_properties.append(("fused", self.fused.take()))

    def pytest_runtest_logreport(self, report):
        result = self.results.setdefault(report.nodeid, Result())
        if report.when == "call":
            calls, modules = dict(report.user_properties).get("fused", (0, 0))
            result = result._replace(calls=calls, modules=modules)
        if report.outcome != "passed":
            crash = getattr(report.longrepr, "reprcrash", None)
            result = result._replace(outcome=report.outcome, why=crash.message.split("\n")[0] if crash else "")
        self.results[report.nodeid] = result

    def pytest_sessionfinish(self):
        if not self.is_worker:
            self.results_file.write_text(json.dumps(self.results))


def pytest_addoption(parser):
    parser.addoption("--mode", choices=MODES, default="stock")
    parser.addoption("--results", required=True, help="a file for `{test: outcome, calls, modules, why}`")
    parser.addoption("--only", help="results of a former run: only its tests that passed")


def pytest_configure(config):
    for marker in MARKERS:
        config.addinivalue_line("markers", marker)
    config.pluginmanager.register(Plugin(config), "lorafuse-peft-suite")
