"""The launches of bench/host.py (T5), counted in the emulator, where they do not run."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

import gpu_results  # noqa: E402
import host  # noqa: E402

pytest_plugins = "emu_fixtures"


def test_launches_of_a_layer_are_counted(emu, monkeypatch):
    monkeypatch.setattr(host, "CALLS", 1)
    monkeypatch.setattr(host, "ROUNDS", 1)
    steps, launches = emu.statistics()["steps"], emu.statistics()["launches"]
    measured = host.measure_all("emu", rows=4)
    counted = {name: [calls for *_, calls in passes.values()] for name, passes in measured.items()}
    assert counted["q, k, v"] == [
        {"project_x": 1, "siblings_forward": 1},
        dict.fromkeys(("reduce_each_workspace", "reduce_each", "siblings_dx", "reduce_x_workspace", "reduce_x"), 1),
    ]
    assert counted["gated MLP"][1]["reduce_each"] == 2
    assert all(us >= within >= 0 for passes in measured.values() for us, within, _ in passes.values())
    # of a forward before what is measured, and of one forward and backward: 3 + 6, 2 + 5 and 5 + 12
    assert emu.statistics()["launches"] - launches == (3 + 2 + 5) + (9 + 7 + 17)
    assert emu.statistics()["steps"] in (0, steps)


def test_its_file_is_collected(emu, monkeypatch, tmp_path):
    """`make gpu` leaves it beside the files of `lorafuse bench`."""
    monkeypatch.setattr(host, "CALLS", 1)
    monkeypatch.setattr(host, "ROUNDS", 1)
    (tmp_path / "run").mkdir()
    file = tmp_path / "run" / "host.json"
    assert host.main(["emu", "--rows", "4", "--json", str(file)]) == 0
    content = json.loads(file.read_text())
    content["conditions"]["device"] = "NVIDIA H200"
    file.write_text(json.dumps(content))
    (collected,) = gpu_results.collect([tmp_path / "run"], tmp_path)
    assert collected.name == f"h200-{content['conditions']['date'].split()[0]}-host.json"
    assert [one["name"] for one in json.loads(collected.read_text())["results"]] == ["q, k, v", "o", "gated MLP"]
