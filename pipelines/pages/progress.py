"""What moves in the Prefect UI while a node is made: a progress bar, with the way back from its words to the numbers, and a
page of losses and samples where something is trained."""

from __future__ import annotations

import io
import re
import time
from typing import Any, cast
from uuid import UUID

from prefect.artifacts import create_markdown_artifact, create_progress_artifact, update_progress_artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactUpdate

from pipelines.flows.run import Run
from pipelines.pages.harmless import harmless
from pipelines.pages.lineage import artifact_key
from pipelines.pages.markdown import table
from pipelines.pages.pictures import picture_uri

# What of the report of an evaluation is no figure.
REPORT = ("node", "phase", "done", "total", "unit", "report")
# How often the bar moves and the losses are drawn, in seconds.
PROGRESS_EVERY = 2.0
CURVE_EVERY = 20.0


class ProgressArtifact:
    """The node's progress bar in the UI; made with its first report. A report that fails is skipped."""

    def __init__(self, run: Run, node: str):
        self.run, self.node = run, node
        self.artifact: UUID | None = None
        self.moved = 0.0

    def report(self, fields: dict[str, Any]) -> None:
        with harmless(f"the progress of {self.node}"):
            self._report(fields)

    def _report(self, fields: dict[str, Any]) -> None:
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


class TrainingArtifact:
    """A page for a node that trains, one a run: its losses, drawn again as they come, and the newest sheet of samples."""

    def __init__(self, run: Run, node: str):
        self.run, self.node = run, node
        self.rows: list[dict[str, Any]] = []
        self.sheet: list[str] = []
        self.measured: dict[int, dict[str, Any]] = {}
        self.artifact: UUID | None = None
        self.drawn = 0.0

    def report(self, fields: dict[str, Any]) -> None:
        """A loss, or a sheet or an evaluation that is ready; other nodes report none of these, and have no page. A report that
        fails is skipped."""
        with harmless(f"the page of losses of {self.node}"):
            self._report(fields)

    def _report(self, fields: dict[str, Any]) -> None:
        if "picture" in fields:
            picture = picture_uri(self.run.store.read(fields["picture"]))
            self.sheet = [f"## Samples at step {fields['done']}", f"![samples]({picture})"]
        elif "report" in fields:
            self.measured[fields["done"]] = {name: value for name, value in fields.items() if name not in REPORT}
        elif "loss" in fields:
            self._add(fields["phase"], fields["done"], fields["loss"])
            if time.monotonic() - self.drawn < CURVE_EVERY and fields["done"] < fields["total"]:
                return
        else:
            return
        self.drawn = time.monotonic()
        if self.artifact is None:
            key = f"{artifact_key(self.run.recipe.name, self.node)}-training"
            self.artifact = cast(UUID, create_markdown_artifact(self._page(), key, "losses and samples so far"))
            self.run.pages[f"{self.node}-training"] = str(self.artifact)
            return
        with get_client(sync_client=True) as client:
            client.update_artifact(self.artifact, ArtifactUpdate(data=self._page()))

    def _add(self, kind: str, step: int, loss: float) -> None:
        """A row; in place of those of workers that were lost, whose steps come again, and of steps that were gone back from."""
        if self.rows and self.rows[-1]["step"] >= step:
            self.rows = [row for row in self.rows if row["step"] < step or (row["step"] == step and row["kind"] != kind)]
        self.rows.append({"kind": kind, "step": step, "loss": loss})

    def _page(self) -> str:
        from stages.drawing.pictures import loss_curve

        picture = io.BytesIO()
        loss_curve(picture, {self.node: self.rows}, "loss")
        last = [f"Step {row['step']}: {row['kind']} loss {row['loss']:.4g}." for row in self.rows[-1:]]
        return "\n\n".join(
            [f"# {self.node}", *last, f"![losses]({picture_uri(picture.getvalue())})", *self._figures(), *self.sheet]
        )

    def _figures(self) -> list[str]:
        """A line an evaluation."""
        if not self.measured:
            return []
        names = list(dict.fromkeys(name for figures in self.measured.values() for name in figures))
        lines = [
            (f"{step:,}", *(f"{figures[name]:.4g}" if name in figures else "" for name in names))
            for step, figures in sorted(self.measured.items())
        ]
        return ["## Evaluations", table(("step", *(name.replace("_", " ") for name in names)), lines)]


def describe_progress(fields: dict[str, Any]) -> str:
    """``write: 3 of 10 units, rows 1200, rows_per_s 340.5, left 0:12``"""
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
