"""Structure (T0): which file may import what, what no file may hold, and lint. Each checker can fail."""

import ast
import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest
import warm_python

from lorafuse import env

pytestmark = pytest.mark.no_poison

ROOT = Path(__file__).parents[1]
SOURCES = sorted(p for folder in ("lorafuse", "tests", "bench", "examples") for p in (ROOT / folder).rglob("*.py"))
PACKAGE = sorted((ROOT / "lorafuse").rglob("*.py"))
_TEXT_PATTERNS = "*.md *.toml Makefile setup.py .ci/* docs/**/*.md docs/*.py .github/**/* requirements/* csrc/**/*"
_OTHER_TEXTS = {path for pattern in _TEXT_PATTERNS.split() for path in ROOT.glob(pattern) if path.is_file()}
TEXTS = SOURCES + sorted(_OTHER_TEXTS)
MAX_LINES = 400

# part of the package: (parts of lorafuse it may import, packages outside the standard library it may import).
# Imports point one way, from the public surface down to the kernels; every part may import itself.
_LEAVES = {"errors", "env", "files", "versions"}
_BASE = _LEAVES | {"philox", "activation"}
_OPERANDS = _BASE | {"formats", "operands"}
_OPERATORS = _OPERANDS | {"kernels", "backends", "plan", "ops"}
_LIBRARY = _OPERATORS | {"functional", "nn", "adapters", "parallel", "integrations", "__init__"}
_TOOLS = _LIBRARY | {"testing", "advise"}
_MEASURING = ("advise", "bench", "cli", "demo", "study", "testing", "tune")
_HUGGING_FACE = {"peft", "transformers", "accelerate"}
_TRAINERS = {
    "axolotl",
    "lightning",
    "llamafactory",
    "nemo_automodel",
    "pydantic",
    "pytorch_lightning",
    "safetensors",
    "swift",
    "torchtune",
}
LAYERS = {
    "errors": (set(), set()),
    "env": ({"errors"}, set()),
    "files": (set(), set()),
    "versions": (set(), set()),
    "philox": (_LEAVES, {"torch"}),
    "activation": (_LEAVES | {"formats"}, {"torch"}),
    "plan": (_LEAVES | {"formats"}, set()),
    "kernels": (_BASE | {"formats", "plan"}, {"torch", "triton"}),
    "formats": (_LEAVES, {"torch"}),
    "operands": (_BASE | {"formats"}, {"torch"}),
    "backends": (_OPERANDS | {"plan", "kernels"}, {"torch", "triton"}),
    "ops": (_OPERANDS | {"backends", "plan"}, {"torch"}),
    "functional": (_OPERATORS, {"torch"}),
    "nn": (_OPERANDS | {"functional"}, {"torch"}),
    "adapters": (_OPERANDS | {"functional", "nn", "integrations"}, {"torch", "safetensors"}),
    "export": (_OPERANDS | {"functional", "nn", "adapters"}, {"torch", "safetensors"}),
    "parallel": (_OPERATORS | {"functional"}, {"torch"}),
    "integrations": (_OPERATORS | {"functional", "nn", "parallel"}, {"torch", "deepspeed"} | _HUGGING_FACE | _TRAINERS),
    "advise": (_LEAVES | {"formats", "plan"}, {"torch"} | _HUGGING_FACE),
    "__init__": (_LIBRARY, set()),
    "tune": (_TOOLS, {"torch", "triton", "rich"}),
    "testing": (_TOOLS, {"torch", "triton", "numpy"} | _HUGGING_FACE),
    "study": (_TOOLS | {"demo"}, {"torch", "numpy", "matplotlib"} | _HUGGING_FACE),
    "bench": (_TOOLS | {"demo"}, {"torch", "rich", "matplotlib", "psutil"} | _HUGGING_FACE),
    "demo": (
        _TOOLS,
        {"torch", "numpy", "rich", "matplotlib", "gguf", "reasoning_gym", "bitsandbytes", "torchao"} | _HUGGING_FACE,
    ),
    "cli": (_TOOLS | {"demo", "study", "bench", "tune"}, {"torch", "numpy", "rich", "matplotlib"} | _HUGGING_FACE),
    "__main__": ({"cli"}, set()),
}


@functools.cache
def nodes(source):
    """All nodes of a source, parsed once for all checkers."""
    return tuple(ast.walk(ast.parse(source)))


