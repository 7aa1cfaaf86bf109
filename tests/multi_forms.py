"""The forms of the operator of many adapters: siblings, a gated MLP, experts; their batches, and their formula in fp64.

A layer holds the factors of each adapter apart, so that a batch of some adapters has theirs.
"""

from dataclasses import dataclass, replace

import torch
from experts_reference import REFERENCE, REFERENCE_GATES
from multi_reference import mover

from lorafuse.functional import MultiProjection, lora_experts_multi, lora_gated_mlp_multi, lora_linears_multi
from lorafuse.operands import Weight
from lorafuse.philox import keep_mask, rescaled

__all__ = ["CHOICES", "EXPERTS", "FORMS", "Batch", "Layer", "make", "reference", "run"]

# "shared" are experts whose factors at H are one for all
FORMS = ("siblings", "gated", "experts", "shared")
EXPERTS, CHOICES = 3, 2


@dataclass
class Layer:
    """One layer; a and b are lists, of each adapter one."""

    w: torch.Tensor
    bias: torch.Tensor | None
    a: list
    b: list
    scales: list
    p: list | None
    seeds: torch.Tensor
    weight: Weight | None = None

    @property
    def ranks(self):
        return [t.shape[-2] for t in self.a]

    def pick(self, order):
        a, b, scales = ([some[g] for g in order] for some in (self.a, self.b, self.scales))
        p = self.p and [self.p[g] for g in order]
        return replace(self, a=a, b=b, scales=scales, p=p, seeds=self.seeds[list(order)])


@dataclass
class Batch:
    """`counts` are the rows of each adapter; dy has one tensor for each result."""

    form: str
    counts: list
    layers: list
    x: torch.Tensor
    dy: list
    index: torch.Tensor | None = None
    weight: torch.Tensor | None = None
    activation: str = "silu"
    interleaved: bool = False

    @property
    def offsets(self):
        return torch.tensor(self.counts).cumsum(0).int()

    def rows(self, g):
        first = sum(self.counts[:g])
        return slice(first, first + self.counts[g])

    def pick(self, order):
        """The batch of some adapters, in this order, and of no other rows."""

        def of_rows(t):
            return None if t is None else torch.cat([t[self.rows(g)] for g in order])

        return replace(
            self, counts=[self.counts[g] for g in order], layers=[layer.pick(order) for layer in self.layers],
            x=of_rows(self.x), dy=[of_rows(t) for t in self.dy], index=of_rows(self.index), weight=of_rows(self.weight),
        )  # fmt: skip


def make(
    form, counts, ranks, dtype=torch.float32, H=20, I=12, rest=3, bias=True, dropout=True, activation="silu",  # noqa: E741
    interleaved=False,
):  # fmt: skip
    """Random operands of which `rest` rows have no adapter; the last layer does not adapt every third adapter's."""
    T, L, is_stack = sum(counts) + rest, len(counts), form in ("experts", "shared")
    sizes = {"siblings": [(16, H), (8, H), (8, H)], "gated": [(I, H), (I, H), (H, I)]}.get(form, [(2 * I, H), (H, I)])
    groups, layers = (EXPERTS,) if is_stack else (), []

    def normal(*shape, fan=1):
        return (torch.randn(shape, dtype=torch.float64) / fan**0.5).to(dtype)

    for i, (N, K) in enumerate(sizes):
        of_a, of_b = ((), groups) if form == "shared" and i == 0 else (groups, groups)
        of_b = () if form == "shared" and i == 1 else of_b
        own = [0 if i == len(sizes) - 1 and g % 3 == 1 else R for g, R in enumerate(ranks)]
        layers.append(Layer(
            normal(*groups, N, K, fan=K), normal(*groups, N) if bias else None,
            [normal(*of_a, R, K, fan=K) for R in own], [normal(*of_b, N, R) for R in own],
            [(0.5, 1.0, 3.0)[(g + i) % 3] for g in range(L)],
            [(0.5, 0.0, 0.25)[(g + i) % 3] for g in range(L)] if dropout and not is_stack else None,
            torch.arange(L) * 12345678912345 + 3 + i,
        ))  # fmt: skip
    out = [N for N, _ in sizes] if form == "siblings" else [H]
    given = Batch(form, list(counts), layers, normal(T, H), [normal(T, N) for N in out], activation=activation,
                  interleaved=interleaved)  # fmt: skip
    if is_stack:
        # a sentinel is EXPERTS
        given.index = torch.rand(T, EXPERTS + 1).topk(CHOICES, 1).indices
        given.weight = torch.rand(T, CHOICES).to(dtype) + 0.1
    return given


