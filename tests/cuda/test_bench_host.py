"""The launches of bench/host.py (T5), counted in the emulator, where they do not run."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

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
