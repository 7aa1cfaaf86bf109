"""`lorafuse.adapters` (T1): the pool's bits, its files in stock PEFT, and MultiAdamW against torch's AdamW."""

import copy
import itertools

import peft
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lorafuse.adapters import AdamParams, AdapterPool, MultiAdamW
from lorafuse.nn import LoRALinearMulti
from lorafuse.testing.numerics import relative_l2, tolerance


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.norm, self.o = nn.Linear(24, 40), nn.LayerNorm(40), nn.Linear(40, 16, bias=False)

    def forward(self, x):
        return self.o(torch.tanh(self.norm(self.q(x))))


BASE = Net()
# rank, alpha, targets, dropout
USERS = (2, 8.0, None, 0.0), (9, None, ["q"], 0.25), (1, 3.0, ["q", "o"], 0.5), (33, 16.0, ["o"], 0.0)


def fill(pool, slot, seed):
    """b is not zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, t in pool.parameters(slot).items():
        if "lora_B" in name:
            t.normal_(generator=generator)


def pooled(users, **more):
    pool = AdapterPool(copy.deepcopy(BASE), **more)
    for i in users:
        rank, alpha, targets, dropout = USERS[i]
        fill(pool, pool.allocate(rank, alpha=alpha, seed=i, targets=targets, dropout=dropout), i)
    return pool


def data(user, rows=3, tokens=5):
    generator = torch.Generator().manual_seed(100 + user)
    return torch.randn(rows, tokens, 24, generator=generator), torch.randn(rows, tokens, 16, generator=generator)


def train(pool, slots, x, dy):
    with pool.use_adapters(slots):
        y = pool.model(x)
        y.backward(dy)
    return y.detach()


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 1, 0, 2)])
@pytest.mark.parametrize("by", ["int", "sample", "token"])
def test_bits_alone_and_in_a_batch(order, by):
    """In whatever order the samples stand, and the adapters in the pool."""
    pool, users = pooled(order), (1, 0, 3, 2, 0)
    parts = [data(user, rows=1 + user) for user in users]
    x, dy = (torch.cat(t) for t in zip(*parts, strict=True))
    slots = [s for user, (some, _) in zip(users, parts, strict=True) for s in [order.index(user)] * len(some)]
    given = slots if by == "int" else torch.tensor(slots)
    y = train(pool, given if by != "token" else given[:, None].expand(-1, x.shape[1]), x, dy)
    for user in range(4):
        mine = [i for i, slot in enumerate(slots) if slot == order.index(user)]
        alone = pooled([user])
        expected = train(alone, [0] * len(mine), x[mine], dy[mine])
        assert torch.equal(y[mine], expected)
        for name, t in alone.gradients(0).items():
            assert torch.equal(pool.gradients(order.index(user))[name], t), name
            assert t.count_nonzero()


def test_formula_against_peft():
    """The adapters as PEFT has them, one after the other."""
    pool = pooled((0, 2))
    pool.model.eval()
    for slot, user in enumerate((0, 2)):
        rank, alpha, targets, _ = USERS[user]
        config = peft.LoraConfig(r=rank, lora_alpha=alpha or rank, target_modules=targets or ["q", "o"])
        model = peft.get_peft_model(copy.deepcopy(BASE), config)
        state = {f"base_model.model.{name}": t for name, t in pool.parameters(slot).items()}
        peft.set_peft_model_state_dict(model, state)
        x, dy = data(user)
        y = train(pool, [slot] * 3, x, dy)
        expected = model(x)
        expected.backward(dy)
        assert relative_l2(y, expected) <= tolerance(torch.float32)
        own = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        for name, t in pool.gradients(slot).items():
            grad = own[f"base_model.model.{name}".replace(".weight", ".default.weight")]
            assert relative_l2(t, grad) <= tolerance(torch.float32), name


def test_rows_without_an_adapter_and_calls_outside():
    pool, (x, _) = pooled((0, 3)), data(0)
    with torch.no_grad():
        outside = pool.model(x)
        with pool.use_adapters([1, -1, 0]):
            y = pool.model(x)
        with pool.use_adapters(torch.tensor([1, -1, 0])):
            assert torch.equal(pool.model(x), y)
    assert torch.equal(outside, BASE(x))
    assert relative_l2(y[1], outside[1]) <= tolerance(torch.float32)
    assert relative_l2(y[2], outside[2]) > 0.1


def test_checkpointing_runs_the_same_adapters_again():
    results = []
    for again in (False, True):
        pool, (x, dy) = pooled((1, 2)), data(1)
        with pool.use_adapters([1, 0, 1]):
            run = (lambda t, model=pool.model: checkpoint(model, t, use_reentrant=False)) if again else pool.model
            run(x.requires_grad_()).backward(dy)
        results.append([pool.gradients(slot) for slot in pool.slots])
    for first, second in zip(*results, strict=True):
        assert all(torch.equal(t, second[name]) for name, t in first.items())


def test_release_keeps_the_others_and_their_gradients():
    pool, (x, dy) = pooled((0, 1, 2)), data(1)
    train(pool, [0, 1, 2], x, dy)
    kept = [{name: t.clone() for name, t in pool.gradients(2).items()}, pool.parameters(2)["q.lora_A.weight"].clone()]
    pool.release(1)
    assert pool.slots == (0, 2)
    assert all(torch.equal(pool.gradients(2)[name], t) for name, t in kept[0].items())
    assert torch.equal(pool.parameters(2)["q.lora_A.weight"], kept[1])
    with pytest.raises(KeyError):
        pool.parameters(1)
    slot = pool.allocate(5, seed=9)
    assert slot == 1
    assert not any(t.any() for t in pool.gradients(1).values())
    fresh = AdapterPool(copy.deepcopy(BASE))
    fresh.allocate(5, seed=9)
    assert all(torch.equal(t, pool.parameters(1)[name]) for name, t in fresh.parameters(0).items())


def test_close_puts_the_model_back():
    pool = pooled((0,))
    assert isinstance(pool.model.q, LoRALinearMulti)
    pool.close()
    assert type(pool.model.q) is nn.Linear
    assert [n for n, _ in pool.model.named_parameters()] == [n for n, _ in BASE.named_parameters()]


def test_files_are_pefts(tmp_path):
    pool, (x, dy) = pooled((0, 1, 2)), data(2)
    y = train(pool, [2] * 3, x, dy)
    pool.export(2, tmp_path / "user")
    model = peft.PeftModel.from_pretrained(copy.deepcopy(BASE), tmp_path / "user")
    pool.model.eval()
    with torch.no_grad(), pool.use_adapters([2] * 3):
        assert relative_l2(pool.model(x), model(x)) <= tolerance(torch.float32)
    # and back, on a pool with another neighbour
    other = pooled((3,))
    slot = other.load(tmp_path / "user", seed=2)
    assert torch.equal(train(other, [slot] * 3, x, dy), y)
    # what PEFT writes
    model.save_pretrained(tmp_path / "peft")
    again = other.load(tmp_path / "peft")
    assert all(torch.equal(t, other.parameters(again)[name]) for name, t in other.parameters(slot).items())


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"use_dora": True}, "use_dora"), ({"bias": "all"}, "bias"), ({"rank_pattern": {"o": 5}}, "ranks")],
)
def test_files_of_other_adapters_are_refused(settings, message, tmp_path):
    config = peft.LoraConfig(r=4, target_modules=["q", "o"], **settings)
    peft.get_peft_model(copy.deepcopy(BASE), config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        AdapterPool(copy.deepcopy(BASE)).load(tmp_path)


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"rank": 0}, ValueError),
        ({"rank": 1.5}, TypeError),
        ({"rank": True}, TypeError),
        ({"rank": 2, "alpha": float("nan")}, ValueError),
        ({"rank": 2, "dropout": float("nan")}, ValueError),
        ({"rank": 2, "targets": "q"}, TypeError),
    ],
)
def test_settings_of_no_adapter(settings, error):
    pool = pooled((0,))
    with pytest.raises(error, match="must be"):
        pool.allocate(**settings)
    assert pool.slots == (0,)


def test_what_does_not_fit_is_refused():
    with pytest.raises(TypeError, match="must be a list of names"):
        AdapterPool(copy.deepcopy(BASE), "qo")
    with pytest.raises(ValueError, match="no linear layer"):
        AdapterPool(copy.deepcopy(BASE), ["k"])
    model = peft.get_peft_model(copy.deepcopy(BASE), peft.LoraConfig(r=2, target_modules=["q"]))
    with pytest.raises(ValueError, match="without its layers"):
        AdapterPool(model)
    assert AdapterPool(model.unload(), ["q"]).allocate(2) == 0
    pool = pooled((0,), targets=["q"])
    assert list(pool.layers) == ["q"]
    with pytest.raises(ValueError, match="no layer of the pool"):
        pool.allocate(2, targets=["o"])
    with pytest.raises(ValueError, match="rank=0"):
        pool.allocate(0)
    with pytest.raises(KeyError), pool.use_adapters([3]):
        pass
    with pytest.raises(ValueError, match="first sizes"), pool.use_adapters([0, 0]):
        pool.model(data(0)[0])


SETTINGS = (
    AdamParams(lr=1e-2, max_grad_norm=0.5),
    AdamParams(lr=3e-3, betas=(0.8, 0.99), eps=1e-8, weight_decay=0.1, grad_scale=0.25),
    AdamParams(lr=1e-3),
)


def test_optimizer_against_torch():
    """Slots that step at different times, and gradients that sum up meanwhile."""
    pool = pooled((0, 1, 2))
    optimizer = MultiAdamW(pool)
    leaves = [[t.clone().requires_grad_() for t in pool.parameters(slot).values()] for slot in pool.slots]
    theirs = [
        torch.optim.AdamW(some, lr=s.lr, betas=s.betas, eps=s.eps, weight_decay=s.weight_decay)
        for some, s in zip(leaves, SETTINGS, strict=True)
    ]
    x, dy = data(1)
    for due in ((0, 1, 2), (1,), (0, 2), (0, 1)):
        train(pool, [0, 1, 2], x, dy)
        for slot in due:
            for leaf, grad in zip(leaves[slot], pool.gradients(slot).values(), strict=True):
                leaf.grad = grad.clone() * SETTINGS[slot].grad_scale
            norm = nn.utils.clip_grad_norm_(leaves[slot], SETTINGS[slot].max_grad_norm or float("inf"))
            theirs[slot].step()
            result = optimizer.step({slot: SETTINGS[slot]})[slot] if slot == due[0] else None
            if result:
                assert result.grad_norm == pytest.approx(float(norm), rel=1e-5)
        optimizer.step({slot: SETTINGS[slot] for slot in due[1:]})
        for slot, some in enumerate(leaves):
            for leaf, t in zip(some, pool.parameters(slot).values(), strict=True):
                assert relative_l2(t, leaf) <= tolerance(torch.float32)
        assert all(any(t.any() for t in pool.gradients(slot).values()) is (slot not in due) for slot in pool.slots)


def test_a_step_does_not_depend_on_its_neighbours():
    """Bits; and a slot with a gradient that is not finite stops nobody, itself for one step."""
    every, x = {}, data(1)
    for users in ((0, 1, 2), (1,)):
        pool = pooled(users)
        optimizer, slots = MultiAdamW(pool), pool.slots
        for i in range(3):
            train(pool, [users.index(1)] * 3, *x)
            if len(users) > 1 and i == 1:
                pool.gradients(2)["o.lora_A.weight"][0, 0] = float("inf")
                before = {name: t.clone() for name, t in pool.parameters(2).items()}
            results = optimizer.step({slot: SETTINGS[users[slot]] for slot in slots})
            assert [slot for slot, result in results.items() if result.is_skipped] == (
                [2] if len(users) > 1 and i == 1 else []
            )
            if len(users) > 1 and i == 1:
                assert all(torch.equal(t, before[name]) for name, t in pool.parameters(2).items())
                assert results[2].number == 1
                assert not any(t.any() for t in pool.gradients(2).values())
        every[users] = {name: t.clone() for name, t in pool.parameters(users.index(1)).items()}
    first, second = every.values()
    assert all(torch.equal(t, second[name]) for name, t in first.items())


def test_a_slot_that_is_given_again_starts_anew():
    pool = pooled((0, 1))
    optimizer = MultiAdamW(pool)
    for again, number in itertools.zip_longest((False, False, True), (1, 2, 1)):
        if again:
            pool.release(1)
            pool.allocate(9, targets=["q"])
        train(pool, [1] * 3, *data(1))
        assert optimizer.step({1: SETTINGS[0]})[1].number == number
    optimizer.reset(1)
    train(pool, [1] * 3, *data(1))
    assert optimizer.step({1: SETTINGS[0]})[1].number == 1


def test_quantized_base():
    """A stand-in for a library's layer: torchao's and bitsandbytes' are adopted the same."""
    bnb = pytest.importorskip("bitsandbytes")
    model = Net()
    # packed by blocks of 64
    layer = bnb.nn.Linear4bit(64, 32, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    model.q, model.o = nn.Linear(24, 64), layer.to("cpu")
    model.norm = nn.LayerNorm(64)
    pool = AdapterPool(model)
    for rank in (3, 5):
        fill(pool, pool.allocate(rank), rank)
    x = torch.randn(4, 24)
    dy = torch.randn(4, 32)
    train(pool, [0, 0, 1, 1], x, dy)
    decoded = pool.layers["o"].weight.decoded(torch.float32).data
    for slot, rows in ((0, slice(2)), (1, slice(2, 4))):
        named = pool.parameters(slot)
        a, b = (named[f"o.lora_{letter}.weight"].clone().requires_grad_() for letter in "AB")
        q = model.q.base(x[rows]) + x[rows] @ named["q.lora_A.weight"].t() @ named["q.lora_B.weight"].t()
        h = torch.tanh(model.norm(q))
        (h @ decoded.t() + h @ a.t() @ b.t()).backward(dy[rows])
        assert relative_l2(pool.gradients(slot)["o.lora_A.weight"], a.grad) <= tolerance(torch.float32)
        assert relative_l2(pool.gradients(slot)["o.lora_B.weight"], b.grad) <= tolerance(torch.float32)
