"""The `lorafuse` command. Each sub-command is a module here with `SUMMARY`, `add_arguments(parser)` and `run(args)`."""

import argparse
import importlib
import sys

from lorafuse.errors import BackendUnavailable, MissingDependency

COMMANDS = ("demo", "bench", "doctor", "plan", "tune", "advise", "study")

__all__ = ["COMMANDS", "main"]


def main(argv: list[str] | None = None) -> int:
    """Run one sub-command and return its exit status (2 for bad input, with one line on stderr that says the fix)."""
    parser = argparse.ArgumentParser(prog="lorafuse", description="Fused LoRA layers: try, measure, diagnose.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        module = importlib.import_module(f"lorafuse.cli.{name}")
        sub = commands.add_parser(name, help=module.SUMMARY, description=module.__doc__)
        module.add_arguments(sub)
        sub.set_defaults(run=module.run)
    args = parser.parse_args(argv)
    try:
        return args.run(args)
    except (BackendUnavailable, MissingDependency, ValueError, FileNotFoundError) as error:
        print(f"lorafuse {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nlorafuse {args.command}: interrupted", file=sys.stderr)
        return 130
