"""What documentation, comments and docstrings name exists (T0): paths, targets, flags, variables, Python names."""

import argparse
import ast
import fnmatch
import functools
import importlib
import io
import pkgutil
import re
import runpy
import sys
import tokenize
from pathlib import Path

import pytest

from lorafuse import cli, env, errors, versions

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "bench"))

import gpu  # noqa: E402
import hopper  # noqa: E402
import schedule  # noqa: E402

pytestmark = pytest.mark.no_poison

DOCS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "bench/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
SUFFIXES = {
    ".py",
    ".md",
    ".toml",
    ".txt",
    ".json",
    ".cpp",
    ".cu",
    ".cuh",
    ".h",
    ".sh",
    ".yml",
    ".png",
    ".svg",
}
# files and folders whose comments are checked
CODE_ROOTS = (
    "bench", "docs", "examples", "setup.py", "tests", *(f"lorafuse/{part}" for part in (
        "advise", "bench", "cli", "demo", "integrations", "nn", "study", "testing", "tune",
    )),
)  # fmt: skip
CODE_SUFFIXES = {".py", ".cpp", ".cu", ".cuh", ".h", ".hpp"}
FOLDERS = ("bench", "csrc", "docs", "examples", "lorafuse", "requirements", "tests")
# a comment may name a path from here on, or from its own folder on
BASES = [ROOT / base for base in (".", "lorafuse", "csrc", "csrc/include", "csrc/include/lorafuse")]
OTHER_PROGRAMS = re.compile(r"\b(mkdocs|pip|swift|pytest|ruff|mypy|git|apt|apt-get|nvcc|torchrun|accelerate)\b")


def code_of(markdown):
    """Lines of fenced blocks and contents of backtick spans: where a document names things, links apart."""
    fences = re.findall(r"^```\w*\n(.*?)^```", markdown, re.MULTILINE | re.DOTALL)
    prose = re.sub(r"^```\w*\n.*?^```", "", markdown, flags=re.MULTILINE | re.DOTALL)
    spans = re.findall(r"`([^`\n]+)`", prose)
    return [line for block in fences for line in block.splitlines()] + spans


def missing_links(markdown, folder, root=ROOT):
    """Links to files that are not there, from the folder of the document or, with a slash in front, from the root."""
    links = [link for link in re.findall(r"\]\(([^)#\s]+)(?:#[^)\s]*)?\)", markdown) if ":" not in link]
    return [link for link in links if not (root / link[1:] if link[0] == "/" else folder / link).exists()]


def missing_paths(markdown, root=ROOT):
    """Tokens that look like paths of this repository and are not there; what git ignores may be absent."""
    ignored = [line.strip("/ ") for line in (ROOT / ".gitignore").read_text().splitlines() if line.strip()]
    top = {path.name for path in root.iterdir()}
    missing = []
    for code in code_of(markdown):
        for token in re.findall(r"(?<![\w/:.~$-])[\w.*<>-]+(?:/[\w.*<>-]*)*", code):
            path = token.rstrip(".,")
            parts = [part for part in path.split("/") if part]
            is_file = Path(path).suffix in SUFFIXES
            is_folder = "/" in path and (parts[0] in top or path.endswith("/"))
            if not is_file and not is_folder:
                continue
            if any(fnmatch.fnmatch(part, pattern) for part in parts for pattern in ignored):
                continue
            if not list(root.glob(re.sub(r"<[^>]*>", "*", path.rstrip("/")))):
                missing.append(path)
    return missing


def code_files():
    roots = [ROOT / root for root in CODE_ROOTS]
    files = [path for root in roots for path in (root.rglob("*") if root.is_dir() else [root])]
    return sorted(path for path in files if path.suffix in CODE_SUFFIXES)


def prose_of(source, suffix):
    """Comments, and docstrings of Python, of a source text."""
    if suffix != ".py":
        return re.findall(r"//[^\n]*|/\*.*?\*/", source, re.DOTALL)
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    with_docstring = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, with_docstring)]
    return [t.string for t in tokens if t.type == tokenize.COMMENT] + [ast.get_docstring(node) or "" for node in nodes]


@functools.cache
def names_here():
    """Names of all files, and of the folders with which a path of this repository begins."""
    files = {path.name for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file()}
    heads = {path.name for base in BASES[:3] for path in base.iterdir() if path.is_dir()}
    return files | {path.name for path in ROOT.iterdir() if path.is_file()}, heads


