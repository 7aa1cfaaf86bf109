"""A hook of mkdocs: pages from files outside docs/, and links between files of the checkout as links of the site.

A link leads where it leads in the checkout: README.md is the home page, examples are pages that show their source.
A link to any other file outside docs/ stays as it is, and `mkdocs build --strict` ends with it.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).parents[1]
# files outside docs/ by their page
PAGES = {
    "README.md": "index.md",
    "bench/README.md": "results.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
_LANGUAGES = {".py": "python", ".yaml": "yaml", ".ipynb": "json"}
_LINK = re.compile(r"\]\(([^)\s#:]+)(#[^)\s]*)?\)")


def _examples() -> dict[str, str]:
    files = sorted(path for path in (ROOT / "examples").iterdir() if path.suffix in _LANGUAGES)
    return {f"examples/{path.name}": f"examples/{path.name}.md" for path in files}


def _page_of(path: str) -> str | None:
    """The page, or the file of docs/, that a path of the checkout is in the site; None where it is none."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return (PAGES | _examples()).get(path)


def linked(markdown: str, source: str) -> str:
    """A text of `source`, a path of the checkout, with its links as links of the site."""
    page = _page_of(source) or source

    def replaced(match: re.Match[str]) -> str:
        target, anchor = match[1], match[2] or ""
        path = target.lstrip("/") if target.startswith("/") else posixpath.join(posixpath.dirname(source), target)
        end = _page_of(posixpath.normpath(path))
        return match[0] if end is None else f"]({posixpath.relpath(end, posixpath.dirname(page) or '.')}{anchor})"

    return _LINK.sub(replaced, markdown)


def on_files(files: Files, config: Any) -> Files:
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    for source, page in _examples().items():
        path = ROOT / source
        text = f"# {path.name}\n\n````{_LANGUAGES[path.suffix]}\n{path.read_text(encoding='utf-8').rstrip()}\n````\n"
        files.append(File.generated(config, page, content=text, inclusion=InclusionLevel.NOT_IN_NAV))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    sources = {end: source for source, end in (PAGES | _examples()).items()}
    return linked(markdown, sources.get(page.file.src_uri, f"docs/{page.file.src_uri}"))
