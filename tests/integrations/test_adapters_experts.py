"""Experts of transformers' models in a pool (T1): bits, PEFT's files and gradients, what is refused."""

import copy
import json

import moe_models
import peft
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import lorafuse
from lorafuse import export
from lorafuse.adapters import AdamParams, AdapterPool, MultiAdamW
from lorafuse.testing.numerics import relative_l2, tolerance

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::RuntimeWarning:peft")

# rank, alpha, targets
USERS = (2, 8.0, None), (5, None, ["experts"]), (3, 2.0, ["experts.down_proj"]), (4, 1.0, ["o"])
SETTINGS = AdamParams(lr=1e-2, max_grad_norm=0.5)
EXPERTS = "model.layers.0.mlp.experts"


class Block(nn.Module):
    """A family's experts behind a router whose bits depend on a token alone, and a linear layer."""

    def __init__(self, family):
        super().__init__()
        model = moe_models.base(family)
        self.experts = next(m for m in model.modules() if hasattr(m, "down_proj") and hasattr(m, "num_experts"))
        self.o = nn.Linear(moe_models.HIDDEN, moe_models.HIDDEN)

    def forward(self, x):
        flat = x.flatten(0, -2)
        weight, index = flat[:, : self.routes].softmax(-1).topk(2, -1)
        return self.experts(flat, index, weight).view_as(x) + self.o(x)


def block_of(family):
    torch.manual_seed(3)
    block = Block(family)
    block.routes = block.experts.num_experts
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(std=0.3)
    return block


def filled(pool, slot, seed):
    """b is not zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, t in pool.parameters(slot).items():
        if "lora_B" in name:
            t.normal_(std=0.3, generator=generator)
    return slot


def pooled(block, users):
    pool = AdapterPool(copy.deepcopy(block))
    for i in users:
        rank, alpha, targets = USERS[i]
        filled(pool, pool.allocate(rank, alpha=alpha, seed=i, targets=targets), i)
    return pool


def step(pool, slots, x, dy):
    x = x.clone().requires_grad_()
    with pool.use_adapters(slots):
        y = pool.model(x)
        y.backward(dy)
    return {"y": y.detach(), "dx": x.grad}


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "nemotron_h"])
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 1, 0, 2)])
def test_bits_alone_and_in_a_batch(family, order):
    """y, every gradient, and the steps made of them."""
    block, who = block_of(family), (1, -1, 0, 2, 3, 0, 1)
    x, dy = torch.randn(2, len(who), 6, moe_models.HIDDEN)
    pool, slots = pooled(block, order), [order.index(user) if user >= 0 else -1 for user in who]
    every = step(pool, torch.tensor(slots), x, dy)
    grads = {slot: {name: t.clone() for name, t in pool.gradients(slot).items()} for slot in pool.slots}
    MultiAdamW(pool).step(dict.fromkeys(pool.slots, SETTINGS))
    for user in order:
        alone, mine = pooled(block, [user]), [i for i, other in enumerate(who) if other == user]
        for name, t in step(alone, [0] * len(mine), x[mine], dy[mine]).items():
            assert torch.equal(every[name][mine], t), (user, name)
        for name, t in alone.gradients(0).items():
            assert torch.equal(grads[order.index(user)][name], t), (user, name)
            assert t.count_nonzero(), name
        MultiAdamW(alone).step({0: SETTINGS})
        for name, t in alone.parameters(0).items():
            assert torch.equal(pool.parameters(order.index(user))[name], t), (user, name)
    base = block(x[1])
    assert relative_l2(every["y"][1], base) <= tolerance(torch.float32)
    assert relative_l2(every["y"][2], block(x[2])) > 0.01
    pool.release(1)
    with torch.no_grad(), pool.use_adapters([order.index(0) if order.index(0) != 1 else -1] * 2):
        assert pool.model(x[:2]).isfinite().all()
    assert torch.equal(pool.model(x[1]), base)
    pool.close()
    assert type(pool.model.experts) is type(block.experts)
    assert pool.model.state_dict().keys() == block.state_dict().keys()


def test_bits_in_tritons_interpreter():
    """Every tensor of each user alone and in a batch (T2); y and dx are eager's."""
    block, order, who = block_of("gpt_oss"), (2, 0, 1), (1, -1, 0, 2, 0)
    x, dy = torch.randn(2, len(who), 2, moe_models.HIDDEN)
    results = {}
    for backend in ("eager", "triton"):
        pool, slots = pooled(block, order), [order.index(user) if user >= 0 else -1 for user in who]
        with lorafuse.use_backend(backend):
            results[backend] = step(pool, slots, x, dy)
    for name, t in results["triton"].items():
        assert relative_l2(t, results["eager"][name]) <= tolerance(torch.float32), name
    for user in order:
        alone, mine = pooled(block, [user]), [i for i, other in enumerate(who) if other == user]
        with lorafuse.use_backend("triton"):
            for name, t in step(alone, [0] * len(mine), x[mine], dy[mine]).items():
                assert torch.equal(results["triton"][name][mine], t), (user, name)
        for name, t in alone.gradients(0).items():
            assert torch.equal(pool.gradients(order.index(user))[name], t), (user, name)
            assert t.count_nonzero(), name


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("parameters", [None, ["experts.down_proj"]], ids=["both", "down"])
def test_files_and_gradients_are_pefts(family, parameters, tmp_path):
    """What PEFT saved, beside a neighbour; then what the pool writes, in stock PEFT."""
    model, ids = moe_models.adapted(family, parameters=parameters), moe_models.token_ids()
    model.save_pretrained(tmp_path / "peft")
    pool = AdapterPool(moe_models.base(family))
    filled(pool, pool.allocate(3, targets=["experts", "q_proj"]), 0)
    slot = pool.load(tmp_path / "peft")
    pool.model.train()
    logits = model(ids).logits
    dy = torch.randn_like(logits)
    logits.backward(dy)
    with pool.use_adapters([slot] * len(ids)):
        ours = pool.model(ids).logits
        ours.backward(dy)
    assert relative_l2(ours, logits) <= tolerance(torch.float32)
    assert not any(t.any() for t in pool.gradients(0).values())
    stock, seen = {n: m for n, m in model.named_modules() if hasattr(m, "parameter_name")}, 0
    for layer in stock.values():
        prefix = next(n for n, m in model.named_modules() if m is layer.get_base_layer())
        name = f"{prefix.removeprefix('base_model.model.').replace('.base_layer', '')}.{layer.parameter_name}"
        da, db = (pool.gradients(slot)[f"{name}.lora_{letter}.weight"] for letter in "AB")
        E = layer.num_experts
        assert relative_l2(da.flatten(0, 1), layer.lora_A.default.weight.grad) <= tolerance(torch.float32), name
        expected = layer.lora_B.default.weight.grad.unflatten(1, (-1, E)).permute(2, 0, 1)
        assert relative_l2(db, expected) <= tolerance(torch.float32), name
        seen += 1
    assert seen == len(pool.gradients(slot)) / 2
    filled(pool, slot, 5)
    pool.export(slot, tmp_path / "ours")
    loaded = peft.PeftModel.from_pretrained(moe_models.base(family), tmp_path / "ours").eval()
    pool.model.eval()
    with torch.no_grad(), pool.use_adapters([slot] * len(ids)):
        assert relative_l2(pool.model(ids).logits, loaded(ids).logits) <= tolerance(torch.float32)
    again = pool.load(tmp_path / "ours")
    assert all(torch.equal(t, pool.parameters(again)[name]) for name, t in pool.parameters(slot).items())


