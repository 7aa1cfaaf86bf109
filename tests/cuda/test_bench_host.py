"""The launches of bench/host.py (T5), counted in the emulator, where they do not run."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

import gpu_results  # noqa: E402
import host  # noqa: E402

pytest_plugins = "emu_fixtures"
# filling memory would be a part of what is recorded
pytestmark = pytest.mark.no_poison


@pytest.fixture(autouse=True)
def _once(emu, monkeypatch):
    for name, value in {"CALLS": 1, "ROUNDS": 1, "WARMUP": 2}.items():
        monkeypatch.setattr(host, name, value)


def test_launches_of_a_layer_are_counted(emu):
    steps, launches = emu.statistics()["steps"], emu.statistics()["launches"]
    measured = host.measure_all("emu")
    calls = [[counted for *_, counted in measured[name].values()] for name in ("lorafuse, in Python", "lorafuse")]
    # q, k and v, o, gate and up, down
    assert calls[0] == [
        {"project_x": 4, "siblings_forward": 1, "linear": 2, "gated_forward": 1},
        {
            **{
                "reduce_each_workspace": 3,
                "reduce_each": 3,
                "gated_backward": 1,
                "reduce_x_workspace": 4,
                "reduce_x": 4,
            },
            **{"siblings_dx": 2, "reduce_dy_workspace": 1, "reduce_dy": 1, "linear": 1},
        },
    ]
    # of a recording all launches, but for what waits for an operator of torch, are one call
    assert calls[1] == [{"run": 3}, {"run": 3}]
    assert all(us >= within >= 0 for passes in measured.values() for us, within, _ in passes.values())
    # in Python and from recordings: of a forward before what is measured, and of three of both directions; of q, k and
    # v, o and the MLP 3 + 6, 2 + 5 and 5 + 12
    assert emu.statistics()["launches"] - launches == 2 * ((3 + 2 + 5) + 3 * (9 + 7 + 17))
    assert emu.statistics()["steps"] in (0, steps)


def test_its_file_is_collected(tmp_path):
    """`make gpu` leaves it beside the files of `lorafuse bench`."""
    (tmp_path / "run").mkdir()
    file = tmp_path / "run" / "host.json"
    assert host.main(["emu", "--json", str(file)]) == 0
    content = json.loads(file.read_text())
    content["conditions"]["device"] = "NVIDIA H200"
    file.write_text(json.dumps(content))
    (collected,) = gpu_results.collect([tmp_path / "run"], tmp_path)
    assert collected.name == f"h200-{content['conditions']['date'].split()[0]}-host.json"
    names = [one["name"] for one in json.loads(collected.read_text())["results"]]
    assert names == ["frozen", "PEFT", "floor", "lorafuse, in Python", "lorafuse"]
