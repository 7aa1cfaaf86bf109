"""Everything that needs an NVIDIA GPU, in one command and under nine minutes: probes and checks first, then times.

    python bench/gpu.py --out DIR [--minutes 9]        (or: make gpu ARGS="--out DIR")
    python bench/gpu.py --out DIR --grid               what bench/README.md lists as not yet measured, and no checks
    python bench/gpu.py --collect DIR [DIR ...]        without a GPU: their results into bench/results, for make numbers

It runs from a bare checkout with the torch and triton that are there: nothing is installed, nothing is fetched. Checks
run side by side, since they wait for compilers; what is timed runs alone, the most valuable first. A step starts only
where its budget fits in what is left; the others are listed. Every step's output is a file in DIR, and `gpu.json`, the
summary, is written anew as each ends: a run that is cut off is worth what it has finished. The next one goes on from
there: what passed in DIR, or in the folders of --resume, on the same card, driver, versions and commit is not repeated,
and what failed or was cut off comes last.
"""

import argparse
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from threading import Lock
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

from gpu_steps import Step, grid, steps  # noqa: E402

_MOST_MINUTES = 9.0

Setting = dict[str, str]
Execute = Callable[[Step, Path], int | None]


def measured(device: str, folders: Iterable[Path] = ()) -> list[dict[str, Any]]:
    """The results of that device in bench/results, and in the folders of earlier runs."""
    import goals
    import gpu_results
    import published

    contents = [published.load(file) for file in published.on_gpus(ROOT)]
    return goals.results_of(device, [*contents, *gpu_results.contents(folders)])


def remembered(folders: Iterable[Path], setting: Setting) -> dict[str, Step]:
    """The steps that were tried in those folders, by name. Raises ValueError where the conditions were others."""
    steps = {}
    for folder in folders:
        if not (folder / "gpu.json").exists():
            continue
        content = json.loads((folder / "gpu.json").read_text())
        before = content["conditions"]
        if differing := [key for key in {**before, **setting} if key != "date" and before.get(key) != setting.get(key)]:
            parts = (f"{key} {before.get(key)}, here {setting.get(key)}" for key in differing)
            raise ValueError(f"{folder} was measured with {'; '.join(parts)}: name another folder")
        steps |= {one["name"]: Step(command=[], **one) for one in content["steps"] if one["outcome"]}
    return steps


def pending(plan: list[Step], before: dict[str, Step]) -> list[Step]:
    """What is still to run: never tried steps first, then those that failed or were cut off."""
    left = [step for step in plan if step.name not in before or before[step.name].outcome != "passed"]
    return sorted(left, key=lambda step: step.name in before)


def grouped(plan: list[Step]) -> list[list[Step]]:
    """The steps in their order, those of one stage together."""
    groups: list[list[Step]] = []
    for step in plan:
        if step.stage and groups and groups[-1][0].stage == step.stage:
            groups[-1].append(step)
        else:
            groups.append([step])
    return groups


