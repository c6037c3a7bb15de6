"""Builds the site: pages and what is made beside them into one folder, and that folder into HTML by zensical."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from website import made
from website.expand import expanded, linked
from website.llms import listing
from website.pages import DOCS, ROOT, Page, in_order, written

# Nothing of these asks the network, neither while the site is built nor when it is looked at.
SETTINGS = """
[project]
site_name = "UniDiffuser, trained"
site_description = "The open training pipeline for UniDiffuser"
docs_dir = "docs"
site_dir = "html"
use_directory_urls = false
extra_css = ["site.css"]
nav = [
{nav}
]

[project.theme]
language = "en"
font = false
features = ["content.code.copy", "navigation.footer", "navigation.indexes", "navigation.sections", "navigation.top", "toc.follow"]

[[project.theme.palette]]
media = "(prefers-color-scheme: light)"
scheme = "default"
toggle.icon = "lucide/sun"
toggle.name = "Dark"

[[project.theme.palette]]
media = "(prefers-color-scheme: dark)"
scheme = "slate"
toggle.icon = "lucide/moon"
toggle.name = "Light"

[project.plugins.offline]

# The plugin would take this from a server.
[[project.extra.polyfills]]
path = "iframe-worker.js"
type = "text/javascript"
async = false
defer = false

[project.plugins.search]

[project.plugins.mkdocstrings.handlers.python]
paths = ["{root}"]

[project.plugins.mkdocstrings.handlers.python.options]
docstring_style = "google"
docstring_section_style = "list"
heading_level = 2
show_root_heading = true
show_root_full_path = false
show_source = false
show_signature_annotations = true
separate_signature = true
line_length = 100
members_order = "source"

[project.markdown_extensions]
admonition = {{}}
attr_list = {{}}
md_in_html = {{}}
tables = {{}}
toc.permalink = true
pymdownx.details = {{}}
pymdownx.highlight = {{}}
pymdownx.superfences = {{}}
"""


def build(folder: Path) -> Path:
    """Build the site below a folder, which is emptied, and give the folder of its HTML.

    Raises:
        SiteError: a page links to nothing, names code that is not there, or has no heading.
        subprocess.CalledProcessError: the generator refuses; it has said why.
    """
    shutil.rmtree(folder, ignore_errors=True)
    docs = folder / "docs"
    pages = gathered()
    places = placed(pages)
    shutil.copytree(DOCS, docs, ignore=shutil.ignore_patterns("*.md"))
    for page in pages:
        target = docs / page.path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(expanded(page, places), encoding="utf-8")
    for name in ("site.css", "iframe-worker.js"):
        shutil.copyfile(Path(__file__).parent / name, docs / name)
    (docs / "llms.txt").write_text(listing(pages), encoding="utf-8")
    (folder / "zensical.toml").write_text(settings(pages), encoding="utf-8")
    command = [sys.executable, "-m", "zensical", "build", "--config-file", str(folder / "zensical.toml"), "--strict"]
    told = subprocess.run(command, cwd=folder, check=False, capture_output=True, text=True)
    if told.returncode:
        sys.stderr.write(told.stdout + told.stderr)
        told.check_returncode()
    # A page for servers alone, whose links begin at their root.
    (folder / "html" / "404.html").unlink()
    # Machines read the same pages as Markdown, under the same names.
    for page in pages:
        (folder / "html" / page.path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(docs / page.path, folder / "html" / page.path)
    return folder / "html"


def gathered() -> list[Page]:
    """All pages of the site: those that are written, those that are made, and the files that they link to."""
    pages = [*written(), *made.results(), made.commands(), made.notebook()]
    seen = {page.source for page in pages}
    todo = pages
    while todo:
        wanted = {name for page in todo for name in linked(page)} - seen
        todo = made.files(name for name in wanted if not name.startswith("docs/"))
        seen |= wanted
        pages = pages + todo
    return pages


def placed(pages: list[Page]) -> dict[str, str]:
    """Where each file of the repository is in the site: pages, and everything else that lies in `docs`."""
    files = {path.relative_to(ROOT).as_posix(): path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*") if path.is_file()}
    pages_of = {page.source: page.path for page in pages}
    # Who follows a link to a result wants to read it.
    told = {name: pages_of[text] for name in files if (text := f"{name.removesuffix('.json')}.md") in pages_of}
    return files | told | pages_of


def settings(pages: list[Page]) -> str:
    """The generator's configuration, whose navigation names every page but linked files."""
    nav = []
    for section, those in in_order(pages).items():
        entries = ", ".join(f"{{ {_text(page.title.replace('`', ''))} = {_text(page.path)} }}" for page in those)
        nav.append(f"  {{ {_text(section)} = [{entries}] }},")
    return SETTINGS.format(nav="\n".join(nav), root=ROOT)


def _text(value: Any) -> str:
    return '"' + str(value).replace("\\", "\\\\").replace('"', '\\"') + '"'
