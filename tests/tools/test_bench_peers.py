"""Baselines of others: each way in which one can fail is reported and not counted, and ours are judged as before."""

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import fake_peers
import pytest
import torch
import warm_python
from transformers.models.llama import modeling_llama

from lorafuse.bench import group, peaks, plugins
from lorafuse.bench.group import Group, Mlp
from lorafuse.bench.layer import DecoderLayer
from lorafuse.bench.linear import Linear
from lorafuse.bench.moe import Experts
from lorafuse.bench.problem import wrong
from lorafuse.bench.remote import RemoteRunner
from lorafuse.bench.transformer import Given, Model
from lorafuse.bench.transformer_cost import Sizes
from lorafuse.cli import main

SMALL = ["bench", "linear", "--shape", "24,40", "--m", "16", "--rank", "3", "--rounds", "3", "--device", "cpu"]
SMALL += ["--dtype", "float32"]
PROBLEM = Linear("tiny", "float32", 16, 24, 40, 3)
CPU = torch.device("cpu")

# the right result by plain autograd, after `before`; `y` and the gradients' tensors can be spoiled by `after`
PEER = """
import os, signal, subprocess, sys, time
import torch
LABEL = "fake"
REQUIRES = ({requires})
ISOLATED = {isolated}
calls = 0

def linear(given):
    {before}
    a, b = given.a.clone().requires_grad_(), given.b.clone().requires_grad_()
    wanted = {{"da": a, "db": b}}

    def call(x):
        global calls
        calls += 1
        y = x @ given.w.t() + 2.0 * (x @ a.t()) @ b.t()
        {during}
        return y

    {after}
    return call, wanted
"""


@pytest.fixture(autouse=True)
def _no_peaks(monkeypatch):
    """Measuring the machine's peaks takes seconds; no test here reads them."""
    monkeypatch.setattr(peaks, "matmul_flops", lambda dtype, device: 1e11)
    monkeypatch.setattr(peaks, "copy_bytes", lambda device: 1e10)


