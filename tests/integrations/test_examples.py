"""Every file of examples/ runs as it is, on its tiny models, and trains through patched layers (T1)."""

import contextlib
import importlib
import json
import os
import sys
from pathlib import Path

import peft
import pytest
import torch
import torch.distributed as dist
import yaml
from fake_trainers import provide
from two_processes import WORLD, spawn

import lorafuse

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
pytestmark = pytest.mark.no_poison


@pytest.fixture(autouse=True)
def on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))


def check_adapter(folder, rank):
    """PEFT's files, complete, and trained: B is zero before the first step."""
    config = peft.PeftConfig.from_pretrained(folder)
    tensors = peft.utils.load_peft_weights(str(folder), device="cpu")
    trained = [tensor for name, tensor in tensors.items() if "lora_B" in name]
    assert config.r == rank
    assert len(tensors) == 2 * len(trained) > 0
    assert all(tensor.abs().sum() > 0 for tensor in trained)


def learned(losses):
    return losses[-1] < losses[0]


def test_experts(tmp_path, capsys):
    with recorded() as models:
        losses = importlib.import_module("moe_qwen3").main(str(tmp_path))
    assert learned(losses)
    check_run(lorafuse.status(*models), len(losses))
    out = capsys.readouterr().out
    assert "0 left to PEFT" in out
    assert "experts" in out
    check_adapter(tmp_path, 4)


def test_a_service_of_two_users(tmp_path, capsys):
    losses = importlib.import_module("two_users").main(str(tmp_path))
    assert all(learned(mine) for mine in losses.values())
    assert "step 3: the gradient of bob is not finite" in capsys.readouterr().out
    check_adapter(tmp_path / "ann", 8)
    check_adapter(tmp_path / "bob", 1)


def test_the_notebook(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cells = json.loads((EXAMPLES / "quickstart.ipynb").read_text())["cells"]
    assert not any(cell.get("outputs") for cell in cells)
    names = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), "quickstart.ipynb", "exec"), names)
    assert not names["report"].skipped
    assert learned(names["patched"])
    assert names["largest"] < 1e-5
    assert names["apart"] < 1e-5
    check_adapter(tmp_path / "adapter", 8)


@contextlib.contextmanager
def recorded():
    """The models that are patched."""
    models, patch = [], lorafuse.patch

    def recording(model, **options):
        models.append(model)
        return patch(model, **options)

    lorafuse.patch = recording
    try:
        yield models
    finally:
        lorafuse.patch = patch


def check_run(status, steps):
    """Every layer ran fused in each step, and nothing else."""
    assert status.layers
    assert status.fallbacks == 0
    assert all(sum(layer.fused.values()) == steps for layer in status.layers)


def launched(rank, folder, name, port, nodes=1, environment=()):
    """One process of two with what its launcher sets: losses and what ran go to a file."""
    os.environ.update(environment, RANK=str(rank), WORLD_SIZE=str(WORLD), LOCAL_RANK=str(rank if nodes == 1 else 0))
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True")
    torch.set_num_threads(1)
    sys.path.insert(0, str(EXAMPLES))
    with recorded() as models:
        losses = importlib.import_module(name).main(f"{folder}/adapter")
    if dist.is_initialized():
        dist.destroy_process_group()
    torch.save((losses, lorafuse.status(*models)), f"{folder}/{rank}.pt")


def results(folder):
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(WORLD)]


@pytest.fixture
def port():
    """Where the processes meet: the launcher has the store."""
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    yield store.port
    del store


@pytest.mark.parametrize("name", ["fsdp2", "fsdp2_qlora", "ddp_qlora", "ep_qwen3"])
def test_two_processes_of_torchrun(name, port, tmp_path):
    """With what torchrun sets, and in processes that are forks of one that has imported everything."""
    if name.endswith("qlora"):
        pytest.importorskip("bitsandbytes")
    spawn(launched, str(tmp_path), name, port)
    for losses, status in results(tmp_path):
        assert learned(losses)
        check_run(status, len(losses))
    check_adapter(tmp_path / "adapter", 4 if name == "ep_qwen3" else 8)


def accelerate_environment():
    """What `accelerate launch` sets for a process by the configuration, which its own reader has checked."""
    config_args = pytest.importorskip("accelerate.commands.config.config_args")
    config = config_args.load_config_from_file(str(EXAMPLES / "accelerate_two_nodes.yaml"))
    assert (config.num_machines, config.num_processes, config.rdzv_backend) == (2, 16, "c10d")
    launch = importlib.import_module("accelerate.commands.launch")
    arguments = ["--config_file", str(EXAMPLES / "accelerate_two_nodes.yaml"), "accelerate_loop.py"]
    parsed, _, _ = launch._validate_launch_command(launch.launch_command_parser().parse_args(arguments))
    return importlib.import_module("accelerate.utils.launch").prepare_multi_gpu_env(parsed)


def test_accelerate_on_two_machines(port, tmp_path):
    variables = accelerate_environment()
    assert (variables["ACCELERATE_USE_FSDP"], variables["FSDP_VERSION"]) == ("true", "2")
    own = {key: value for key, value in variables.items() if key.startswith(("ACCELERATE", "FSDP"))}
    own |= {"ACCELERATE_MIXED_PRECISION": "no"}
    spawn(launched, str(tmp_path), "accelerate_loop", port, 2, own)
    for losses, status in results(tmp_path):
        # 32 rows in batches of 4 on two processes
        assert len(losses) == 4
        check_run(status, len(losses))
    check_adapter(tmp_path / "adapter", 8)


@pytest.mark.parametrize(("name", "rank"), [("trl_sft", 8), ("trl_grpo_rank1", 1)])
def test_under_trl(name, rank, tmp_path, monkeypatch, capsys):
    for package in ("trl", "datasets"):
        pytest.importorskip(package, reason=f"{name} needs {package}: make test-trl has it")
    monkeypatch.chdir(tmp_path)
    values = importlib.import_module(name).main(str(tmp_path / "adapter"))
    assert "14 adapted layers patched, 0 left to PEFT" in capsys.readouterr().out
    assert len(values) > 1
    check_adapter(tmp_path / "adapter", rank)


def test_axolotl_reads_the_yaml(monkeypatch):
    """The plugin it names accepts it, and ends with Axolotl's own kernels off and a strict callback."""
    provide(monkeypatch, "axolotl")
    config = yaml.safe_load((EXAMPLES / "axolotl.yaml").read_text())
    module, _, name = config["plugins"][0].rpartition(".")
    monkeypatch.delitem(sys.modules, module, raising=False)
    axolotl = importlib.import_module(module)
    monkeypatch.delitem(sys.modules, module)
    plugin = getattr(axolotl, name)()
    plugin.register(config)
    assert not any(config[kernel] for kernel in axolotl.KERNELS)
    (callback,) = plugin.add_callbacks_pre_trainer(config, None)
    assert callback.training.strict


def test_every_example_is_run():
    text = Path(__file__).read_text()
    helpers = {"quantized"}
    files = {path.stem for path in EXAMPLES.iterdir() if path.is_file()}
    assert {name for name in files - helpers if f'"{name}' not in text} == set()
