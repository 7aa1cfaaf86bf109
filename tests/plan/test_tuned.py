"""Measurements that overrule the model (T1): ranges from points, the file, the user's own before what ships."""

import json
import os
import pwd
from dataclasses import replace
from pathlib import Path

import pytest
from plan_problems import ALL, BACKWARD, HEADLINE

from lorafuse import cli, env
from lorafuse.plan import clear_cache, find, modelled, override, select, tuned
from lorafuse.tune.ranges import rectangles, split

pytestmark = pytest.mark.no_poison

H200 = find("H200")
ENTRY = tuned.Tuned(
    N=4096, K=4096, R=(16, 16), M=(1024, 16384), dtype="bfloat16", dropout=False, gradients=(), kernel="aten_addmm",
    seconds=0.00061, commit="abc", date="2026-11-25", points=((1024, 16, 0.00005), (16384, 16, 0.00061)),
    conditions={"torch": "2.13.0"},
)  # fmt: skip


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    """Folders of this test for both files of a GPU."""
    monkeypatch.setenv("LORAFUSE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(tuned, "FOLDER", tmp_path / "package")
    clear_cache()
    yield tmp_path
    clear_cache()


def reason(problem=HEADLINE):
    return select(problem, H200, ALL).reasons[-1]


def warned():
    """The one warning of a plan that then follows the model, as do all after it."""
    with pytest.warns(UserWarning, match="plans follow the model instead of measurements: ") as actual:
        reasons = [reason(replace(HEADLINE, M=M)) for M in (8192, 4096)]
    assert all(one.startswith("triton: two_kernel, model") for one in reasons)
    (warning,) = actual
    assert str(warning.message).isprintable()
    return str(warning.message)


class TestRanges:
    @pytest.mark.parametrize(
        ("winners", "expected"),
        [
            ({512: "a"}, [((512, 512), "a")]),
            ({512: "a", 2048: "a", 8192: "a"}, [((512, 8192), "a")]),
            # given in any order; the geometric mean of 512 and 2048 is 1024
            ({2048: "b", 512: "a"}, [((512, 1024), "a"), ((1025, 2048), "b")]),
            ({512: "a", 2048: "b", 8192: "a"}, [((512, 1024), "a"), ((1025, 4096), "b"), ((4097, 8192), "a")]),
            ({7: "a", 8: "b"}, [((7, 7), "a"), ((8, 8), "b")]),
            ({1: "a", 2: "b", 3: "b"}, [((1, 1), "a"), ((2, 3), "b")]),
        ],
    )
    def test_neighbours_merge_and_others_part_at_the_geometric_mean(self, winners, expected):
        assert split(winners) == expected

    def test_ranks_of_one_pattern_merge(self):
        winners = {(M, R): "a" if M == 512 else "b" for M in (512, 2048) for R in (8, 16)}
        assert rectangles(winners) == [((512, 1024), (8, 16), "a"), ((1025, 2048), (8, 16), "b")]

    def test_ranks_of_other_patterns_part(self):
        winners = {(512, 16): "a", (2048, 16): "a", (512, 64): "a", (2048, 64): "b"}
        assert rectangles(winners) == [
            ((512, 2048), (16, 32), "a"), ((512, 1024), (33, 64), "a"), ((1025, 2048), (33, 64), "b"),
        ]  # fmt: skip

    def test_every_point_lies_in_one_rectangle_of_its_winner(self):
        winners = {(M, R): "abc"[(M * R) % 3] for M in (1, 2, 7, 8, 100, 513) for R in (1, 4, 5, 64)}
        for (M, R), winner in winners.items():
            around = [w for m, r, w in rectangles(winners) if m[0] <= M <= m[1] and r[0] <= R <= r[1]]
            assert around == [winner]

    def test_no_points_say_nothing(self):
        assert rectangles({}) == []


class TestFile:
    def test_what_is_written_is_read(self, folders):
        entries = ENTRY, replace(ENTRY, gradients=BACKWARD, kernel="aten_beta1", points=())
        tuned.write(folders / "new" / "h200.json", entries)
        assert tuned.read(folders / "new" / "h200.json") == entries
        assert [path.name for path in (folders / "new").iterdir()] == ["h200.json"]
        tuned.write(folders / "new" / "h200.json", ())
        assert tuned.read(folders / "new" / "h200.json") == ()

    def test_a_write_that_fails_leaves_the_file_as_it_was(self, folders, monkeypatch):
        path = folders / "h200.json"
        tuned.write(path, (ENTRY,))

        def interrupted(*args):
            raise KeyboardInterrupt

        monkeypatch.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tuned.write(path, ())
        assert tuned.read(path) == (ENTRY,)
        assert [other.name for other in folders.glob("*h200*")] == ["h200.json"]

    def test_version_1_is_read_and_kept_by_writing(self, folders):
        old = {
            "N": 4096, "K": 4096, "R": [1, 16], "M": [1024, 16384], "dtype": "bfloat16", "dropout": False,
            "gradients": [], "kernel": "aten_addmm", "seconds": 0.00035, "commit": "abc", "date": "2026-11-24",
        }  # fmt: skip
        path = folders / "h200.json"
        path.write_text(json.dumps({"version": 1, "entries": [old]}))
        before = tuned.read(path)
        assert (before[0].seconds, before[0].points, before[0].conditions) == (0.00035, (), {})
        tuned.write(path, before)
        assert json.loads(path.read_text())["version"] == 4
        assert tuned.read(path) == before

    @pytest.mark.parametrize(("former", "name"), [("cuda one_launch_backward", "cuda concurrent_backward")])
    @pytest.mark.parametrize("version", [2, 3])
    def test_older_versions_are_read_with_their_names(self, folders, former, name, version):
        path = folders / "h200.json"
        tuned.write(path, (replace(ENTRY, kernel=name),))
        content = json.loads(path.read_text())
        (entry,) = content["entries"]
        for missing in ("siblings", "epilogue", *(("format", "groups") if version == 2 else ())):
            del entry[missing]
        entry["kernel"] = former
        path.write_text(json.dumps(content | {"version": version}))
        assert tuned.read(path) == (replace(ENTRY, kernel=name),)

    @pytest.mark.parametrize("kernel", ["single_kernel", "fused_xa", "cuda single_kernel", "cuda fused_xa"])
    def test_what_was_measured_of_a_removed_kernel_is_left_out(self, folders, kernel):
        path = folders / "h200.json"
        tuned.write(path, (replace(ENTRY, kernel=kernel), ENTRY))
        assert tuned.read(path) == (ENTRY,)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("{", "Expecting"),
            ("[]", '"version": 4'),
            ('{"version": 5, "entries": []}', '"version": 4'),
            ('{"version": [], "entries": []}', '"version": 4'),
            ('{"version": 2, "entries": [5]}', "entry 0: it is 5"),
            ('{"version": 2, "entries": [{}]}', "entry 0: it has the fields"),
        ],
    )
    def test_a_broken_file_of_the_user_says_which_and_how_to_get_rid_of_it(self, folders, text, message):
        path = tuned.own_file("H200")
        path.parent.mkdir(parents=True)
        path.write_text(text)
        shown = warned()
        assert f": {path}: " in shown
        assert message in shown
        assert shown.endswith("; delete it, and measure again with lorafuse tune")

    @pytest.mark.parametrize("point", [[1024, 16], [0, 16, 1e-5], [1024, 16, "fast"], 7])
    def test_a_broken_point_is_named(self, folders, point):
        path = folders / "h200.json"
        tuned.write(path, (ENTRY,))
        content = json.loads(path.read_text())
        content["entries"][0]["points"].append(point)
        path.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=r"entry 0: points is .* must be a list of \[M, R, seconds\], all above 0"):
            tuned.read(path)


