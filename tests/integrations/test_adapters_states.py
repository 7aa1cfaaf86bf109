"""States of a pool and of its optimizer (T1): resumed slots, numbers that are no slot, modules in several places."""

import copy
import io

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_adapters import BASE, SETTINGS, data, fill, pooled, train
from torch import nn
from torch.utils.checkpoint import checkpoint

from lorafuse import export
from lorafuse.adapters import AdamParams, AdapterPool, MultiAdamW


def steps(pool, optimizer, slots, count):
    """Of users 1 and 2, in `slots`."""
    batches = [data(user) for user in (1, 2)]
    x, dy = (torch.cat(t) for t in zip(*batches, strict=True))
    for _ in range(count):
        train(pool, [slots[0]] * 3 + [slots[1]] * 3, x, dy)
        optimizer.step({slot: SETTINGS[user] for slot, user in zip(slots, (0, 1), strict=True)})


def test_a_slot_is_resumed_bit_for_bit(tmp_path):
    """In another pool, at another place, with its next mask of dropout."""
    pool = pooled((1, 2))
    optimizer = MultiAdamW(pool)
    steps(pool, optimizer, (0, 1), 2)
    states = []
    for slot in (0, 1):
        pool.export(slot, tmp_path / str(slot))
        file = io.BytesIO()
        torch.save(optimizer.state_dict(slot), file)
        states.append(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    steps(pool, optimizer, (0, 1), 2)
    other = pooled((3, 0))
    other.release(0)
    resumed = MultiAdamW(other)
    # 1 comes to 0, and 0 to 2
    slots = [other.load(tmp_path / str(slot)) for slot in (1, 0)][::-1]
    with pytest.raises(ValueError, match="the layers and the rank"):
        resumed.load_state_dict(slots[0], states[1])
    for slot, state in zip(slots, states, strict=True):
        resumed.load_state_dict(slot, state)
    steps(other, resumed, slots, 2)
    for slot, now in enumerate(slots):
        for name, t in pool.parameters(slot).items():
            assert torch.equal(other.parameters(now)[name], t), name
        assert resumed.state_dict(now)["number"] == 4


@pytest.mark.parametrize(
    "settings",
    [{"lr": -1.0}, {"lr": float("nan")}, {"betas": (0.9, 1.0)}, {"eps": -1e-8}, {"weight_decay": float("inf")},
     {"max_grad_norm": -1.0}, {"grad_scale": float("nan")}],
)  # fmt: skip
def test_settings_of_no_step(settings):
    with pytest.raises(ValueError, match="must be finite"):
        AdamParams(**settings)


def test_numbers_that_are_no_slot_are_the_base():
    pool, (x, _) = pooled((0, 3)), data(0)
    pool.release(0)
    results = []
    with torch.no_grad():
        for slots in (torch.tensor([-5, 0, 99]), torch.tensor([-1, -1, -1], dtype=torch.int32), [-1] * 3):
            with pool.use_adapters(slots):
                results.append(pool.model(x))
    assert all(torch.equal(t, results[0]) for t in results)
    for slots in (torch.tensor([1.0] * 3), torch.tensor([True] * 3), [[0, 3]] * 3):
        with pytest.raises(TypeError, match="must hold integers"), pool.use_adapters(slots):
            pass


def test_rows_of_a_generation_are_those_of_a_step():
    pool, (x, dy) = pooled((0, 3)), data(0)
    with pool.use_adapters([1, 0, -1]):
        with torch.inference_mode():
            y = pool.model(x)
        again = pool.model(x)
        again.backward(dy)
    assert torch.equal(y, again)


def test_adapters_stay_within_use_adapters(tmp_path):
    pool = pooled((0,))
    pool.export(0, tmp_path)
    with pool.use_adapters([0]):
        for change in (lambda: pool.allocate(2), lambda: pool.load(tmp_path), lambda: pool.release(0), pool.close):
            with pytest.raises(RuntimeError, match="within use_adapters"):
                change()
    pool.release(0)
    assert pool.slots == ()


@pytest.mark.parametrize("change", ["allocate", "release", "load"])
def test_a_graph_of_before_the_slots_changed_is_refused(change, tmp_path):
    """Its gradients would go into buffers that nobody reads."""
    pool, (x, dy) = pooled((0, 1)), data(0)
    pool.export(0, tmp_path)
    with pool.use_adapters([1] * len(x)):
        y = pool.model(x)
    {"allocate": lambda: pool.allocate(2), "release": lambda: pool.release(0), "load": lambda: pool.load(tmp_path)}[
        change
    ]()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(dy)
    with pool.use_adapters([1] * len(x)):
        pool.model(x).backward(dy)
    assert all(t.any() for t in pool.gradients(1).values())


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_checkpoint_that_is_called_again_too_late(use_reentrant):
    """Its layers would be the base alone, and the gradients of its adapters lost."""
    pool, (x, dy) = pooled((0,)), data(0)
    with pool.use_adapters([0] * 3):
        y = checkpoint(pool.model, x.requires_grad_(), use_reentrant=use_reentrant)
    with pytest.raises(RuntimeError, match="keep backward within it"):
        y.backward(dy)
    # the base alone is what it was
    with pool.use_adapters([-1] * 3):
        checkpoint(pool.model, x, use_reentrant=use_reentrant).backward(dy)


def test_a_module_in_two_places(tmp_path):
    """Adapted in both, and put back in both."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = self.second = nn.Linear(8, 8)

        def forward(self, x):
            return self.second(self.first(x))

    pool, x = AdapterPool(Twice()), torch.randn(2, 8)
    fill(pool, pool.allocate(2), 0)
    assert list(pool.layers) == ["first"]
    with pool.use_adapters([0, -1]):
        y = pool.model(x)
        y.sum().backward()
    named = pool.parameters(0)
    w = pool.layers["first"].base.weight + named["first.lora_B.weight"] @ named["first.lora_A.weight"]
    bias = pool.layers["first"].base.bias
    assert torch.allclose(y[0], (x[0] @ w.t() + bias) @ w.t() + bias, atol=1e-5)
    with pytest.raises(ValueError, match="first and second are one module, which PEFT would adapt in the first place"):
        pool.export(0, tmp_path)
    written = export.to_vllm(pool, adapter_name=0)
    assert torch.equal(written["base_model.model.second.lora_B.weight"], named["first.lora_B.weight"])
    pool.close()
    assert type(pool.model.second) is nn.Linear
    assert pool.model.first is pool.model.second


class Shared(nn.Module):
    """A block that stands in two places, next to layers whose names end as those in it."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"q_proj": nn.Linear(8, 8), "o": nn.Linear(8, 8)}) for _ in range(2))
        self.layers.append(self.layers[0])
        self.q_proj = nn.ModuleDict({"o": nn.LayerNorm(8)})

    def forward(self, x):
        for layer in self.layers:
            x = layer["o"](torch.tanh(layer["q_proj"](x)))
        return self.q_proj["o"](x)


def test_a_block_in_two_places(tmp_path):
    """Files have it by both names, as PEFT's own; names that end as those of other modules are written whole."""
    model = Shared()
    pool, x = AdapterPool(copy.deepcopy(model)), torch.randn(3, 8)
    fill(pool, pool.allocate(2, targets=["0.q_proj", "1.o"]), 0)
    pool.export(0, tmp_path / "pool")
    export.to_vllm(pool, tmp_path / "vllm", adapter_name=0)
    with pool.use_adapters([0] * 3):
        y = pool.model(x)
    names = {
        f"base_model.model.layers.{n}.lora_{letter}.weight" for n in ("0.q_proj", "2.q_proj", "1.o") for letter in "AB"
    }
    for folder in ("pool", "vllm"):
        assert load_file(tmp_path / folder / "adapter_model.safetensors").keys() == names
        config = peft.LoraConfig.from_pretrained(tmp_path / folder)
        config.task_type = None
        stock = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / folder, config=config)
        assert torch.allclose(stock(x), y, atol=1e-5)
    written = export.to_vllm(stock)
    assert all(torch.equal(t, written[name]) for name, t in export.to_vllm(pool, adapter_name=0).items())
    stock.save_pretrained(tmp_path / "peft")
    for folder in ("pool", "peft"):
        slot = pool.load(tmp_path / folder)
        assert all(torch.equal(t, pool.parameters(slot)[name]) for name, t in pool.parameters(0).items())
    tensors = load_file(tmp_path / "pool" / "adapter_model.safetensors")
    tensors["base_model.model.layers.2.q_proj.lora_A.weight"] += 1
    save_file(tensors, tmp_path / "pool" / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="which are of one layer of the pool"):
        pool.load(tmp_path / "pool")


