"""A process of its own for one variant: `python -m lorafuse.bench.worker`, spoken to in lines of JSON.

It makes the problem's inputs from the same seed, checks its variant against the formula, and times it when asked, so
that variants of several processes take turns as those of one process do. Questions and answers go through copies of
standard input and output: what a peer prints goes to standard error, and it reads nothing. The argument is the id of
the process that asks; without it this one ends.
"""

import ctypes
import json
import os
import signal
import sys
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from lorafuse.bench import group, linear, moe, plugins
from lorafuse.bench.limits import is_out_of_memory
from lorafuse.bench.problem import Problem, wrong
from lorafuse.bench.runner import Runner
from lorafuse.testing.timing import Clock

__all__ = ["PROBLEMS", "main"]

PROBLEMS: dict[str, type[Problem]] = {one.kind: one for one in (linear.Linear, group.Group, group.Mlp, moe.Experts)}


class _Worker:
    """The commands, by name; each answers with what can be written as JSON."""

    runner: Runner

    def build(
        self, kind: str, problem: dict[str, Any], file: str, name: str, device: str, threads: int, graphs: bool
    ) -> str:
        """Build a variant and check it. "" or what is wrong."""
        torch.set_num_threads(threads)
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in problem.items()}
        made, where = PROBLEMS[kind](**fields), torch.device(device)
        path = Path(file)
        (baseline,) = (one for one in plugins.load_file(path, kind, where) if one.name == name)
        given = made.inputs(where)
        variant = made.variant(name, baseline.module, given, **baseline.options)
        said = wrong(variant, made.references(given)[baseline.trains], made.shaped)
        if not said:
            self.runner = Runner(variant, Clock(where), graphs)
        return said

    def launched(self) -> str:
        return self.runner.launched

    def once(self) -> tuple[float, float]:
        return self.runner.once()

    def memory(self) -> dict[str, int]:
        return asdict(self.runner.memory())


def _end_with(parent: int) -> None:
    """Let the kernel end this process when `parent` ends, for a peer that hangs reads no end of input."""
    PR_SET_PDEATHSIG = 1
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:
        sys.exit(f"process {parent}, which asked for this one, has ended")


def main() -> int:
    """Answer every line of standard input until it ends."""
    _end_with(int(sys.argv[1]))
    questions, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    worker = _Worker()
    for line in questions:
        asked = json.loads(line)
        try:
            answer = {"result": getattr(worker, asked.pop("do"))(**asked)}
        except Exception as error:
            # a peer's process must answer whatever its code raises; it is reported under the variant's name
            traceback.print_exc()
            kind = "memory" if is_out_of_memory(error) else "error"
            answer = {kind: f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
