"""The command line (T1): what each command prints, and its exit status."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import warm_python

from lorafuse import cli, functional
from lorafuse.backends import base
from lorafuse.cli import doctor, plan
from lorafuse.versions import MINIMUM, is_older

ROOT = Path(__file__).parents[2]


def test_help_lists_every_command():
    command = [sys.executable, "-m", "lorafuse", "--help"]
    done = warm_python.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=300)
    assert all(re.search(rf"^\s+{name}\s", done.stdout, re.MULTILINE) for name in cli.COMMANDS)


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_of_each_command(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    assert f"lorafuse {command}" in capsys.readouterr().out


@pytest.mark.parametrize("argv", [[], ["docter"], ["doctor", "--jsn"]])
def test_bad_command_is_status_2_and_says_what_is_known(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "usage: lorafuse" in error
    assert argv[-1:] == ["--jsn"] or "doctor" in error or "COMMAND" in error


def test_doctor_is_healthy_here(capsys):
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "self-test" in out
    assert torch.__version__ in out
    assert out.rstrip().endswith("healthy")


def test_doctor_json(capsys):
    assert cli.main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["healthy"] is True
    actual = {(f["section"], f["name"]): f for f in report["findings"]}
    assert {section for section, _ in actual} == {
        "versions",
        "devices",
        "compilers",
        "backends",
        "environment",
        "self-test",
    }
    assert {name for section, name in actual if section == "backends"} == set(base.BACKENDS)
    for finding in report["findings"]:
        assert finding["status"] == "ok" or finding["fix"], finding


@pytest.mark.parametrize("wrong", ["double the scale", "no low-rank term", "NaN", "detached A"])
def test_doctor_sees_wrong_arithmetic(monkeypatch, capsys, wrong):
    right = functional.lora_linear

    def lora_linear(x, w, a, b, *, scale, backend):
        if wrong == "double the scale":
            return right(x, w, a, b, scale=2 * scale, backend=backend)
        if wrong == "no low-rank term":
            return right(x, w, a, b, scale=0.0, backend=backend)
        if wrong == "NaN":
            return right(x, w, a, b, scale=scale, backend=backend) * float("nan")
        return right(x, w, a.detach(), b, scale=scale, backend=backend) + 0 * a.sum()

    monkeypatch.setattr(functional, "lora_linear", lora_linear)
    assert cli.main(["doctor", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert {f["section"] for f in report["findings"] if f["status"] == "fail"} == {"self-test"}


def test_doctor_without_rich_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "installed", lambda package: None if package == "rich" else "99")
    assert cli.main(["doctor"]) == 2
    assert "pip install rich" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("package", "version", "triton", "status"),
    [
        ("torch", None, None, "fail"),
        ("torch", "2.10.1", None, "fail"),
        ("torch", "2.11.0+cu130", None, "ok"),
        ("peft", None, None, "warn"),
        ("peft", "0.9.0", None, "warn"),
        ("peft", "0.17.1", None, "warn"),
        ("peft", "0.18.0.dev0", None, "ok"),
        ("numpy", "2.4.0", "3.6.0", "warn"),
        ("numpy", "2.4.0", "3.7.0", "ok"),
        ("numpy", "2.3.5", "3.6.0", "ok"),
        ("numpy", "2.4.0", None, "ok"),
    ],
)
def test_doctor_judges_versions(package, version, triton, status):
    finding = doctor.version_finding(package, doctor.PURPOSES[package], version, triton)
    assert finding.status == status
    assert status == "ok" or "pip install" in finding.fix


def test_versions_compare_by_release():
    assert is_older("2.9.1", "2.11")
    assert is_older("2.10.1+cu130", "2.11")
    assert not is_older("2.11.0.dev20261101", "2.11")
    assert not is_older("10.0", "9.9.9")
    with pytest.raises(ValueError, match="must begin with a number"):
        is_older("unknown", "2.11")


def test_doctor_describes_each_gpu(monkeypatch):
    gpu = SimpleNamespace(name="GPU X", major=9, minor=0, total_memory=139 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    monkeypatch.setattr(doctor, "program_output", lambda *command: "580.1\n580.1")
    actual = {finding.name: finding.value for finding in doctor.device_findings()}
    assert set(actual) == {"cpu", "cuda:0", "cuda:1"}
    assert actual["cuda:1"].startswith("GPU X, compute capability 9.0, 139 GiB, driver 580.1")


def test_doctor_sees_a_gpu_that_torch_cannot_use(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(doctor, "program_output", lambda *command: "580.1")
    finding = list(doctor.device_findings())[-1]
    assert (finding.name, finding.status) == ("cuda", "warn")
    assert "CUDA build of torch" in finding.fix


def test_doctor_asks_for_the_versions_that_the_package_asks_for():
    declared = dict(re.findall(r'"(\w+)>=([\d.]+)', (ROOT / "pyproject.toml").read_text()))
    assert {name: declared[name] for name in MINIMUM} == MINIMUM


def test_doctor_shows_markup_as_text(capsys):
    finding = doctor.Finding("backends", "eager", "why [red]not[/red]", "warn", 'pip install "lorafuse[cli]"')
    doctor.render([finding], healthy=True)
    out = capsys.readouterr().out
    assert "[red]not[/red]" in out
    assert "lorafuse[cli]" in out


class TestOutput:
    """A process whose output goes nowhere ends with one line and status 2."""

    # plain prints, and rich's
    COMMANDS = ("plan --gpu H200 --case square-2048", "tune --dry-run --gpu H200 --shape 4096,4096")

    def run(self, command, stdout, **variables):
        command = [sys.executable, "-W", "error", "-m", "lorafuse", *command.split()]
        environment = {**os.environ, **variables}
        return warm_python.run(
            command, cwd=ROOT, stdout=stdout, stderr=subprocess.PIPE, text=True, env=environment, timeout=300
        )

    @pytest.mark.parametrize("command", COMMANDS)
    def test_a_reader_that_stopped(self, command):
        reader, writer = os.pipe()
        os.close(reader)
        done = self.run(command, writer)
        os.close(writer)
        assert done.stderr == f"lorafuse {command.split()[0]}: whoever read the output has stopped\n"
        assert done.returncode == 2

    def test_a_full_disk(self):
        with open("/dev/full", "w") as full:
            done = self.run(self.COMMANDS[0], full)
        assert (done.returncode, done.stderr) == (2, "lorafuse plan: [Errno 28] No space left on device\n")

    def test_a_closed_output(self):
        command = f"{shlex.quote(sys.executable)} -m lorafuse {self.COMMANDS[0]} >&-"
        done = subprocess.run(command, shell=True, cwd=ROOT, stderr=subprocess.PIPE, text=True, timeout=300)
        assert done.returncode == 2
        assert done.stderr == "lorafuse: standard output is closed; send it to a file or to /dev/null\n"

    def test_an_output_that_knows_no_such_letters(self, tmp_path):
        with open(tmp_path / "out", "w") as out:
            done = self.run(f"{self.COMMANDS[1]} --out {tmp_path}/\udcff[/b].json", out, PYTHONIOENCODING="ascii")
        assert (done.returncode, done.stderr) == (0, "")
        assert "4096 \\xd7 4096" in (tmp_path / "out").read_text()


def test_interruption_while_commands_are_loaded(monkeypatch, capsys):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "parser", interrupted)
    assert cli.main([]) == 130
    assert capsys.readouterr().err == "\nlorafuse: interrupted\n"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), "lorafuse plan: out of memory:"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 7 bytes."),
            "out of memory: Def",
        ),
        (
            OSError(28, "No space left on device", "x.json"),
            "lorafuse plan: [Errno 28] No space left on device: 'x.json'",
        ),
        (ValueError("two\n  lines \x1b[31m"), "lorafuse plan: two lines \\x1b[31m\n"),
    ],
)
def test_what_the_machine_lacks_is_one_line(error, message, monkeypatch, capsys):
    def fail(*args):
        raise error

    monkeypatch.setattr(plan, "print_plans", fail)
    assert cli.main(["plan", "--gpu", "H200", "--case", "square-2048"]) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.count("\n") == 1
