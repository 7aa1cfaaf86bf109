"""Odd command lines (T1): numbers, devices, paths and files that cannot be: one line and status 2, before any work."""

import json
import os
import pickle
import shutil
from types import SimpleNamespace

import pytest
import tiny_models
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from lorafuse.bench import compare, peaks
from lorafuse.cli import bench, demo, main, study, tune
from lorafuse.plan import find
from lorafuse.study import record
from lorafuse.tune.measure import Target

pytestmark = pytest.mark.no_poison

CONFIG = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64,
}  # fmt: skip
MOE = CONFIG | {
    "model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8,
}  # fmt: skip
# a config.json by the name of its folder: text as it is, or what is written as JSON
CONFIGS = {
    "empty": "",
    "binary": b"\x00\xff\xfe\x1b[2J",
    "deep": "[" * 200_000,
    "cut": '{"model_type": "lla',
    "list": [CONFIG],
    "number": 5,
    "text": '"llama"',
    "null": None,
    "no-type": {"hidden_size": 32},
    "type-list": CONFIG | {"model_type": ["llama"]},
    "type-null": CONFIG | {"model_type": None},
    "type-unknown": CONFIG | {"model_type": "\x1b[31mno-such-model"},
    "negative": CONFIG | {"hidden_size": -32},
    "zero": CONFIG | {"num_attention_heads": 0},
    "nothing": CONFIG | {"hidden_size": 0},
    "string": CONFIG | {"hidden_size": "32"},
    "float": CONFIG | {"hidden_size": 32.5},
    "no-layers": CONFIG | {"num_hidden_layers": 0},
    "fewer-than-no-layers": CONFIG | {"num_hidden_layers": -1},
    "no-inner": CONFIG | {"intermediate_size": 0},
    "no-head": CONFIG | {"num_attention_heads": 64, "num_key_value_heads": 64},
    "no-keys": CONFIG | {"num_key_value_heads": 0},
    "no-words": CONFIG | {"vocab_size": 0},
    "no-active": MOE | {"num_experts_per_tok": 0},
    "more-active": MOE | {"num_experts_per_tok": 99},
    "text-active": MOE | {"num_experts_per_tok": "2"},
    "huge": CONFIG | {"hidden_size": 10**30},
    "large": CONFIG | {"intermediate_size": 2**62},
    "listed-sizes": CONFIG | {"hidden_size": [32, 32]},
    "nan": CONFIG | {"intermediate_size": float("nan")},
    "null-size": CONFIG | {"intermediate_size": None},
    "nested": CONFIG | {"rope_parameters": [1, 2]},
    "unknown-keys": CONFIG | {"torch_dtype": 7},
    "architecture-text": CONFIG | {"architectures": 5},
    "architecture-function": CONFIG | {"architectures": ["pipeline"]},
    "architecture-trainer": CONFIG | {"architectures": ["Trainer"]},
    "architecture-of-another": CONFIG | {"architectures": ["BertModel"]},
    "architecture-numbers": CONFIG | {"architectures": [1, None]},
    "remote": CONFIG | {"model_type": "foreign", "auto_map": {"AutoConfig": "evil.Evil"}},
}
# of these only what is odd is passed over: what is no model of theirs, or is not read
GOOD = (
    "architecture-text",
    "architecture-function",
    "architecture-trainer",
    "architecture-of-another",
    "architecture-numbers",
)
ROW = {"question": "a b", "answer": "b", "prompt": "a ", "completion": "b"}
DATA = {
    "empty": b"",
    "binary": b"\xff\x00\n\xfe",
    "deep": b"[" * 200_000,
    "not-objects": b'[1, 2]\n5\n"x"\nnull\n',
    "cut": b'{"question": "a',
    "messages": b'{"messages": [1, 2]}\n{"messages": [{"role": "user"}]}\n{"messages": {"a": 1}}\n',
    "contents": b'{"messages": [{"role": "user", "content": {"a": 1}}, {"role": "assistant", "content": [2]}]}\n',
}
MINE = {"version": record.VERSION, "device": "cpu"}
STUDIES = {
    "empty": "",
    "deep": "[" * 200_000,
    "no-runs": MINE,
    "no-spec": MINE | {"runs": [5]},
    "binary": b"\xff",
}
NUMBERS = ("nan", "inf", "-1", "0", "1e400", "9" * 23, "x", "")
DEVICES = ("foo", "cuda", "cuda:99", "cuda:x", "meta", "mps", "xla", "privateuseone")
SHAPES = ("", "1", "-1,-2", "0,0", "a,b", "1e9,5", "9999999999,5", "nan,nan", "4,,4", "4,9,4,4")
# no file can be made there
NOWHERE = ("{file}/x", "/proc/x/y", "{long}")
NAMES = ("", "foo", "\x1b[31m", "\udcff")

