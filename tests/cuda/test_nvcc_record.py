"""The record of what nvcc compiled (T4): every input of the compiler changes a digest, comments change none."""

import shutil

import nvcc_record
import pytest
from native_commands import ROOT
from nvcc_record import digest, sample, script, without_comments

pytestmark = pytest.mark.no_poison

NAMES = sorted(path.name for path in (ROOT / "csrc" / "kernels").glob("*.cu"))
# units that copy rows of x and draw tiles
GATHERED = {name for name in NAMES if name.startswith("gathered")}
# which nvcc there is does not matter here
NVCC = "13.0.88"


@pytest.fixture
def csrc(tmp_path):
    """A copy of csrc."""
    return shutil.copytree(ROOT / "csrc", tmp_path / "csrc", ignore=shutil.ignore_patterns("emu", "__pycache__"))


def digests(csrc=ROOT / "csrc", nvcc=NVCC, **given):
    return {name: digest(name, csrc, nvcc, **given) for name in NAMES}


@pytest.fixture(scope="module")
def before():
    """The checkout's own digests."""
    return digests()


def changed(before, now):
    return {name for name in NAMES if before[name] != now[name]}


def test_where_the_sources_lie_changes_nothing(before, csrc):
    assert changed(before, digests(csrc)) == set()


def test_comments_change_nothing(before, csrc):
    for path in (csrc / "include").rglob("*.cuh"):
        path.write_text("// why\n" + path.read_text().replace("\n", ' // "that\n', 1) + "\n\n/* two\nlines */\n")
    assert changed(before, digests(csrc)) == set()


@pytest.mark.parametrize(
    ("file", "units"),
    [
        ("kernels/linear_dx_sm90.cu", {"linear_dx_sm90.cu"}),
        ("kernels/reduce_sm80.cuh", {"ragged_ranks_sm80.cu", "reduce_each_sm80.cu", "skinny_sm80.cu"}),
        ("kernels/decode_sm80.cuh", {"decode_sm80.cu"}),
        ("kernels/grouped_sm90.cuh", {name for name in NAMES if name.startswith("grouped")} | GATHERED),
        ("kernels/gathered_sm90.cuh", GATHERED),
        ("kernels/pipeline_sm90.cuh", {name for name in NAMES if name.endswith("sm90.cu")}),
        ("include/lorafuse/common.cuh", set(NAMES)),
        (
            "include/lorafuse/ptx/mma.cuh",
            {
                *("fused_backward_sm90.cu", "fused_forward_sm90.cu", "ragged_ranks_sm80.cu", "reduce_each_sm80.cu"),
                *("round_each_sm80.cu", "round_sm80.cu", "skinny_sm80.cu", "split_sm90.cu", *GATHERED),
            },
        ),
        ("include/lorafuse/ptx/wgmma.cuh", {name for name in NAMES if name.endswith("sm90.cu")}),
        ("bindings.cpp", set()),
    ],
)
def test_a_line_changes_every_unit_that_it_is_part_of(before, csrc, file, units):
    (csrc / file).write_text((csrc / file).read_text() + "using Added = int;\n")
    assert changed(before, digests(csrc)) == units


def test_every_file_is_part_of_a_unit():
    """None is found by a way that nvcc has and `reached` does not."""
    csrc = ROOT / "csrc"
    actual = {path for name in NAMES for path in nvcc_record.reached(csrc / "kernels" / name, csrc)}
    assert actual == {
        p.resolve() for folder in ("include", "kernels") for p in (csrc / folder).rglob("*") if p.is_file()
    }


def test_every_other_input_changes_all_digests(before, monkeypatch):
    build_py = script()
    assert changed(before, digests(nvcc="13.0.89")) == set(NAMES)
    assert changed(before, digests(flags=build_py["NVCC_FLAGS"].replace("-O3", "-O2"))) == set(NAMES)
    assert changed(before, digests(targets=("arch=compute_100a,code=sm_100a",))) == set(NAMES)
    monkeypatch.setenv("NVCC_APPEND_FLAGS", "-lineinfo")
    assert not before.items() & digests().items()
    monkeypatch.delenv("NVCC_APPEND_FLAGS")
    monkeypatch.setattr(nvcc_record, "READERS", nvcc_record.READERS[1:])
    assert not before.items() & digests().items()


def test_only_comments_are_cut():
    source = 'int f() {  // why\n\n  /* "how" */ g("// no comment", \'"\', 1\'000);\n}\n'
    assert without_comments(source) == "int f() {\n    g(\"// no comment\", '\"', 1'000);\n}"
    with pytest.raises(AssertionError, match="raw strings"):
        without_comments('asm(R"(mov // a)");')


def test_a_unit_of_each_architecture_is_compiled_in_any_case():
    sizes = {"a": {"9": 3, "8": 3}, "b": {"8": 1, "9": 1}, "c": {"7": 2}, "d": {}, "e": {"7": 5}}
    record = {
        name: {
            "kernels": {arch: dict.fromkeys(range(n)) for arch, n in one.items()},
            "defines": [f"lorafuse::{name}()"],
        }
        for name, one in sizes.items()
    }
    assert sample(record) == {"b", "c", "d"}
    record["e"]["defines"].append(f"{nvcc_record.CALLED}lorafuse::Round const&, void*)")
    assert sample(record) == {"b", "c", "d", "e"}


def test_an_instruction_is_counted_where_its_name_begins(monkeypatch, tmp_path):
    text = "Function : k\n  HMMA.16816 R0;\n @P0 HMMA R1;\n XHMMA; _HMMA; .HMMA; LDGSTS; UTMALDG.2D.MULTICAST; UTMALDG"
    tool = tmp_path / "cuobjdump"
    tool.write_text(f"#!/bin/sh\ncat <<'E'\narch = sm_80\n{text}\nE\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(nvcc_record, "INSTRUCTIONS", {"k": ("HMMA", "LDGSTS", "UTMALDG", "UTMALDG.2D.MULTICAST")})
    assert nvcc_record.instructions("k.o") == {
        "sm_80": {"k": {"HMMA": 3, "LDGSTS": 1, "UTMALDG": 2, "UTMALDG.2D.MULTICAST": 1}}
    }
