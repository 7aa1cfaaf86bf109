"""A process of its own for one variant: `python -m lorafuse.bench.worker`, spoken to in lines of JSON.

It makes the problem's inputs from the same seed, checks its variant against the formula, and times it when asked, so
that variants of several processes take turns as those of one process do. Standard output carries the answers only.
"""

import json
import os
import sys
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from lorafuse.bench import group, linear, moe, plugins
from lorafuse.bench.problem import Problem
from lorafuse.bench.runner import Runner
from lorafuse.bench.variant import wrong
from lorafuse.testing.timing import Clock

__all__ = ["PROBLEMS", "main"]

PROBLEMS: dict[str, type[Problem]] = {one.kind: one for one in (linear.Linear, group.Group, moe.Experts)}


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


def main() -> int:
    """Answer every line of standard input until it ends."""
    answers = os.fdopen(os.dup(1), "w")
    # whatever else is printed must not come between the answers
    os.dup2(2, 1)
    worker = _Worker()
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            answer = {"result": getattr(worker, asked.pop("do"))(**asked)}
        except Exception as error:
            # a peer's process must answer whatever its code raises; it is reported under the variant's name
            traceback.print_exc()
            kind = "memory" if isinstance(error, MemoryError | torch.OutOfMemoryError) else "error"
            answer = {kind: f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