# of each command something that would run
HOW = ["--device", "cpu", "--dtype", "float32"]
DEMO = ["demo", "--model", "{tiny}", "--data", "{rows}", "--out", "{out}", *HOW]
LINEAR = ["bench", "linear", "--shape", "24,40", *HOW]
MODEL = ["bench", "model", "--case", "llama-3.1-8b", "--layers", "1", *HOW]
PLAN = ["plan", "--gpu", "H200", "--case", "square-2048"]
TUNE = ["tune", "--shape", "32,64", "--dtype", "float16", "--out", "{out}/tuned.json"]
STUDY = ["study", "rank", "--quick", "--device", "cpu", "--out", "{out}"]
ADVISE = ["advise", "--model", "{tiny}", "--tokens", "1000"]
# the numbers that are right for an option are left out
OPTIONS = (
    (DEMO, ("steps", "batch-size", "seq-len", "rank", "lr"), ()),
    (DEMO, ("seed",), ("0",)),
    (LINEAR, ("m", "rank", "rounds", "seconds", "timeout"), ()),
    (["bench", "group", "--shape", "24,8,40", *HOW], ("m", "rank"), ()),
    (["bench", "layer", "--shape", "16,16,8,4,24", *HOW], ("m", "rank"), ()),
    (["bench", "moe", "--shape", "4,2,32,32", *HOW], ("m", "rank"), ()),
    (["bench", "memory", *HOW], ("m", "rank"), ()),
    (MODEL, ("layers", "tokens", "batch", "accumulate", "rank", "rounds", "seconds"), ()),
    (PLAN, ("m", "rank"), ()),
    (TUNE, ("m", "rank", "rounds"), ()),
    (TUNE, ("dropout",), ("0",)),
    (STUDY, ("seeds", "workers", "base-steps"), ()),
    (STUDY, ("seed",), ("0",)),
    (["advise", "--model", "{tiny}"], ("tokens", "episodes"), ()),
    (ADVISE, ("rank", "length", "micro-batch", "devices", "batch", "epochs", "rollouts"), ()),
)
LINES = [
    *([*argv, f"--{name}={n}"] for argv, names, right in OPTIONS for name in names for n in NUMBERS if n not in right),
    *([*argv, "--device", name] for argv in (DEMO, LINEAR, MODEL, STUDY, TUNE) for name in DEVICES),
    *([*LINEAR, f"--{option}", path] for option in ("json", "csv") for path in ("{folder}", "{fifo}", "/dev/null")),
    *([*LINEAR, f"--{option}", path] for option in ("json", "csv", "plot") for path in NOWHERE),
    *([*LINEAR, option, path] for option in ("--plot", "--baselines") for path in ("{file}", "{fifo}", "/dev/full")),
    *([*LINEAR, "--baselines", path] for path in ("{missing}", "{folder}", "{syntax}")),
    *([*argv, "--out", path] for argv in (DEMO, STUDY) for path in ("{file}", "{fifo}", *NOWHERE)),
    *([*TUNE, "--out", path] for path in ("{folder}", "{fifo}", "{file}", "/dev/zero", *NOWHERE)),
    *(
        ["bench", kind, f"--shape={text}", *HOW]
        for kind in ("linear", "group", "layer", "moe")
        for text in SHAPES
        if (kind, text) != ("group", "4,9,4,4")
    ),
    *([*argv, f"--shape={text}"] for argv in (["plan", "--gpu", "H200"], ["tune"]) for text in SHAPES),
    *(["plan", "--gpu", "H200", f"--{option}={name}"] for option in ("case", "moe") for name in NAMES),
    *([*argv, f"--gpu={name}"] for argv in (PLAN, ADVISE, [*TUNE, "--dry-run"]) for name in NAMES),
    *([*LINEAR, f"--{option}={name}"] for option in ("only", "base") for name in NAMES),
    *(["study", name] for name in NAMES),
    *(
        [*argv, "--model", path]
        for argv in (ADVISE, DEMO, ["tune"])
        for path in ("{missing}", "{folder}", "{file}", "{fifo}", "/dev/zero", "{long}")
    ),
    *(["advise", "--tokens", "9", "--model", f"{{configs}}/{name}"] for name in CONFIGS if name not in GOOD),
    *(["tune", "--model", f"{{configs}}/{name}"] for name in ("empty", "binary", "list", "negative", "no-inner")),
    *([*DEMO, "--model", f"{{configs}}/{name}"] for name in ("empty", "binary", "type-unknown", "negative", "remote")),
    *([*DEMO, "--data", path] for path in ("{missing}", "{folder}", "{fifo}", *(f"{{data}}/{name}" for name in DATA))),
    *(
        ["advise", "--model", "{tiny}", "--data", path]
        for path in ("{missing}", "{folder}", "{fifo}", *(f"{{data}}/{name}" for name in DATA))
    ),
    *(
        [*argv, "--model", f"{{weights}}/{name}"]
        for argv in (DEMO, ["advise", "--data", "{rows}", "--probe", "1"])
        for name in ("pickle", "torch", "empty", "cut", "none", "tokenizer")
    ),
    *(["advise", "--model", "{tiny}", "--data", "{rows}", f"--probe={n}"] for n in NUMBERS),
    *([*STUDY[:-1], f"{{studies}}/{name}"] for name in (*STUDIES, "folder")),
    ["bench"],
    ["bench", "foo"],
    [*MODEL, "--base", "HEAD"],
    ["plan"],
    ["doctor", "x"],
]  # fmt: skip


