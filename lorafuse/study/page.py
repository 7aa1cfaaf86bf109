"""The results in `docs/studies/README.md`, written from the files in its folder.

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
    """A table of all studies, then the claims of each, from the files of one run of all of them in the folder."""
    contents = {name: json.loads((folder / f"{name}.json").read_text()) for name in STUDIES}
    lines = ["| study | finding | in the source | outcome here |", "|---|---|---|---|"]
    for name, content in contents.items():
        module = importlib.import_module(f"lorafuse.study.{name}")
        finding = str(module.__doc__).split("\n\n")[0].replace("\n", " ")
        lines.append(f"| `{name}` | {finding} | {module.SOURCE} | {content['finding']['outcome']} |")
    for name, content in contents.items():
        conditions = content["conditions"]
        where = ", ".join(f"{key} {conditions[key]}" for key in ("threads", "torch", "commit") if key in conditions)
        lines += [
            "", f"### {name}", "", f"**{content['finding']['outcome'].capitalize()}.** {len(content['seeds'])} seeds, "
            f"{content['seconds']:.0f} s, {conditions['device']}, {where}, {conditions['date']}: "
            f"[every run](/docs/studies/{name}.json)", "",
            f"![{name}](/docs/studies/{name}.png)", "", *_claims(content["finding"]["claims"]),
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
