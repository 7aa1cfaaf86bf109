"""The results in `docs/studies/README.md`, written from the files beside it.

`python -m lorafuse.study.page docs/studies/README.md` writes them anew.
"""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

from lorafuse.study import STUDIES

__all__ = ["rewrite", "section"]

_BEGIN, _END = "<!-- results -->\n", "<!-- /results -->"


def section(folder: Path) -> str:
    """A table of all studies in the folder, then what each one found, claim by claim."""
    found = {name: json.loads(file.read_text()) for name in STUDIES if (file := folder / f"{name}.json").exists()}
    found = {name: content for name, content in found.items() if "finding" in content}
    lines = ["| study | finding | in the source | outcome here | seeds | seconds |", "|---|---|---|---|---:|---:|"]
    for name, content in found.items():
        module = importlib.import_module(f"lorafuse.study.{name}")
        finding = str(module.__doc__).split("\n\n")[0].replace("\n", " ")
        cells = (
            finding,
            module.SOURCE,
            content["finding"]["outcome"],
            len(content["seeds"]),
            f"{content['seconds']:.0f}",
        )
        lines.append(f"| `{name}` | " + " | ".join(map(str, cells)) + " |")
    for name, content in found.items():
        conditions = content["conditions"]
        size, beside = "`--quick`" if content["quick"] else "full size", f"/docs/studies/{name}"
        where = ", ".join(f"{key} {conditions[key]}" for key in ("threads", "torch", "commit") if key in conditions)
        lines += [
            "", f"### {name}: {content['finding']['outcome']}", "",
            f"{size}, {conditions['device']}, {where}, {conditions['date']}: [every run]({beside}.json)", "",
            f"![{name}]({beside}.png)", "", *_claims(content["finding"]["claims"]),
        ]  # fmt: skip
    return "\n".join(lines) + "\n"


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