@pytest.fixture(scope="module", autouse=True)
def _parsed_here():
    yield
    # a million objects, which every full collection of later tests would visit
    nodes.cache_clear()


def imported_modules(source, module):
    """Absolute names of what a module imports, at the top or inside functions, relative imports resolved."""
    package = module if module.endswith("__init__") else module.rpartition(".")[0]
    package = package.removesuffix(".__init__")
    for node in nodes(source):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join(parents + ([base] if base else []))
            # `from lorafuse import nn` names a part, `from lorafuse.nn import LoRALinear` does not
            yield from (f"{base}.{alias.name}" if base == "lorafuse" else base for alias in node.names)


def forbidden_imports(source, module):
    """Imports of a module (dotted name, `__init__` spelled out) that `LAYERS` does not allow."""
    part = module.split(".")[1]
    if part not in LAYERS:
        return [f"{module}: {part} is not in LAYERS: give it a row"]
    inner, outer = LAYERS[part]
    actual = []
    for name in imported_modules(source, module):
        top, _, rest = name.partition(".")
        if top == "lorafuse":
            target = rest.split(".")[0]
            target = target if target in LAYERS else "__init__"
            if target != part and target not in inner:
                actual.append(f"{module} imports {name}")
        elif top not in sys.stdlib_module_names and top not in outer:
            actual.append(f"{module} imports {name}")
    return sorted(set(actual))


def test_imports_point_one_way():
    names = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in PACKAGE}
    assert [line for path in PACKAGE for line in forbidden_imports(path.read_text(), names[path])] == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("lorafuse.ops.linear", "from lorafuse import functional"),
        ("lorafuse.ops.linear", "from lorafuse.nn.linear import LoRALinear"),
        ("lorafuse.ops.linear", "from ..nn import linear"),
        ("lorafuse.backends.aten", "def f():\n    import lorafuse.ops.linear"),
        ("lorafuse.formats.int8", "from lorafuse.operands import LowRank"),
        ("lorafuse.operands", "from lorafuse.backends.protocol import Backend"),
        ("lorafuse.kernels.ragged", "from lorafuse.operands import Rows"),
        ("lorafuse.plan.choose", "import torch"),
        ("lorafuse.functional", "import triton.language as tl"),
        ("lorafuse.nn.linear", "from peft import LoraConfig"),
        ("lorafuse.nn.linear", "from lorafuse import use_backend"),
        ("lorafuse.novelty", "import torch"),
    ],
)
def test_a_wrong_import_is_seen(module, source):
    assert forbidden_imports(source, module)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("lorafuse.ops.linear", "import torch\nfrom lorafuse.backends import base\nfrom . import _define"),
        ("lorafuse.nn.__init__", "from .linear import LoRALinear"),
        ("lorafuse.cli.demo", "from lorafuse import patch"),
    ],
)
def test_a_right_import_is_not_reported(module, source):
    assert forbidden_imports(source, module) == []


# packages of others, and the parts of this one that measure, study or test
HEAVY = ("triton", "peft", "transformers", "rich", *(f"lorafuse.{part}" for part in _MEASURING))


@pytest.fixture(scope="module")
def loaded():
    """The heavy packages that a new process has loaded after each statement, and whether CUDA is initialized."""
    code = f"""
import sys
for statement in ("import lorafuse", "import rich", "import lorafuse.tune"):
    exec(statement)
    import torch
    print(*[name for name in {HEAVY} if name in sys.modules], torch.cuda.is_initialized())
"""
    done = warm_python.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True, timeout=300
    )
    return [line.split() for line in done.stdout.splitlines()]


def test_import_is_lean(loaded):
    assert loaded[0] == ["False"]


def test_a_heavy_import_is_seen(loaded):
    assert loaded[1:] == [["rich", "False"], ["rich", "lorafuse.tune", "False"]]


def swallowed_exceptions(source):
    """Line numbers of handlers whose whole body is `pass`."""
    return [
        node.lineno
        for node in nodes(source)
        if isinstance(node, ast.ExceptHandler) and all(isinstance(child, ast.Pass) for child in node.body)
    ]


def calls_to_print(source):
    return [
        node.lineno
        for node in nodes(source)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]


