"""What evaluate measures of the world of shapes: a known truth.

Accuracies of text to image and of image to text, whether the two halves of a joint sample agree, and how far the distributions
of pictures and of captions are from the world's. The report is a page with its figures, the curve of the losses and samples.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
from safetensors.torch import load_file

from examples.shapes.autoencoder import Autoencoder
from examples.shapes.measure import TASKS, Artist, Protocol, Read, measure, read_samples
from examples.shapes.report import figures, page
from examples.shapes.sheets import curve, sheet
from examples.shapes.world import SCENES
from infra.dataset import fetch_files
from stages.evaluate.history import histories
from stages.runner.contract import Job, Output, Records, Unit
from stages.shards.tables import read_table, write_table

SAMPLES_A_UNIT = 2000
UNREADABLE = -1
WRITTEN = ("shown", "said")
# What the picture codec is called in the dataset of its world.
CODEC = "codec.safetensors"


class _Drawer:
    """The trained network with the picture codec, loaded once a worker."""

    def __init__(self, job: Job):
        import torch

        from training.shares import merge
        from unidiffuser.weights import load_native

        self.job, config = job, job.config
        self.protocol = Protocol(
            config.count, config.samples, config.steps, config.sampler, config.guidance, config.batch, config.seed
        )
        with tempfile.TemporaryDirectory() as scratch:
            checkpoint, folder = job.inputs["checkpoint"].fetch(Path(scratch, "checkpoint")), Path(scratch, "model")
            folder.mkdir()
            shutil.copyfile(checkpoint / "config.json", folder / "config.json")
            merge(checkpoint, config.weights, folder / "model.safetensors")
            model = load_native(folder)
            codec = fetch_files(job.store, [job.inputs["codec"].file(CODEC)], Path(scratch, "codec"))
            self.codec = Autoencoder.of(load_file(codec / CODEC))
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.artist = Artist(model.to(device), self.codec.to(device), self.protocol)


class Draw(_Drawer):
    """Draws a stretch of the samples of a task, and reads them back."""

    def run(self, unit: Unit, out: Output) -> None:
        start, stop = unit.payload["start"], unit.payload["stop"]
        read = dict(zip(WRITTEN, read_samples(self.artist, unit.payload["task"], start, stop), strict=True))
        numbers = {scene: number for number, scene in enumerate(SCENES)}
        columns = {
            name: pa.array([UNREADABLE if scene is None else numbers[scene] for scene in scenes], pa.int8())
            if scenes
            else pa.nulls(stop - start, pa.int8())
            for name, scenes in read.items()
        }
        write_table(pa.table(columns), out.path("drawn.parquet", stop - start))
        out.stats.rows_in = stop - start


class Report(_Drawer):
    """Measures what was drawn, and writes the page."""

    def run(self, unit: Unit, out: Output) -> None:
        read = {task: self.read(paths) for task, paths in unit.payload["drawn"].items()}
        checkpoint = self.job.inputs["checkpoint"].manifest
        rows = [row for row in histories(self.job)[checkpoint.node] if row["kind"] == "train"]
        made = self.job.inputs["codec"].manifest.summary
        values = figures(self.artist, measure(self.codec, self.protocol, read), made, checkpoint.config, rows)
        out.path("shapes.json", 1).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        out.path("shapes.md").write_text(page(values), encoding="utf-8")
        curve(out.path("shapes-curve.png"), rows)
        sheet(out.path("shapes-samples.png"), self.artist)
        out.stats.rows_out = sum(len(shown or said) for shown, said in read.values())
        out.notes |= {name: value for name, value in values.items() if isinstance(value, float | int)}

    def read(self, paths: list[str]) -> tuple[Read, Read]:
        """What the samples of a task show, and what they say; empty where they have none."""
        table = pa.concat_tables([read_table(self.job, path) for path in paths])
        shown, said = (
            [None if number == UNREADABLE else SCENES[number] for number in table[name].drop_null().to_pylist()]
            for name in WRITTEN
        )
        return shown, said


def plan_draws(job: Job) -> Iterator[Unit]:
    """Units of some samples of each task."""
    for task in TASKS:
        count = job.config.count if task in ("t2i", "i2t") else job.config.samples
        for start in range(0, count, SAMPLES_A_UNIT):
            stop = min(start + SAMPLES_A_UNIT, count)
            yield Unit(f"{task}-{start:05d}", (), {"task": task, "start": start, "stop": stop}, stop - start)


def plan_report(job: Job, records: Records) -> Iterator[Unit]:
    drawn: dict[str, list[str]] = {}
    for record in records["draw"]:
        drawn.setdefault(record.name.rsplit("-", 1)[0], []).append(record.files[0].path)
    history = [d.manifest.fingerprint for name, d in job.inputs.items() if name.startswith("history.")]
    yield Unit("report", (*history, *(r.files[0].sha256 for r in records["draw"])), {"drawn": drawn})