class _Evil:
    def __reduce__(self):
        return pytest.fail, ("a pickle was read",)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """What the names in braces stand for."""
    root = tmp_path_factory.mktemp("odd")
    tiny = root / "tiny"
    tiny_models.tiny().save_pretrained(tiny)
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "a": 2, "b": 3}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")
    fast.chat_template = "{{ messages[0].content + 'x' }}"
    fast.save_pretrained(tiny)
    (root / "folder").mkdir()
    (root / "file").write_text("x")
    (root / "rows").write_text(f"{json.dumps(ROW)}\n" * 5)
    os.mkfifo(root / "fifo")
    for name, content in CONFIGS.items():
        shutil.copytree(tiny, root / "configs" / name)
        _write(root / "configs" / name / "config.json", content)
    for name, content in DATA.items():
        _write(root / "data" / name, content)
    for name, content in STUDIES.items():
        mine = content | {"code": record.code()} if isinstance(content, dict) else content
        _write(root / "studies" / name / "a.json", mine)
    (root / "studies" / "folder" / "a.json").mkdir(parents=True)
    weights = (tiny / "model.safetensors").read_bytes()
    for name, file, content in (
        ("pickle", "pytorch_model.bin", pickle.dumps(_Evil())),
        ("torch", "consolidated.00.pth", b""),
        ("empty", "model.safetensors", b""),
        ("cut", "model.safetensors", weights[:-100]),
        ("none", "README.md", b""),
        ("tokenizer", "tokenizer.json", b"{}"),
    ):
        shutil.copytree(tiny, root / "weights" / name)
        if name != "tokenizer":
            (root / "weights" / name / "model.safetensors").unlink()
        _write(root / "weights" / name / file, content)
    _write(root / "syntax" / "frozen.py", b"def (")
    return {path.name: str(path) for path in root.iterdir()} | {
        "missing": str(root / "missing" / "x"),
        "long": str(root / ("a" * 300)),
        "out": str(root / "out"),
    }


def _write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = content if isinstance(content, bytes | str) else json.dumps(content)
    path.write_bytes(text.encode() if isinstance(text, str) else text)


