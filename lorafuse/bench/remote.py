"""A variant that another process runs, asked for its times like one of this process."""

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from lorafuse.bench.plugins import Baseline
from lorafuse.bench.problem import Problem
from lorafuse.bench.result import Failed
from lorafuse.testing.memory import Held

__all__ = ["TIMEOUT", "RemoteRunner"]

# seconds for one answer: peers import half of the ecosystem, compile and tune their kernels before the first
TIMEOUT = 600.0
# seconds for a process whose answers have ended to end itself
_LAST_WORDS = 10.0


class RemoteRunner:
    """Has the methods of `Runner`; `wrong` is what the gate in that process said.

    `tree` is the checkout whose lorafuse runs; None is the one that runs here. Raises Failed, with the reason, when the
    process ends, what it runs raises, or an answer takes longer than `timeout` seconds; MemoryError when it ran out of
    memory. The process ends with this one, however that ends; `close` also ends what it started.
    """

    def __init__(
        self,
        name: str,
        problem: Problem,
        baseline: Baseline,
        device: torch.device,
        graphs: bool = True,
        tree: Path | None = None,
        timeout: float = TIMEOUT,
    ) -> None:
        self.name, self._timeout = name, timeout
        tree = tree or Path(__file__).parents[2]
        # `close` closes it
        self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", "lorafuse.bench.worker", str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            # where -m looks first
            cwd=tree,
            # a group of its own, so that `close` reaches what a peer starts: compilers, pools of workers
            start_new_session=True,
        )
        try:
            self.wrong = self._ask(
                "build",
                kind=problem.kind,
                problem=asdict(problem),
                file=str(baseline.file.resolve()),
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
        """End the process and what it started; again is nothing."""
        self._end()
        self._errors.close()

    def _end(self) -> int:
        """Kill the process and its group, and give its status."""
        # not after it was waited for: the number of the group could be another's by then
        if self._process.returncode is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        return self._process.wait()

    def _ask(self, what: str, **arguments: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        if self._process.returncode is not None:
            raise Failed("its process has ended")
        try:
            self._process.stdin.write(json.dumps({"do": what, **arguments}) + "\n")
            self._process.stdin.flush()
            # every question has one answer, so nothing waits in the buffer of stdout
            if not select.select([self._process.stdout], [], [], self._timeout)[0]:
                last = self._last_words()
                self._end()
                raise Failed(f"no answer in {self._timeout:g} seconds" + (f", its last line: {last}" if last else ""))
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise Failed(self._how_it_ended())
        answer = json.loads(line)
        if "memory" in answer:
            raise MemoryError(answer["memory"])
        if "error" in answer:
            raise Failed(answer["error"])
        return answer["result"]

    def _how_it_ended(self) -> str:
        # its answers end a moment before it does, and a kill in between would be taken for its status
        end = time.monotonic() + _LAST_WORDS
        while os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            if time.monotonic() > end:
                break
            time.sleep(0.01)
        status, last = self._end(), self._last_words()
        how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        return f"its process {how}" + (f": {last}" if last else "")

    def _last_words(self) -> str:
        """The last line that the process wrote to its standard error."""
        self._errors.seek(0)
        return self._errors.read().strip().rpartition("\n")[2]
