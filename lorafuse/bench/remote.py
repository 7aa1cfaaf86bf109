"""A variant that another process runs, asked for its times like one of this process."""

import json
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from lorafuse.bench.plugins import Baseline
from lorafuse.bench.problem import Problem
from lorafuse.bench.result import Failed
from lorafuse.testing.memory import Held

__all__ = ["RemoteRunner"]


class RemoteRunner:
    """Has the methods of `Runner`; `wrong` is what the gate in that process said.

    `tree` is the checkout whose lorafuse runs; None is the one that runs here. Raises Failed, with the reason, when the
    process ends or what it runs raises, MemoryError when that ran out of memory.
    """

    def __init__(
        self,
        name: str,
        problem: Problem,
        baseline: Baseline,
        device: torch.device,
        graphs: bool = True,
        tree: Path | None = None,
    ) -> None:
        self.name = name
        tree = tree or Path(__file__).parents[2]
        self._errors = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "lorafuse.bench.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            # where -m looks first
            cwd=tree,
        )
        try:
            self.wrong = self._ask(
                "build",
                kind=problem.kind,
                problem=asdict(problem),
                file=str(baseline.file),
                name=baseline.name,
                device=str(device),
                threads=torch.get_num_threads(),
                graphs=graphs,
            )
            self.launched = "" if self.wrong else self._ask("launched")
        except BaseException:
            self.close()
            raise

    def once(self) -> tuple[float, float]:
        """Seconds of one forward and of one backward, taken in that process."""
        forward, backward = self._ask("once")
        return forward, backward

    def memory(self) -> Held:
        """Bytes that one forward and backward hold beyond what was there before."""
        return Held(**self._ask("memory"))

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        self._errors.close()

    def _ask(self, what: str, **arguments: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": what, **arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            status = self._process.wait()
            self._errors.seek(0)
            last = self._errors.read().strip().rpartition("\n")[2]
            raise Failed(f"its process ended with status {status}" + (f": {last}" if last else ""))
        answer = json.loads(line)
        if "memory" in answer:
            raise MemoryError(answer["memory"])
        if "error" in answer:
            raise Failed(answer["error"])
        return answer["result"]
