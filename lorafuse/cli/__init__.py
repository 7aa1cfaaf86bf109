"""The `lorafuse` command. Each sub-command is a module here with `SUMMARY`, `add_arguments(parser)` and `run(args)`."""

import argparse
import importlib
import io
import os
import sys

from lorafuse.bench.limits import is_out_of_memory, out_of_memory
from lorafuse.errors import BackendUnavailable, MissingDependency, one_line

COMMANDS = ("demo", "bench", "doctor", "plan", "tune", "advise", "study")

__all__ = ["COMMANDS", "main"]


def main(argv: list[str] | None = None) -> int:
    """Run one sub-command and return its exit status (2 for bad input, with one line on stderr that says the fix)."""
    name = "lorafuse"
    try:
        _prepare_output()
        try:
            args = parser().parse_args(argv)
            name = f"lorafuse {args.command}"
            status: int = args.run(args)
        finally:
            sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        reason = "whoever read the output has stopped"
    except (BackendUnavailable, MissingDependency, ValueError, OSError) as error:
        reason = str(error)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reason = out_of_memory(error)
    print(f"{name}: {one_line(reason)}", file=sys.stderr)
    _forget_output()
    return 2


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lorafuse", description="Fused LoRA layers: try, measure, diagnose.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        module = importlib.import_module(f"lorafuse.cli.{name}")
        sub = commands.add_parser(name, help=module.SUMMARY, description=module.__doc__)
        module.add_arguments(sub)
        sub.set_defaults(run=module.run)
    return parser


def _prepare_output() -> None:
    """No name of a file, in whatever encoding, may end a run. Raises ValueError where there is no output at all."""
    if sys.stdout is None:
        raise ValueError("standard output is closed; send it to a file or to /dev/null")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _forget_output() -> None:
    """What cannot be written is given up: Python would try again at its end, and complain."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
