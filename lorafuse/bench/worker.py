"""The process of one variant: `python -m lorafuse.bench.worker PARENT` answers requests, one line of JSON each.

It makes the problem's inputs from the same seed, checks its variant against the formula, and times single calls on
request, so that variants of several processes take turns like those of one. Requests and answers use copies of standard
input and output: a peer's output goes to standard error, and it reads nothing. The process ends when PARENT does.
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

from lorafuse.bench import group, layer, linear, moe, plugins, quantized
from lorafuse.bench.limits import is_out_of_memory
from lorafuse.bench.problem import Problem, wrong
from lorafuse.bench.runner import Runner
from lorafuse.testing.timing import Clock

__all__ = ["PROBLEMS", "main"]

_KINDS: tuple[type[Problem], ...] = (
    linear.Linear,
    quantized.Quantized,
    group.Group,
    group.Mlp,
    layer.DecoderLayer,
    moe.Experts,
)
PROBLEMS = {one.kind: one for one in _KINDS}


class _Worker:
    """The requests by name; each returns a JSON value."""

    runner: Runner
    trainee: Any

    def build(
        self, kind: str, problem: dict[str, Any], file: str, name: str, device: str, threads: int, graphs: bool
    ) -> str:
        """Build a variant and check it; "" or the reason why it is wrong."""
        torch.set_num_threads(threads)
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in problem.items()}
        made, where = PROBLEMS[kind](**fields), torch.device(device)
        (baseline,) = (one for one in plugins.load_file(Path(file), kind, where) if one.name == name)
        given = made.inputs(where)
        variant = baseline.variant(made, given)
        reason = wrong(variant, made.references(given)[baseline.trains], made.shaped)
        if not reason:
            self.runner = Runner(variant, Clock(where), graphs)
        return reason

    def launched(self) -> str:
        return self.runner.launched

    def once(self, warm: bool = False) -> tuple[float, float]:
        return self.runner.once(warm)

    def memory(self) -> dict[str, int]:
        return asdict(self.runner.memory())

    def train(self, model: dict[str, Any], file: str, name: str, device: str, threads: int) -> dict[str, Any]:
        """Build a whole model for training; what its baseline says of it."""
        # these import transformers, which layers do not need
        from lorafuse.bench import training, transformer
        from lorafuse.bench.transformer_cost import Sizes

        torch.set_num_threads(threads)
        where = torch.device(device)
        (baseline,) = (one for one in plugins.load_file(Path(file), "model", where) if one.name == name)
        known, sizes = transformer.Model(**model.pop("model")), Sizes(**model.pop("sizes"))
        given = transformer.Given(known, sizes, getattr(torch, model.pop("dtype")), where, **model)
        self.trainee, facts = training.built(baseline, given)
        return facts | {"trained": sum(p.numel() for p in self.trainee.trained)}

    def loss(self, ids: list[Any]) -> float:
        return self.trainee.evaluate(torch.tensor(ids, device=self.trainee.device))

    def step(self, ids: list[Any]) -> tuple[float, float]:
        self.trainee.step(torch.tensor(ids, device=self.trainee.device))
        return self.trainee.seconds[-1], self.trainee.losses[-1]

    def step_memory(self, ids: list[Any]) -> dict[str, int]:
        return self.trainee.memory(torch.tensor(ids, device=self.trainee.device))


def _end_with(parent: int) -> None:
    """Let the kernel end this process when `parent` ends: a peer that hangs does not read the end of its input."""
    PR_SET_PDEATHSIG = 1
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:
        sys.exit(f"process {parent}, the parent of this one, has ended")


def main() -> int:
    """Answer every line of standard input until it ends."""
    _end_with(int(sys.argv[1]))
    requests, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    worker = _Worker()
    for line in requests:
        request = json.loads(line)
        try:
            answer = {"result": getattr(worker, request.pop("do"))(**request)}
        except Exception as error:
            # a peer's code may raise anything; the parent reports it under the variant's name
            traceback.print_exc()
            kind = "memory" if is_out_of_memory(error) else "error"
            answer = {kind: f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
