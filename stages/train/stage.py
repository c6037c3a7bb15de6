"""train: a stage of the U-ViT's training (arXiv 2303.06555, section 6.1), as a chain of checkpoints on a gang of workers.

A unit is a checkpoint: a step of a chain whose key says what is trained, not how long nor when it is saved. So a run goes on
from the greatest checkpoint that is there, whether it died, was stopped, or was asked for fewer steps or for another rhythm. One
that is asked to stop leaves a checkpoint of the step that it has reached. The dataset is the checkpoint at `steps`. Where a run
begins that has none of its own is in `stages.train.origin`.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from uuid import uuid4

from pydantic import ConfigDict, Field, field_validator, model_validator

from infra.dataset import InputRef, by_prefix
from infra.listing import OutsideError
from infra.scratch import scratch_folder
from infra.store import NotThere, Store, StoreError
from stages.runner.chain import Chain, Gang
from stages.runner.contract import Bug, Job, Phase, Records, Stage, StageError, UnitRecord, operational
from stages.runner.recipe import encoder, external_file
from stages.runner.run import emit_progress, time_left
from stages.shards.scores import SCORES
from stages.train.before import by_subset, check_encoders, check_origin, check_sizes
from stages.train.evaluation import BesideConfig, Evaluations, check_beside, check_beside_before
from stages.train.fits import MODEL_FILE, STATE_FILE, WROTE, outside
from stages.train.foreign import Start, check_data, check_network, files_of, is_lone_file
from stages.train.kept import Fetched, Newest, Outside, Publisher, kept_at_most
from stages.train.order import ORDER_FILE, arrived, order_of, shards
from stages.train.origin import LENGTH, Origin, begins, end, fork, root_of
from stages.train.preview import PreviewConfig, Previews
from stages.train.trackers import Name, not_installed
from stages.train.tracking import Tracking
from training.begin import Kept
from training.config import DataConfig, TrainConfig
from training.footprint import checkpoint_bytes
from training.names import column_of
from training.told import Told

if TYPE_CHECKING:
    from training.job import TrainJob

log = logging.getLogger("stages")

# Numbers that encode writes beside the latents.
COLUMNS = (*SCORES, "width", "height")
PROFILES = ".state/profiles"
OF_WEIGHTS = "weights alone, in any layout, are named in `weights` in place of `from`"
# Files without which a folder is no checkpoint to begin from.
NEEDED = frozenset({MODEL_FILE, "history.jsonl", STATE_FILE, ORDER_FILE})


class TrainStageConfig(TrainConfig):
    model_config = ConfigDict(validate_by_alias=True)

    origin: Origin | None = Field(
        None, alias="from", exclude=True, description="what it begins from, in place of nothing; a name alone is a `run`"
    )
    growth_steps: int | None = Field(
        None,
        ge=1,
        description="Steps to go further each time that the data, or the training that it began from, has grown when "
        "`steps` are done, as with new data every week.",
    )
    weights: str | None = external_file(
        None,
        "weights to start from instead of a training: uvit_v0.pth or uvit_v1.pth, a folder of diffusers' UniDiffuser, an export, "
        "a native folder or a lone file of tensors; a path or URL, or embedded://base, which is shipped with this package",
    )
    vae: str = encoder("embedded", "AutoencoderKL of the latents, for the preview; none of the three decides the result")
    clip: str = encoder("embedded", "open_clip model of the image embeddings, likewise")
    text: str = encoder("embedded", "open_clip model of the caption's hidden states, likewise")
    track: tuple[Name, ...] = operational(
        (), "where else the history goes, row by row: tensorboard, trackio, wandb, mlflow; each with its package installed"
    )
    evaluate: BesideConfig = operational(BesideConfig(), "checkpoints measured while it trains, beside it")
    preview: PreviewConfig = operational(PreviewConfig(), "sheets of samples in the UI while it trains, one a checkpoint")

    @model_validator(mode="after")
    def _adapters_have_a_base(self) -> TrainStageConfig:
        if self.lora is not None and self.weights is None:
            raise ValueError("lora trains adapters on given weights, and nothing else: name them in `weights`, or leave out lora")
        return self

    @model_validator(mode="after")
    def _profile_is_reached(self) -> TrainStageConfig:
        if self.profile is not None and self.growth_steps is None and self.profile.begin > self.steps:
            raise ValueError(
                f"profile.from is {self.profile.begin}, and the last step is {self.steps}: lower it, or nothing is traced"
            )
        return self

    @field_validator("data")
    @classmethod
    def _known_columns(cls, data: DataConfig) -> DataConfig:
        """What encode writes is known before anything runs."""
        for field, condition in zip((*("where" for _ in data.where), "data_type"), data.conditions, strict=False):
            if column_of(condition.column, COLUMNS) is None:
                raise ValueError(f"{field} names {condition.column}; latents have {', '.join(COLUMNS)}")
        return data


@dataclass(frozen=True)
class Traces:
    """Puts a profiler's trace beside what else is told of a run; runs in the worker of rank 0."""

    store: Store
    folder: str

    def __call__(self, file: str) -> None:
        self.store.publish(file, f"{self.folder}/{Path(file).name}")
        log.info("profile: %s", self.store.url(f"{self.folder}/{Path(file).name}"))


