"""The results in `docs/studies/README.md`, written from the files in its folder.

`python -m lorafuse.study.page docs/studies/README.md` writes them anew.
"""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

from lorafuse.study import STUDIES
from lorafuse.study.runner import SELECTION
from lorafuse.study.verdict import Claim

__all__ = ["rewrite", "section"]

_BEGIN, _END = "<!-- results -->\n", "<!-- /results -->"


def section(folder: Path) -> str:
    """A table of all studies, then the claims of each that has a file in the folder.

    A file of a study that was interrupted has runs and no finding; without a file nothing is measured.
    """
    files = {name: folder / f"{name}.json" for name in STUDIES}
    contents = {name: json.loads(file.read_text()) for name, file in files.items() if file.exists()}
    lines = ["| study | finding | in the source | outcome here |", "|---|---|---|---|"]
    for name in STUDIES:
        module = importlib.import_module(f"lorafuse.study.{name}")
        finding = str(module.__doc__).split("\n\n")[0].replace("\n", " ")
        content = contents.get(name)
        outcome = _outcome(content) if content else "not measured"
        lines.append(f"| `{name}` | {finding} | {module.SOURCE} | {outcome} |")
    for name, content in contents.items():
        if "finding" not in content:
            continue
        conditions = content["conditions"]
        where = ", ".join(f"{key} {conditions[key]}" for key in ("threads", "torch", "commit") if key in conditions)
        lines += [
            "", f"### {name}", "", f"**{content['finding']['outcome'].capitalize()}.** {_size(content)}, "
            f"{len(content['seeds'])} seeds, {_chosen(content)}, {content['seconds']:.0f} s, {conditions['device']}, "
            f"{where}, {conditions['date']}: [every run](/docs/studies/{name}.json)", "",
            f"![{name}](/docs/studies/{name}.png)", "",
            "| claim | found: mean (90% interval, seeds); margin; power | outcome |", "|---|---|---|",
            *(f"| {one.claim} | {one.shown} | {one.outcome} |" for one in
              (Claim(**each) for each in content["finding"]["claims"])),
        ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _outcome(content: dict[str, Any]) -> str:
    if "finding" not in content:
        return f"not measured: stopped after {len(content['runs'])} runs"
    return f"{content['finding']['outcome']} ({_size(content)})"


def _chosen(content: dict[str, Any]) -> str:
    """By how many other seeds the learning rates were chosen: of SmolLM2's runs, and of the small models'."""
    by: dict[str, set[int]] = {}
    for run in content["runs"]:
        spec = run["spec"]
        if spec["seed"] >= SELECTION:
            by.setdefault("SmolLM2's" if spec["task"] == "problems" else "small models'", set()).add(spec["seed"])
    counts = {whose: f"{len(seeds)} other{'s' if len(seeds) > 1 else ''}" for whose, seeds in by.items()}
    return ", ".join(f"{whose} rates chosen by {count}" for whose, count in counts.items())


def _size(content: dict[str, Any]) -> str:
    return "`--quick`" if content["quick"] else "full size"


def rewrite(page: Path) -> str:
    """The page with its results written anew. Raises ValueError where it lacks the two marks around them."""
    text = page.read_text()
    if _BEGIN not in text or _END not in text:
        raise ValueError(f"{page}: it has no {_BEGIN.strip()} and {_END} to write between")
    before, _, rest = text.partition(_BEGIN)
    return before + _BEGIN + section(page.parent) + _END + rest.partition(_END)[2]


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.write_text(rewrite(target))
