"""train: a stage of the U-ViT's training (arXiv 2303.06555, section 6.1), as a chain of checkpoints on a gang of workers.

A unit is a checkpoint: a step of a chain whose key says what is trained, not how long nor when it is saved. So a run goes on
from the greatest checkpoint that is there, whether it died, was stopped, or was asked for fewer steps or for another rhythm. One
that is asked to stop leaves a checkpoint of the step that it has reached. The dataset is the checkpoint at `steps`.
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

from infra.dataset import VERIFY, FileEntry, fetch_files
from infra.store import Store
from stages.runner.chain import Chain, Gang
from stages.runner.contract import Bug, Job, Phase, Records, Stage, StageError, UnitRecord, operational, scratch_output
from stages.runner.recipe import encoder
from stages.runner.run import emit_progress, time_left
from stages.shards.scores import SCORES
from stages.train.preview import PreviewConfig, Previews
from training.config import DataConfig, TrainConfig
from training.footprint import parameters
from training.names import column_of
from training.where import Comparison

log = logging.getLogger("stages")

# Numbers that encode writes beside the latents.
COLUMNS = (*SCORES, "width", "height")
# Name of the record of a checkpoint that a stop left between two planned ones.
STOPPED = "stopped"


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


def keeps(config: TrainStageConfig, step: int) -> bool:
    """Whether the checkpoint of a step stays when there is a later one."""
    return config.keep_every is None or step % config.keep_every == 0


@dataclass(frozen=True)
class Publisher:
    """Puts a checkpoint folder into the store as a unit; runs in the worker of rank 0, on whatever machine that is."""

    chain: Chain
    started: float

    def __call__(self, folder: str, step: int, metrics: dict[str, Any]) -> None:
        # Another run of the chain may have been here first: what is done stays as it is.
        if self.chain.record(step) is None:
            self.publish(folder, step, metrics)
        self.give_way(step)

    def publish(self, folder: str, step: int, metrics: dict[str, Any]) -> None:
        job = self.chain.job
        state = json.loads(Path(folder, "trainer.json").read_text(encoding="utf-8"))
        rows = sum(d.manifest.stats.rows_out for name, d in job.inputs.items() if name.startswith("data."))
        planned = step == self.chain.end or step % job.config.checkpoint_every == 0
        with scratch_output(job.store) as out:
            for path in sorted(Path(folder).iterdir()):
                path.rename(out.path(path.name))
            out.stats.rows_in, out.stats.rows_out = rows, state["rows"]
            out.stats.drop("validation_or_where" if job.config.data.where else "validation", rows - state["rows"])
            out.notes |= {"step": step, "metrics": metrics}
            name = f"step-{step:08d}" if planned else STOPPED
            out.publish(job, self.chain.key_of(step), name, time.time() - self.started)

    def give_way(self, step: int) -> None:
        """Remove the checkpoints before this one that `keep_every` does not keep, and what stops left: a year of checkpoints
        would fill any disk."""
        for earlier, record in self.chain.done().items():
            if earlier < step and (record.name == STOPPED or not keeps(self.chain.job.config, earlier)):
                self.chain.remove(earlier)


@dataclass(frozen=True)
class Fetched:
    """Fetches a checkpoint to go on from, on each machine that trains."""

    store: Store
    files: list[FileEntry]
    folder: str
    fix: str

    def __call__(self) -> str:
        return str(fetch_files(self.store, self.files, Path(self.folder), self.fix))


def _resume(chain: Chain, record: UnitRecord, folder: str) -> Fetched:
    unit = chain.job.store.url(chain.job.unit_folder(record.key))
    return Fetched(chain.job.store, record.files, f"{folder}/resume", f"delete {unit} to go on from the one before")


def train_chain(chain: Chain) -> None:
    """Train from the newest checkpoint to the last step.

    Raises:
        StageError: the workers failed, or the run was asked to stop before its last step.
    """
    from training.job import TrainingBug, TrainingError, TrainJob
    from training.launch import train

    job, done = chain.job, chain.done()
    start, previews = chain.start(done), Previews(chain)
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
            publish=Publisher(chain, time.time()),
            resume=_resume(chain, done[start], folder) if start else None,
            init_from=Fetched(job.store, job.inputs["init"].files, f"{folder}/init", VERIFY) if "init" in job.inputs else None,
            init_optimizer=job.config.init_optimizer,
        )
        try:
            outcome = train(run, on_row=on_row)
        except TrainingBug as error:
            raise Bug(f"{job.node}: {error}") from error
        except TrainingError as error:
            raise StageError(f"{job.node}: {error}") from error
    if outcome.stopped:
        raise StageError(f"{job.node}: stopped at step {outcome.step} of {job.config.steps}; run again to go on")
    previews.close()


class Train(Stage):
    """A checkpoint: config.json, model, ema and optimizer tensors, trainer.json and history.jsonl; its rows are samples."""

    name = "train"
    version = 4
    Config = TrainStageConfig
    whole = frozenset({"data", "init"})
    phases = (
        Phase(
            "train",
            gang=Gang(train_chain, lambda config: config.steps, keeps),
            fields=frozenset(TrainStageConfig.model_fields) - {"steps"},
        ),
    )

    @classmethod
    def bytes_needed(cls, job: Job) -> int:
        # fp32 weights, moving average and two moments, for two checkpoints: the one being written and the one before.
        return 2 * 4 * 4 * parameters(job.config.model)

    @classmethod
    def schema(cls, job: Job, records: list[UnitRecord]) -> dict[str, str]:
        return {"tensors": "fp32"}

    @classmethod
    def summary(cls, job: Job, records: Records) -> dict[str, Any]:
        return records["train"][-1].notes