def _begin(chain: Chain, folder: str) -> tuple[Callable[[], str] | None, list[str]]:
    """What fetches the checkpoint that a chain began from, and the shards whose order goes on, by digest; None where there is
    none (any more)."""
    job, parent = chain.job, chain.parent
    if parent is None:
        return None, []
    if not parent.chain:
        before = outside(job, job.sources, ORDER_FILE)["shards"] if "order" in parent.keep else []
        return Outside(dict(job.sources), f"{folder}/init"), before
    record = job.unit_done(parent.unit)
    if record is None:
        return None, []
    return Fetched(job.store, record.files, f"{folder}/init"), _shards(job, [record]) if "order" in parent.keep else []


def _shards(job: Job, records: Sequence[UnitRecord]) -> list[str]:
    """The shards of a chain in the order in which they came, by digest, as its newest checkpoint that can be read says."""
    for record in reversed(records):
        with suppress(StoreError):
            return cast(list[str], order_of(job.store, record)["shards"])
    return []


def _told(job: Job) -> tuple[Told, ...]:
    """Where the datasets of latents tell of their shards."""
    datasets = [dataset for name, dataset in job.inputs.items() if name.startswith("data.") and dataset.manifest.file_columns]
    return tuple(Told(job.store.url(f"{dataset.folder}/files.parquet"), job.store.root) for dataset in datasets)


def _foreign(job: Job, folder: str) -> Start | None:
    if (files := job.lists.get("weights")) is None:
        return None
    return Start(job.store, job.config.weights, files, job.config.model.heads, job.config.text, f"{folder}/weights")


def _plan(chain: Chain, folder: str) -> TrainJob:
    """What a group of workers is to do, from the newest checkpoint that is there, with this scratch folder."""
    from training.job import TrainJob

    job, done = chain.job, chain.done()
    start = chain.start(done)
    there = tuple(step for step in done if step <= start)
    init, before = _begin(chain, folder)
    resume = Newest(chain, there, f"{folder}/resume", init is not None) if there else None
    if resume is None and init is None and (parent := chain.parent) is not None:
        raise StageError(
            f"{job.node}: step {parent.step} of {parent.node}, from which it begins, was removed ({parent.unit}); run again"
        )
    data = arrived(shards(job, job.inputs), _shards(job, [done[step] for step in there]) or before)
    return TrainJob(
        config=job.config.model_copy(update={"steps": chain.end}),
        shards=tuple(shard.address for shard in data),
        work_folder=folder,
        publish=Publisher(chain, time.time(), tuple(shard.digest for shard in data), uuid4().hex[:8]),
        resume=resume,
        newest=start if resume is not None else None,
        init_from=init,
        keep=cast(tuple[Kept, ...], chain.parent.keep if chain.parent is not None else ()),
        fork=f"`{fork(job.node)}`",
        weights=_foreign(job, folder),
        traced=Traces(job.store, f"{PROFILES}/{job.node}-{chain.key}"),
        subsets=tuple(shard.subset for shard in data),
        told=_told(job),
    )


