"""train: a stage of the U-ViT's training (arXiv 2303.06555, section 6.1), as a chain of checkpoints on a gang of workers.

A unit is a checkpoint: a step of a chain whose key says what is trained, not how long nor when it is saved. So a run goes on
from the greatest checkpoint that is there, whether it died, was stopped, or was asked for fewer steps or for another rhythm. One
that is asked to stop leaves a checkpoint of the step that it has reached. The dataset is the checkpoint at `steps`. Where a run
begins that has none of its own is in `stages.train.origin`.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import fsspec
from pydantic import ConfigDict, Field, field_validator, model_validator

from infra.dataset import VERIFY, FileEntry, InputRef, by_prefix, fetch_files
from infra.store import NotThere, Store, StoreError, sha256_of
from stages.runner.chain import Chain, Gang
from stages.runner.contract import Bug, Job, Phase, Records, Stage, StageError, UnitRecord, operational, scratch_output
from stages.runner.recipe import encoder, external_file
from stages.runner.run import emit_progress, time_left
from stages.shards.scores import SCORES
from stages.train.foreign import Start, check_data, check_network, files_of
from stages.train.origin import (
    LENGTH,
    ORDER_FILE,
    Origin,
    arrived,
    begins,
    end,
    fork,
    order_of,
    order_told,
    outside,
    shards,
)
from stages.train.preview import PreviewConfig, Previews
from training.begin import Kept
from training.config import DataConfig, TrainConfig
from training.footprint import parameters
from training.names import column_of
from training.told import Told

log = logging.getLogger("stages")

# Numbers that encode writes beside the latents.
COLUMNS = (*SCORES, "width", "height")
# Name of the record of a checkpoint that a stop left between two planned ones.
STOPPED = "stopped"
# Files without which a folder is no checkpoint to begin from, and the length of a digest of content in hexadecimal.
NEEDED = frozenset({"config.json", "model.safetensors", "ema.safetensors", "trainer.json", ORDER_FILE})
SHA256 = 64


class TrainStageConfig(TrainConfig):
    model_config = ConfigDict(validate_by_alias=True)

    origin: Origin | None = Field(
        None, alias="from", exclude=True, description="what it begins from, in place of nothing; a name alone is a `run`"
    )
    growth_steps: int | None = Field(
        None,
        ge=1,
        description="Steps to go further each time that the data has grown when `steps` are done, as with new data every week.",
    )
    weights: str | None = external_file(
        None,
        "weights to start from instead of a training: uvit_v0.pth or uvit_v1.pth, a folder of diffusers' UniDiffuser, an export, "
        "a native folder or a lone file of tensors; a path or URL",
    )
    vae: str = encoder("embedded", "AutoencoderKL of the latents, for the preview; none of the three decides the result")
    clip: str = encoder("embedded", "open_clip model of the image embeddings, likewise")
    text: str = encoder("embedded", "open_clip model of the caption's hidden states, likewise")
    preview: PreviewConfig = operational(PreviewConfig(), "sheets of samples in the UI while it trains, one a checkpoint")

    @model_validator(mode="after")
    def _adapters_have_a_base(self) -> TrainStageConfig:
        if self.lora is not None and self.weights is None:
            raise ValueError("lora trains adapters on given weights, and nothing else: name them in `weights`, or leave out lora")
        return self

    @field_validator("data")
    @classmethod
    def _known_columns(cls, data: DataConfig) -> DataConfig:
        """What encode writes is known before anything runs."""
        for field, condition in zip((*("where" for _ in data.where), "data_type"), data.conditions, strict=False):
            if column_of(condition.column, COLUMNS) is None:
                raise ValueError(f"{field} names {condition.column}; latents have {', '.join(COLUMNS)}")
        return data


def keeps(config: TrainStageConfig, step: int) -> bool:
    """Whether the checkpoint of a step stays when there is a later one."""
    return config.keep_every is None or step % config.keep_every == 0


@dataclass(frozen=True)
class Publisher:
    """Puts a checkpoint folder into the store as a unit; runs in the worker of rank 0, on whatever machine that is."""

    chain: Chain
    started: float
    shards: tuple[str, ...]

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
            told = order_told(job.config, list(self.shards))
            out.path(ORDER_FILE).write_text(json.dumps(told) + "\n", encoding="utf-8")
            out.stats.rows_in, out.stats.rows_out = rows, state["rows"]
            out.stats.drop("validation_or_where" if job.config.data.where else "validation", rows - state["rows"])
            out.notes |= {"step": step, "metrics": metrics}
            if self.chain.parent is not None:
                out.notes["began"] = self.chain.parent.model_dump(mode="json")
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


@dataclass(frozen=True)
class Outside:
    """Fetches a checkpoint from outside the store, likewise; `files` are address -> digest."""

    files: dict[str, str]
    folder: str

    def __call__(self) -> str:
        folder = Path(self.folder)
        folder.mkdir(parents=True)
        for address, digest in self.files.items():
            target = folder / address.rsplit("/", 1)[-1]
            with fsspec.open(address, "rb") as source, target.open("wb") as file:
                shutil.copyfileobj(source, file)
            if len(digest) == SHA256 and sha256_of(target) != digest:
                raise StoreError(f"{address}: has changed since the run was planned; run again")
        return self.folder


def _resume(chain: Chain, record: UnitRecord, folder: str) -> Fetched:
    unit = chain.job.store.url(chain.job.unit_folder(record.key))
    return Fetched(chain.job.store, record.files, f"{folder}/resume", f"delete {unit} to go on from the one before")


def _begin(chain: Chain, folder: str) -> tuple[Callable[[], str] | None, list[str]]:
    """What fetches the checkpoint that a chain without steps begins from, and the shards whose order goes on, by digest.

    Raises:
        StageError: it is no longer there.
    """
    job, parent = chain.job, chain.parent
    if parent is None:
        return None, []
    if not parent.chain:
        before = outside(job.sources, ORDER_FILE)["shards"] if "order" in parent.keep else []
        return Outside(dict(job.sources), f"{folder}/init"), before
    record = job.unit_done(parent.unit)
    if record is None:
        raise StageError(
            f"{job.node}: step {parent.step} of {parent.node}, from which it begins, was removed ({parent.unit}); name another "
            f"with `from`, or begin anew with --force {job.node}"
        )
    before = order_of(job.store, record)["shards"] if "order" in parent.keep else []
    return Fetched(job.store, record.files, f"{folder}/init", VERIFY), before


def _told(job: Job) -> tuple[Told, ...]:
    """Where the datasets of latents tell of their shards."""
    datasets = [dataset for name, dataset in job.inputs.items() if name.startswith("data.") and dataset.manifest.file_columns]
    return tuple(Told(job.store.url(f"{dataset.folder}/files.parquet"), job.store.root) for dataset in datasets)


def _foreign(job: Job, folder: str) -> Start | None:
    if (files := job.lists.get("weights")) is None:
        return None
    return Start(job.store, job.config.weights, files, job.config.model.heads, job.config.text, f"{folder}/weights")


def train_chain(chain: Chain) -> None:
    """Train from the newest checkpoint to the last step.

    Raises:
        StageError: the workers failed, or the run was asked to stop before its last step.
    """
    from training.job import TrainingBug, TrainingError, TrainJob
    from training.launch import train

    job, done = chain.job, chain.done()
    start, previews = chain.start(done), Previews(chain)

    def on_row(row: dict[str, Any]) -> None:
        more: dict[str, Any] = {name: round(row[name], 5) for name in ("loss", "samples_per_s", "lr") if name in row}
        more |= time_left(chain.end - row["step"], row.get("samples_per_s", 0) / job.config.global_batch)
        emit_progress(job.node, row["kind"], row["step"], chain.end, "steps", more)
        previews.seen(row["step"])
        if row["kind"] == "validation":
            log.info("%s: step %d validation loss %.4f", job.node, row["step"], row["loss"])

    with tempfile.TemporaryDirectory(prefix="unidiffuser-train-") as folder:
        resume = _resume(chain, done[start], folder) if start in done else None
        init, before = _begin(chain, folder) if resume is None else (None, order_of(job.store, done[start])["shards"])
        data = arrived(shards(job, job.inputs), before)
        run = TrainJob(
            config=job.config.model_copy(update={"steps": chain.end}),
            shards=tuple(shard.address for shard in data),
            work_folder=folder,
            publish=Publisher(chain, time.time(), tuple(shard.digest for shard in data)),
            resume=resume,
            init_from=init,
            keep=cast(tuple[Kept, ...], chain.parent.keep if chain.parent is not None else ()),
            fork=f"`{fork(job.node)}`",
            weights=_foreign(job, folder),
            subsets=tuple(shard.subset for shard in data),
            told=_told(job),
        )
        try:
            outcome = train(run, on_row=on_row)
        except TrainingBug as error:
            raise Bug(f"{job.node}: {error}") from error
        except TrainingError as error:
            raise StageError(f"{job.node}: {error}") from error
    if outcome.stopped:
        raise StageError(f"{job.node}: stopped at step {outcome.step} of {chain.end}; run again to go on")
    previews.close()


class Train(Stage):
    """A checkpoint: config.json, model, ema and optimizer tensors, trainer.json and history.jsonl; its rows are samples."""

    name = "train"
    version = 5
    Config = TrainStageConfig
    whole = frozenset({"data", "init"})
    phases = (
        Phase(
            "train",
            gang=Gang(train_chain, end, begins, keeps),
            fields=frozenset(info.alias or name for name, info in TrainStageConfig.model_fields.items()) - LENGTH,
        ),
    )

    @classmethod
    def sources(cls, config: TrainStageConfig) -> list[str]:
        folder = config.origin.folder if config.origin is not None else None
        return [f"{folder}/*"] if folder is not None else []

    @classmethod
    def datasets(cls, config: TrainStageConfig, store: Store) -> dict[str, InputRef]:
        named = config.origin.dataset if config.origin is not None else None
        if named is None:
            return {}
        found = by_prefix(store, named).manifest
        if found.stage != cls.name:
            raise NotThere(f"{named}: is a dataset of {found.stage}; name one of {cls.name}")
        return {"init": found.reference()}

    @classmethod
    def lists(cls, config: TrainStageConfig) -> dict[str, list[str]]:
        return {} if config.weights is None else {"weights": files_of(config.weights)}

    @classmethod
    def check(cls, config: TrainStageConfig, sources: Mapping[str, str], lists: Mapping[str, Mapping[str, str]]) -> None:
        if "weights" in lists:
            check_network(config, lists["weights"], config.text)
        names = {address.rsplit("/", 1)[-1] for address in sources}
        if config.origin is not None and sources and (missing := sorted(NEEDED - names)):
            raise StageError(
                f"from: {config.origin.folder} has no {missing[0]}; name the folder of a checkpoint that a training wrote"
            )
        if config.lora is not None and find_spec("peft") is None:
            raise StageError("lora needs peft, which is not installed: pip install 'unidiffuser[lora]'")

    @classmethod
    def check_before(
        cls, config: TrainStageConfig, lists: Mapping[str, Mapping[str, str]], before: Mapping[str, Sequence[Any]]
    ) -> None:
        width = next((codec.latent_width for codec in before.get("text-codec", ())), None)
        for encode in before.get("encode", ()) if "weights" in lists else ():
            check_data(config, lists["weights"], config.text, encode, width)

    @classmethod
    def bytes_needed(cls, job: Job) -> int:
        # fp32 weights, moving average and what the optimizer keeps, of two checkpoints: that being written and the one before.
        # What it keeps of adapters is small.
        kept = 2 if job.config.lora is not None else 2 + job.config.optimizer.matrix_state
        return 2 * kept * 4 * parameters(job.config.model)

    @classmethod
    def schema(cls, job: Job, records: list[UnitRecord]) -> dict[str, str]:
        return {"tensors": "fp32"}

    @classmethod
    def summary(cls, job: Job, records: Records) -> dict[str, Any]:
        return records["train"][-1].notes