def test_layers_and_experts_in_one_file(tmp_path):
    """In stock PEFT, and in a server's layout as that writes it."""
    pool, ids = AdapterPool(moe_models.base("qwen3_moe")), moe_models.token_ids()
    slot = filled(pool, pool.allocate(4, alpha=6, targets=["experts", "q_proj", "o_proj"]), 2)
    pool.export(slot, tmp_path)
    loaded = peft.PeftModel.from_pretrained(moe_models.base("qwen3_moe"), tmp_path).eval()
    with torch.no_grad(), pool.use_adapters([slot] * len(ids)):
        assert relative_l2(pool.model(ids).logits, loaded(ids).logits) <= tolerance(torch.float32)
        assert export.check_applied(pool.model, ids) == [
            one for one in export.check_applied(pool.model, ids) if one.reason == "its lora_A or lora_B is zero"
        ]
    for write in (export.to_vllm, export.to_sglang):
        ours, theirs = write(pool, adapter_name=slot), write(loaded)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(t, theirs[name]) for name, t in ours.items())


def test_a_quantized_base():
    quantization = pytest.importorskip("bitsandbytes.nn.parametrize")
    block = block_of("qwen3_moe")
    dense = copy.deepcopy(block)
    for name in ("gate_up_proj", "down_proj"):
        quantization.replace_parameter_4bit(block.experts, name, quant_type="nf4")
        with torch.no_grad():
            getattr(dense.experts, name).copy_(getattr(block.experts, name))
    x, dy = torch.randn(2, 3, 6, moe_models.HIDDEN)
    results = []
    for one in (block, dense):
        pool = pooled(one, (1, 0))
        results.append(step(pool, [0, 1, 0], x, dy) | pool.gradients(0) | pool.gradients(1))
    for name, t in results[0].items():
        assert relative_l2(t, results[1][name]) <= tolerance(torch.float32), name
        assert t.count_nonzero(), name


def test_what_is_refused(tmp_path):
    block = block_of("qwen3_moe")
    pool = pooled(block, (1,))
    assert list(pool.experts) == ["experts"]
    with pytest.raises(ValueError, match="have no dropout, as in PEFT"):
        pool.allocate(2, dropout=0.1)
    assert pool.allocate(2, dropout=0.1, targets=["o"]) == 1
    # the end of a name with one part is a linear layer's
    with pytest.raises(ValueError, match="no layer of the pool matches"):
        pool.allocate(2, targets=["down_proj"])
    x = torch.randn(2, 3, moe_models.HIDDEN, requires_grad=True)
    with pool.use_adapters([0, 0]):
        y = checkpoint(pool.model, x, use_reentrant=False)
    with pytest.raises(RuntimeError, match="keep backward within it"):
        y.sum().backward()
    down = AdapterPool(copy.deepcopy(block), ["experts.down_proj"])
    assert set(down.parameters(down.allocate(2))) == {f"experts.down_proj.lora_{letter}.weight" for letter in "AB"}
    pool.export(0, tmp_path)
    with pytest.raises(ValueError, match="adapts .'experts.gate_up_proj'., which the pool does not hold"):
        down.load(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"r": 10}))
    with pytest.raises(ValueError, match="another number of experts"):
        pool.load(tmp_path)
    other = copy.deepcopy(block)
    other.experts.act_fn = nn.Softsign()
    skipping = AdapterPool(copy.deepcopy(other))
    assert list(skipping.skipped) == ["experts"]
    with pytest.raises(ValueError, match="experts: the activation of its Qwen3MoeExperts"):
        AdapterPool(other, ["experts"])