def execute(step: Step, out: Path) -> int | None:
    """The status of a step's command, None where its time was up; what it prints is kept."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    environment.pop("TRITON_INTERPRET", None)
    with open(out / f"{step.name}.log", "w") as log:
        # in a session of its own: what it started ends with it, and disturbs no later time
        process = subprocess.Popen(
            step.command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            return process.wait(step.seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


class Lease:
    """Runs steps until `minutes` are over, and keeps the summary in `out` up to date."""

    def __init__(
        self, out: Path, setting: Setting, minutes: float, before: dict[str, Step],
        clock: Callable[[], float] = time.monotonic, execute: Execute = execute,
    ) -> None:  # fmt: skip
        self._out, self._setting, self._before, self._clock, self._execute = out, setting, before, clock, execute
        self._end = clock() + minutes * 60
        self._lock, self._tried = Lock(), dict(before)

    def run(self, plan: list[Step]) -> list[Step]:
        """Run what fits; the steps for which no time was left."""
        left_out = []
        for group in grouped(plan):
            left = self._end - self._clock()
            fitting = [step for step in group if step.seconds <= left]
            left_out += [step for step in group if step not in fitting]
            if fitting:
                with ThreadPoolExecutor(len(fitting)) as pool:
                    list(pool.map(self._one, fitting))
        return left_out

    def _one(self, step: Step) -> None:
        start = self._clock()
        if shutil.which(step.command[0]) is None:
            step.outcome = f"skipped: there is no {step.command[0]}"
        else:
            status = self._execute(step, self._out)
            step.outcome = (
                f"cut off after {step.seconds} s" if status is None
                else "passed" if status == 0 else f"failed with status {status}"
            )  # fmt: skip
        step.took, step.date = self._clock() - start, time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
        with self._lock:
            self._tried[step.name] = step
            self._write()
            print(f"{step.name}: {step.outcome}, {step.took:.0f} s", flush=True)
            log = self._out / f"{step.name}.log"
            if step.outcome.startswith("failed") and log.exists():
                print(log.read_text()[-3000:], flush=True)

    def _write(self) -> None:
        done = [{k: v for k, v in asdict(step).items() if k != "command"} for step in self._tried.values()]
        unfinished = self._out / "gpu.json.new"
        unfinished.write_text(json.dumps({"conditions": self._setting, "steps": done}, indent=1) + "\n")
        os.replace(unfinished, self._out / "gpu.json")


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu", help="folder of the results (build/gpu)")
    parser.add_argument("--minutes", type=float, default=8.5, help="stop after so many, nine at most (8.5)")
    parser.add_argument(
        "--resume", type=Path, nargs="+", default=[], metavar="DIR", help="go on from these folders too"
    )
    parser.add_argument(
        "--grid", action="store_true", help="times alone: of the grid, what bench/results does not have"
    )
    parser.add_argument("--collect", type=Path, nargs="+", metavar="DIR", help="move results into bench/results")
    return parser


def main() -> int:
    """0 when every step that ran passed, or when there is no GPU; 1 otherwise."""
    parser = arguments()
    args = parser.parse_args()
    if not 0 < args.minutes <= _MOST_MINUTES:
        parser.error(f"--minutes {args.minutes:g}: it is above 0 and at most {_MOST_MINUTES:g}")
    try:
        import torch
    except ImportError:
        if shutil.which("nvidia-smi") is None:
            print("there is no NVIDIA GPU here: nothing to run")
            return 0
        print(f"{sys.executable} has no torch: name a Python that has it, make gpu PYTHON=…")
        return 1
    if args.collect:
        import gpu_results

        try:
            print("\n".join(map(str, gpu_results.collect(args.collect, ROOT))))
        except ValueError as error:
            print(f"bench/gpu.py: {error}", file=sys.stderr)
            return 1
        return 0
    if not torch.cuda.is_available():
        print(f"torch {torch.__version__} sees no NVIDIA GPU here: nothing to run")
        return 0
    return _run(args)


def _run(args: argparse.Namespace) -> int:
    import gpu_results
    import torch

    from lorafuse.backends import native
    from lorafuse.testing.conditions import conditions, describe

    args.out.mkdir(parents=True, exist_ok=True)
    setting, folders = conditions(torch.device("cuda")), [*args.resume, args.out]
    try:
        before = remembered(folders, setting)
    except ValueError as error:
        print(f"bench/gpu.py: {error}", file=sys.stderr)
        return 1
    built = native.built("_cuda") and not native.stale("_cuda")
    done = measured(setting["device"], folders) if args.grid else []
    plan = grid(args.out, done, built) if args.grid else steps(args.out, built)
    print(describe(setting), flush=True)
    left_out = Lease(args.out, setting, args.minutes, before).run(left := pending(plan, before))
    print("\n" + "\n".join(itertools.chain([describe(setting)], gpu_results.lines(folders))))
    print("\n".join(f"{step.name:<40} {step.took:5.0f} s  {step.outcome}" for step in left if step.outcome))
    for step in left_out:
        print(f"{step.name:<40} left for the next call: its budget of {step.seconds} s did not fit")
    return int(any(step.outcome.startswith(("failed", "cut off")) for step in left))


if __name__ == "__main__":
    sys.exit(main())
