"""The results in `docs/studies/README.md`, written from the files beside it and in folders below.

`python -m lorafuse.study.page docs/studies/README.md` writes them anew.
"""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

from lorafuse.study import STUDIES
from lorafuse.study.model import Size

__all__ = ["rewrite", "section"]

_BEGIN, _END = "<!-- results -->\n", "<!-- /results -->"


def section(folder: Path) -> str:
    """A table of all studies, then what each one found, claim by claim: in the folder, then in the folders below it."""
    found = {name: _results(folder, name) for name in STUDIES}
    lines = ["| study | finding | in the source | outcome here |", "|---|---|---|---|"]
    for name, results in found.items():
        module = importlib.import_module(f"lorafuse.study.{name}")
        finding = str(module.__doc__).split("\n\n")[0].replace("\n", " ")
        outcomes = "; ".join(f"{_size(content)}: {content['finding']['outcome']}" for content in results.values())
        lines.append(f"| `{name}` | {finding} | {module.SOURCE} | {outcomes} |")
    for name, results in found.items():
        lines += ["", f"### {name}"]
        for beside, content in results.items():
            conditions = content["conditions"]
            where = ", ".join(f"{key} {conditions[key]}" for key in ("threads", "torch", "commit") if key in conditions)
            lines += [
                "", f"**{_size(content)}: {content['finding']['outcome']}.** {len(content['seeds'])} seeds, "
                f"{content['seconds']:.0f} s, {conditions['device']}, {where}, {conditions['date']}: "
                f"[every run](/docs/studies/{beside}.json)", "",
                f"![{name}](/docs/studies/{beside}.png)", "", *_claims(content["finding"]["claims"]),
            ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _results(folder: Path, name: str) -> dict[str, dict[str, Any]]:
    """What was found, by the file's path below the folder, without its ending."""
    files = (folder / f"{name}.json", *sorted(folder.glob(f"*/{name}.json")))
    contents = {str(file.relative_to(folder).with_suffix("")): json.loads(file.read_text()) for file in files}
    return {beside: content for beside, content in contents.items() if "finding" in content}


def _size(content: dict[str, Any]) -> str:
    size = "`--quick`" if content["quick"] else "full size"
    return size if content["width"] == Size().width else f"{size}, width {content['width']}"


def _claims(claims: list[dict[str, Any]]) -> list[str]:
    lines = ["| claim | found, mean (spread over seeds) | margin | outcome |", "|---|---:|---|---|"]
    for one in claims:
        value = f"{one['value']:.3g} ({one['low']:.3g} to {one['high']:.3g})"
        lines.append(f"| {one['claim']} | {value} | {one['margin']} | {one['outcome']} |")
    return lines


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