@pytest.fixture
def work(monkeypatch):
    """What would be measured or trained: listed, and not done."""
    done = []

    def instead_of(module, name, result):
        monkeypatch.setattr(module, name, lambda *args, **kwargs: done.append(name) or result)

    instead_of(bench, "_run_cases", 0)
    instead_of(compare, "_compare", {})
    instead_of(demo, "_train", False)
    instead_of(study, "_study", SimpleNamespace(outcome="held"))
    instead_of(tune, "_measure_all", 0)
    monkeypatch.setattr(peaks, "matmul_flops", lambda dtype, device: 1e11)
    return done


@pytest.fixture
def here(monkeypatch):
    """`lorafuse tune` without --device runs as on an H200."""
    target = tune.live_target
    available = (("eager", ""), ("triton", ""), ("cuda", "not built"))
    monkeypatch.setattr(
        tune, "live_target", lambda name: target(name) if name else Target(torch.device("cpu"), find("H200"), available)
    )


def filled(argv, places):
    return [argument.format_map(places) if "{" in argument else argument for argument in argv]


def _name(argv):
    return " ".join(argument for argument in argv if argument not in HOW)


@pytest.mark.parametrize("argv", LINES, ids=[ascii(_name(argv)) for argv in LINES])
def test_it_is_refused_in_one_line_before_any_work(argv, places, work, here, capsys):
    try:
        status = main(filled(argv, places))
        lines = 1
    except SystemExit as stop:
        # argparse, with the usage before
        status, lines = stop.code, None
    error = capsys.readouterr().err
    assert status == 2
    assert work == []
    assert lines is None or error.count("\n") == lines, error
    assert error.splitlines()[-1].startswith("lorafuse")
    assert all(line.isprintable() for line in error.splitlines())


@pytest.mark.parametrize("argv", [DEMO, LINEAR, MODEL, PLAN, TUNE, STUDY, ADVISE], ids=lambda argv: " ".join(argv[:2]))
def test_the_same_without_what_is_odd_runs(argv, places, work, here, capsys):
    assert main(filled(argv, places)) == (130 if argv is DEMO else 0)
    assert len(work) == (argv not in (PLAN, ADVISE))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("folder", "text"),
    [
        ("{file}", "it cannot be written (Not a directory); name another by --out or LORAFUSE_CACHE_DIR"),
        ("{file}/x", "it cannot be written (Not a directory); name another by --out or LORAFUSE_CACHE_DIR"),
        ("/proc/x", "it cannot be written (No such file or directory); name another by --out or LORAFUSE_CACHE_DIR"),
        ("relative", "LORAFUSE_CACHE_DIR relative: processes that start in another folder would not find it"),
        ("~nobody-of-this-name/x", "the home folder is not known; name another file by --out or LORAFUSE_CACHE_DIR"),
    ],
)
def test_a_cache_folder_that_cannot_be_is_named_before_any_work(folder, text, places, work, here, monkeypatch, capsys):
    monkeypatch.setenv("LORAFUSE_CACHE_DIR", folder.format_map(places))
    assert main(TUNE[:-2]) == 2
    error = capsys.readouterr().err
    assert text in error
    assert error.count("\n") == 1
    assert work == []


def test_a_cache_folder_that_does_not_exist_is_made(work, here, monkeypatch, tmp_path):
    monkeypatch.setenv("LORAFUSE_CACHE_DIR", str(tmp_path / "new" / "cache"))
    assert main(TUNE[:-2]) == 0
    assert work == ["_measure_all"]
    assert (tmp_path / "new" / "cache" / "tuned").is_dir()


@pytest.mark.parametrize("name", GOOD)
def test_only_models_of_its_kind_are_built_of_a_configuration(name, places, monkeypatch, capsys):
    monkeypatch.setattr(transformers, "pipeline", lambda *args: pytest.fail("a function was called"))
    for foreign in (transformers.Trainer, transformers.BertModel):
        monkeypatch.setattr(foreign, "__init__", lambda *args: pytest.fail("another class was made"))
    assert main(filled(["advise", "--tokens", "9", "--model", f"{{configs}}/{name}"], places)) == 0
    assert "all, per rank" in capsys.readouterr().out
