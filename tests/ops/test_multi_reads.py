"""Many adapters never make the host wait (T1): the operators' own Python runs where every read of a value is counted.

Kernels are left out, whose results are not what is looked at; those that say where groups end run in the interpreter.
"""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from multi_forms import FORMS, make, run
from multi_reference import GPU, batch, count_reads
from multi_reference import run as run_linear
from torch import nn
from torch.library import get_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaModel

import lorafuse
from lorafuse.adapters import AdapterPool
from lorafuse.backends import triton as triton_backend
from lorafuse.kernels import gates
from lorafuse.kernels import multi as kernels
from lorafuse.ops import multi, multi_experts

aten = torch.ops.aten
# where the tests run
KEY = GPU.type.upper()
KEYS = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, KEY))
# what copies a value to the host, or has sizes that depend on values
READS = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.bincount, aten._unique2}
READS |= {aten.unique_consecutive, aten.unique_dim, aten.is_nonzero, aten.item, aten.repeat_interleave}


class Counting(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        masks = args[1] if op.overloadpacket in (aten.index, aten.index_put_, aten.index_put) else ()
        if op.overloadpacket in READS or any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in masks):
            self.seen.append(str(op))
        if op.namespace != "lorafuse":
            return op(*args, **(kwargs or {}))
        # what our operators do is seen too
        with self:
            return get_kernel(op, KEY).call_boxed(KEYS, *args)


class _Kernel:
    def __getitem__(self, grid):
        return lambda *_, **__: None


@pytest.fixture
def reads(monkeypatch):
    """Counts the reads of a block: in Python, and of torch's operators, inside ours too."""
    for module in (kernels, gates):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, _Kernel())
    for module in (multi_experts, triton_backend):
        # of a CPU's values, which is where it reads them
        monkeypatch.setattr(module, "refuse_negative", lambda *_: None)

    @contextlib.contextmanager
    def counting(allowed=()):
        with monkeypatch.context() as patch, Counting() as mode:
            names = count_reads(patch)
            yield
        every = [name for name in (*names, *mode.seen) if name not in allowed]
        assert not every, every

    return counting


def test_a_read_is_counted(reads, monkeypatch):
    for read in (torch.Tensor.item, torch.Tensor.nonzero, lambda t: t[t > 0], bool):
        with pytest.raises(AssertionError), reads():
            read(torch.ones(1))
    given, rows = make("siblings", [1, 2], [2, 2]), multi.rows_by_adapter
    with pytest.raises(AssertionError, match="tolist"), reads():
        run(given, backend="eager")
    # within an operator
    monkeypatch.setattr(
        multi, "rows_by_adapter", lambda offsets, *_: torch.nonzero(offsets) is None or rows(offsets, *_)
    )
    with pytest.raises(AssertionError, match="aten.nonzero"), reads():
        run(given, backend="triton")


@pytest.mark.parametrize("is_training", [False, True])
@pytest.mark.parametrize("form", ["linear", *FORMS])
def test_forms(form, is_training, reads):
    def given(counts):
        made = batch(counts, [1, 3, 40], torch.float32) if form == "linear" else make(form, counts, [1, 3, 40])
        if not is_training:
            made.p = None
            for layer in getattr(made, "layers", ()):
                layer.p = None
        return made

    call = run_linear if form == "linear" else run
    # what is copied to the device once, for ranks, scales and probabilities
    call(given([4, 0, 9]), backend="triton")
    with reads():
        call(given([1, 7, 0]), backend="triton")


@pytest.mark.parametrize("slots", [[0, 1, -1], torch.tensor([1, -1, 0]), torch.randint(-1, 2, (3, 5))])
def test_a_pool(slots, reads):
    """A model's layers, siblings and gated MLP, with dropout; a list of slots is a copy to the device, which waits for
    nothing from pinned memory.
    """
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1}
    pool = AdapterPool(LlamaModel(LlamaConfig(vocab_size=8, **sizes)).to(GPU))
    for rank in (2, 5):
        pool.allocate(rank, dropout=0.25)
    attention, mlp = pool.model.layers[0].self_attn, pool.model.layers[0].mlp
    x = torch.randn(3, 5, 16, device=GPU, requires_grad=True)
    slots = slots.to(GPU) if isinstance(slots, torch.Tensor) else slots

    def step():
        with pool.use_adapters(slots):
            y = mlp(x)
            for layer in (attention.q_proj, attention.k_proj, attention.v_proj):
                y = y + layer(x)
            attention.o_proj(y).sum().backward()

    with lorafuse.use_backend("triton"):
        step()
        with reads({"to in lorafuse.adapters.pool", "tensor in lorafuse.adapters.pool"}):
            step()


def test_gpus_run_triton(monkeypatch):
    """Its kernels are those for many adapters, whatever the cost model would choose for a layer of one."""
    monkeypatch.setattr("lorafuse.ops.multi_layers.candidates", lambda kind: ("cuda", "triton", "eager"))
    chosen = []

    def choose(backend, *_):
        chosen.append(backend)
        return SimpleNamespace(name=backend), None

    monkeypatch.setattr("lorafuse.ops.multi_layers.choose", choose)
    monkeypatch.setattr("lorafuse.ops.multi_layers.adapters_on", lambda *_: None)
    layer = nn.Linear(4, 4)
    settings = [2], [1.0], [0.0], ["dense"], [0], False, True, "auto", False
    arguments = [layer.weight], [None], [layer.weight[:2]], [layer.weight[:, :2]], [None], [], *settings
    for dtype, expected in ((torch.bfloat16, "triton"), (torch.float64, "eager")):
        multi.layers_of(torch.empty(3, 4, dtype=dtype, device="meta"), False, arguments)
        assert chosen.pop() == expected
