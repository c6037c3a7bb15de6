"""Markdown as the UI's pages show it."""

from __future__ import annotations

from collections.abc import Iterable


def table(head: Iterable[str], rows: Iterable[tuple[str, ...]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def image(words: str, uri: str, width: int) -> str:
    """A picture of a width in pixels, which Markdown's own form has no place for."""
    return f'<img alt="{words}" src="{uri}" width="{width}">'
