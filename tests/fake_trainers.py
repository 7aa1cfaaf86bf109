"""The interfaces of trainers that lorafuse's integrations meet, written anew from their published source.

`provide(monkeypatch, name)` puts one into `sys.modules` where the package itself is not installed: what is there for
real is used. Versions read: axolotl 0.19.0, llamafactory 0.9.5, ms-swift 4.6.0, lightning 2.6.6, torchtune 0.6.1,
nemo-automodel 0.7.0.
"""

import importlib
import importlib.util
import sys
import types

import torch
from torch import nn
from torch.nn import functional as F


def provide(monkeypatch, name):
    """Whether the package `name` is the real one; its imitation is put in its place otherwise."""
    if importlib.util.find_spec(name) is not None:
        return True
    for path, content in LIBRARIES[name].items():
        module = types.ModuleType(path)
        module.__path__ = []
        vars(module).update(content)
        for key, value in content.items():
            if callable(value):
                # functions and classes are known by where they belong
                value.__module__ = path
                setattr(module, key, value)
        monkeypatch.setitem(sys.modules, path, module)
        parent, _, child = path.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
    return False


class BasePlugin:
    def register(self, cfg):
        pass

    def get_input_args(self):
        return None

    def add_callbacks_pre_trainer(self, cfg, model):
        return []


def apply_lora_mlp_swiglu(self, x, inplace=True):
    """As Axolotl's and Unsloth's kernels do: the weights are read, the layers are not called."""
    gate, up = _product(self.gate_proj, x), _product(self.up_proj, x)
    return _product(self.down_proj, F.silu(gate) * up)


def _product(layer, x):
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return layer.base_layer(x) + layer.scaling["default"] * (x @ a.T) @ b.T


def keep_device_forward(self, *args, **kwargs):
    x = args[0]
    if self.weight.device != x.device:
        return self.forward_origin(x.to(self.weight.device), *args[1:], **kwargs)
    return self.forward_origin(*args, **kwargs)


def run_exp(args=None, callbacks=None):
    """Hands its callbacks to the Trainer that `args["trainer"]` makes."""
    args["trainer"](callbacks).train()


class Callback:
    def setup(self, trainer, pl_module, stage):
        pass

    def on_train_start(self, trainer, pl_module):
        pass

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        pass


class LightningModule(nn.Module):
    pass


class LightningTrainer:
    """The order in which Lightning calls what the callback has."""

    def __init__(self, max_steps, callbacks, **options):
        self.max_steps, self.callbacks, self.is_global_zero = max_steps, callbacks, True

    def fit(self, module, batches):
        for callback in self.callbacks:
            callback.setup(self, module, stage="fit")
        if hasattr(module, "configure_model"):
            module.configure_model()
        optimizer = module.configure_optimizers()
        for callback in self.callbacks:
            callback.on_train_start(self, module)
        for i, batch in zip(range(self.max_steps), batches, strict=False):
            optimizer.zero_grad()
            loss = module.training_step(batch, i)
            loss.backward()
            optimizer.step()
            for callback in self.callbacks:
                callback.on_train_batch_end(self, module, loss, batch, i)


class LoRALinear(nn.Module):
    """torchtune's."""

    def __init__(self, in_dim, out_dim, rank, alpha, dropout=0.0, use_bias=False, quantize_base=False):
        super().__init__()
        self.in_dim, self.out_dim, self.rank, self.alpha, self.use_bias = in_dim, out_dim, rank, alpha, use_bias
        self._quantize_base = quantize_base
        linear = nn.Linear(in_dim, out_dim, bias=use_bias)
        self.disabled = self.merged = False
        self.register_parameter("weight", nn.Parameter(linear.weight))
        self.register_parameter("bias", nn.Parameter(linear.bias) if use_bias else None)
        self.dropout = nn.Dropout(p=dropout) if dropout > 0.0 else nn.Identity()
        self.lora_a = nn.Linear(in_dim, rank, bias=False)
        self.lora_b = nn.Linear(rank, out_dim, bias=False)

    def forward(self, x):
        out = F.linear(x, self.weight, self.bias)
        if self.disabled:
            return out
        return out + (self.alpha / self.rank) * self.lora_b(self.lora_a(self.dropout(x)))


