"""No test waits without a limit (T0): one that hung would take the whole run with it."""

import ast
from pathlib import Path

import pytest

pytestmark = pytest.mark.no_poison

TESTS = Path(__file__).parent
# the digest of the record of nvcc is over the text of its readers; these read a file
DIGESTED = {"nvcc_record.py"}


def waits(source):
    """Line numbers of calls that run a program, or wait for a process, a thread or a barrier, without a limit."""
    lines = []
    for call in ast.walk(ast.parse(source)):
        if not isinstance(call, ast.Call) or any(keyword.arg == "timeout" for keyword in call.keywords):
            continue
        owner, _, method = ast.unparse(call.func).rpartition(".")
        is_waiting = method in ("wait", "join", "communicate") and not call.args
        # a barrier waits as long as it was made for
        if f"{owner}.{method}" == "subprocess.run" or method == "Barrier" or is_waiting and owner != "barrier":
            lines.append(call.lineno)
    return sorted(lines)


def test_no_test_waits_without_a_limit():
    files = [path for path in TESTS.rglob("*.py") if path.name not in DIGESTED]
    assert {str(path.relative_to(TESTS)): lines for path in files if (lines := waits(path.read_text()))} == {}


@pytest.mark.parametrize("call", ["subprocess.run(c)", "process.wait()", "thread.join()", "threading.Barrier(2)"])
def test_a_wait_without_a_limit_is_seen(call):
    assert waits(f"1\n{call}") == [2]
    assert waits(f"1\n{call[:-1]}, timeout=9)".replace("(, ", "(")) == []
