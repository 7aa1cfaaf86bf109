"""Stand-ins for peers that need a GPU: their functions by name and signature, computed by the formula.

Signatures of unsloth 015bdef (`unsloth/kernels/fast_lora.py`, `FastLanguageModel`) and axolotl 067b021
(`axolotl/kernels/lora.py`, `axolotl/monkeypatch/lora_kernels.py`,
`axolotl/integrations/kernels/libs/scattermoe_lora/`), both Apache-2.0. What their callers have to know is kept too: x
of three dimensions, dx over x where `inplace` is True.
"""

_UNSLOTH = """
import torch

def project(x, w, quant, a, b, s):
    assert quant is None
    return x @ w.t() + s * (x @ a.to(x.dtype).t()) @ b.to(x.dtype).t()

class _Projections(torch.autograd.Function):
    @staticmethod
    def run(ctx, x, flat, inplace):
        ctx.projections = [flat[i : i + 5] for i in range(0, len(flat), 5)]
        ctx.inplace = inplace
        ctx.x = x
        return tuple(project(x, *p) for p in ctx.projections)

    @staticmethod
    def backward(ctx, *dys):
        batch, tokens, features = ctx.x.shape
        x, dx, grads = ctx.x[0], 0, []
        for (w, _, a, b, s), (dy,) in zip(ctx.projections, dys):
            dx = dx + dy @ w + s * (dy @ b) @ a
            grads += [None, None, s * (dy @ b).t() @ x, s * dy.t() @ (x @ a.t()), None]
        if ctx.inplace:
            x.copy_(dx)
        return dx[None], *grads, *((None,) if len(dys) == 3 else ())

class LoRA_W(_Projections):
    @staticmethod
    def forward(ctx, X, W, W_quant, A, B, S):
        return _Projections.run(ctx, X, (W, W_quant, A, B, S), False)[0]

class LoRA_QKV(_Projections):
    @staticmethod
    def forward(ctx, X, QW, QW_quant, QA, QB, QS, KW, KW_quant, KA, KB, KS, VW, VW_quant, VA, VB, VS, inplace=True):
        flat = (QW, QW_quant, QA, QB, QS, KW, KW_quant, KA, KB, KS, VW, VW_quant, VA, VB, VS)
        return _Projections.run(ctx, X, flat, inplace)

def swiglu_fg_kernel(e, g):
    return torch.nn.functional.silu(e) * g

def swiglu_DWf_DW_dfg_kernel(DW, e, g):
    raise NotImplementedError

class LoRA_MLP:
    @staticmethod
    def apply(X, gateW, gateW_quant, gateA, gateB, gateS, upW, upW_quant, upA, upB, upS,
              downW, downW_quant, downA, downB, downS, _forward_function, _backward_function, inplace=True):
        batch, tokens, features = X.shape
        assert _backward_function is swiglu_DWf_DW_dfg_kernel
        own = X.clone()
        if inplace:
            own.register_hook(lambda dx: X.data.copy_(dx))
        gate = project(own, gateW, gateW_quant, gateA, gateB, gateS)
        h = _forward_function(gate, project(own, upW, upW_quant, upA, upB, upS))
        return project(h, downW, downW_quant, downA, downB, downS)
"""

_AXOLOTL = """
from torch.nn.functional import silu

def project(proj, x):
    assert not proj.merged
    name = proj.active_adapters[0]
    a, b = proj.lora_A[name].weight, proj.lora_B[name].weight
    return x @ proj.base_layer.weight.t() + proj.scaling[name] * (x @ a.to(x.dtype).t()) @ b.to(x.dtype).t()

def apply_lora_o(self, X):
    batch, tokens, features = X.shape
    assert self.training is not None
    return project(self.o_proj, X)

def apply_lora_qkv(self, X, inplace=True):
    batch, tokens, features = X.shape
    assert self.training is not None
    own = X.clone()
    if inplace:
        own.register_hook(lambda dx: X.data.copy_(dx))
    return tuple(project(proj, own) for proj in (self.q_proj, self.k_proj, self.v_proj))

def apply_lora_mlp_swiglu(self, X, inplace=True):
    batch, tokens, features = X.shape
    assert self.training is not None
    own = X.clone()
    if inplace:
        own.register_hook(lambda dx: X.data.copy_(dx))
    return project(self.down_proj, silu(project(self.gate_proj, own)) * project(self.up_proj, own))
"""

