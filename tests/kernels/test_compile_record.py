"""The record of what was compiled (T3): every input of the compiler changes a digest, and a false record is seen."""

import json

import pytest
from test_compile import compiler, false_entries

from lorafuse.testing.compile_only import Resources
from lorafuse.testing.compile_record import without_comments

pytestmark = [pytest.mark.no_poison, pytest.mark.first]

# a sample of each kernel, and what becomes of their digests; nothing is compiled
DIGESTS = """
import ast, functools, json, sys
from dataclasses import replace
import triton
from triton.runtime.jit import JITCallable
import lorafuse.kernels.combine
from lorafuse.testing import compile_only
from lorafuse.testing.compile_only import Resources, compile_variants, sample, variants

# Triton parses all sources for each of the digests, and changes no tree
ast.parse = functools.cache(ast.parse)
every = variants("sm_90", False)
names = sample(every)
codebook = next(variant.name for variant in every if variant.name.startswith("decode codebook "))
chosen = [variant for variant in every if variant.name in names or variant.name == codebook]

def label(variant):
    # kernels that decode have one configuration
    return variant.kernel if variant.kernel != "decode" else "decode " + variant.name.split()[1]

def digests(chosen=chosen, target="sm_90"):
    found = compile_variants(chosen, target, lambda variant, digest: Resources(0, 0, 0, {}, digest))
    return {label(variant): resources.digest for variant, resources in zip(chosen, found)}

def changed(now):
    return sorted(kernel for kernel in before if before[kernel] != now[kernel])

def with_line(functions, line):
    sources = [function.src for function in functions]
    for function in functions:
        function._unsafe_update_src(function.src + line)
    try:
        return changed(digests())
    finally:
        for function, source in zip(functions, sources):
            function._unsafe_update_src(source)

before = digests()
kernels = {f"{module.__name__}.{name}": function
           for module in list(sys.modules.values()) if module.__name__.startswith("lorafuse.kernels.")
           for name, function in vars(module).items()
           if isinstance(function, JITCallable) and function.module == module.__name__}
out = {"kernels": sorted(before), "nothing": changed(digests())}
out["a comment"] = with_line(kernels.values(), "\\n    # said\\n\\n    # twice  \\n")
out["a line"] = {name: with_line([f], "\\n    pass") for name, f in kernels.items()}
wider = [replace(variant, config=replace(variant.config, warps=2 * variant.config.warps)) for variant in chosen]
out["warps"] = changed(digests(wider))
more = [replace(v, config=replace(v.config, stages=v.config.stages + 1)) for v in chosen]
out["stages"] = changed(digests(more))
out["alignment"] = changed(digests([replace(variant, aligned=not variant.aligned) for variant in chosen]))
out["architecture"] = changed(digests(target="sm_100"))
version, triton.__version__ = triton.__version__, "3.6.1"
out["Triton"] = changed(digests())
triton.__version__ = version
compile_only._INSTRUCTIONS += ("IMMA",)
out["what is read"] = changed(digests())
print(json.dumps(out))
"""

# what a falsified record does to the variants of one kernel
FALSIFIED = """
import json
from dataclasses import asdict, replace
from lorafuse.testing.compile_only import compile_variants, sample, variants

chosen = [variant for variant in variants("sm_90", False) if variant.config.kernel == "reduce"]
true = compile_variants(chosen, "sm_90")
record = [replace(r, registers=r.registers - 1) for r in true]
by_digest, names = {r.digest: r for r in record}, sample(chosen)
found = compile_variants(chosen, "sm_90", lambda v, digest: None if v.name in names else by_digest[digest])
tables = {"true": true, "record": record, "found": found}
print(json.dumps({key: {v.name: asdict(r) for v, r in zip(chosen, table)} for key, table in tables.items()}))
"""


@pytest.fixture(scope="module")
def digests():
    return json.loads(compiler("-c", DIGESTS).stdout)


def configured(digests):
    """Warps and alignment of kernels that decode and route, of DoRA's and of activations of many adapters are their
    launchers' own.
    """
    fixed = [kernel for kernel in digests["kernels"] if kernel.startswith(("decode ", "route_"))]
    assert len(fixed) > 3
    fixed += ["row_norms", "columns_backward", "gates", "gates_backward"]
    return [kernel for kernel in digests["kernels"] if kernel not in fixed]


def test_comments_change_nothing(digests):
    assert digests["nothing"] == []
    assert digests["a comment"] == []


def test_a_line_changes_every_kernel_that_it_is_part_of(digests):
    # tables of tiles and the sum over choices have no configuration to compile, and are not on record
    apart = {"lorafuse.kernels.rows._ragged_tiles_kernel", "lorafuse.kernels.combine._combine_kernel"}
    assert {name for name, kernels in digests["a line"].items() if not kernels} == apart
    assert {len(kernels) for kernels in digests["a line"].values()} > {1, 2}, "helpers are part of several kernels"


def test_alignment_changes_all_but_sums_of_partials(digests):
    assert digests["alignment"] == [kernel for kernel in configured(digests) if kernel != "reduce"]


def test_warps_change_all_that_have_a_configuration(digests):
    assert digests["warps"] == configured(digests)


@pytest.mark.parametrize("given", ["architecture", "Triton", "what is read"])
def test_every_other_input_changes_all_digests(digests, given):
    assert digests[given] == digests["kernels"]


def test_a_constexpr_changes_a_digest(digests):
    assert "y" in digests["stages"]


def test_a_falsified_record_is_seen():
    tables = json.loads(compiler("-c", FALSIFIED).stdout)
    true, record, actual = ({n: Resources(**r) for n, r in table.items()} for table in tables.values())
    # as in `make test`: one is compiled and differs, the others are what the record says
    assert len(true) > 1
    assert len(false_entries(record, actual)) == 1
    # as in `make test-compile`
    assert false_entries(record, true).keys() == true.keys()
    assert false_entries(true, true) == {}


def test_only_comments_and_docstrings_are_cut():
    source = 'def f(x):  # why\n    """What.\n\n    # more\n    """\n    # how\n\n    return "#" + x  # that\n'
    assert without_comments(source) == 'def f(x):\n    return "#" + x'
