"""Hooks of MkDocs: pages that are files elsewhere in the repository, a page for each group of options, formulas.

The pages of docs/ are read on GitHub too, so they link to files outside of docs/ (`../SECURITY.md`,
`../configs/task/shadow.yaml`) and write most formulas as plain text. On the site those files are pages, and the
formulas MathML, which browsers draw without a script or a font from elsewhere.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

from tools.site import formulas
from tools.site.options import option_pages

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"

#: pages of the repository's root, with their places on the site; README's is the home page
TOP = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "ARCHITECTURE.md": "architecture.md",
    "CONTRIBUTING.md": "contributing.md",
}
LANGUAGES = {".py": "python", ".yaml": "yaml", ".toml": "toml", ".sh": "sh", ".md": "markdown", ".yml": "yaml"}
_LINK = re.compile(r"(\]\(|^\[[^\]]+\]: )(?!https?:|#|mailto:)([^)#\s]+)(#[^)\s]*)?", re.MULTILINE)
_MATH = re.compile(r'<(span|div) class="arithmatex">(?:\\\(|\\\[)(.*?)(?:\\\)|\\\])</\1>', re.DOTALL)


def _source_page(path: str) -> str:
    """Return the place on the site of a file or folder of the repository outside of docs/."""
    return TOP.get(path) or f"source/{path.strip('/')}.md"


def _targets(text: str, folder: Path) -> Iterator[str]:
    """Yield the files and folders outside of docs/ that a page links to, relative to the repository."""
    for match in _LINK.finditer(text):
        place = (folder / match[2]).resolve()
        if place.exists() and place.is_relative_to(ROOT) and not place.is_relative_to(DOCS):
            yield place.relative_to(ROOT).as_posix()


def _source_text(path: str) -> str:
    """Return the page of a file, or of a folder with links to its files."""
    place = ROOT / path
    if place.is_dir():
        inside = sorted(p for p in place.iterdir() if not p.name.startswith(("_", ".")))
        items = "\n".join(f"- `{p.name}{'/' if p.is_dir() else ''}`" for p in inside)
        return f"# {path}\n\n{items}\n"
    if place.suffix == ".ipynb":
        return _notebook(path, json.loads(place.read_text()))
    fence = "~~~~~"
    return f"# {path}\n\n{fence}{LANGUAGES.get(place.suffix, 'text')}\n{place.read_text()}\n{fence}\n"


def _notebook(path: str, notebook: dict[str, Any]) -> str:
    """Return the cells of a notebook as a page; its headings go down by one level."""
    parts = [f"# {path}\n"]
    for cell in notebook["cells"]:
        text = "".join(cell["source"])
        code = cell["cell_type"] == "code"
        parts.append(f"```python\n{text}\n```\n" if code else re.sub(r"^#", "##", text, flags=re.MULTILINE) + "\n")
    return "\n".join(parts)


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are not files of docs/."""
    texts = [(path.read_text(), path.parent) for path in DOCS.rglob("*.md")]
    texts += [((ROOT / name).read_text(), ROOT) for name in TOP if name != "README.md"]
    linked = {target for text, folder in texts for target in _targets(text, folder)} - TOP.keys()
    for name, place in TOP.items():
        if name != "README.md":
            files.append(File.generated(config, place, content=(ROOT / name).read_text()))
    for path in sorted(linked):
        files.append(File.generated(config, _source_page(path), content=_source_text(path)))
    for place, text in option_pages().items():
        files.append(File.generated(config, place, content=text))
    return files


def _relinked(text: str, page: str) -> str:
    """Return a page whose links lead to pages of the site; `page` is its place, own_data.md for docs/own_data.md."""
    written = next((name for name, place in TOP.items() if place == page and name != "README.md"), None)
    folder = ROOT if written else (DOCS / page).parent
    up = "../" * page.count("/")

    def replace(match: re.Match[str]) -> str:
        place = (folder / match[2]).resolve()
        if not place.exists() or not place.is_relative_to(ROOT):
            return match[0]
        if place.is_relative_to(DOCS):
            target = place.relative_to(DOCS).as_posix()
        else:
            target = _source_page(place.relative_to(ROOT).as_posix())
        return f"{match[1]}{up}{target}{match[3] or ''}"

    return _LINK.sub(replace, text)


def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> str:
    """Point links to pages of the site, and turn formulas into TeX."""
    place = page.file.src_uri
    if place.startswith(("source/", "reference/options")):
        return markdown
    relinked = _relinked(markdown, place)
    return relinked if place in ("changelog.md", "contributing.md", "security.md") else formulas.markdown(relinked)


def mathml(page: str) -> str:
    """Return HTML whose formulas are MathML."""

    def replace(match: re.Match[str]) -> str:
        block = match[1] == "div"
        formula = convert(html.unescape(match[2]).strip(), display="block" if block else "inline")
        formula = formula.replace("<mi>&#x0007E;</mi>", "<mo>&#x0223C;</mo>")  # a relation, as in TeX
        return f'<div class="formula">{formula}</div>' if block else formula

    return _MATH.sub(replace, page)


def on_page_content(html: str, **kwargs: Any) -> str:
    """Draw the formulas."""
    return mathml(html)
