"""The page of a comparison in the Prefect UI: what differs, as Markdown; the HTML file has the rest."""

from __future__ import annotations

import re
from typing import Any

from prefect.artifacts import create_markdown_artifact

from pipelines.commands.comparison import value_words
from pipelines.pages.lineage import version_link
from pipelines.pages.markdown import image, table
from pipelines.pages.pictures import picture_uri

WIDTH = 640


def publish_comparison(facts: dict[str, Any], curve: bytes | None) -> str:
    """Publish the page; gives its path in the UI. Pages of the same A and B are versions of one."""
    names = [facts[side]["name"] for side in ("a", "b")]
    key = re.sub(r"[^a-z0-9]+", "-", "-".join(["compare", *names]).lower()).strip("-")[:120]
    return version_link(str(create_markdown_artifact(page(facts, curve), key, f"{names[0]} against {names[1]}")))


def page(facts: dict[str, Any], curve: bytes | None) -> str:
    a, b = (facts[side]["name"] for side in ("a", "b"))
    parts = [f"# {_plain(a)} against {_plain(b)}", "\n".join(f"- {_plain(line)}" for line in facts["glance"])]
    rows = [
        (node["node"], f"`{field}`", f"`{_value(left)}`", f"`{_value(right)}`")
        for node in facts["nodes"]
        for field, (left, right) in node["differ"].items()
    ]
    if rows:
        parts += ["## Configuration", table(("node", "field", "A", "B"), rows)]
    measured = [
        (node, figure, *("" if each is None else _value(each) for each in (left, right)))
        for node, found in facts["figures"].items()
        for figure, (left, right) in found.items()
        if left != right
    ]
    if measured:
        parts += ["## Figures", table(("node", "figure", "A", "B"), measured)]
    lines = [(node["node"], *(f"{each['out']:,}" if each else "" for each in node["rows"])) for node in facts["nodes"]]
    parts += ["## Rows", table(("node", "A", "B"), lines)]
    if curve is not None:
        parts += ["## Losses", image("losses of A and B", picture_uri(curve), WIDTH)]
    return "\n\n".join(parts)


def _value(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else value_words(value)
    return _plain(text.replace("|", "/").replace("`", "'"))


def _plain(text: str) -> str:
    return " ".join(text.split())
