"""The code blocks of pages: which there are, and which of them are not to be run, and why."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from website.expand import FENCE
from website.pages import Page, SiteError

RUN = ("bash", "python")
# `<!-- not run: REASON -->` stands in the line before a block. A reason begins with one of these, so that no mark hides a block
# that could run.
REASONS = (
    "cluster",
    "server",
    "needs public encoders",
    "needs the published weights",
    "goes to",
    "hours",
    "the tests themselves",
    "this page is run in a clone already",
)
MARK = re.compile(r"^<!-- not run: (.+) -->$")


@dataclass(frozen=True)
class Block:
    """A code block of a page, below the heading of the anchor `section`; `reason` says why it is not run, and is empty for one
    that is."""

    page: str
    line: int
    language: str
    code: str
    reason: str
    section: str = ""


def blocks(page: Page) -> Iterator[Block]:
    """The blocks of a page in its order.

    Raises:
        SiteError: a block is marked with a reason that is none, or a mark stands before no block.
    """
    lines = iter(enumerate(page.text.split("\n"), 1))
    reason = section = ""
    for number, line in lines:
        if line.startswith("#"):
            section = re.sub(r"[^a-z0-9]+", "-", line.lower()).strip("-")
        if mark := MARK.match(line):
            reason = mark[1]
            if not reason.startswith(REASONS):
                raise SiteError(f"{page.source}:{number}: `{reason}` is no reason; it begins with {', '.join(REASONS)}")
        elif fence := FENCE.match(line):
            language = (line.strip().lstrip("`~").split() or [""])[0]
            code = []
            for _, inside in lines:
                if inside.strip() == fence[1]:
                    break
                code.append(inside)
            yield Block(page.source, number, language, "\n".join(code), reason, section)
            reason = ""
        elif reason and line.strip():
            raise SiteError(f"{page.source}:{number}: the line behind `not run` is no code block")


def to_run(page: Page) -> list[Block]:
    """The blocks of commands and Python that a walk runs."""
    return [block for block in blocks(page) if block.language in RUN and not block.reason]
