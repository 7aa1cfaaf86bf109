"""A variant in a process of its own, a layer or a whole model, with the methods of one in this process."""

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorafuse.bench.plugins import Baseline
from lorafuse.bench.problem import Problem
from lorafuse.bench.result import Failed
from lorafuse.testing.memory import Held

__all__ = ["TIMEOUT", "RemoteRunner", "RemoteTrainee"]

# seconds for one answer: before the first, peers import large packages, compile and tune their kernels
TIMEOUT = 600.0
# seconds between the end of a process's output and its end
_LAST_WORDS = 10.0


class _Process:
    """A worker process for one variant, which answers requests.

    `tree` is the checkout whose lorafuse runs, by default this one. A request raises Failed with the reason when the
    process ends, its code raises, or an answer takes more than `timeout` seconds; MemoryError when it runs out of
    memory. The process ends with this one in any case; `close` also ends the processes that it started.
    """

    def __init__(self, name: str, timeout: float = TIMEOUT, tree: Path | None = None) -> None:
        self.name, self._timeout = name, timeout
        # `close` closes it
        self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", "lorafuse.bench.worker", str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            # first on -m's path
            cwd=tree or Path(__file__).parents[2],
            # a group of its own, so that `close` reaches a peer's compilers and workers
            start_new_session=True,
        )

    def __enter__(self) -> "_Process":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process and those it started; idempotent."""
        self._end()
        self._errors.close()

    def _end(self) -> int:
        """Kill the process and its group, and give its status."""
        # not after a wait for it: the group's number could be another's by then
        if self._process.returncode is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        return self._process.wait()

    def _request(self, what: str, **arguments: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        if self._process.returncode is not None:
            raise Failed("its process has ended")
        try:
            self._process.stdin.write(json.dumps({"do": what, **arguments}) + "\n")
            self._process.stdin.flush()
            # every request has one answer, so the buffer of stdout is empty
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
        # its output ends a moment before it does, and a kill in between would become its status
        end = time.monotonic() + _LAST_WORDS
        while os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            if time.monotonic() > end:
                break
            time.sleep(0.01)
        status, last = self._end(), self._last_words()
        how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        return f"its process {how}" + (f": {last}" if last else "")

    def _last_words(self) -> str:
        """The last line of the process's standard error."""
        self._errors.seek(0)
        return self._errors.read().strip().rpartition("\n")[2]


class RemoteRunner(_Process):
    """The methods of `Runner`; the process builds its variant when `wrong` is first read.

    Processes that are made before the first is read import their packages at the same time.
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
        super().__init__(name, timeout, tree)
        self._variant = {"kind": problem.kind, "problem": asdict(problem), "graphs": graphs}
        self._variant |= _described(baseline, device)

    @cached_property
    def wrong(self) -> str:
        """The result of the gate in that process: "" or the reason why its variant is wrong."""
        reason: str = self._request("build", **self._variant)
        return reason

    @cached_property
    def launched(self) -> str:
        """As `Runner.launched`; "" for a variant that is wrong."""
        reason: str = "" if self.wrong else self._request("launched")
        return reason

    def once(self, warm: bool = False) -> tuple[float, float]:
        """Seconds of one forward and of one backward, measured in that process."""
        # an older checkout's worker knows no warm calls
        forward, backward = self._request("once", **({"warm": True} if warm else {}))
        return forward, backward

    def memory(self) -> Held:
        """Bytes of one forward and backward beyond those alive before."""
        return Held(**self._request("memory"))


class RemoteTrainee(_Process):
    """The methods of `Trainee` for a model in that process; `facts` is what its baseline says of it.

    `model` holds the arguments of `lorafuse.bench.transformer.Given`, model and sizes as mappings, dtype as text.
    """

    trains, optimizer = "adapters", None

    def __init__(self, baseline: Baseline, model: dict[str, Any], device: torch.device, timeout: float) -> None:
        super().__init__(baseline.name, timeout)
        self.seconds: list[float] = []
        self.losses: list[float] = []
        try:
            self.facts: dict[str, Any] = self._request("train", model=model, **_described(baseline, device))
        except BaseException:
            self.close()
            raise

    def loss(self, micro: Tensor) -> float:
        """The loss of one micro-batch `[batch, tokens]`, without a step."""
        loss: float = self._request("loss", ids=micro.tolist())
        return loss

    def step(self, ids: Tensor) -> None:
        """One optimizer step, timed in that process."""
        seconds, loss = self._request("step", ids=ids.tolist())
        self.seconds.append(seconds)
        self.losses.append(loss)

    def memory(self, ids: Tensor) -> dict[str, int]:
        """As `Trainee.memory`."""
        measured: dict[str, int] = self._request("step_memory", ids=ids.tolist())
        return measured


def _described(baseline: Baseline, device: torch.device) -> dict[str, Any]:
    """What a process needs to load a baseline."""
    return {
        "file": str(baseline.file.resolve()), "name": baseline.name, "device": str(device),
        "threads": torch.get_num_threads(),
    }  # fmt: skip
