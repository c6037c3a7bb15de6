"""Which pages the site has, in which order, and where each comes from."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
# Sections and what comes first in each; every other page of the folder follows by its name. A page that is in no folder and not
# named here stands in the last section, so that none is ever left out.
ORDER: dict[str, tuple[str, ...]] = {
    "Start": ("index.md", "tutorial.md", "notebook.md"),
    "How to": (
        "how-to/schedule.md",
        "how-to/rerun.md",
        "how-to/scale.md",
        "how-to/image.md",
        "how-to/kubernetes.md",
        "how-to/slurm.md",
        "how-to/cloud.md",
        "how-to/trace.md",
        "how-to/",
        "fine-tune.md",
    ),
    "Understand": ("mathematics.md", "formats.md", "comparison.md"),
    "Reference": ("reference/", "fields.md"),
    "Results": ("results/overview.md", "results/leaderboard.md", "results/"),
    "Project": ("source/CONTRIBUTING.md", ""),
}


class SiteError(Exception):
    """What is wrong with a page, in one line that names it."""


@dataclass(frozen=True)
class Page:
    """A page as Markdown.

    Attributes:
        path: where it stands in the site, such as ``how-to/scale.md``.
        source: the file that its links are relative to, from the repository's root.
        text: Markdown, before code, formulas and links are put in.
    """

    path: str
    source: str
    text: str

    @property
    def title(self) -> str:
        """Its first heading.

        Raises:
            SiteError: it has none.
        """
        found = re.search(r"^# (.+)$", self.text, re.MULTILINE)
        if found is None:
            raise SiteError(f"{self.source}: no heading; begin the page with `# TITLE`")
        return found[1]

    @property
    def lead(self) -> str:
        """The first sentence below the heading, on one line; empty where there is none."""
        for paragraph in re.split(r"^# .+$", self.text, maxsplit=1, flags=re.MULTILINE)[-1].split("\n\n"):
            line = " ".join(paragraph.split())
            if line and line[0] not in "#<!|-*>:" and not line.startswith("```"):
                return re.split(r"(?<=[.!?]) ", re.sub(r"\[([^\]]+)\]\([^)]+\)", r"\1", line))[0]
        return ""


def written() -> list[Page]:
    """The pages that people write: the README, which is the first page, and ``docs``."""
    pages = [Page("index.md", "README.md", (ROOT / "README.md").read_text(encoding="utf-8"))]
    for path in sorted(DOCS.rglob("*.md")):
        text = path.read_text(encoding="utf-8")
        pages.append(Page(path.relative_to(DOCS).as_posix(), path.relative_to(ROOT).as_posix(), text))
    return pages


def in_order(pages: list[Page]) -> dict[str, list[Page]]:
    """The pages by section, each once. What is made of results and files is reached by links only, but for what is named."""
    left = {page.path: page for page in pages}
    named = {name for names in ORDER.values() for name in names}
    sections: dict[str, list[Page]] = {}
    for section, names in ORDER.items():
        for name in names:
            folder = not name or name.endswith("/")
            taken = [path for path in left if _within(path, name) and path not in named] if folder else [name]
            sections.setdefault(section, []).extend(left.pop(path) for path in taken if path in left)
    return {section: found for section, found in sections.items() if found}


def _within(path: str, folder: str) -> bool:
    return path.startswith(folder) if folder else "/" not in path
