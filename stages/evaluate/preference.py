"""What evaluate measures of pictures and captions of any kind: a preference, between a floor and a ceiling.

How often does CLIP find a caption closer to the image that was made for it than to an image that was made for another caption?
The untrained network gives the floor, the real images the ceiling.
"""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from stages.drawing.assembly import assemble
from stages.drawing.pictures import loss_curve, sample_sheet
from stages.evaluate.history import histories
from stages.evaluate.prompts import read_prompts
from stages.runner.contract import Job, Output, Records, StageError, Unit
from stages.shards.tables import read_table, write_table

PROMPTS_A_UNIT = 25
SHEET = 6


class Model:
    """The assembled model, loaded once a worker, and its sampling settings."""

    def __init__(self, job: Job):
        import torch

        from unidiffuser.generation import UniDiffuser

        self.job, self.config = job, job.config
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        with tempfile.TemporaryDirectory() as folder:
            self.unidiffuser = UniDiffuser.load(assemble(job, Path(folder, "model")), device=self.device)
        self.trained = self.unidiffuser.uvit
        self.prompts = read_prompts(job.sources, job.config.count)

    def generate(self, task: str, count: int, first: int = 0, **inputs: Any) -> list[Any]:
        """`count` results with the seeds from `first` on: one for every input, or that many where the task takes none.

        Raises:
            StageError: a network computes what is not finite.
        """
        from unidiffuser.tensors import NotFinite

        config = self.config
        try:
            return self.unidiffuser.generate(
                task, count=1 if inputs else count, seeds=[config.seed + first + n for n in range(count)], steps=config.steps,
                guidance=config.guidance, sampler=config.sampler, beams=config.beams, batch=config.batch,
                data_type=config.data_type, mark=False, **inputs,
            )  # fmt: skip
        except NotFinite as error:
            raise StageError(f"{self.job.node}: {error}; or the checkpoint has diverged") from None

    def untrained(self) -> Any:
        """A network of the same size that has learned nothing."""
        import torch

        from unidiffuser.uvit import UViT

        torch.manual_seed(self.config.seed)
        return UViT(self.trained.config).to(self.device).eval()

    def real_images(self, start: int, stop: int) -> list[Any]:
        """The pictures of some prompts, as people see them.

        Raises:
            StageError: one of them cannot be read.
        """
        from unidiffuser.images import PictureError, open_picture

        pictures = []
        for row, value in enumerate(self.prompts.slice(start, stop - start)["image"].to_pylist(), start):
            try:
                pictures.append(open_picture(value or b""))
            except PictureError as reason:
                address = next(iter(self.job.sources))
                raise StageError(
                    f"{address}: row {row}, column image: {reason}; put a picture there or leave the row out"
                ) from None
        return pictures


class Draw(Model):
    """Makes an image for every caption, or a caption for every image, of a few prompts."""

    def run(self, unit: Unit, out: Output) -> None:
        start, stop = unit.payload["start"], unit.payload["stop"]
        captions = self.prompts["caption"].to_pylist()[start:stop]
        self.unidiffuser.uvit = self.trained
        if unit.payload["kind"] == "captions":
            results = self.generate("i2t", stop - start, start, images=self.real_images(start, stop))
            table = pa.table({"caption": [result.caption for result in results]})
        else:
            if unit.payload["kind"] == "untrained":
                self.unidiffuser.uvit = self.untrained()
            else:
                out.stats.rows_in = out.stats.rows_out = len(captions)
            results = self.generate("t2i", stop - start, start, prompts=captions)
            table = pa.table({"image": [_png(result.image) for result in results]})
        write_table(table, out.path("drawn.parquet", len(table)))


