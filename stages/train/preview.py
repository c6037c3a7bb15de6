"""Sheets of samples while a training stage is at work: one for the newest checkpoint, drawn beside the training.

A sheet decides nothing and is no part of a dataset. It lies below `FOLDER` in the store, where the next one replaces it.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

from pydantic import Field

from infra.dataset import FileEntry, fetch_files, find
from infra.scratch import scratch_folder
from stages.drawing.assembly import put_together
from stages.drawing.pictures import sample_sheet
from stages.runner.chain import Chain
from stages.runner.contract import Job, StageConfig, UnitRecord
from stages.runner.run import emit_progress
from stages.shards.tables import open_table
from stages.train.beside import Beside

FOLDER = ".state/previews"
SEED = 0


class PreviewConfig(StageConfig):
    count: int = Field(0, ge=0, le=8, description="samples of each task on a sheet; 0 draws none")
    steps: int = Field(20, ge=1, le=999, description="network calls a sample")
    guidance: float = Field(5.0, ge=0, le=100, description="scale s of c + s * (c - u)")
    gpus: float = Field(0, ge=0, le=1, description="share of a GPU that drawing takes; with 0 it draws on a CPU")


class Previews(Beside):
    """The sheets of one training run."""

    what = "sheet of samples"

    def __init__(self, chain: Chain) -> None:
        config = chain.job.config
        super().__init__(chain, config.checkpoint_every if config.preview.count else 0, config.preview.gpus)
        self.path = f"{FOLDER}/{chain.job.node}-{chain.key_of(chain.end)}.png"

    def work(self, step: int, record: UnitRecord) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return draw_sheet, (self.job, record.files, self.path)

    def finished(self, step: int, result: Any) -> None:
        emit_progress(self.job.node, "preview", step, max(self.job.config.steps, 1), "steps", {"picture": self.path})


def draw_sheet(job: Job, files: list[FileEntry], path: str) -> None:
    """Draw text to image for captions of the data, and the tasks without an input, with a checkpoint's moving average.

    Args:
        job: of the training stage.
        files: the checkpoint's.
        path: of the PNG, in the store.
    """
    import torch

    from unidiffuser.generation import UniDiffuser

    settings, data = job.config.preview, _data(job)
    reference = data.manifest.inputs["codec"]
    codec = find(job.store, reference.stage, reference.fingerprint)
    if codec is None:
        raise FileNotFoundError("the text codec of the latents is no longer in the store")
    with scratch_folder() as scratch:
        checkpoint = fetch_files(job.store, files, scratch / "checkpoint")
        folder = put_together(checkpoint, "ema", codec, job.config, scratch / "model")
        model = UniDiffuser.load(folder, "cuda" if torch.cuda.is_available() else "cpu")

    kind = job.config.data.data_type

    def drawn(task: str, **wanted: Any) -> list[Any]:
        seeds = range(SEED, SEED + settings.count)
        return model.generate(
            task, seeds=seeds, steps=settings.steps, guidance=settings.guidance, batch=settings.count, beams=1,
            sampler="dpm++2m",  # of few steps it makes the better pictures
            data_type=kind if isinstance(kind, int) else None, mark=False, **wanted,
        )  # fmt: skip

    captions, count = _captions(job, settings.count), settings.count
    rows = [
        ("Text to image", [(r.image, caption) for r, caption in zip(drawn("t2i", prompts=captions), captions, strict=True)]),
        ("Joint", [(r.image, r.caption) for r in drawn("joint", count=count)]),
        ("Image only", [(r.image, "") for r in drawn("i", count=count)]),
        ("Text only", [(None, r.caption) for r in drawn("t", count=count)]),
    ]
    sheet = io.BytesIO()
    sample_sheet(sheet, rows, columns=settings.count)
    job.store.write(path, sheet.getvalue())


def _data(job: Job) -> Any:
    """The first dataset of latents."""
    return next(dataset for name, dataset in job.inputs.items() if name.startswith("data."))


def _captions(job: Job, count: int) -> list[str]:
    """The first captions of the data, again from the start if there are too few."""
    import pyarrow.parquet as pq

    shard = next(entry for entry in _data(job).files if entry.name.endswith(".parquet"))
    with open_table(job, shard.path) as file:
        rows = pq.ParquetFile(file, page_checksum_verification=True).iter_batches(count, columns=["caption"])
        found = next(rows).column(0).to_pylist()
    return [found[number % len(found)] for number in range(count)]
