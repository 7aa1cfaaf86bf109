"""Files of a user (T1): what is read cannot block or be endless, what is written is whole; tuned files that are bad."""

import json
import multiprocessing
import os
import shutil
import stat
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import warm_python
from plan_problems import ALL, HEADLINE
from test_tuned import ENTRY, H200

from lorafuse import files
from lorafuse.errors import one_line
from lorafuse.plan import clear_cache, select, tuned

pytestmark = pytest.mark.no_poison

ROOT = Path(__file__).parents[2]
GOOD = {name: value for name, value in asdict(ENTRY).items() if name != "own"}


def text(**fields):
    return json.dumps({"version": 4, "entries": [GOOD | fields]})


def make(path, kind):
    """Put at `path` what is no tuned file."""
    if kind == "folder":
        path.mkdir()
    elif kind == "FIFO":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "dangling link":
        path.symlink_to(path.parent / "nowhere")
    elif kind == "link to itself":
        path.symlink_to(path)
    elif kind == "huge":
        with open(path, "wb") as file:
            file.truncate(2**40)
    else:
        path.write_bytes(kind if isinstance(kind, bytes) else kind.encode())


BAD = {
    "folder": "folder",
    "FIFO": "FIFO",
    "device": "device",
    "dangling link": "dangling link",
    "link to itself": "link to itself",
    "huge": "huge",
    "empty": "",
    "cut": text()[:-9],
    "binary": b"\x00\xff\xfe",
    "UTF-16": text().encode("utf-16"),
    "deep": "[" * 200_000,
    "deep in an entry": text(conditions="X").replace('"X"', "[" * 100_000 + "]" * 100_000),
    "later version": '{"version": 5, "entries": []}',
    "version true": '{"version": true, "entries": []}',
    "version 2.0": '{"version": 2.0, "entries": []}',
    "NaN": text(seconds=float("nan")),
    "infinite": text(seconds=float("inf")),
    "infinite point": text(points=[[1024, 16, float("inf")]]),
    "1e999": text(seconds=7.5).replace("7.5", "1e999"),
    "large time": text(seconds=10**300),
    "large size": text(N=10**30),
    "size true": text(N=True),
    "size 1.5": text(K=1.5),
    "size text": text(N="4096"),
    "size null": text(N=None),
    "range reversed": text(M=[16, 8]),
    "range NaN": text(M=[8, float("nan")]),
    "range of three": text(R=[1, 2, 3]),
    "point of floats": text(points=[[1024.5, 16, 1e-5]]),
    "gradients nested": text(gradients=[["dx"]]),
    "kernel list": text(kernel=["two_kernel"]),
    "kernel unknown": text(kernel="\x1b[31mevil"),
    "control characters": text(commit="\x1b]0;evil\x07"),
    "control in a name": json.dumps({"version": 4, "entries": [GOOD | {"\x1b[2J": 1}]}),
    "control in a condition": text(conditions={"torch": "\x1b[31m"}),
    "surrogate": text(date="\udcff"),
    "number of 5000 digits": '{"version": 2, "entries": [' + "9" * 5000 + "]}",
}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LORAFUSE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(tuned, "FOLDER", tmp_path / "package")
    clear_cache()
    yield tmp_path
    clear_cache()


def plan(M=8192):
    return select(HEADLINE if M == 8192 else type(HEADLINE)(M, 4096, 4096, 16, "bfloat16", "float32"), H200, ALL)