class Report(Model):
    """Scores what was drawn and draws the pictures."""

    def run(self, unit: Unit, out: Output) -> None:
        drawn = {kind: [read_table(self.job, path) for path in paths] for kind, paths in unit.payload["drawn"].items()}
        captions = self.prompts["caption"].to_pylist()
        scores = {
            "text_to_image": self.preference(captions, _images(drawn["model"])),
            "text_to_image_untrained": self.preference(captions[: self.config.untrained], _images(drawn["untrained"])),
        }
        if "captions" in drawn:
            real = self.real_images(0, len(captions))
            written = [caption for table in drawn["captions"] for caption in table["caption"].to_pylist()]
            scores["text_to_image_real"] = self.preference(captions, real)
            scores["image_to_text"] = self.preference(written, real)
        facts = {"prompts": len(captions), "preference": scores, "checkpoint": self.job.inputs["checkpoint"].manifest.fingerprint}
        trained = histories(self.job)
        facts["validation_loss"] = {
            node: [[row["step"], round(row["loss"], 5)] for row in rows if row["kind"] == "validation"]
            for node, rows in trained.items()
        }
        out.path("report.json", 1).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        loss_curve(out.path("loss-curve.png"), trained)
        sample_sheet(out.path("sample-sheet.png"), self.sheet(captions, drawn))
        out.stats.rows_in = out.stats.rows_out = len(captions)
        out.notes |= facts

    def preference(self, captions: list[str], images: list[Any]) -> float:
        """Share of pairs in which CLIP finds the caption closer to its own image than to that of the next prompt.

        The n-th caption is paired with the image of the prompt half the list further on, so that neighbours in the file, which
        may be alike, never meet. A tie counts half.
        """
        import torch
        from torch.nn.functional import normalize

        clip = self.unidiffuser.clip_image
        batch = self.config.batch
        with torch.inference_mode():
            text = torch.cat([clip.text(captions[i : i + batch]) for i in range(0, len(captions), batch)])
            image = torch.cat([clip.image(images[i : i + batch]) for i in range(0, len(images), batch)])
        text, image = normalize(text, dim=-1), normalize(image, dim=-1)
        own = (text * image).sum(-1)
        other = (text * image.roll(len(images) // 2, 0)).sum(-1)
        return round(float((own > other).float().mean() + 0.5 * (own == other).float().mean()), 4)

    def sheet(self, captions: list[str], drawn: dict[str, list[pa.Table]]) -> list[tuple[str, list[tuple[Any, str]]]]:
        """Rows of the sample sheet; the three tasks without an input are drawn here."""
        rows: list[tuple[str, list[tuple[Any, str]]]] = []
        rows.append(("Text to image", list(zip(_images(drawn["model"]), captions, strict=True))[:SHEET]))
        if "captions" in drawn:
            written = drawn["captions"][0]["caption"].to_pylist()[:SHEET]
            rows.append(("Image to text", list(zip(self.real_images(0, len(written)), written, strict=True))))
        joint = self.generate("joint", SHEET)
        rows.append(("Joint: image and text together", [(r.image, r.caption) for r in joint]))
        rows.append(("Image only", [(r.image, "") for r in self.generate("i", SHEET)]))
        rows.append(("Text only", [(None, r.caption) for r in self.generate("t", SHEET)]))
        return rows


def _png(image: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _images(tables: list[pa.Table]) -> list[Any]:
    from unidiffuser.images import open_picture

    return [open_picture(value) for table in tables for value in table["image"].to_pylist()]


def plan_draws(job: Job) -> Iterator[Unit]:
    """Units of `PROMPTS_A_UNIT` prompts for each kind of drawing; captions only where there are real images."""
    table = read_prompts(job.sources, job.config.count)
    kinds = ["model", "untrained", *(["captions"] if "image" in table.column_names else [])]
    digest = next(iter(job.sources.values()))
    for kind in kinds:
        count = min(len(table), job.config.untrained) if kind == "untrained" else len(table)
        for start in range(0, count, PROMPTS_A_UNIT):
            stop = min(start + PROMPTS_A_UNIT, count)
            yield Unit(f"{kind}-{start:05d}", (digest,), {"kind": kind, "start": start, "stop": stop}, stop - start)


def plan_report(job: Job, records: Records) -> Iterator[Unit]:
    drawn: dict[str, list[str]] = {}
    for record in records["draw"]:
        drawn.setdefault(record.name.rsplit("-", 1)[0], []).append(record.files[0].path)
    history = [d.manifest.fingerprint for name, d in job.inputs.items() if name.startswith("history.")]
    yield Unit("report", (*history, *(r.files[0].sha256 for r in records["draw"])), {"drawn": drawn})
