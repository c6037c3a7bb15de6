"""The page of a plan in the Prefect UI: its tables as Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prefect.artifacts import create_markdown_artifact

from pipelines.pages.lineage import artifact_key, version_link
from pipelines.pages.markdown import table
from pipelines.planning.words import blocks


def publish_plan(plan: Mapping[str, Any]) -> str:
    """Publish the page under the recipe's key; gives its path in the UI."""
    text = page(plan)
    machine = plan["machine"]
    where = "this machine" if machine["calibrated"] else f"{machine['gpus']} {machine['gpu']}"
    return version_link(str(create_markdown_artifact(text, artifact_key(plan["recipe"], "plan"), f"what it takes on {where}")))


def page(plan: Mapping[str, Any]) -> str:
    """A plan as Markdown."""
    parts = [f"# What {plan['recipe']} takes"]
    for block in blocks(plan):
        parts += [f"## {block.title}"] if block.title else []
        parts += [table(block.head, [tuple(cell.replace("|", "/") for cell in row) for row in block.rows])] if block.rows else []
        parts += ["\n".join(f"- {line}" for line in block.lines)] if block.lines else []
    return "\n\n".join(parts)
