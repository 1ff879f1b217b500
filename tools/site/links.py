"""Check the links of the built site: every file and every anchor that a page of it names exists.

    python -m tools.site.links site

mkdocs checks Markdown links while it builds; this also sees what hooks, docstrings and HTML add. Addresses elsewhere
are left alone.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

#: attributes that hold an address
ADDRESSES = ("href", "src")


class Page(HTMLParser):
    """The addresses and anchors of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ADDRESSES and value and tag != "base":
                self.addresses.append(value)
            elif name in ("id", "name") and value:
                self.anchors.add(value)


def dead_links(site: Path) -> list[str]:
    """Return a line for each address on a page below `site` that leads to no file, or to no anchor of its page."""
    pages = {path.resolve(): Page(path.read_text()) for path in sorted(site.rglob("*.html"))}
    root, dead = site.resolve(), []
    for path, page in pages.items():
        for address in page.addresses:
            parts = urlsplit(address)
            if parts.scheme or parts.netloc:
                continue
            place = unquote(parts.path)
            target = path if not place else (root / place.lstrip("/") if place[0] == "/" else path.parent / place)
            target = target.resolve()
            if target.is_dir():
                target /= "index.html"
            anchor = unquote(parts.fragment)
            known = not anchor or anchor.startswith("__") or target not in pages or anchor in pages[target].anchors
            if not target.is_file() or not known:
                dead.append(f"{path.relative_to(root)}: {address}")
    return dead


def main(arguments: Sequence[str] | None = None) -> int:
    (site,) = sys.argv[1:] if arguments is None else arguments
    dead = dead_links(Path(site))
    for line in dead:
        print(line)
    print(f"{len(dead)} dead links in {len(list(Path(site).rglob('*.html')))} pages")
    return min(len(dead), 1)


if __name__ == "__main__":
    sys.exit(main())
