"""A node's progress bar in the Prefect UI, and the way back from its words to the numbers."""

from __future__ import annotations

import re
import time
from typing import Any, cast
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact

from pipelines.run import Run

# How often the bar moves, in seconds.
PROGRESS_EVERY = 2.0


class ProgressArtifact:
    """The node's progress bar in the UI; made with its first report."""

    def __init__(self, run: Run, node: str):
        self.run, self.node = run, node
        self.artifact: UUID | None = None
        self.moved = 0.0

    def report(self, fields: dict[str, Any]) -> None:
        self.run.view.progress(self.node, fields)
        finished = fields["done"] >= fields["total"]
        if time.monotonic() - self.moved < PROGRESS_EVERY and not finished:
            return
        self.moved = time.monotonic()
        percent = 100.0 * fields["done"] / max(fields["total"], 1)
        words = f"{self.node} {describe_progress(fields)}"
        if self.artifact is None:
            self.artifact = cast(UUID, create_progress_artifact(percent, description=words))
        else:
            update_progress_artifact(self.artifact, percent, description=words)


def describe_progress(fields: dict[str, Any]) -> str:
    """``write: 3 of 10 units, rows 1200, rows_per_s 340.5``"""
    known = ("node", "phase", "done", "total", "unit")
    more = "".join(f", {name} {value}" for name, value in fields.items() if name not in known)
    return f"{fields['phase']}: {fields['done']} of {fields['total']} {fields['unit']}{more}"


_PROGRESS = re.compile(r"(\S+) (.+?): (\d+) of (\d+) (\w+)((?:, \w+ [^,]+)*)")


def read_progress(description: str) -> tuple[str, dict[str, Any]]:
    """The node and the fields that such a description was made of; an empty name when it is none."""
    match = _PROGRESS.fullmatch(description)
    if match is None:
        return "", {}
    more = [pair.rsplit(" ", 1) for pair in match[6].split(", ")[1:]]
    fields = {"phase": match[2], "done": int(match[3]), "total": int(match[4]), "unit": match[5]}
    return match[1], {**fields, **{name: _number(value) for name, value in more}}


def _number(text: str) -> Any:
    try:
        return float(text) if "." in text or "e" in text else int(text)
    except ValueError:
        return text