def environment_reads(source):
    """Line numbers that name `os.environ` or `os.getenv`, however os is imported."""
    lines = []
    for node in nodes(source):
        names = {node.attr} if isinstance(node, ast.Attribute) else set()
        if isinstance(node, ast.ImportFrom):
            names = {alias.name for alias in node.names}
        if names & {"environ", "environb", "getenv", "putenv"}:
            lines.append(node.lineno)
    return lines


def forbidden_words(text):
    """Line numbers with notes to self, or with paths that exist on one machine only."""
    notes = re.compile(r"\b(TO[D]O|FIX[M]E|XX[X])\b")
    # home folders, and folders that lie beside a checkout and not in it
    machine = re.compile(r"(?<![\w.~-])/(home|root|work|Users)/|(?<!\w)[.]library\b|(?<![\w-])shared[/]")
    return [i for i, line in enumerate(text.splitlines(), 1) if notes.search(line) or machine.search(line)]


# words of the list below the glossary of CONTRIBUTING.md: each has a term there
NOT_TERMS = {"found", "way", "ways", "said", "wanted", "beside", "taken", "odd", "share", "told"}


def names_that_are_no_terms(source):
    """Line numbers at which a variable, an argument or a function has a name of `NOT_TERMS`."""
    lines = []
    for node in nodes(source):
        match node:
            case ast.Name(id=name, ctx=ast.Store()) | ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                lines += [node.lineno] if name in NOT_TERMS else []
            case ast.arg(arg=name) | ast.MatchAs(name=name):
                lines += [node.lineno] if name in NOT_TERMS else []
    return sorted(lines)


def constants_of_modules(source):
    """Line numbers in Triton kernels at which a constant is read as `module.NAME`: Triton's cache does not know it.

    A constant of the kernel's own file is part of the key, and what tl holds is Triton's.
    """
    imports = [node for node in nodes(source) if isinstance(node, (ast.Import, ast.ImportFrom))]
    modules = {alias.asname or alias.name for node in imports for alias in node.names} - {"tl"}
    return [
        node.lineno
        for kernel in nodes(source)
        if isinstance(kernel, ast.FunctionDef) and any("triton.jit" in ast.unparse(d) for d in kernel.decorator_list)
        for node in ast.walk(kernel)
        if isinstance(node, ast.Attribute) and node.attr.isupper()
        if isinstance(node.value, ast.Name) and node.value.id in modules
    ]


def _is_private(name):
    return name.startswith("_") and not name.startswith("__")


def private_names(source):
    """Line numbers at which a test reaches for a name of the package that begins with an underscore."""
    imports = [n for n in nodes(source) if isinstance(n, ast.ImportFrom) and (n.module or "").startswith("lorafuse")]
    # a module of this name is a part of a folder, no part of another module
    lines = [n.lineno for n in imports if n.module != "lorafuse.cli" and any(_is_private(a.name) for a in n.names)]
    ours = {alias.asname or alias.name for node in imports for alias in node.names} | {"lorafuse"}
    for node in nodes(source):
        match node:
            case ast.Attribute(value=ast.Name(id=owner), attr=name) if owner in ours and _is_private(name):
                lines.append(node.lineno)
            case ast.Call(
                func=ast.Attribute(attr="setattr" | "delattr" | "object"),
                args=[ast.Name(id=owner), ast.Constant(value=str(name)), *_],
            ) if owner in ours and _is_private(name):
                lines.append(node.lineno)
    return sorted(set(lines))


def _report(checker, paths):
    return [f"{path.relative_to(ROOT)}:{line}" for path in paths for line in checker(path.read_text())]


def test_no_exception_is_swallowed():
    assert _report(swallowed_exceptions, SOURCES) == []
    assert swallowed_exceptions("try:\n    f()\nexcept ValueError:\n    pass") == [3]


def test_kernels_read_constants_by_their_own_name():
    kernels = [path for path in PACKAGE if path.parent.name in ("kernels", "formats")]
    assert _report(constants_of_modules, kernels) == []
    head = "import triton.language as tl; from lorafuse.kernels import common\n"
    for decorator in ("@triton.jit", '@triton.jit(do_not_specialize=["x"])'):
        assert constants_of_modules(f"{head}{decorator}\ndef f(x):\n    return x + common.SIZE") == [4]
        assert constants_of_modules(f"{head}{decorator}\ndef f(x):\n    return tl.NAN + x.T + SIZE") == []
    assert constants_of_modules(f"{head}def f(x):\n    return x + common.SIZE") == []