class TestTuned:
    def test_without_its_fault_each_text_is_good(self, tmp_path):
        (tmp_path / "h200.json").write_text(text())
        assert tuned.read(tmp_path / "h200.json") == (ENTRY,)

    @pytest.mark.parametrize("own", [True, False])
    @pytest.mark.parametrize("kind", BAD)
    def test_a_bad_file_is_one_warning_and_then_the_model(self, cache, kind, own):
        path = tuned.own_file("H200") if own else cache / "package" / "h200.json"
        path.parent.mkdir(parents=True)
        make(path, BAD[kind])
        with pytest.warns(UserWarning, match="plans follow the model") as caught:
            plans = [plan(), plan(4096), plan()]
        (warning,) = map(str, (one.message for one in caught))
        assert str(path) in warning
        assert warning.isprintable()
        assert len(warning) < 1500
        assert all("model" in one.reasons[-1] for one in plans)

    def test_it_is_read_once_in_a_process(self, cache, monkeypatch):
        path = tuned.own_file("H200")
        path.parent.mkdir(parents=True)
        path.write_text("{")
        read, times = files.read_text, []
        monkeypatch.setattr(files, "read_text", lambda *args: times.append(args) or read(*args))
        with pytest.warns(UserWarning, match="h200.json"):
            plan()
        for M in range(1, 50):
            plan(M)
        assert len(times) == 1

    def test_a_warning_that_is_an_error_stops_no_plan(self, cache):
        path = tuned.own_file("H200")
        path.parent.mkdir(parents=True)
        path.write_text("{")
        code = (
            "from lorafuse.plan import Problem, find, select\n"
            "p = Problem(8192, 4096, 4096, 16, 'bfloat16', 'float32')\n"
            "print(select(p, find('H200'), (('eager', ''), ('triton', ''))).reasons[-1])\n"
        )
        done = warm_python.run(
            [sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300
        )
        assert done.stdout.startswith("triton: two_kernel, model")
        assert done.stderr.count("\n") == 1
        assert str(path) in done.stderr

    def test_another_user_may_read_what_is_written(self, tmp_path):
        former = os.umask(0o022)
        try:
            tuned.write(tmp_path / "h200.json", (ENTRY,))
            os.umask(0o077)
            tuned.write(tmp_path / "private.json", (ENTRY,))
        finally:
            os.umask(former)
        assert stat.S_IMODE((tmp_path / "h200.json").stat().st_mode) == 0o644
        assert stat.S_IMODE((tmp_path / "private.json").stat().st_mode) == 0o600

    def test_a_file_of_another_user_that_cannot_be_read(self, monkeypatch):
        if os.geteuid():
            pytest.skip("only root can be two users")
        folder = Path(tempfile.mkdtemp())
        folder.chmod(0o755)
        monkeypatch.setenv("LORAFUSE_CACHE_DIR", str(folder))
        clear_cache()
        try:
            path = tuned.own_file("H200")
            tuned.write(path, (ENTRY,))
            path.chmod(0o600)
            os.seteuid(65534)
            try:
                with pytest.warns(UserWarning, match=r"h200\.json: Permission denied"):
                    assert "model" in plan().reasons[-1]
            finally:
                os.seteuid(0)
        finally:
            shutil.rmtree(folder)
            clear_cache()

    def test_two_that_write_at_once_leave_one_whole_file(self, tmp_path):
        path = tmp_path / "h200.json"
        fork, end = multiprocessing.get_context("fork"), time.monotonic() + 120
        sides = [fork.Process(target=_write, args=(path, kind), daemon=True) for kind in ("a", "b")]
        for side in sides:
            side.start()
        try:
            while any(side.is_alive() for side in sides):
                entries = tuned.read(path)
                assert len({entry.commit for entry in entries}) <= 1
                assert len(entries) in (0, 100)
                assert time.monotonic() < end, "they do not end"
        finally:
            for side in sides:
                side.kill()
                side.join(60)
        assert [side.exitcode for side in sides] == [0, 0]
        assert [file.name for file in tmp_path.iterdir()] == ["h200.json"]


def _write(path, kind):
    for _ in range(20):
        tuned.write(path, [tuned.Tuned(**{**GOOD, "commit": kind})] * 100)


class TestFiles:
    def test_a_link_stays_a_link(self, tmp_path):
        (tmp_path / "there").mkdir()
        link = tmp_path / "link"
        link.symlink_to(tmp_path / "there" / "file")
        files.write_text(link, "1")
        files.write_text(link, "2")
        assert link.is_symlink()
        assert [file.name for file in (tmp_path / "there").iterdir()] == ["file"]
        assert link.read_text() == "2"

    def test_the_longest_name_can_be_written(self, tmp_path):
        path = tmp_path / ("a" * 255)
        assert files.why_no_file(path) == ""
        files.write_text(path, "1")
        assert files.read_text(path) == "1"

    @pytest.mark.parametrize(
        ("make_it", "reason"),
        [
            (Path.mkdir, "it is a folder; name a file"),
            (os.mkfifo, "it is no regular file; name another"),
            (lambda path: path.symlink_to("/dev/null"), "it is no regular file; name another"),
            (lambda path: path.symlink_to("/proc/x/y"), "/proc/x: it cannot be written (No such file or directory)"),
        ],
    )
    def test_why_a_path_is_no_file_to_write(self, tmp_path, make_it, reason):
        path = tmp_path / "x"
        make_it(path)
        assert reason in files.why_no_file(path)

    def test_a_good_path_and_what_a_file_is_as_a_folder(self, tmp_path):
        assert files.why_no_file(tmp_path / "new" / "x") == ""
        assert files.why_no_folder(tmp_path / "new" / "deeper") == ""
        (tmp_path / "file").write_text("")
        assert files.why_no_folder(tmp_path / "file") == "it is a file; name a folder"
        assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / "file"]

    def test_one_line(self):
        assert one_line("a\n  b\x1b[31m\u202e\udcff ü") == "a b\\x1b[31m\\u202e\\udcff ü"
