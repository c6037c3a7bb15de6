"""train: a stage of the U-ViT's training (arXiv 2303.06555, section 6.1), as a chain of checkpoints on a gang of workers.

A unit is a checkpoint. Its key leaves out the last step, so a longer run goes on from the greatest checkpoint of a shorter one,
and a run that died goes on from its own. A run that is asked to stop leaves one more, aside from the units, of the step that it
has reached. The dataset is the checkpoint at `steps`.
"""

from __future__ import annotations

import json
import logging
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from infra.dataset import fetch_files
from stages.runner.contract import Job, Phase, Records, Stage, StageError, Unit, UnitRecord, operational, scratch_output
from stages.runner.recipe import encoder
from stages.runner.run import emit_progress, time_left
from stages.shards.scores import SCORES
from stages.train.preview import PreviewConfig, Previews
from training.config import DataConfig, TrainConfig
from training.names import column_of
from training.where import Comparison

log = logging.getLogger("stages")

# Numbers that encode writes beside the latents.
COLUMNS = (*SCORES, "width", "height")


class TrainStageConfig(TrainConfig):
    init_optimizer: bool = Field(False, description="start with Adam's moments of the stage that this one starts `from`")
    vae: str = encoder("embedded", "AutoencoderKL of the latents, for the preview; none of the three decides the result")
    clip: str = encoder("embedded", "open_clip model of the image embeddings, likewise")
    text: str = encoder("embedded", "open_clip model of the caption's hidden states, likewise")
    preview: PreviewConfig = operational(PreviewConfig(), "sheets of samples in the UI while it trains, one a checkpoint")

    @field_validator("data")
    @classmethod
    def _known_columns(cls, data: DataConfig) -> DataConfig:
        """What encode writes is known before anything runs."""
        for condition in map(Comparison.parse, data.where):
            if column_of(condition.column, COLUMNS) is None:
                raise ValueError(f"where names {condition.column}; latents have {', '.join(COLUMNS)}")
        return data


def checkpoint_steps(config: TrainStageConfig) -> list[int]:
    """Steps at which a checkpoint is written: the multiples of `checkpoint_every`, and the last."""
    return [*range(config.checkpoint_every, config.steps, config.checkpoint_every), config.steps]


def plan_checkpoints(job: Job, _: Records) -> list[Unit]:
    return [Unit(f"step-{step:08d}", (str(step),)) for step in checkpoint_steps(job.config)]


@dataclass(frozen=True)
class Publisher:
    """Puts a checkpoint folder into the store as a unit; runs in the worker of rank 0, on whatever machine that is."""

    job: Job
    keys: dict[int, str]
    aside: str
    started: float

    def __call__(self, folder: str, step: int, metrics: dict[str, Any]) -> None:
        key = self.keys.get(step, self.aside)
        state = json.loads(Path(folder, "trainer.json").read_text(encoding="utf-8"))
        rows = sum(d.manifest.stats.rows_out for name, d in self.job.inputs.items() if name.startswith("data."))
        with scratch_output(self.job.store) as out:
            for path in sorted(Path(folder).iterdir()):
                path.rename(out.path(path.name))
            out.stats.rows_in, out.stats.rows_out = rows, state["rows"]
            out.stats.drop("validation_or_where" if self.job.config.data.where else "validation", rows - state["rows"])
            out.notes |= {"step": step, "metrics": metrics}
            if step not in self.keys:
                self.job.store.remove(self.job.unit_folder(self.aside))
            out.publish(self.job, key, f"step-{step:08d}", time.time() - self.started)
        if step in self.keys:
            self.give_way(step)

    def give_way(self, step: int) -> None:
        """Remove the checkpoint before this one unless `keep_every` keeps it, and what the last stop left: a year of
        checkpoints would fill any disk."""
        self.job.store.remove(self.job.unit_folder(self.aside))
        keep = self.job.config.keep_every
        earlier = [s for s in self.keys if s < step]
        if keep is None or not earlier or max(earlier) % keep == 0:
            return
        self.job.store.remove(self.job.unit_folder(self.keys[max(earlier)]))