class LinearLoRA(nn.Linear):
    """NeMo Automodel's."""

    def forward(self, x):
        y = F.linear(x, self.weight, self.bias)
        if self.dropout_position == "pre":
            x = F.dropout(x, p=self.dropout_p, training=self.training)
        delta = self.lora_B(self.lora_A(x) * self.scale)
        if self.dropout_position == "post":
            delta = F.dropout(delta, p=self.dropout_p, training=self.training)
        return y + delta


class TritonLinearLoRA(LinearLoRA):
    def forward(self, x):
        return LinearLoRA.forward(self, x)


def patch_linear_module(
    orig_linear,
    dim=8,
    alpha=32,
    use_dora=False,
    dropout=0.0,
    dropout_position="post",
    use_memory_efficient_lora=True,
    use_triton=True,
):
    """A linear layer whose class becomes one of its own that derives from NeMo's and from what it was."""
    layer = orig_linear.requires_grad_(False)
    layer.dim, layer.scale, layer.use_dora = dim, alpha / dim, use_dora
    layer.lora_A = nn.Linear(layer.in_features, dim, bias=False)
    layer.lora_B = nn.Linear(dim, layer.out_features, bias=False)
    layer.dropout_p, layer.dropout_position = dropout, dropout_position
    layer.use_memory_efficient_lora = use_memory_efficient_lora
    base = TritonLinearLoRA if use_triton else LinearLoRA
    layer.__class__ = type("PatchedLinearLoRA", (base, type(layer)), {})
    return layer


def install_fused_lora_mlp(model):
    """Puts a forward that reads the weights of gate, up and down on each MLP; what it does is decided at each call."""
    count = 0
    for mlp in model.modules():
        if not hasattr(mlp, "gate_proj"):
            continue
        own = mlp.forward

        def forward(x, mlp=mlp, own=own):
            layers = mlp.gate_proj, mlp.up_proj, mlp.down_proj
            if not all(layer.use_memory_efficient_lora for layer in layers):
                return own(x)
            gate, up, down = (
                layer.weight + layer.scale * layer.lora_B.weight @ layer.lora_A.weight for layer in layers
            )
            return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)

        mlp.forward = forward
        count += 1
    return count


class GroupedExpertsLoRA(nn.Module):
    """NeMo Automodel's adapted experts."""


LIBRARIES = {
    "axolotl": {
        "axolotl": {},
        "axolotl.integrations": {},
        "axolotl.integrations.base": {"BasePlugin": BasePlugin},
    },
    "swift": {
        "swift": {},
        "swift.callbacks": {"callbacks_map": {}},
        "swift.tuners": {},
        "swift.tuners.peft": {"keep_device_forward": keep_device_forward},
    },
    "llamafactory": {
        "llamafactory": {},
        "llamafactory.train": {},
        "llamafactory.train.tuner": {"run_exp": run_exp},
    },
    "lightning": {
        "lightning": {},
        "lightning.pytorch": {"Callback": Callback, "LightningModule": LightningModule, "Trainer": LightningTrainer},
    },
    "torchtune": {
        "torchtune": {},
        "torchtune.modules": {},
        "torchtune.modules.peft": {"LoRALinear": LoRALinear},
    },
    "nemo_automodel": {
        "nemo_automodel": {},
        "nemo_automodel.components": {},
        "nemo_automodel.components._peft": {},
        "nemo_automodel.components._peft.lora": {
            "LinearLoRA": LinearLoRA,
            "TritonLinearLoRA": TritonLinearLoRA,
            "patch_linear_module": patch_linear_module,
            "GroupedExpertsLoRA": GroupedExpertsLoRA,
        },
        "nemo_automodel.components._peft.lora_mlp": {"install_fused_lora_mlp": install_fused_lora_mlp},
    },
}


def randomize(model, names="lora_"):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if names in name:
                parameter.normal_(std=0.5)
    return model


def module_of(name, monkeypatch):
    """An integration, imported anew."""
    monkeypatch.delitem(sys.modules, f"lorafuse.integrations.{name}", raising=False)
    module = importlib.import_module(f"lorafuse.integrations.{name}")
    monkeypatch.delitem(sys.modules, f"lorafuse.integrations.{name}")
    return module
