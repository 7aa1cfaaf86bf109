"""A whole training step of a patched model in a CUDA graph: on a GPU the graph itself, elsewhere that nothing reads
from the device, which would end its capture.
"""

import copy

import pytest
import torch
from tiny_models import adapted, run, token_ids
from torch.utils._python_dispatch import TorchDispatchMode

import lorafuse

pytestmark = pytest.mark.usefixtures("small_groups")

ATEN = torch.ops.aten
READS = {ATEN._local_scalar_dense.default, ATEN.nonzero.default, ATEN.is_nonzero.default, ATEN.equal.default}


class Reads(TorchDispatchMode):
    """The operators of a block whose results the host needs."""

    def __init__(self):
        super().__init__()
        self.seen, self.calls = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls += 1
        if function in READS or torch.Tag.data_dependent_output in function.tags:
            self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("groups", [True, False], ids=["groups", "layers"])
def test_a_step_reads_nothing_on_the_host(dropout, groups):
    model = adapted(lora_dropout=dropout).train()
    lorafuse.patch(model, groups=groups)
    # the first call of siblings is the one that learns them
    run(model)
    with Reads() as reads:
        model(input_ids=token_ids(), labels=token_ids()).loss.backward()
    assert reads.calls > 100
    assert reads.seen == []


def test_a_read_is_seen():
    with Reads() as reads:
        torch.ones(2).sum().item()
        torch.ones(2).nonzero()
    assert reads.seen == ["aten._local_scalar_dense.default", "aten.nonzero.default"]


@pytest.mark.gpu
@pytest.mark.no_poison
@pytest.mark.parametrize("groups", [True, False], ids=["groups", "layers"])
def test_a_graph_trains_as_calls_do(groups):
    stock = adapted().train().cuda()
    trained = {}
    for how in ("calls", "graph"):
        model = copy.deepcopy(stock)
        lorafuse.patch(model, groups=groups)
        train(model, how == "graph")
        trained[how] = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    for name, parameter in trained["calls"].items():
        assert not torch.equal(parameter, dict(stock.named_parameters())[name]), name
        torch.testing.assert_close(trained["graph"][name], parameter, rtol=1e-4, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.no_poison
def test_every_replay_draws_masks_of_its_own():
    model = adapted(lora_dropout=0.5).train().cuda()
    lorafuse.patch(model)
    losses = train(model, True, rate=0.0, same=True)
    assert len({loss.item() for loss in losses}) == len(losses)


def train(model, as_graph, rate=1e-2, same=False, warm_up=3, steps=4):
    """The losses of `steps` steps after `warm_up`, each over ids of its own unless they are the `same`."""
    ids = token_ids().cuda()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, fused=True, capturable=True)

    def step():
        optimizer.zero_grad(set_to_none=True)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        return loss.detach()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(warm_up):
            step()
    torch.cuda.current_stream().wait_stream(side)
    if as_graph:
        graph = torch.cuda.CUDAGraph()
        # nothing runs while it is captured
        with torch.cuda.graph(graph):
            loss = step()
    losses = []
    for i in range(steps):
        if not same:
            ids.copy_(token_ids(seed=10 + i))
        if as_graph:
            graph.replay()
            losses.append(loss.clone())
        else:
            losses.append(step())
    return losses
