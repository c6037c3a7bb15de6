"""evaluate: what a checkpoint can do, by a measure, and a sheet of samples of every task.

    draw     units of samples
    report   one unit: scores, the sample sheet and the loss curve

Two measures have a module each: `stages.evaluate.preference`, between a floor and a ceiling, for pictures and captions of any
kind, and `stages.evaluate.shapes`, against the truth, for the world of shapes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from stages.drawing.assembly import encoder_digests
from stages.evaluate.prompts import read_prompts
from stages.runner.contract import Job, Phase, Records, Resources, Stage, StageConfig, Unit, UnitRecord, Worker, operational
from stages.runner.recipe import encoder, external_file


class EvaluateConfig(StageConfig):
    measure: Literal["preference", "shapes"] = Field(
        "preference",
        description="preference: how often CLIP finds a caption closer to its own image than to another's; shapes: accuracies "
        "and distributions of the world of shapes, of the stage world",
    )
    prompts: str | None = external_file(
        None,
        "text with a prompt a line, or Parquet with a column `caption`, and `image` (bytes) where there are real images; not for "
        "shapes",
    )
    count: int = Field(200, ge=2, description="prompts to use, the first of the file; of shapes, for each direction")
    untrained: int = Field(50, ge=2, description="prompts that the untrained network gets, for the floor")
    samples: int = Field(20_000, ge=1, description="of shapes: samples of each task without an input")
    steps: int = Field(20, ge=1, le=999, description="network calls a sample")
    guidance: float = Field(3.0, ge=0, le=100, description="scale s of c + s * (c - u)")
    sampler: Literal["dpm++2m", "dpm++3m", "unipc", "ddim", "dpm++2m-sde", "era", "analytic-dpm"] = Field(
        "dpm++2m", description="sampler's name"
    )
    beams: int = Field(5, ge=1, description="beams of the captions; 1 writes greedily")
    seed: int = Field(0, ge=0, lt=2**62, description="seed of the first sample; the n-th has seed + n")
    weights: str = Field("ema", pattern="^(ema|model)$", description="which weights: the moving average or the last")
    vae: str = encoder("embedded", "AutoencoderKL of the latents that the model was trained on")
    clip: str = encoder("embedded", "open_clip model that judges, and embeds images")
    text: str = encoder("embedded", "open_clip model whose text tower gives the caption's hidden states")
    data_type: Literal[0, 1] | None = Field(None, description="of a model with a data-type token; 1 when not given")
    batch: int = operational(25, "samples drawn at once", ge=1)
    workers: int | None = operational(None, "drawing processes at most; as many as the cluster holds when not given", ge=1)

    @model_validator(mode="after")
    def _prompts_of_its_own(self) -> EvaluateConfig:
        if (self.prompts is None) != (self.measure == "shapes"):
            raise ValueError("prompts: shapes has its own; leave it out" if self.prompts else "prompts: field required")
        return self


def measure(config: EvaluateConfig) -> Any:
    """The module of a measure."""
    from stages.evaluate import preference, shapes

    return {"preference": preference, "shapes": shapes}[config.measure]


def plan_draws(job: Job, _: Records) -> Iterator[Unit]:
    return measure(job.config).plan_draws(job)


def plan_report(job: Job, records: Records) -> Iterator[Unit]:
    return measure(job.config).plan_report(job, records)


def draw(job: Job) -> Worker:
    return measure(job.config).Draw(job)


def report(job: Job) -> Worker:
    return measure(job.config).Report(job)


def sampler_resources(config: EvaluateConfig) -> Resources:
    """One worker a GPU where there are GPUs, else one a core."""
    from stages.runner.pool import gpus_each

    return Resources(cpus=1, gpus=gpus_each(), workers=config.workers)


class Evaluate(Stage):
    """report.json, sample-sheet.png and loss-curve.png; its rows are prompts. Of shapes: its page, and its rows are samples."""

    name = "evaluate"
    version = 5
    Config = EvaluateConfig
    whole = frozenset({"checkpoint", "codec"})
    phases = (
        Phase("draw", plan_draws, worker=draw, resources=sampler_resources, memory=("batch",)),
        Phase("report", plan_report, worker=report, resources=sampler_resources, memory=("batch",)),
    )

    @classmethod
    def sources(cls, config: EvaluateConfig) -> list[str]:
        return [] if config.prompts is None else [config.prompts]

    @classmethod
    def check(cls, config: EvaluateConfig, sources: Mapping[str, str], lists: Mapping[str, Mapping[str, str]]) -> None:
        if config.prompts is not None:
            read_prompts(sources, config.count)

    @classmethod
    def weights(cls, config: EvaluateConfig) -> dict[str, str]:
        return encoder_digests(config) if config.measure == "preference" else {}

    @classmethod
    def schema(cls, job: Job, records: list[UnitRecord]) -> dict[str, str]:
        return {"report": "JSON", "sample-sheet": "PNG", "loss-curve": "PNG"}

    @classmethod
    def summary(cls, job: Job, records: Records) -> dict[str, Any]:
        return records["report"][0].notes
