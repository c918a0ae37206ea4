"""Check every internal link of a folder of HTML pages: `python docs/check_links.py FOLDER`."""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    "The links of a page, and the places in it that links can lead to."

    def __init__(self, text: str):
        super().__init__()
        self.links: list[str] = []
        self.anchors = {"", "top"}
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            if name in ("href", "src") and value and tag != "base":
                self.links.append(value)
            if name == "id" or name == "name" and tag == "a":
                self.anchors.add(value)


def dead_links(folder: Path) -> list[str]:  # a line for each
    "Links to files or places in them that are not there."
    pages = {p.resolve(): Page(p.read_text(encoding="utf-8")) for p in folder.rglob("*.html") if "_static" not in p.parts}
    dead = []
    for at, page in pages.items():
        for link in sorted(set(page.links)):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (at.parent / unquote(parts.path)).resolve() if parts.path else at
            target = target / "index.html" if target.is_dir() else target
            there = target.exists() and (target not in pages or unquote(parts.fragment) in pages[target].anchors)
            if not there:
                dead.append(f"{at.relative_to(folder.resolve())}: {link}")
    return dead


if __name__ == "__main__":
    dead = dead_links(Path(sys.argv[1]))
    print(*dead, f"{len(dead)} dead links in {sys.argv[1]}", sep="\n")
    sys.exit(bool(dead))