def run(given, buffers=None, backward=True, **more):
    """`{"y0", …, "dx", "dweight", "da0": of each adapter, "db0", …}`, or the y alone; `buffers` are of each layer."""
    move = mover(more.get("backend"))
    x, projections, factors = move(given.x.clone()).requires_grad_(), [], []
    weight = None if given.weight is None else move(given.weight.clone()).requires_grad_()
    buffers = buffers and [tuple(map(move, some)) for some in buffers]
    for i, layer in enumerate(given.layers):
        a, b = move(torch.cat(layer.a, -2)).requires_grad_(), move(torch.cat(layer.b, -1)).requires_grad_()
        factors.append((a, b))
        projections.append(MultiProjection(
            move(layer.weight or layer.w), a, b, layer.ranks, layer.scales, move(layer.bias), layer.p,
            move(layer.seeds) if layer.p else None, buffers and buffers[i],
        ))  # fmt: skip
    offsets = move(given.offsets)
    if given.form == "siblings":
        ys = lora_linears_multi(x, offsets, projections, **more)
    elif given.form == "gated":
        ys = [lora_gated_mlp_multi(x, offsets, *projections, activation=given.activation, **more)]
    else:
        given_more = {"activation": given.activation, "is_concatenated": not given.interleaved} | more
        ys = [lora_experts_multi(x, offsets, move(given.index), weight, *projections, **given_more)]
    out = {f"y{i}": y.detach().cpu() for i, y in enumerate(ys)}
    if not backward:
        return out
    torch.autograd.backward(list(ys), list(map(move, given.dy)))
    out["dx"] = x.grad.cpu()
    if weight is not None:
        out["dweight"] = weight.grad.cpu()
    for i, (layer, (a, b)) in enumerate(zip(given.layers, factors, strict=True)):
        da, db = (t.cpu() for t in (buffers[i] if buffers else (a.grad, b.grad)))
        out[f"da{i}"], out[f"db{i}"] = list(da.split(layer.ranks, -2)), list(db.split(layer.ranks, -1))
    return out


def _layer(x, layer, a, b, g, e=None):
    """y of adapter g's rows, or of the base alone where g is None."""
    # factors that experts share are matrices
    w, a, b = (t if t is None or t.dim() == 2 else t[e] for t in (layer.w, a, b))
    y = x @ w.double().t()
    if layer.bias is not None:
        y = y + (layer.bias if e is None else layer.bias[e]).double()
    if g is None:
        return y
    scale, kept = layer.scales[g], x
    if layer.p and layer.p[g]:
        kept = x * keep_mask(layer.seeds[g : g + 1], layer.p[g], slice(0, x.shape[0]), x.shape[1])
        scale = rescaled(scale, layer.p[g])
    return y + scale * (kept @ a.t() @ b.t())


def _act(given, gate, up):
    if given.activation in REFERENCE_GATES:
        return REFERENCE_GATES[given.activation](gate, up)
    return REFERENCE[given.activation](gate) * up


def _of_rows(given, x, index, weight, factors, g):
    """The results for the rows of one adapter."""
    each = [(layer, *pair) for layer, pair in zip(given.layers, factors, strict=True)]
    if given.form == "siblings":
        return [_layer(x, *one, g) for one in each]
    if given.form == "gated":
        return [_layer(_act(given, _layer(x, *each[0], g), _layer(x, *each[1], g)), *each[2], g)]
    out = torch.zeros_like(x)
    for e in range(EXPERTS):
        token, choice = (index == e).nonzero(as_tuple=True)
        u = _layer(x[token], *each[0], g, e)
        gate, up = (u[:, ::2], u[:, 1::2]) if given.interleaved else u.chunk(2, 1)
        y = _layer(_act(given, gate, up), *each[1], g, e)
        out = out.index_add(0, token, y * weight[token, choice].unsqueeze(1))
    return [out]


def _leaf(t):
    return t.double().clone().requires_grad_()


def reference(given):
    """The same as `run` in fp64, one adapter after the other."""
    L, last = len(given.counts), sum(given.counts)
    x = _leaf(given.x)
    weight = None if given.weight is None else _leaf(given.weight)
    factors = [[tuple(_leaf(t[g]) for t in (layer.a, layer.b)) for layer in given.layers] for g in range(L)]
    parts = []
    for g in [*range(L), None]:
        some = slice(last, None) if g is None else given.rows(g)
        rows = [None if t is None else t[some] for t in (x, given.index, weight)]
        parts.append(_of_rows(given, *rows, [(None, None)] * len(given.layers) if g is None else factors[g], g))
    ys = [torch.cat(some) for some in zip(*parts, strict=True)]
    torch.autograd.backward(ys, [dy.double() for dy in given.dy])
    out = {f"y{i}": y.detach() for i, y in enumerate(ys)} | {"dx": x.grad}
    if weight is not None:
        out["dweight"] = weight.grad
    for i in range(len(given.layers)):
        for j, name in enumerate(("da", "db")):
            leaves = [factors[g][i][j] for g in range(L)]
            out[f"{name}{i}"] = [torch.zeros_like(t) if t.grad is None else t.grad for t in leaves]
    return out