def stale_paths(source, path):
    """Paths of this repository in comments that lead nowhere, and names of source files that no file has."""
    files, heads = names_here()
    stale = []
    for token in re.findall(r"(?<![\w/:.~$-])[\w.*<>-]+(?:/[\w.*<>-]+)*/?", "\n".join(prose_of(source, path.suffix))):
        name = re.sub(r"<[^>]*>", "*", token.rstrip(".,"))
        if "/" not in name:
            is_source = Path(name).suffix in CODE_SUFFIXES | {".md"}
            missing = is_source and not fnmatch.filter(files, name)
        else:
            is_ours = name.split("/")[0] in heads and (name.endswith("/") or Path(name).suffix)
            missing = is_ours and not any(list(base.glob(name)) for base in (*BASES, path.parent))
        if missing:
            stale.append(name)
    return stale


def missing_targets(markdown, makefile):
    known = set(re.findall(r"^([a-z][\w-]*):", makefile, re.MULTILINE))
    lines = code_of(markdown)
    named = {name for line in lines for name in re.findall(r"(?:^|[\s;&$])make ([a-z][\w-]*)", line)}
    return sorted(named - known)


def flags_by_command():
    """`{command: its flags}` from the argparse parsers themselves, those of bench/ and csrc/build.py among them."""
    actual = {one.__name__: flags_of(one.arguments()) for one in (gpu, hopper, schedule)}
    actual["build.py"] = flags_of(runpy.run_path(str(ROOT / "csrc" / "build.py"))["arguments"]())
    for name in cli.COMMANDS:
        parser = argparse.ArgumentParser()
        importlib.import_module(f"lorafuse.cli.{name}").add_arguments(parser)
        actual[name] = flags_of(parser)
    return actual


def flags_of(parser):
    """The flags of a parser and of its sub-commands."""
    flags = {flag for action in parser._actions for flag in action.option_strings}
    subs = [action.choices.values() for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return flags.union(*(flags_of(sub) for several in subs for sub in several))


def missing_flags(markdown, known):
    """Flags that the named command lacks, or, where none is named, that no command has."""
    missing = []
    for code in code_of(markdown):
        command = re.search(rf"(?:lorafuse|make) ({'|'.join(known)})\b", code)
        allowed = known[command[1]] if command else set().union(*known.values())
        for flag in re.finditer(r"(?<![\w-])--[a-z][\w-]*", code):
            if flag[0] not in allowed and not OTHER_PROGRAMS.search(code[: flag.start()]):
                missing.append(flag[0])
    return missing


def missing_variables(markdown):
    return sorted(set(re.findall(r"LORAFUSE_[A-Z_]+", markdown)) - set(env.VARIABLES))


def exists(name):
    """Whether a dotted name leads to a module or attribute; of a module that needs an absent package, by its source."""
    try:
        pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        # resolve_name takes a module that does not import for an absent attribute
        module = next((path for path in map(source_of, (name, name.rpartition(".")[0])) if path.is_file()), None)
        if module is None or imports(module):
            return False
        tops = {node.name for node in ast.parse(module.read_text()).body if hasattr(node, "name")}
        return module == source_of(name) or name.rpartition(".")[2] in tops
    return True


def source_of(name):
    return (ROOT / name.replace(".", "/")).with_suffix(".py")


def imports(path):
    """Whether a module of the package has what it needs."""
    try:
        importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    except errors.MissingDependency:
        return False
    return True


def missing_names(markdown):
    """Dotted names `lorafuse.x.y` or `torch.ops.lorafuse.x` that lead to no module or attribute."""
    pattern = r"\b(?:torch\.ops\.)?lorafuse(?:\.[A-Za-z_]\w*)+"
    names = {match for code in code_of(markdown) for match in re.findall(pattern, code)}
    return sorted(name for name in names if not exists(name))


def broken_examples(markdown):
    """Python blocks that do not parse."""
    broken = []
    for block in re.findall(r"^```python\n(.*?)^```", markdown, re.MULTILINE | re.DOTALL):
        try:
            ast.parse(block)
        except SyntaxError as error:
            broken.append(f"{error}: {block}")
    return broken


def table_of_variables(markdown):
    """`(name, default, meaning)` of each row of the environment table."""
    return re.findall(r"^\| `(LORAFUSE_\w+)` \| `([^`]*)` \| (.*) \|$", markdown, re.MULTILINE)


@pytest.mark.parametrize("path", DOCS, ids=lambda path: str(path.relative_to(ROOT)))
class TestEveryDocument:
    def test_paths_exist(self, path):
        assert missing_paths(path.read_text()) == []

    def test_links_lead_to_files(self, path):
        assert missing_links(path.read_text(), path.parent) == []

    def test_make_targets_exist(self, path):
        assert missing_targets(path.read_text(), (ROOT / "Makefile").read_text()) == []

    def test_flags_exist(self, path):
        assert missing_flags(path.read_text(), flags_by_command()) == []

    def test_variables_exist(self, path):
        assert missing_variables(path.read_text()) == []

    def test_python_names_exist(self, path):
        assert missing_names(path.read_text()) == []

    def test_examples_parse(self, path):
        assert broken_examples(path.read_text()) == []


def test_paths_in_comments_exist():
    actual = {str(path.relative_to(ROOT)): stale_paths(path.read_text(), path) for path in code_files()}
    assert {path: stale for path, stale in actual.items() if stale} == {}


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("a.py", "# see absent.py"),
        ("a.py", '"""The rule is in `plan/absent.py`."""'),
        ("a.py", 'def f():\n    """`lorafuse/absent/`"""'),
        ("a.cuh", "// compared by csrc/emu/absent.cpp"),
        ("a.hpp", "/* the rules:\n   plan/absent.py */"),
        ("a.cu", "int i = 0;  // absent_*_sm90.cuh"),
    ],
)
def test_a_stale_path_in_a_comment_is_seen(name, source):
    assert stale_paths(source, ROOT / "csrc" / name)