def test_files_that_do_not_fit_change_nothing(tmp_path):
    pool = pooled((0, 1))
    pool.export(0, tmp_path / "narrow")
    wide = AdapterPool(nn.ModuleDict({"q": nn.Linear(25, 40), "o": nn.Linear(40, 16)}))
    with pytest.raises(ValueError, match="which maps 25 features to 40"):
        wide.load(tmp_path / "narrow")
    assert wide.slots == ()
    config = peft.LoraConfig(r=4, target_modules=["q"], init_lora_weights="pissa")
    peft.get_peft_model(copy.deepcopy(BASE), config).save_pretrained(tmp_path / "pissa")
    with pytest.raises(ValueError, match="which changed the base"):
        pool.load(tmp_path / "pissa")
    assert pool.slots == (0, 1)


def test_transforms_that_would_lose_gradients_are_refused():
    pool, x = pooled((0,)), data(0)[0][:1].clone().requires_grad_()
    pool.model.eval()
    with pool.use_adapters([0]):
        expected = pool.model(x)
        for call in (
            lambda: torch.func.grad(lambda x: pool.model(x).sum())(x),
            lambda: torch.func.vmap(pool.model)(x[None]),
            lambda: torch.autograd.grad(pool.model(x).square().sum(), x, create_graph=True),
        ):
            with pytest.raises(NotImplementedError, match="grad_buffers=None"):
                call()
        with torch.no_grad():
            assert torch.allclose(torch.func.vmap(pool.model)(x[None])[0], expected, atol=1e-5)
        # the gradient of x alone adds nothing to the buffers
        (dx,) = torch.autograd.grad(pool.model(x).sum(), x)
    assert dx.count_nonzero()
    assert not any(t.any() for t in pool.gradients(0).values())


