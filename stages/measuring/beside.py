"""The evaluation of a checkpoint of a training that goes on: units of the stage evaluate, and a report without a dataset."""

from __future__ import annotations

import json
from typing import Any

from infra.dataset import Dataset, Manifest, find
from infra.external import resolve
from stages.catalog import MADE_STAGES, stage_class
from stages.runner.contract import Job, UnitRecord, result_fields

STAGE = "evaluate"


def evaluation_of(training: Job, step: int, record: UnitRecord) -> Job:
    """The evaluation of a checkpoint of a training, which is no dataset of its own.

    Raises:
        FileNotFoundError: the text codec of the latents is gone, or a network of a measure.
    """
    asked, stage = training.config.evaluate, stage_class(STAGE)
    encoders = {name: getattr(training.config, name) for name in ("vae", "clip", "text")}
    config = stage.Config.model_validate({**asked.model_dump(exclude={"every", "gpus", "preset"}), **encoders})
    data = next(dataset for name, dataset in training.inputs.items() if name.startswith("data."))
    manifest = Manifest(
        stage=training.stage, node=training.node, fingerprint=record.key, generation=0, config=result_fields(training.config),
        inputs={name: dataset.manifest.reference() for name, dataset in training.inputs.items()}, sources={}, code={},
        columns={}, stats=record.stats, summary={"step": step}, seconds=record.seconds, created="", files=record.files,
    )  # fmt: skip
    inputs = {"checkpoint": Dataset(training.store, manifest), "codec": _codec(training, data)}
    sources = resolve(stage.sources(config), training.store)
    return Job(training.store, STAGE, training.node, config, inputs, sources, stage.weights(config), recipe=training.recipe)


def _codec(training: Job, data: Dataset) -> Dataset:
    if data.manifest.stage in MADE_STAGES:
        return data
    reference = data.manifest.inputs["codec"]
    if (codec := find(training.store, reference.stage, reference.fingerprint)) is None:
        raise FileNotFoundError("the text codec of the latents is no longer in the store")
    return codec


def measured(job: Job, path: str) -> dict[str, Any]:
    """Evaluate, write the report to `path` in the store, and give it."""
    # Imported here: Ray's is no business of a plan.
    from stages.runner.here import run_here

    records = run_here(stage_class(STAGE), job)
    report = json.loads(job.store.read(records["report"][0].file("report.json").path))
    job.store.write_json(path, report)
    return report
