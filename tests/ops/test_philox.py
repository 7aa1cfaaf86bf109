"""The dropout mask (T1): known answers, the definition word by word, one mask in every direction."""

import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from lorafuse import philox
from lorafuse.functional import lora_linear
from lorafuse.philox import draw_seed, keep_mask, philox_4x32, row_chunks

_LO32 = 2**32 - 1
# Random123 1.14.0, tests/kat_vectors, "philox4x32 10": counter, key, answer
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((_LO32,) * 4, (_LO32,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def philox_in_integers(counter, key):
    """Philox 4x32-10 in Python integers, as the paper writes it."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & _LO32, (p0 >> 32) ^ c3 ^ k1, p0 & _LO32
        k0, k1 = (k0 + 0x9E3779B9) & _LO32, (k1 + 0xBB67AE85) & _LO32
    return c0, c1, c2, c3


def kept(seed, p, row, column, columns):
    """One element of the mask, by the definition in `lorafuse.philox`."""
    i, seed = row * columns + column, seed % 2**64
    words = philox_in_integers(((i // 4) & _LO32, i // 4 >> 32, 0, 0), (seed & _LO32, seed >> 32))
    return words[i % 4] >= math.floor(p * 2**32)


def seed_of(value):
    return torch.tensor([value], dtype=torch.int64)


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_known_answers(counter, key, answer):
    words = philox_4x32(tuple(map(seed_of, counter)), tuple(map(seed_of, key)))
    assert tuple(word.item() for word in words) == answer
    assert philox_in_integers(counter, key) == answer


@pytest.mark.parametrize("seed", [0, 7, 2**32, 2**40 + 7, 2**63 - 1, -1, -(2**63)])
@pytest.mark.parametrize(
    ("columns", "rows"),
    [(4, slice(0, 9)), (67, slice(3, 6)), (1, slice(5, 22)), (6, slice(2**33, 2**33 + 3))],
)
def test_mask_is_the_definition(seed, columns, rows):
    expected = [[kept(seed, 0.4, m, k, columns) for k in range(columns)] for m in range(rows.start, rows.stop)]
    assert keep_mask(seed_of(seed), 0.4, rows, columns).tolist() == expected


@pytest.mark.parametrize("columns", [1, 3, 4, 64, 67, 130])
def test_rows_do_not_depend_on_their_neighbours(columns):
    whole = keep_mask(seed_of(5), 0.3, slice(0, 40), columns)
    for start, stop in ((0, 1), (1, 2), (7, 19), (13, 40), (40, 40), (0, 0)):
        assert torch.equal(keep_mask(seed_of(5), 0.3, slice(start, stop), columns), whole[start:stop])


@pytest.mark.parametrize(("rows", "columns"), [(0, 5), (1, 0), (1, 1 << 20), (1000, 777), (3, 1 << 18)])
def test_chunks_cover_every_row_once(rows, columns):
    chunks = row_chunks(rows, columns, torch.device("meta"))
    assert [row for chunk in chunks for row in range(rows)[chunk]] == list(range(rows))


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_keep_rate(p):
    rows, columns = 1024, 512
    mask = keep_mask(seed_of(11), p, slice(0, rows), columns).double()
    sigma = math.sqrt(p * (1 - p))
    assert abs(mask.mean().item() - (1 - p)) < 5 * sigma / math.sqrt(rows * columns)
    # no word of a counter, row or column is biased; the largest of 512 deviations stays under 5 sigma
    assert (mask.view(-1, 4).mean(0) - (1 - p)).abs().max() < 5 * sigma / math.sqrt(rows * columns / 4)
    assert (mask.mean(0) - (1 - p)).abs().max() < 5 * sigma / math.sqrt(rows)
    assert (mask.mean(1) - (1 - p)).abs().max() < 5 * sigma / math.sqrt(columns)


def test_masks_of_different_seeds_are_independent():
    seeds = [0, 1, 2**32, 2**33, 2**32 + 1, -1]
    masks = [keep_mask(seed_of(seed), 0.5, slice(0, 64), 256) for seed in seeds]
    for i, one in enumerate(masks):
        for other in masks[:i]:
            assert abs((one == other).double().mean().item() - 0.5) < 5 * 0.5 / math.sqrt(64 * 256)


def test_p_at_both_ends():
    assert keep_mask(seed_of(3), 0.0, slice(0, 50), 33).all()
    assert not keep_mask(seed_of(3), 1.0, slice(0, 50), 33).any()


def identity_adapter(columns):
    """w, a, b with which y is `drop(x) · scale`, so that a mask can be read from y and from dx."""
    eye = torch.eye(columns, dtype=torch.float64)
    return torch.zeros_like(eye), eye.clone().requires_grad_(), eye.clone().requires_grad_()


def masks_of_a_call(rows, columns, p, seed):
    """The masks that forward, dx and da applied, each `[rows, columns]`."""
    w, a, b = identity_adapter(columns)
    x = torch.ones(rows, columns, dtype=torch.float64, requires_grad=True)
    y = lora_linear(x, w, a, b, dropout_p=p, seed=seed)
    dx, da = torch.autograd.grad(y, (x, a), torch.ones_like(y), retain_graph=True)
    # with dy the i-th row of ones alone, every row of da is row i of drop(x)
    rows_of_dy = torch.eye(rows, dtype=y.dtype).unsqueeze(2).expand(rows, rows, columns)
    per_row = [torch.autograd.grad(y, a, dy, retain_graph=True)[0] for dy in rows_of_dy]
    assert all((grad == grad[0]).all() for grad in per_row)
    assert torch.allclose(da, sum(per_row), rtol=1e-12)
    return y != 0, dx != 0, torch.stack([grad[0] for grad in per_row]) != 0


@pytest.mark.parametrize("columns", [1, 5, 8, 67])
@pytest.mark.parametrize("seed", [0, 2**40 + 7, -3])
def test_one_mask_in_forward_and_backward(columns, seed):
    expected = keep_mask(seed_of(seed), 0.4, slice(0, 9), columns)
    for mask in masks_of_a_call(9, columns, 0.4, seed):
        assert torch.equal(mask, expected)


@pytest.mark.parametrize("chunk", [1, 100, 67 * 4])
def test_results_do_not_depend_on_chunks(monkeypatch, chunk):
    whole = masks_of_a_call(9, 67, 0.4, 5)
    monkeypatch.setitem(philox.CHUNK, "cpu", chunk)
    assert len(row_chunks(9, 67, torch.device("cpu"))) > 1
    assert all(map(torch.equal, masks_of_a_call(9, 67, 0.4, 5), whole))


def test_a_tensor_seed_is_an_int_seed():
    assert all(map(torch.equal, masks_of_a_call(4, 6, 0.5, seed_of(9)), masks_of_a_call(4, 6, 0.5, 9)))


def test_kept_elements_are_rescaled():
    w, a, b = identity_adapter(8)
    x = torch.ones(16, 8, dtype=torch.float64)
    y = lora_linear(x, w, a, b, scale=3.0, dropout_p=0.25, seed=1)
    assert set(y.flatten().tolist()) == {0.0, 4.0}


def test_dropping_everything_leaves_the_base():
    x, w, a, b = torch.randn(5, 8), torch.randn(6, 8), torch.randn(2, 8), torch.randn(6, 2)
    a.requires_grad_()
    b.requires_grad_()
    y = lora_linear(x, w, a, b, dropout_p=1.0)
    y.sum().backward()
    assert torch.equal(y, torch.nn.functional.linear(x, w))
    assert not a.grad.any()
    assert not b.grad.any()


class TestDefaultSeed:
    def call(self, p=0.5, seed=None):
        w, a, b = identity_adapter(16)
        return lora_linear(torch.ones(32, 16, dtype=torch.float64), w, a, b, dropout_p=p, seed=seed).detach()

    def test_follows_the_default_generator(self):
        torch.manual_seed(3)
        one, two = self.call(), self.call()
        assert not torch.equal(one, two)
        torch.manual_seed(3)
        assert torch.equal(self.call(), one)
        assert torch.equal(self.call(), two)
        torch.manual_seed(4)
        assert not torch.equal(self.call(), one)

    @pytest.mark.parametrize(("p", "seed"), [(0.0, None), (0.5, 7)])
    def test_draws_only_when_it_must(self, p, seed):
        before = torch.get_rng_state()
        self.call(p, seed)
        assert torch.equal(torch.get_rng_state(), before)

    def test_is_drawn_as_documented(self):
        torch.manual_seed(3)
        seed = draw_seed(torch.device("cpu"))
        torch.manual_seed(3)
        assert torch.equal(self.call(), self.call(seed=seed))
        assert seed.dtype is torch.int64
        assert seed.shape == (1,)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("seed", [None, 5])
def test_checkpointing_replays_the_mask(use_reentrant, seed):
    x, w = (
        torch.randn(9, 16, dtype=torch.float64, requires_grad=True),
        torch.randn(12, 16, dtype=torch.float64),
    )
    a, b = torch.randn(4, 16, dtype=torch.float64), torch.randn(12, 4, dtype=torch.float64)
    operands = x, a.requires_grad_(), b.requires_grad_()

    def block(x):
        y = lora_linear(x, w, a, b, scale=0.7, dropout_p=0.5, seed=seed)
        # a draw of its own after the operator's: the recomputation must keep the order
        return torch.nn.functional.dropout(y, 0.3)

    def run(function):
        torch.manual_seed(8)
        for operand in operands:
            operand.grad = None
        y = function(x)
        # reentrant checkpointing supports .backward() only
        y.square().sum().backward()
        return [y.detach(), *(operand.grad for operand in operands)]

    plain = run(block)
    saved = run(lambda x: checkpoint(block, x, use_reentrant=use_reentrant))
    assert all(map(torch.equal, saved, plain))
    assert all(grad.any() for grad in plain)
