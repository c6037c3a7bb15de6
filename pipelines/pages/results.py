"""What a page says first of what was trained or scored: losses as a curve and a table, scores as a table."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

from infra.dataset import Dataset
from pipelines.pages.markdown import image, table
from pipelines.pages.pictures import data_uri, picture_uri

# A curve of this width leaves room for its table on a laptop's first screen, in pixels.
WIDTH = 520
# Of a long training, as many validations evenly, and always the last.
LOSSES = 6
# What each score of an evaluation is, by its name in report.json.
SCORES = {
    "text_to_image": "text to image",
    "text_to_image_untrained": "the same of an untrained network (the floor)",
    "text_to_image_real": "the same of the real pictures (the ceiling)",
    "image_to_text": "image to text",
}


def results(dataset: Dataset) -> list[str]:
    """Markdown for the datasets of `train`, `text-codec` and `evaluate`; nothing for others."""
    stage, summary = dataset.manifest.stage, dataset.manifest.summary
    if stage == "train":
        lines = dataset.store.read(dataset.file("history.jsonl").path).decode().splitlines()
        return losses(dataset.manifest.node, [json.loads(line) for line in lines])
    if stage == "text-codec":
        return _codec(dataset.manifest.node, summary)
    if stage == "evaluate":
        return _scores(dataset)
    return []


def losses(node: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The curve of a training history, and a table of validations, or of what was trained where there are none."""
    told = [row for row in rows if row["kind"] == "validation"] or list(rows)
    if not told:
        return []
    parts = sorted({name for row in told for name in row if name.startswith("loss_")})
    head = (
        "step",
        "loss on held-out rows" if told[0]["kind"] == "validation" else "loss",
        *(p.removeprefix("loss_") for p in parts),
    )
    lines = [
        (f"{row['step']:,}", *(f"{row[name]:.4f}" if name in row else "" for name in ("loss", *parts))) for row in _some(told)
    ]
    return ["## Losses", _curve(node, rows), table(head, lines)]


def _some(rows: Sequence[Any]) -> list[Any]:
    step = max(1, -(-len(rows) // LOSSES))
    return list(rows[::-1][::step])[::-1]


def _curve(node: str, rows: Sequence[Mapping[str, Any]]) -> str:
    from stages.drawing.pictures import loss_curve

    picture = io.BytesIO()
    loss_curve(picture, {node: rows}, "loss")
    return image("losses", picture_uri(picture.getvalue()), WIDTH)


def _codec(node: str, summary: Mapping[str, Any]) -> list[str]:
    history = summary["history"]
    lines = [(f"{row['step']:,}", f"{row['loss']:.4f}", f"{row['bleu4']:.3f}") for row in _some(history)]
    lines.append(("as kept", "", f"**{summary['bleu4']:.3f}**"))
    curve = _curve(node, [{"kind": "train", **row} for row in history])
    return ["## Losses", curve, table(("step", "loss", f"BLEU-4 of {summary['held_out']} held-out captions"), lines)]


def _scores(dataset: Dataset) -> list[str]:
    summary = dataset.manifest.summary
    if "preference" not in summary:
        lines = [(name.replace("_", " "), f"**{value:g}**") for name, value in summary.items()]
        pictures = [image(name, data_uri(dataset, dataset.file(f"shapes-{name}.png")), WIDTH) for name in ("samples", "curve")]
        return ["## Scores", table(("", ""), lines), *pictures]
    told = f"closer to its own picture than to another, of {summary['prompts']:,} prompts"
    lines = [(SCORES.get(name, name), f"**{value:.1%}**") for name, value in summary["preference"].items()]
    return ["## Scores", table(("", told), lines), image("losses", data_uri(dataset, dataset.file("loss-curve.png")), WIDTH)]