def test_variables_have_the_names_of_the_glossary():
    # the digests of published runs and of the nvcc record are over the text of these
    digested = {"lorafuse/study/train.py", "tests/nvcc_record.py"}
    sources = [*SOURCES, ROOT / "csrc" / "build.py"]
    assert {line.partition(":")[0] for line in _report(names_that_are_no_terms, sources)} == digested
    for source in ("1\nfound = f()", "1\ndef way(): ...", "1\nlambda said: 1", "1\n[1 for taken in x]"):
        assert names_that_are_no_terms(source) == [2]
    assert names_that_are_no_terms("share_of = x.found(wayside, odd=1)") == []


# `lorafuse.study.record.code` is a digest of these modules: another name in them, and published runs count as old
STUDIED = {"tests/tools/test_study_command.py", "tests/tools/test_study_runs.py"}


def test_tests_reach_for_public_names():
    tests = [path for path in SOURCES if path.is_relative_to(ROOT / "tests")]
    assert {line.partition(":")[0] for line in _report(private_names, tests)} == STUDIED
    for source in (
        "from lorafuse.plan.choose import _select",
        "from lorafuse.plan import choose\nchoose._select",
        "from lorafuse.plan import choose\nmonkeypatch.setattr(choose, '_select', 1)",
    ):
        assert private_names(source) == [source.count("\n") + 1]
    assert private_names("from lorafuse.cli import _common\nfrom lorafuse import nn\nnn.__file__, self._select") == []


def test_no_test_forgets_what_others_imported():
    """`mock.patch.dict` takes every module out again that was imported under it, and classes then exist twice."""
    call = "patch." + "dict(sys.modules"
    assert [str(path) for path in SOURCES if call in path.read_text()] == []


def test_only_commands_print():
    quiet = [p for p in PACKAGE if p.relative_to(ROOT).parts[1] not in ("cli", "demo")]
    assert _report(calls_to_print, quiet) == []
    assert calls_to_print("x = 1\nprint(x)") == [2]


def test_only_env_reads_the_environment():
    assert _report(environment_reads, [p for p in PACKAGE if p.name != "env.py"]) == []
    for source in ("import os\nos.environ['A']", "import os\nos.getenv('A')", "1\nfrom os import environ"):
        assert environment_reads(source) == [2]


def test_every_variable_is_listed():
    used = {name for path in PACKAGE for name in re.findall(r"LORAFUSE_[A-Z_]+", path.read_text())}
    assert used <= set(env.VARIABLES)


def test_no_notes_to_self_and_no_machine_paths():
    assert _report(forbidden_words, TEXTS) == []
    # a stroke stands where the forbidden text is cut, or this file would report itself
    for planted in ("# TO|DO: later", "cd /wo|rk/x", "../sha|red/x", "/ro|ot/.cache", "the .lib|rary"):
        assert forbidden_words(f"fine\n{planted.replace('|', '')}") == [2], planted
    assert forbidden_words("in shared memory, work/unit, https://x.org/work") == []


def too_long(lines_by_name):
    return [name for name, count in lines_by_name.items() if count > MAX_LINES]


def test_no_file_has_two_jobs():
    assert too_long({str(path.relative_to(ROOT)): path.read_text().count("\n") for path in SOURCES}) == []
    assert too_long({"a.py": MAX_LINES, "b.py": MAX_LINES + 1}) == ["b.py"]


def _lint(*command, cwd=ROOT):
    command = [sys.executable, "-m", *command]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, timeout=300)
    return done.returncode, done.stdout + done.stderr


LINTERS = {"check": ("ruff", "check", "."), "format": ("ruff", "format", "--check", "."), "types": ("mypy",)}


@pytest.mark.parametrize("linter", LINTERS)
def test_lint(linter):
    code, output = _lint(*LINTERS[linter])
    assert code == 0, output


@pytest.mark.parametrize("linter", LINTERS)
def test_lint_can_fail(linter, tmp_path):
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    (tmp_path / "setup.py").write_text("import os\nx : int = 'one'\n")
    (tmp_path / "lorafuse").mkdir()
    (tmp_path / "lorafuse" / "__init__.py").write_text("")
    code, output = _lint(*LINTERS[linter], cwd=tmp_path)
    assert code == 1, output
    assert "setup.py" in output
