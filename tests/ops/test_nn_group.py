"""`LoRAQKV` and `LoRAGatedMLP` (T1): the operators as modules, their names and storage, merging."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lorafuse.nn import LoRAGatedMLP, LoRALinear, LoRAQKV
from lorafuse.testing.numerics import relative_l2, tolerance


def linears(*sizes, bias=True, dtype=None):
    return [nn.Linear(k, n, bias=bias, dtype=dtype) for n, k in sizes]


def trained(module):
    """The module with every B filled, as after training."""
    with torch.no_grad():
        for name, p in module.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.3)
    return module


def qkv(r=4, **settings):
    return trained(LoRAQKV.from_linears(*linears((16, 12), (8, 12), (8, 12)), r, **settings))


def mlp(r=4, **settings):
    return trained(LoRAGatedMLP.from_linears(*linears((20, 12), (20, 12), (12, 20)), r, **settings))


def layer_by_layer(module, x):
    if isinstance(module, LoRAQKV):
        return tuple(layer(x) for layer in module.children())
    return (module.down_proj(F.silu(module.gate_proj(x)) * module.up_proj(x)),)


def run(module, x):
    ys = module(x)
    return ys if isinstance(ys, tuple) else (ys,)


modules = pytest.mark.parametrize("build", [qkv, mlp])


@modules
@pytest.mark.parametrize("targets", ["all", "some"])
def test_equals_its_layers(build, targets):
    names = {qkv: ("q_proj", "v_proj"), mlp: ("up_proj", "down_proj")}[build]
    module = build(**({"targets": names} if targets == "some" else {}), alpha=7)
    actual, x = [], torch.randn(2, 5, 12, requires_grad=True)
    leaves = [x, *(p for p in module.parameters() if p.requires_grad)]
    assert len(leaves) == 1 + 2 * (3 if targets == "all" else 2)
    for ys in (run(module, x), layer_by_layer(module, x)):
        actual.append([*ys, *torch.autograd.grad(sum(y.sin().sum() for y in ys), leaves)])
    for one, other in zip(*actual, strict=True):
        assert relative_l2(one, other) < tolerance(torch.float32)
        assert one.any()


@modules
def test_is_one_node(build):
    x = torch.randn(5, 12, requires_grad=True)
    nodes = {y.grad_fn for y in run(build(), x)}
    assert len(nodes) == 1
    assert nodes.pop().next_functions[0][0].variable is x


@modules
def test_starts_as_its_base(build):
    module = build()
    module.reset_lora_parameters()
    x = torch.randn(5, 12)
    base = copy.deepcopy(module)
    for name, layer in list(base.named_children()):
        plain = nn.Linear(layer.in_features, layer.out_features)
        plain.weight, plain.bias = layer.weight, layer.bias
        setattr(base, name, plain)
    for one, other in zip(run(module, x), layer_by_layer(base, x), strict=True):
        torch.testing.assert_close(one, other)
    assert all(p.any() for name, p in module.named_parameters() if "lora_A" in name)


@modules
def test_weights_are_shared_and_frozen(build):
    given = linears((16, 12), (8, 12), (8, 12)) if build is qkv else linears((20, 12), (20, 12), (12, 20))
    kind = LoRAQKV if build is qkv else LoRAGatedMLP
    module = kind.from_linears(*given, 2, dropout=0.1, targets=(kind._NAMES[0],))
    for layer, linear in zip(module.children(), given, strict=True):
        assert layer.weight is linear.weight
        assert layer.bias is linear.bias
        assert not any(p.requires_grad for p in linear.parameters())
    assert {name for name, p in module.named_parameters() if p.requires_grad} == {
        f"{kind._NAMES[0]}.lora_A.weight",
        f"{kind._NAMES[0]}.lora_B.weight",
    }


@modules
def test_layers_of_their_own(build):
    """Ranks, scales, dropouts and biases may differ; a plain linear is frozen."""
    sizes = ((16, 12), (8, 12), (8, 12)) if build is qkv else ((20, 12), (20, 12), (12, 20))
    first = LoRALinear(sizes[0][1], sizes[0][0], 2, alpha=9, bias=False)
    third = LoRALinear(sizes[2][1], sizes[2][0], 5, use_rslora=True, dropout=0.5)
    module = trained(
        (LoRAQKV if build is qkv else LoRAGatedMLP)(first, nn.Linear(sizes[1][1], sizes[1][0]), third)
    ).eval()
    x = torch.randn(3, 12)
    for one, other in zip(run(module, x), layer_by_layer(module, x), strict=True):
        torch.testing.assert_close(one, other)
    module.train()
    torch.manual_seed(1)
    masked = run(module, x)
    assert not torch.equal(masked[-1], run(module.eval(), x)[-1])
    torch.manual_seed(1)
    for one, other in zip(masked, layer_by_layer(module.train(), x), strict=True):
        torch.testing.assert_close(one, other)


@modules
def test_the_state_dict_has_the_layers_names(build):
    module, other, file = build(), build(), io.BytesIO()
    names = module._NAMES
    assert set(module.state_dict()) == {
        f"{name}.{key}" for name in names for key in ("weight", "bias", "lora_A.weight", "lora_B.weight")
    }
    torch.save(module.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file))
    x = torch.randn(3, 12)
    assert all(map(torch.equal, run(other, x), run(module, x)))
    assert all(map(torch.equal, run(copy.deepcopy(module), x), run(module, x)))


@modules
def test_merge_and_unmerge(build):
    module, x = build(), torch.randn(3, 12)
    before = run(module, x)
    module.merge()
    assert all(layer.merged for layer in module.children())
    for one, other in zip(run(module, x), before, strict=True):
        torch.testing.assert_close(one, other)
    assert run(module, x.requires_grad_())[0].requires_grad
    module.unmerge()
    for one, other in zip(run(module, x), before, strict=True):
        torch.testing.assert_close(one, other)


@modules
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_base_has_fp32_adapters(build, dtype):
    sizes = ((16, 12), (8, 12), (8, 12)) if build is qkv else ((20, 12), (20, 12), (12, 20))
    kind = LoRAQKV if build is qkv else LoRAGatedMLP
    module = trained(kind.from_linears(*linears(*sizes, dtype=dtype), 2))
    assert {p.dtype for name, p in module.named_parameters() if "lora" in name} == {torch.float32}
    ys = run(module, torch.randn(3, 12, dtype=dtype))
    assert {y.dtype for y in ys} == {dtype}
    sum(y.sum() for y in ys).backward()
    assert all(p.grad.any() for p in module.parameters() if p.requires_grad)


@modules
def test_compiled(build):
    torch.compiler.reset()
    module, x = build(), torch.randn(3, 12)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    ys = compiled(x)
    assert all(map(torch.equal, ys if isinstance(ys, tuple) else (ys,), run(module, x)))


def test_repr():
    text = repr(mlp(activation="gelu_tanh", recompute_up=True))
    assert "activation=gelu_tanh, recompute_up=True" in text
    assert "(gate_proj): LoRALinear(" in text
    assert "(q_proj): LoRALinear(" in repr(qkv())


def test_recompute_up_changes_no_number():
    one = mlp()
    other, x = copy.deepcopy(one), torch.randn(4, 12)
    other.recompute_up = True
    for module in (one, other):
        module(x).sum().backward()
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        assert (p.grad is None and q.grad is None) or torch.equal(p.grad, q.grad)


class TestRefused:
    def test_another_module(self):
        with pytest.raises(TypeError, match=r"LoRAQKV got a Conv1d for k_proj; it takes a LoRALinear, or an nn.Linear"):
            LoRAQKV(nn.Linear(4, 4), nn.Conv1d(4, 4, 1), nn.Linear(4, 4))

    def test_a_linear_that_computes_otherwise(self):
        class Packed(nn.Linear):
            def forward(self, x):
                return super().forward(x) * 2

        with pytest.raises(TypeError, match="LoRAGatedMLP got a Packed for gate_proj"):
            LoRAGatedMLP(Packed(4, 6), nn.Linear(4, 6), nn.Linear(6, 4))

    def test_sizes(self):
        with pytest.raises(ValueError, match="LoRAQKV got in features q_proj 4, k_proj 4, v_proj 5"):
            LoRAQKV(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(5, 4))
        with pytest.raises(
            ValueError, match=r"LoRAGatedMLP got gate_proj \[6, 4\], up_proj \[6, 4\], down_proj \[4, 5\]"
        ):
            LoRAGatedMLP(nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(5, 4))

    def test_an_activation(self):
        with pytest.raises(ValueError, match="activation 'swish' is not one of silu"):
            mlp(activation="swish")

    @pytest.mark.parametrize("targets", [("q_proj", "o_proj"), "q_proj"])
    def test_targets(self, targets):
        with pytest.raises(ValueError, match="must be a sequence of names among q_proj, k_proj, v_proj"):
            qkv(targets=targets)

    def test_a_rank(self):
        with pytest.raises(ValueError, match="r=0 is not a rank"):
            qkv(r=0)