class TestFormat:
    def test_dense_measurements_hold_for_quantized_weights(self):
        quantized = replace(HEADLINE, format="int8")
        with override(measured=(ENTRY,)):
            plan = select(quantized, H200, ALL)
        assert plan.kernel == "aten_addmm"
        assert "610 us at M 16384, R 16 of dense weights (" in plan.reasons[-1]

    def test_those_of_the_format_come_first(self):
        own = replace(ENTRY, format="int8", kernel="aten_beta1")
        with override(measured=(ENTRY, own)):
            assert select(replace(HEADLINE, format="int8"), H200, ALL).kernel == "aten_beta1"
            assert select(HEADLINE, H200, ALL).kernel == "aten_addmm"
        with override(measured=(own,)):
            assert select(HEADLINE, H200, ALL).kernel == "two_kernel"


class TestPrecedence:
    def test_the_users_overrules_what_ships_and_the_model(self, folders):
        assert reason().startswith("triton: two_kernel, model")
        tuned.write(folders / "package" / "h200.json", (ENTRY,))
        clear_cache()
        assert select(HEADLINE, H200, ALL).kernel == "aten_addmm"
        assert reason().endswith("(2026-11-25, commit abc, shipped)")
        tuned.write(tuned.own_file("H200"), (replace(ENTRY, kernel="aten_beta1", M=(8192, 8192)),))
        clear_cache()
        assert select(HEADLINE, H200, ALL).backend == "eager"
        assert reason().endswith("(2026-11-25, commit abc, by lorafuse tune)")
        # where the user's says nothing, what ships still does
        assert select(replace(HEADLINE, M=4096), H200, ALL).kernel == "aten_addmm"

    def test_the_reason_gives_the_time_at_the_nearest_measured_point(self):
        tuned.write(tuned.own_file("H200"), (ENTRY,))
        assert "measured on H200: 610 us at M 16384, R 16" in reason()
        assert "measured on H200: 50 us at M 1024, R 16" in reason(replace(HEADLINE, M=2048))

    def test_an_entry_whose_kernel_cannot_run_leaves_the_word_to_the_next(self, folders):
        tuned.write(folders / "package" / "h200.json", (ENTRY,))
        tuned.write(tuned.own_file("H200"), (replace(ENTRY, kernel="cuda two_kernel"),))
        assert select(HEADLINE, H200, ALL).kernel == "aten_addmm"

    def test_the_model_alone_takes_no_single_kernel(self):
        plan = select(HEADLINE, H200, (*ALL[:2], ("cuda", "")))
        assert {candidate.backend for candidate in plan.candidates} == {"eager", "triton", "cuda"}
        assert modelled(plan.candidates).kernel == "two_kernel"
        assert modelled(plan.candidates).backend == "cuda"


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"LORAFUSE_CACHE_DIR": "/a/b", "XDG_CACHE_HOME": "/x"}, "/a/b"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/lorafuse"),
        ({"XDG_CACHE_HOME": ""}, "~/.cache/lorafuse"),
        ({"LORAFUSE_CACHE_DIR": "~/c"}, "~/c"),
        ({}, "~/.cache/lorafuse"),
    ],
)
def test_the_cache_folder(variables, expected, monkeypatch):
    for name in ("LORAFUSE_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert env.cache_dir() == Path(expected).expanduser()


def test_without_a_home_plans_are_made_as_ever(monkeypatch):
    """As in a container whose user is in no list."""

    def unknown(*args):
        raise KeyError

    for name in ("LORAFUSE_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    assert reason().startswith("triton: two_kernel, model")


def test_a_home_of_another_user_holds_no_measurements(folders, monkeypatch):
    stat = os.stat

    def forbidden(path, *args, **kwargs):
        if str(folders / "cache") in str(path):
            raise PermissionError(13, "Permission denied")
        return stat(path, *args, **kwargs)

    monkeypatch.setattr(os, "stat", forbidden)
    assert reason().startswith("triton: two_kernel, model")


def test_a_file_that_cannot_be_read_is_named(monkeypatch):
    tuned.own_file("H200").mkdir(parents=True)
    assert "h200.json: Is a directory; delete it" in warned()


def measurements(capsys):
    status = cli.main(["doctor", "--json"])
    findings = json.loads(capsys.readouterr().out)["findings"]
    return status, [finding for finding in findings if finding["section"] == "measurements"]


def test_doctor_lists_the_users_file(capsys, monkeypatch):
    from lorafuse.cli import doctor

    installed = doctor.installed
    monkeypatch.setattr(doctor, "installed", lambda name: "2.13.0" if name == "torch" else installed(name))
    path = tuned.own_file("H200")
    tuned.write(path, (ENTRY, ENTRY))
    assert measurements(capsys) == (
        0,
        [{"section": "measurements", "name": "h200", "value": f"{path}: 2 entries, the last of 2026-11-25",
          "status": "ok", "fix": ""}],
    )  # fmt: skip
    tuned.write(path, (replace(ENTRY, conditions={"torch": "2.12.0"}),))
    _, (actual,) = measurements(capsys)
    assert (actual["status"], actual["fix"]) == ("warn", "run lorafuse tune --again")
    path.write_text("{")
    status, (actual,) = measurements(capsys)
    assert (status, actual["status"], actual["fix"]) == (0, "warn", f"rm {path}")