@pytest.fixture(autouse=True)
def _warm(monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", warm_python.Popen)


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "baselines"
    place.mkdir()
    shutil.copy(plugins.folder() / "frozen.py", place)
    return place


def write(folder, name, before="pass", during="pass", after="pass", isolated=False, requires='"json",'):
    source = PEER.format(before=before, during=during, after=after, isolated=isolated, requires=requires)
    (folder / f"{name}.py").write_text(source)


def bench(folder, *options):
    """Exit status, and the result of the case where there is one."""
    file = folder.parent / "r.json"
    status = main([*SMALL, "--baselines", str(folder), "--json", str(file), *options])
    results = json.loads(file.read_text())["results"]
    return status, results[0] if results else None


LOCAL = {
    "raises": ({"before": "raise RuntimeError('no such kernel')"}, "RuntimeError: no such kernel"),
    # the gate calls it twice, and it is run once before the rounds
    "raises-later": ({"during": "if calls == 5: raise RuntimeError('tired')"}, "RuntimeError: tired"),
    "wrong": ({"during": "y = y * 1.01"}, "y is wrong by 1.00e-02"),
    "wrong-gradient": ({"during": "if y.requires_grad: y.register_hook(lambda dy: 2 * dy)"}, "dx is wrong by 1.00e+00"),
    "nan": ({"during": "y = y * float('nan')"}, "y is wrong by inf"),
    "missing": ({"after": "del wanted['db']"}, "it does not give db"),
    "unused": (
        {"during": "y = x @ given.w.t() + 2.0 * (x @ a.t()) @ b.detach().t()"},
        "not have been used in the graph",
    ),
    "misshapen": ({"after": "wanted['da'] = b"}, "da is [24, 3], it must be [3, 40]"),
}


def test_what_a_peer_does_wrong_is_reported_and_not_counted(folder, capsys):
    for name, (parts, _) in LOCAL.items():
        write(folder, name.replace("-", "_"), **parts)
    write(folder, "good")
    status, result = bench(folder)
    assert status == 0
    assert result["variants"].keys() == {"frozen", "good"}
    assert result["failed"].keys() == LOCAL.keys()
    for name, (_, reason) in LOCAL.items():
        assert reason in result["failed"][name]
    # the others lose no round to the one that raised
    assert result["rounds"] == 3
    printed = " ".join(capsys.readouterr().out.split())
    assert "raises failed and is not counted: RuntimeError: no such kernel" in printed


def test_a_peer_that_writes_into_its_input_is_wrong(folder):
    # its first call is right: what it saved is a copy
    own_x = "z = x.clone(); y = z @ given.w.t() + 2.0 * (z @ a.t()) @ b.t()"
    write(folder, "destroys", during=f"{own_x}; y.register_hook(lambda dy: [x.data.zero_(), None][1])")
    _, result = bench(folder)
    assert "y is wrong" in result["failed"]["destroys"]


def test_an_own_baseline_that_is_wrong_stops_the_run(folder, capsys):
    write(folder, "own", during="y = y * 1.01", requires="")
    status, result = bench(folder)
    assert (status, result) == (1, None)
    printed = capsys.readouterr().out
    assert "own: y is wrong" in printed
    assert "LoRA tax" not in printed


def test_an_own_baseline_that_raises_stops_the_run(folder):
    write(folder, "own", during="if calls == 5: raise RuntimeError('ours')", requires="")
    with pytest.raises(RuntimeError, match="ours"):
        bench(folder)


def test_processes_of_peers_die_in_their_own_ways(folder, monkeypatch):
    noise = "print('{\"result\": 1}'); os.system('echo noise'); assert sys.stdin.read() == ''"
    write(folder, "good", before=noise, isolated=True)
    write(folder, "local")
    write(folder, "exits", before="print('cannot go on', file=sys.stderr); os._exit(3)", isolated=True)
    killed = "if calls == 5: os.kill(os.getpid(), signal.SIGSEGV)"
    write(folder, "segfault", during=killed, isolated=True)
    # a path that means something else where the processes run
    monkeypatch.chdir(folder.parent)
    status, result = bench(Path(folder.name))
    assert status == 0
    assert result["failed"] == {
        "exits": "its process ended with status 3: cannot go on",
        "segfault": "its process was ended by SIGSEGV",
    }
    assert result["variants"].keys() == {"frozen", "good", "local"}
    assert shape(result["variants"]["good"]) == shape(result["variants"]["local"])
    assert result["variants"]["good"]["total"]["median"] > 0


def shape(figures):
    """Names and types of nested figures."""
    return {k: shape(v) for k, v in figures.items()} if isinstance(figures, dict) else type(figures)


def test_a_process_that_runs_out_of_memory_says_so(folder):
    # on a CPU torch raises a plain RuntimeError for that
    write(folder, "greedy", before="torch.empty(2**49)", isolated=True)
    _, result = bench(folder)
    assert result["failed"]["greedy"].startswith("out of memory: RuntimeError: ")


def test_a_file_is_loaded_once_until_it_changes(folder):
    write(folder, "good")
    file, loads = folder / "good.py", folder.parent / "loads"
    file.write_text(f"{file.read_text()}\nwith open({str(loads)!r}, 'a') as log:\n    log.write('.')\n")
    bench(folder, "--m", "8", "16")
    assert loads.read_text() == "."
    os.utime(file, ns=(0, 0))
    bench(folder)
    assert loads.read_text() == ".."


def test_a_peer_that_hangs_is_given_up(folder):
    write(folder, "hangs", before="time.sleep(600)", isolated=True)
    _, result = bench(folder, "--timeout", "4")
    assert result["failed"]["hangs"].startswith("no answer in 4 seconds")


def test_a_peers_process_ends_with_ours(folder):
    write(folder, "hangs", isolated=True, before="""child = subprocess.Popen(['sleep', '600'])
    with open(os.environ["SAID"], "w") as file: file.write(f"{os.getpid()} {child.pid}\\n")
    time.sleep(600)""")  # fmt: skip
    variants = {signal.SIGINT: 130, signal.SIGKILL: -signal.SIGKILL}
    message = {how: folder.parent / how.name for how in variants}
    ours = {
        how: warm_python.Popen(
            [sys.executable, "-m", "lorafuse", *SMALL, "--baselines", str(folder)],
            has_children=True,
            cwd=Path(__file__).parents[2],
            env={**os.environ, "SAID": str(message[how])},
            stdout=subprocess.DEVNULL,
        )
        for how in variants
    }
    for how, status in variants.items():
        wait(lambda file=message[how]: file.exists() and file.read_text().endswith("\n"))
        peer, child = map(int, message[how].read_text().split())
        assert alive(peer)
        try:
            ours[how].send_signal(how)
            assert ours[how].wait(30) == status
            wait(lambda pid=peer: not alive(pid))
            # when ours is killed nothing of it is left to end what the peer started
            assert how is signal.SIGKILL or not alive(child)
        finally:
            if alive(child):
                os.kill(child, signal.SIGKILL)


def alive(pid):
    """Whether a process runs; one that nobody has waited for yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait(until, seconds=120):
    end = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


@pytest.fixture
def fakes(tmp_path, monkeypatch):
    """Fake peers, importable here and in the processes that are started."""
    fake_peers.install(tmp_path / "fakes")
    monkeypatch.syspath_prepend(tmp_path / "fakes")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "fakes"), prepend=os.pathsep)
    yield tmp_path / "fakes"
    for name in [name for name in sys.modules if name.partition(".")[0] in ("unsloth", "axolotl")]:
        del sys.modules[name]


def one(name, kind, device=CPU):
    (actual,) = plugins.load_file(plugins.folder() / f"{name}.py", kind, device)
    return actual


DENSE = {
    "linear": PROBLEM,
    "qkv": Group("qkv", "float32", 16, (24, 8, 8), 40, 3),
    "gate_up": Group("gate_up", "float32", 16, (24, 24), 40, 3),
    "mlp": Mlp("mlp", "float32", 16, 40, 24, 3),
    "layer": DecoderLayer("layer", "float32", 16, 40, 48, 16, 8, 24, 3),
}


@pytest.mark.parametrize("name", ["unsloth", "axolotl"])
@pytest.mark.parametrize("problem", DENSE.values(), ids=DENSE)
def test_a_peer_is_called_with_the_right_arguments(fakes, name, problem):
    baseline, given = one(name, problem.kind), problem.inputs(CPU)
    variant = baseline.variant(problem, given)
    # adapters as their users have them
    assert {t.dtype for key, t in variant.leaves.items() if key != "dx"} == {torch.float32}
    assert wrong(variant, problem.references(given)[baseline.trains], problem.shaped) == ""


EXPERTS = Experts("e", "float32", 9, 4, 2, 16, 8, 3, "zipf")


def test_scattermoe_runs_in_its_process(fakes, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", warm_python.PeftPopen)
    runner = RemoteRunner("scattermoe", EXPERTS, one("axolotl_scattermoe", "moe"), CPU)
    try:
        assert runner.wrong == ""
        assert min(runner.once()) > 0
    finally:
        runner.close()


def test_scattermoe_that_leaves_peft_alone_is_refused(fakes):
    fake_peers.install(fakes, knows_peft=False)
    with pytest.raises(RuntimeError, match="did not patch PEFT"):
        one("axolotl_scattermoe", "moe").module.experts(EXPERTS.inputs(CPU))


@pytest.mark.parametrize(("name", "kind"), [("unsloth", "group"), ("axolotl", "linear"), ("axolotl_scattermoe", "moe")])
def test_a_peer_says_why_it_cannot_run(fakes, name, kind, monkeypatch):
    assert (one(name, kind).absent, one(name, kind, torch.device("cuda")).absent) == ("needs a GPU", "")
    assert one(name, kind).isolated
    assert one(name, kind).peer
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    package = name.partition("_")[0]
    assert one(name, kind, torch.device("cuda")).absent == f"{package} not installed"


class TestLiger:
    """Its kernels need a GPU: here what stands in the model is looked at, and nothing runs."""

    BASELINES = {one.name: one for one in plugins.load_file(plugins.folder() / "liger.py", "model", CPU)}

    def test_what_there_is(self):
        assert self.BASELINES.keys() == {"liger-peft", "liger-lorafuse", "liger-lorafuse-mlp"}
        assert all(one.isolated and one.peer and one.absent == "needs a GPU" for one in self.BASELINES.values())

    @pytest.mark.parametrize("name", BASELINES)
    def test_a_model(self, name, monkeypatch):
        pytest.importorskip("liger_kernel")
        # Liger replaces them in the module, an instance given or not; restored after the test
        for replaced in ("apply_rotary_pos_emb", "LlamaRMSNorm", "LlamaMLP"):
            monkeypatch.setattr(modeling_llama, replaced, getattr(modeling_llama, replaced))
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
        tiny = Model("tiny", "LlamaConfig", sizes | {"num_hidden_layers": 1, "vocab_size": 64})
        given = Given(tiny, Sizes.of(tiny.config()), torch.float32, CPU, 4, 8, False)
        one = self.BASELINES[name]
        whole, facts = one.module.model(given, **one.options)
        base = whole.get_base_model()
        assert "liger" in base.forward.__func__.__module__
        assert "Liger" in str(base.model.norm)
        assert ("forward" in vars(base.model.layers[0].mlp)) == (name != "liger-lorafuse-mlp")
        assert (facts["autocast"], facts.get("patched", 0)) == (True, 0 if name == "liger-peft" else 7)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["frozen", "full", "peft", "peft_half", "addmm", "lorafuse"])
def test_own_baselines_run_the_mlp(name, dtype):
    problem = Mlp("mlp", dtype, 16, 40, 24, 3)
    given = problem.inputs(CPU)
    baseline = next(iter(plugins.load_file(plugins.folder() / f"{name}.py", "mlp", CPU)))
    variant = baseline.variant(problem, given)
    assert wrong(variant, problem.references(given)[baseline.trains], problem.shaped) == ""


def test_mlp_is_a_case_of_group():
    args = argparse.Namespace(case=["smollm2-135m.mlp"], all=False, shape=None, m=[64], rank=[4], dtype="float32")
    (problem,) = group.cases(args)
    assert problem == Mlp("smollm2-135m.mlp", "float32", 64, 576, 1536, 4)
    # 3 products each way, and two thin ones for each layer forward
    assert problem.work("adapters")["forward"].flops == 2 * 64 * (3 * 576 * 1536 + 3 * 4 * (576 + 1536))
    assert problem.floors()["tax"] == pytest.approx(3 * 4 * (576 + 1536) / (2 * 576 * 1536))


def test_an_own_baseline_says_what_layers_it_does_not_take(folder):
    refuses = "from lorafuse.bench.result import Failed; raise Failed('N is 24, it must be a multiple of 32')"
    write(folder, "own", before=refuses, requires="")
    status, result = bench(folder)
    assert (status, result["failed"]) == (0, {"own": "N is 24, it must be a multiple of 32"})