def train_chain(chain: Chain) -> None:
    """Train from the newest checkpoint to the last step.

    Raises:
        StageError: the workers failed, or the run was asked to stop before its last step.
    """
    from training.job import TrainingBug, TrainingError
    from training.launch import train

    job, previews, tracking = chain.job, Previews(chain), Tracking(chain)
    evaluations = Evaluations(chain, tracking.add)

    def on_row(row: dict[str, Any]) -> None:
        if row["kind"] == "damage":
            log.warning("%s: step %d: %s", job.node, row["step"], row["said"])
            return
        told = ("loss", "samples_per_s", "lr", "skipped", "rollbacks", "damaged_groups")
        more: dict[str, Any] = {name: round(row[name], 5) for name in told if name in row}
        more |= time_left(chain.end - row["step"], row.get("samples_per_s", 0) / job.config.global_batch)
        emit_progress(job.node, row["kind"], row["step"], chain.end, "steps", more)
        tracking.add(row)
        previews.seen(row["step"])
        evaluations.seen(row["step"])
        if row["kind"] == "validation":
            log.info("%s: step %d validation loss %.4f", job.node, row["step"], row["loss"])

    with scratch_folder() as folder:
        starts = itertools.count()

        def plan() -> TrainJob:
            tracking.go_on()
            # A folder a start: a worker of the one before may not have ended yet.
            return _plan(chain, f"{folder}/{next(starts)}")

        try:
            outcome = train(plan, on_row=on_row)
        except TrainingBug as error:
            raise Bug(f"{job.node}: {error}") from error
        except TrainingError as error:
            raise StageError(f"{job.node}: {error}") from error
        else:
            if not outcome.stopped:
                previews.close()
                evaluations.close()
        finally:
            tracking.close()
    if outcome.stopped:
        raise StageError(f"{job.node}: stopped at step {outcome.step} of {chain.end}; run again to go on")


class Train(Stage):
    """A checkpoint: config.json, a share a worker of weights, their average and the optimizer's numbers, trainer.json and
    history.jsonl; its rows are samples."""

    name = "train"
    version = 5
    Config = TrainStageConfig
    whole = frozenset({"data", "init"})
    phases = (
        Phase(
            "train",
            gang=Gang(train_chain, end, begins, lambda config, steps: config.keep.of(steps), root_of),
            fields=frozenset(info.alias or name for name, info in TrainStageConfig.model_fields.items()) - LENGTH,
        ),
    )

    @classmethod
    def sources(cls, config: TrainStageConfig) -> list[str]:
        folder = config.origin.folder if config.origin is not None else None
        if folder is None:
            return []
        if is_lone_file(folder):
            raise OutsideError(folder, f"a file of weights, and no folder of a checkpoint; {OF_WEIGHTS}")
        return [f"{folder}/*"]

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
        missing = sorted(NEEDED - names) or ([] if any(name.startswith("share-") for name in names) else ["share"])
        if config.origin is not None and sources and missing:
            raise StageError(f"from: {config.origin.folder} has no {missing[0]}; {WROTE}; {OF_WEIGHTS}")
        if config.evaluate.every:
            check_beside(config.evaluate)
        if (line := not_installed(config.track)) is not None:
            raise StageError(line)
        if config.lora is not None and find_spec("peft") is None:
            raise StageError("lora needs peft, which is not installed: pip install 'unidiffuser[lora]'")

    @classmethod
    def check_before(
        cls,
        config: TrainStageConfig,
        lists: Mapping[str, Mapping[str, str]],
        before: Mapping[str, Sequence[Any]],
        inputs: Mapping[str, Any],
    ) -> None:
        width = next((codec.latent_width for codec in before.get("text-codec", ())), None)
        check_sizes(config, by_subset(inputs))
        check_encoders(by_subset(inputs), before.get("encode", ()), width)
        if "init" in inputs:
            check_origin(config, inputs["init"])
        if config.evaluate.every:
            check_beside_before(config.evaluate, before)
        named = {name for stage in ("select", "folder") for source in before.get(stage, ()) for name in source.captions}
        if lost := sorted(config.data.captions.keys() - named):
            have = ", ".join(sorted(named)) or "none"
            raise StageError(
                f"data.captions names {lost[0]}, which no subset's select or folder has among its captions; there are: {have}"
            )
        for encode in before.get("encode", ()) if "weights" in lists else ():
            check_data(config, lists["weights"], config.text, encode, width)

    @classmethod
    def bytes_needed(cls, job: Job) -> int:
        return kept_at_most(job.config) * checkpoint_bytes(job.config)

    @classmethod
    def schema(cls, job: Job, records: list[UnitRecord]) -> dict[str, str]:
        return {"tensors": "fp32"}

    @classmethod
    def summary(cls, job: Job, records: Records) -> dict[str, Any]:
        return records["train"][-1].notes