def test_what_is_no_stale_path_is_left_alone():
    prose = "# q/k/v, config.json, unsloth/kernels/fast_lora.py, tests/test_docs.py, `env.py`, lorafuse/<part>/*.py"
    assert stale_paths(f"{prose}\nx = 'absent.py'", ROOT / "tests" / "a.py") == []


def test_the_environment_table_is_the_code():
    expected = [(v.name, v.default, v.doc) for v in env.VARIABLES.values()]
    assert table_of_variables((ROOT / "docs/how-it-works.md").read_text()) == expected


def test_the_versions_are_the_code():
    rows = re.findall(r"^\| `(\w+)`(.*?) \| ([\d.]+) \|", (ROOT / "docs/install.md").read_text(), re.MULTILINE)
    assert {name: version for name, rest, version in rows if not rest} == versions.MINIMUM
    assert {name: version for name, rest, version in rows if rest == ", for experts"} == versions.EXPERTS


def quoted_reasons(markdown):
    """The first column of the table of reasons."""
    section = markdown.split("## What the reason says")[1].split("\n## ")[0]
    return re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE)


def test_the_reasons_are_the_codes():
    """Each is part of a message in the integrations, whose literals are joined over lines."""
    sources = " ".join(path.read_text() for path in sorted((ROOT / "lorafuse" / "integrations").glob("*.py")))
    messages = re.sub(r'"\s*f?"', "", sources)
    reasons = quoted_reasons((ROOT / "docs/why-not-fused.md").read_text())
    assert len(reasons) > 10
    assert [reason for reason in reasons if reason not in messages] == []


@pytest.mark.parametrize(
    "text",
    [
        "see `lorafuse/absent.py`",
        "`absent.md`",
        "```\nlorafuse/absent/  a folder\n```",
        "`bench/absent_*.json`",
    ],
)
def test_a_missing_path_is_seen(text):
    assert missing_paths(text)


@pytest.mark.parametrize("link", ["docs/absent.md", "/docs/absent.md", "absent.md#part"])
def test_a_missing_link_is_seen(link):
    assert missing_links(f"[x]({link})", ROOT) == [link.partition("#")[0]]
    assert (
        missing_links("[x](../README.md) [y](hopper.md#a) [z](/docs/hopper.md) [w](https://x.y/z)", ROOT / "docs") == []
    )


def test_what_is_no_path_is_left_alone():
    assert missing_paths("`q/k/v` and `x.shape`, `lora_A.weight`, `https://example.org/a.html`") == []
    assert missing_paths("`.venv/bin/python` `lorafuse/` `README.md` `lorafuse/<part>/*.py`") == []


def test_a_missing_target_is_seen():
    assert missing_targets("`make tset` makes sure\n```\nmake demo\n```", "demo: x\ntest: y\n") == ["tset"]


def test_a_missing_flag_is_seen():
    known = {"demo": {"--seconds"}, "doctor": {"--json"}}
    assert missing_flags("`--json`, `--jsn` and `pip install --no-deps`", known) == ["--jsn"]
    assert missing_flags("```\nlorafuse demo --json\nmake demo ARGS=--seconds=3\n```", known) == ["--json"]


def test_a_missing_python_name_is_seen():
    absent = ["lorafuse.integrations.axolotl.Absent", "lorafuse.nn.absent", "lorafuse.pach"]
    right = ["lorafuse.patch", "lorafuse.integrations.axolotl", "lorafuse.integrations.axolotl.LorafusePlugin"]
    assert missing_names(f"`{'`, `'.join(absent + right)}`") == absent


def test_a_broken_example_is_seen():
    assert broken_examples("```python\nx = (\n```\n")


def test_a_missing_variable_is_seen():
    assert missing_variables("set LORAFUSE_ABSENT") == ["LORAFUSE_ABSENT"]
    assert table_of_variables("| `LORAFUSE_A` | `0` | wrong |") == [("LORAFUSE_A", "0", "wrong")]
