"""What a page says first of what was trained or scored: losses as a curve and a table, scores as a table."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from infra.dataset import Dataset
from pipelines.pages.markdown import image, table
from pipelines.pages.pictures import data_uri, picture_uri

# A curve of this width leaves room for its table on a laptop's first screen, in pixels.
WIDTH = 520
# Of a long training, as many validations evenly, and always the last.
LOSSES = 6
# The end of the name of a loss of one eighth of the timesteps.
EIGHTH = re.compile(r"_t[1-8]$")


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
    """The curve of a training history, a table of validations, or of what was trained where there are none, and damage."""
    told = [row for row in rows if row["kind"] == "validation"] or [row for row in rows if row["kind"] == "train"]
    if not told:
        return []
    names = {name for row in told for name in row}
    parts = sorted(name for name in names if name.startswith("loss_") and not EIGHTH.search(name))
    columns = {"loss": "loss on held-out rows" if told[0]["kind"] == "validation" else "loss"}
    columns |= {"ema_loss": "with the averaged weights"} if "ema_loss" in names else {}
    columns |= {name: name.removeprefix("loss_") for name in parts}
    lines = [(f"{row['step']:,}", *(_figure(row, name) for name in columns)) for row in _some(told)]
    figures = table(("step", *columns.values()), lines)
    return ["## Losses", _curve(node, rows), figures, *_by_noise(told[-1]), *_damage(rows)]


def _by_noise(row: Mapping[str, Any]) -> list[str]:
    """The loss of each modality by eighths of its timesteps, where the row tells it."""
    modalities = sorted({EIGHTH.sub("", name) for name in row if name.startswith("loss_") and EIGHTH.search(name)})
    lines = [(name.removeprefix("loss_"), *(_figure(row, f"{name}_t{eighth}") for eighth in range(1, 9))) for name in modalities]
    return [table((f"step {row['step']:,}, from clean to noise", *map(str, range(1, 9))), lines)] if lines else []


def _figure(row: Mapping[str, Any], name: str) -> str:
    return f"{row[name]:.4f}" if name in row else ""


def _damage(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a training has met that was damaged, and what it did about it."""
    skipped = max((row.get("skipped", 0) for row in rows), default=0)
    groups = max((row.get("damaged_groups", 0) for row in rows), default=0)
    lines = [f"{skipped:,} steps were skipped because their loss or gradient was not finite, or a spike"] if skipped else []
    lines += [f"{groups:,} row groups were damaged, and others taken in their place"] if groups else []
    lines += [f"at step {row['step']:,}: {row['said']}" for row in rows if row["kind"] == "damage"]
    return ["## Damage", "\n".join(f"- {line}" for line in lines)] if lines else []


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
    lines = [
        (figure["name"].replace("_", " "), f"**{figure['value']:g}**", f"{figure['samples']:,}", figure["by"], figure["note"])
        for figure in summary["figures"]
    ]
    scores = table(("", "", "samples", "seen by", ""), lines)
    curve = image("losses", data_uri(dataset, dataset.file("loss-curve.png")), WIDTH)
    return ["## Scores", scores, curve]