@dataclass(frozen=True)
class Newest:
    """Fetches the newest checkpoint of this chain, on each machine that trains."""

    job: Job
    keys: dict[int, str]
    aside: str
    folder: str

    def __call__(self) -> str | None:
        done = (self.job.unit_done(self.keys[step]) for step in sorted(self.keys, reverse=True))
        newest = next((record for record in done if record is not None), None)
        aside = self.job.unit_done(self.aside)
        # The recipe may ask for fewer steps now than when it was stopped.
        if aside is not None and (newest.notes["step"] if newest else -1) < aside.notes["step"] < max(self.keys):
            newest = aside
        if newest is None:
            return None
        return str(fetch_files(self.job.store, newest.files, Path(self.folder, f"resume-{newest.notes['step']}")))


@dataclass(frozen=True)
class Initial:
    """Fetches the checkpoint that this training stage starts from."""

    job: Job
    folder: str

    def __call__(self) -> str:
        return str(self.job.inputs["init"].fetch(Path(self.folder, "init")))


def train_chain(job: Job, units: list[Unit], keys: list[str], aside: str) -> None:
    """Train from the newest checkpoint to the last step.

    Raises:
        StageError: the workers failed, or the run was asked to stop before its last step.
    """
    from training.job import TrainingError, TrainJob
    from training.launch import train

    by_step = dict(zip(checkpoint_steps(job.config), keys, strict=True))
    previews = Previews(job, by_step)
    # Several inputs are one list of shards, in the order of the recipe.
    shards = [
        job.store.url(entry.path)
        for name, dataset in job.inputs.items()
        if name.startswith("data.")
        for entry in dataset.files
        if entry.name.endswith(".parquet")
    ]

    def on_row(row: dict[str, Any]) -> None:
        more: dict[str, Any] = {name: round(row[name], 5) for name in ("loss", "samples_per_s", "lr") if name in row}
        more |= time_left(job.config.steps - row["step"], row.get("samples_per_s", 0) / job.config.global_batch)
        emit_progress(job.node, row["kind"], row["step"], job.config.steps, "steps", more)
        previews.seen(row["step"])
        if row["kind"] == "validation":
            log.info("%s: step %d validation loss %.4f", job.node, row["step"], row["loss"])

    with tempfile.TemporaryDirectory(prefix="unidiffuser-train-") as folder:
        run = TrainJob(
            config=job.config,
            shards=tuple(shards),
            work_folder=folder,
            publish=Publisher(job, by_step, aside, time.time()),
            resume=Newest(job, by_step, aside, folder),
            init_from=Initial(job, folder) if "init" in job.inputs else None,
            init_optimizer=job.config.init_optimizer,
        )
        try:
            outcome = train(run, on_row=on_row)
        except TrainingError as error:
            raise StageError(f"{job.node}: {error}") from error
    if outcome.stopped:
        raise StageError(f"{job.node}: stopped at step {outcome.step} of {job.config.steps}; run again to go on")
    previews.close()


class Train(Stage):
    """A checkpoint: config.json, model, ema and optimizer tensors, trainer.json and history.jsonl; its rows are samples."""

    name = "train"
    version = 3
    Config = TrainStageConfig
    whole = frozenset({"data", "init"})
    phases = (Phase("train", plan_checkpoints, gang=train_chain, fields=frozenset(TrainStageConfig.model_fields) - {"steps"}),)

    @classmethod
    def bytes_needed(cls, job: Job) -> int:
        # fp32 weights, moving average and two moments, for two checkpoints: the one being written and the one before.
        model = job.config.model
        weights = 12 * model.width**2 * (model.depth + 1) + 2 * model.width**2 * (model.depth // 2)
        return 2 * 4 * 4 * weights

    @classmethod
    def schema(cls, job: Job, records: list[UnitRecord]) -> dict[str, str]:
        return {"tensors": "fp32"}

    @classmethod
    def summary(cls, job: Job, records: Records) -> dict[str, Any]:
        return records["train"][-1].notes