def test_a_slot_in_the_layouts_of_servers(tmp_path):
    pool = AdapterPool(
        nn.ModuleDict(
            {"layers": nn.ModuleList([nn.ModuleDict({"q_proj": nn.Linear(8, 6), "k_proj": nn.Linear(8, 4)})])}
        )
    )
    for user, rank in enumerate((2, 3)):
        fill(pool, pool.allocate(rank, alpha=7, targets=["q_proj"]), user)
    tensors = export.to_vllm(pool, tmp_path, adapter_name=1)
    assert {name[33:]: list(t.shape) for name, t in tensors.items()} == {
        "lora_A.weight": [3, 8],
        "lora_B.weight": [6, 3],
    }
    again = pool.load(tmp_path)
    assert pool.scale(again) == pytest.approx(7 / 3)
    assert all(torch.equal(t, pool.parameters(1)[name]) for name, t in pool.parameters(again).items())
    assert {n.split(".")[4] for n in export.to_sglang(pool, adapter_name=0)} == {"q_proj", "k_proj"}
    with pytest.raises(ValueError, match="no slot 'default'"):
        export.to_vllm(pool)
    with pool.use_adapters([1]):
        # k_proj is not called
        actual = {
            one.name.rpartition(".")[2]: one.reason
            for one in export.check_applied(Called(pool.model), torch.randn(1, 8))
        }
    assert actual == {"k_proj": "its lora_A or lora_B is zero"}
    assert {one.reason for one in export.check_applied(Called(pool.model), torch.randn(1, 8))} == {
        "its rows have no adapters: call it within AdapterPool.use_adapters"
    }


class Called(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model["layers"][0]["q_proj"](x)


def test_gradients_whose_squares_overflow():
    """Of fp16 adapters: the norm is finite, and clipped."""
    pool = pooled((0,), dtype=torch.float16)
    for t in pool.gradients(0).values():
        t.fill_(6e4)
    count = sum(t.numel() for t in pool.gradients(0).values())
    result = MultiAdamW(pool).step({0: AdamParams(lr=1e-2, max_grad_norm=1.0)})[0]
    assert not result.is_skipped
    assert result.grad_norm == pytest.approx(6e4 * count**0.5, rel=1e-3)


def test_a_state_without_a_part_changes_nothing():
    pool = pooled((1, 2))
    optimizer = MultiAdamW(pool)
    steps(pool, optimizer, (0, 1), 1)
    before = optimizer.state_dict(0)
    for part in before:
        with pytest.raises(KeyError, match=part):
            optimizer.load_state_dict(0, {key: value for key, value in before.items() if key != part})
    after = optimizer.state_dict(0)
    assert after["number"] == before["number"] == 1
    assert all(torch.equal(t, after["m"][name]) for name, t in before["m"].items())


def test_layers_on_several_devices_are_refused():
    model = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4, device="meta")])
    with pytest.raises(ValueError, match="lie on cpu and meta"):
        AdapterPool(model)
    assert all(type(layer) is nn.Linear for layer in model)


def test_a_torch_that_does_not_know_what_backward_reaches(monkeypatch):
    """Gradients of others would be added to the buffers: it is refused before anything runs, but for no gradients."""
    pool, x = pooled((0,)), data(0)[0]

    def unknown(node):
        raise RuntimeError("no longer so")

    with pool.use_adapters([0] * len(x)):
        expected = pool.model(x)
        monkeypatch.setattr(torch._C, "_will_engine_execute_node", unknown)
        with pytest.raises(RuntimeError, match="no longer so"):
            pool.model(x).sum().backward()
        monkeypatch.delattr(torch._C, "_will_engine_execute_node")
        with pytest.raises(NotImplementedError, match=r"2\.11 to 2\.13 .* to train an AdapterPool"):
            pool.model(x)
        with torch.no_grad():
            assert torch.equal(pool.model(x), expected)
