"""An evaluation's units: samples drawn, networks that look at them, and one report.

    draw     samples of each kind that a measure asks for, some at a time
    look     what a network makes of the pictures or captions of a drawn unit, or of as many held-out ones
    report   one unit: the measures' figures, the sheet of samples and the curve of the losses

What was drawn and looked at is known by what decides it, so another measure, or more samples, draw only what is not there yet.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa

from stages.drawing.pictures import loss_curve, sample_sheet
from stages.measuring.checkpoint import identity
from stages.measuring.history import histories
from stages.measuring.networks import Look, framed, judge_of, looks_at, network
from stages.measuring.painters import painter_of
from stages.measuring.rows import HELD_OUT
from stages.measuring.samples import Asked, Need, Samples
from stages.measuring.view import Stored, View, named
from stages.runner.contract import Job, Output, Phase, Records, Resources, Unit, canonical
from stages.shards.tables import read_table, write_table

SHEET = 6
TITLES = {
    "t2i": "Text to image", "i2t": "Image to text", "joint": "Joint: image and text together", "i": "Image only",
    "t": "Text only",
}  # fmt: skip


def asked_of(job: Job) -> Asked:
    """The evaluation as its measures see it."""
    config, held_out = job.config, painter_of(job).prompts(job)
    way = Samples("t2i", config.steps, config.guidance, config.sampler, config.beams)
    return Asked(held_out.count, held_out.pictures, way, "before" in job.lists)


def needs_of(config: Any, asked: Asked) -> list[Need]:
    """What the measures and the sheet of samples need."""
    return [*_sheet_needs(asked), *(need for measure in config.measures for need in measure.needs(asked))]


def _sheet_needs(asked: Asked) -> list[Need]:
    tasks = [task for task in TITLES if task != "i2t" or asked.pictures]
    return [Need(asked.samples(task), min(SHEET, asked.count)) for task in tasks]  # type: ignore[arg-type]


def samples_wanted(config: Any, asked: Asked) -> dict[Samples, int]:
    """How many of each kind an evaluation draws."""
    wanted: dict[Samples, int] = {}
    for need in needs_of(config, asked):
        if need.samples is not None:
            wanted[need.samples] = max(wanted.get(need.samples, 0), need.count)
    return wanted


def plan_draw(job: Job, _: Records) -> Iterator[Unit]:
    painter = painter_of(job)
    held_out, asked = painter.prompts(job), asked_of(job)
    config = job.config
    # All that decides a sample besides its kind and its number.
    codec = job.inputs["codec"].manifest.fingerprint if "codec" in job.inputs else ""
    weights = {name: digest for name, digest in job.weights.items() if name in ("vae", "clip", "text")}
    drawn_by = canonical([identity(job).fingerprint, codec, weights, config.seed, config.weights, config.data_type])
    for samples, count in samples_wanted(config, asked).items():
        begun = sorted(job.lists["before"].values()) if samples.of == "before" else []
        for start in range(0, count, painter.at_once):
            stop = min(start + painter.at_once, count)
            given = held_out.digests(start, stop) if samples.task in ("t2i", "i2t") else ()
            payload = {"samples": asdict(samples), "start": start, "stop": stop}
            yield Unit(f"{samples.name}-{start:05d}-{stop - start}", (drawn_by, *begun, *given), payload, stop - start)


class Draw:
    """Draws a stretch of samples."""

    def __init__(self, job: Job) -> None:
        self.painter = painter_of(job)(job)

    def run(self, unit: Unit, out: Output) -> None:
        start, stop = unit.payload["start"], unit.payload["stop"]
        images, captions = self.painter.draw(Samples(**unit.payload["samples"]), start, stop)
        columns: dict[str, Any] = {}
        if images is not None:
            columns["image"] = pa.array([_png(image) for image in images], pa.binary())
            out.notes["side"] = images[0].width
        if captions is not None:
            columns["caption"] = pa.array(captions, pa.string())
        write_table(pa.table(columns), out.path("drawn.parquet", stop - start))
        out.stats.rows_in = stop - start


def plan_look(job: Job, records: Records) -> Iterator[Unit]:
    asked, drawn = asked_of(job), _drawn(records)
    held_out, at_once = painter_of(job).prompts(job), painter_of(job).at_once
    side = next((record.notes["side"] for found in drawn.values() for record in found if "side" in record.notes), None)
    looks: dict[tuple[str, str], int] = {}
    for need in needs_of(job.config, asked):
        if need.network is not None:
            key = (need.network, named(need.samples))
            looks[key] = max(looks.get(key, 0), need.count)
    # A network after the other: a worker holds one at a time.
    for (name, samples), count in sorted(looks.items()):
        by = _digest_of(job, name)
        for number, start in enumerate(range(0, count, at_once)):
            payload: dict[str, Any] = {"network": name, "samples": samples, "start": start}
            if samples == HELD_OUT:
                stop = min(start + at_once, count)
                digests = (*held_out.digests(start, stop), str(side))
                yield Unit(
                    f"{name}-{samples}-{start:05d}-{stop - start}", (by, *digests), {**payload, "stop": stop, "side": side},
                    stop - start,
                )  # fmt: skip
            else:
                entry = drawn[samples][number].files[0]
                yield Unit(f"{name}-{samples}-{start:05d}", (by, entry.sha256), {**payload, "path": entry.path}, entry.rows)


def _digest_of(job: Job, name: str) -> str:
    """What decides what a network makes of something."""
    kind = name.split("-")[0]
    return job.weights["inception" if kind == "inception" else "judge"] if kind in ("inception", "clip") else "scenes"


def _drawn(records: Records) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for record in records["draw"]:
        found.setdefault(record.name.rsplit("-", 2)[0], []).append(record)
    return found


class Looker:
    """Looks at a stretch of samples or of the held-out data."""

    def __init__(self, job: Job) -> None:
        self.job, self.held_out = job, painter_of(job).prompts(job)
        self.name = ""
        self.look: Look | None = None

    def run(self, unit: Unit, out: Output) -> None:
        name = unit.payload["network"]
        if self.look is None or self.name != name:
            # One at a time: the one before gives its memory back first.
            self.look = None
            self.name, self.look = name, network(name, self.job)
        found = self.look(self._values(unit, looks_at(name))).astype(np.float32)
        rows = pa.array([row.tobytes() for row in found], pa.binary(found.shape[1] * found.itemsize))
        write_table(pa.table({"features": rows}), out.path("features.parquet", len(found)))

    def _values(self, unit: Unit, part: str) -> list[Any]:
        from unidiffuser.images import open_picture

        given = unit.payload
        if "path" in given:
            values = read_table(self.job, given["path"], columns=[part])[part].to_pylist()
            return [open_picture(value) for value in values] if part == "image" else values
        if part == "image":
            return framed(self.held_out.images(given["start"], given["stop"]), given["side"])
        return self.held_out.captions(given["start"], given["stop"])


def plan_report(job: Job, records: Records) -> Iterator[Unit]:
    stored: list[tuple[str, str, list[str]]] = []
    for samples, found in _drawn(records).items():
        stored.append((samples, "", [record.files[0].path for record in found]))
    looked: dict[tuple[str, str], list[str]] = {}
    for unit, record in zip(plan_look(job, records), records["look"], strict=True):
        looked.setdefault((unit.payload["samples"], unit.payload["network"]), []).append(record.files[0].path)
    stored += [(*key, paths) for key, paths in looked.items()]
    history = [d.manifest.fingerprint for name, d in job.inputs.items() if name.startswith("history.")]
    digests = [record.files[0].sha256 for phase in ("draw", "look") for record in records[phase]]
    rows = sum(record.files[0].rows for record in records["draw"])
    yield Unit("report", (*history, *digests), {"stored": stored, "rows": rows})


class Report:
    """Measures what was drawn, and draws the pictures of the report."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def run(self, unit: Unit, out: Output) -> None:
        stored: Stored = {(samples, by): paths for samples, by, paths in unit.payload["stored"]}
        asked = asked_of(self.job)
        view = View(self.job, asked, stored)
        figures: list[dict[str, Any]] = []
        details: dict[str, dict[str, Any]] = {}
        for measure in self.job.config.measures:
            found = measure.result(view, out)
            figures += [{"measure": measure.kind, **asdict(figure)} for figure in found.figures]
            if found.details:
                details.setdefault(measure.kind, {}).update(found.details)
        trained = histories(self.job)
        facts = {"figures": figures, **self._about(asked)}
        losses = {
            node: [[row["step"], round(row["loss"], 5)] for row in rows if row["kind"] == "validation"]
            for node, rows in trained.items()
        }
        told = {**facts, "details": details, "validation_loss": losses}
        out.path("report.json", 1).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
        loss_curve(out.path("loss-curve.png"), trained)
        sample_sheet(out.path("sample-sheet.png"), self._sheet(view))
        out.stats.rows_in = out.stats.rows_out = unit.payload["rows"]
        out.notes |= facts

    def _about(self, asked: Asked) -> dict[str, Any]:
        """What was measured, and how."""
        checkpoint, config = identity(self.job), self.job.config
        return {
            "checkpoint": checkpoint.fingerprint,
            "node": checkpoint.node,
            "step": checkpoint.step,
            "weights": config.weights,
            "prompts": asked.count,
            "seed": config.seed,
            "sampling": {name: getattr(asked.way, name) for name in ("sampler", "steps", "guidance", "beams")},
            "judge": judge_of(config),
        }

    def _sheet(self, view: View) -> list[tuple[str, list[tuple[Any, str]]]]:
        """Rows of the sheet; what was given stands beside what was drawn."""
        rows = []
        for need in _sheet_needs(view.asked):
            assert need.samples is not None
            task, count = need.samples.task, need.count
            images = [None] * count if task == "t" else view.images(None if task == "i2t" else need.samples, count)
            captions = [""] * count if task == "i" else view.captions(None if task == "t2i" else need.samples, count)
            rows.append((TITLES[task], list(zip(images, captions, strict=True))))
        return rows


def _one_each(config: Any) -> Resources:
    """One worker a GPU where there are GPUs, else one a core."""
    from stages.runner.cluster import gpus_each

    return Resources(cpus=1, gpus=gpus_each(config.machines), workers=config.workers)


PHASES = (
    Phase("draw", plan_draw, worker=Draw, by_content=True, resources=_one_each, memory=("batch",)),
    Phase("look", plan_look, worker=Looker, by_content=True, resources=_one_each, memory=("batch",)),
    Phase("report", plan_report, worker=Report, resources=_one_each, memory=("batch",)),
)


def _png(image: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