_UNSLOTH_MODEL = """
class FastLanguageModel:
    @staticmethod
    def from_pretrained(model_name, max_seq_length=2048, dtype=None, load_in_4bit=True):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        assert not load_in_4bit
        model = AutoModelForCausalLM.from_pretrained(model_name, dtype=dtype)
        return model, AutoTokenizer.from_pretrained(model_name)

    @staticmethod
    def get_peft_model(model, r=16, target_modules=(), lora_alpha=16, lora_dropout=0.0, bias="none",
                       use_gradient_checkpointing="unsloth", random_state=3407, max_seq_length=2048):
        from peft import LoraConfig, get_peft_model

        assert (lora_dropout, bias) == (0, "none")
        return get_peft_model(model, LoraConfig(r=r, lora_alpha=lora_alpha, target_modules=list(target_modules)))
"""

_AXOLOTL_PATCHES = """
import types

from axolotl.kernels.lora import apply_lora_mlp_swiglu, apply_lora_o, apply_lora_qkv

patched = []

def patch_self_attn_lora(cfg):
    from transformers import AutoConfig

    patched.append(AutoConfig.from_pretrained(cfg["base_model"]).model_type)

def apply_lora_kernel_patches(model, cfg):
    assert patched and cfg.lora_qkv_kernel and cfg.lora_o_kernel
    for layer in model.model.model.layers:
        if cfg.lora_mlp_kernel:
            layer.mlp.forward = types.MethodType(apply_lora_mlp_swiglu, layer.mlp)
    return model
"""

_AXOLOTL_DICT = """
class DictDefault(dict):
    def __getattr__(self, name):
        return self.get(name)
"""

_SCATTERMOE = """
import torch

def scattermoe_experts_forward(self, hidden_states, top_k_index, top_k_weights):
    out = torch.zeros_like(hidden_states)

    def project(x, name, e):
        a, b, s = self._scattermoe_lora[name]
        r = a.shape[0] // self.num_experts
        # expert by expert in both
        a, b = a[e * r : (e + 1) * r], b[:, e * r : (e + 1) * r]
        return x @ getattr(self, name)[e].t() + s * (x @ a.t()) @ b.t()

    for e in range(self.num_experts):
        token, slot = torch.where(top_k_index == e)
        gate, up = project(hidden_states[token], "gate_up_proj", e).chunk(2, -1)
        y = project(self.act_fn(gate) * up, "down_proj", e)
        out = out.index_add(0, token, y * top_k_weights[token, slot, None])
    return out

def register_scattermoe_experts():
    from peft.tuners.lora.layer import ParamWrapper
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register("scattermoe", scattermoe_experts_forward)
    if {knows_peft}:
        ParamWrapper.forward = forward

def forward(self, x, *args):
    base, factors = self, {{}}
    while hasattr(base, "base_layer"):
        a, b = base.lora_A["default"].weight.to(x.dtype), base.lora_B["default"].weight.to(x.dtype)
        E = base.get_base_layer().num_experts
        b = b.reshape(b.shape[0], -1, E).mT.flatten(1)
        factors[base.parameter_name] = a, b, base.scaling["default"]
        base = base.base_layer
    assert base.config._experts_implementation == "scattermoe"
    base._scattermoe_lora = factors
    return base(x, *args)
"""


def install(place, knows_peft=True):
    """Write them as packages below `place`; `knows_peft` False is a ScatterMoE that leaves this PEFT alone."""
    scattermoe = "axolotl/integrations/kernels/libs/scattermoe_lora/experts.py"
    files = {
        "unsloth/kernels/fast_lora.py": _UNSLOTH,
        "axolotl/kernels/lora.py": _AXOLOTL,
        "unsloth/__init__.py": _UNSLOTH_MODEL,
        "axolotl/monkeypatch/lora_kernels.py": _AXOLOTL_PATCHES,
        "axolotl/utils/dict.py": _AXOLOTL_DICT,
        scattermoe: _SCATTERMOE.format(knows_peft=knows_peft),
    }
    for name, source in files.items():
        file = place / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source)
        for package in file.relative_to(place).parents[:-1]:
            (place / package / "__init__.py").touch()
