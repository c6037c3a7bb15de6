"""Whether every link of a built site leads somewhere: pages, pictures, anchors; and whether it asks anything of the network."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

# What a browser fetches by itself when it shows a page.
FETCHED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src", "audio": "src"}


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.anchors = set[str]()
        self.links: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.anchors |= {given[name] for name in ("id", "name") if given.get(name)}
        if tag in FETCHED and FETCHED[tag] in given:
            self.fetched.append(given[FETCHED[tag]])
        if tag == "link" and "stylesheet" in given.get("rel", "") + given.get("as", ""):
            self.fetched.append(given.get("href", ""))
        elif tag in ("a", "link") and "href" in given:
            self.links.append(given["href"])


def broken(folder: Path) -> list[str]:
    """What is wrong in the HTML files of a folder, as lines ``PAGE: TARGET: what``, in order of the pages."""
    readers = {}
    for path in sorted(folder.rglob("*.html")):
        readers[path.resolve()] = reader = _Reader()
        reader.feed(path.read_text(encoding="utf-8"))
    found = []
    for path, reader in readers.items():
        page = path.relative_to(folder.resolve())
        for target in [*reader.links, *reader.fetched]:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                if target in reader.fetched and parts.scheme != "data":
                    found.append(f"{page}: {target}: is fetched from the network")
                continue
            place = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if place.is_dir():
                place /= "index.html"
            if not place.is_file():
                found.append(f"{page}: {target}: no such file")
            elif parts.fragment and place in readers and unquote(parts.fragment) not in readers[place].anchors:
                found.append(f"{page}: {target}: no such anchor")
    return list(dict.fromkeys(found))
