"""evaluate: what a checkpoint is worth on held-out data, by any measures, and a sheet of samples of every task.

The units are those of `stages.measuring.phases`. A measure is a component with its own configuration, in a module of
`stages.measuring`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field, model_validator

from infra.dataset import InputRef, by_prefix
from infra.store import Store
from stages.drawing.assembly import encoder_digests
from stages.measuring.checkpoint import files_of
from stages.measuring.config import EvaluationConfig, check_prompts, check_world, judge_weights
from stages.measuring.phases import PHASES
from stages.measuring.rows import HELD_OUT, Rows
from stages.runner.contract import Job, NodeConfig, Records, Stage, UnitRecord, operational
from stages.runner.recipe import encoder, external_file

# How rows are named that no subset of the recipe has.
STORED = re.compile(r"(filter|folder|download)/[0-9a-f]{8,24}")


class EvaluateConfig(EvaluationConfig, NodeConfig):
    weights: str = Field("ema", pattern="^(ema|model)$", description="which weights: the moving average or the last")
    before: str | None = external_file(
        None, "what training began from, a folder with uvit/ such as an export's: the measure judge tells what that draws"
    )
    vae: str = encoder("embedded", "AutoencoderKL of the latents that the model was trained on")
    clip: str = encoder("embedded", "open_clip model that embeds images, and judges where no other does")
    text: str = encoder("embedded", "open_clip model whose text tower gives the caption's hidden states")
    data: str | None = operational(
        None, "held-out rows with pictures in place of `prompts`: a subset of the recipe, or a dataset as filter/FINGERPRINT"
    )
    checkpoint: str | None = external_file(
        None, "folder of a whole model in any layout, measured in place of the recipe's own checkpoint"
    )
    workers: int | None = operational(None, "drawing processes at most; as many as the cluster holds when not given", ge=1)

    @model_validator(mode="after")
    def _one_source(self) -> EvaluateConfig:
        if self.prompts is not None and self.data is not None:
            raise ValueError("data: there are prompts already; leave out one of the two")
        return self


class Evaluate(Stage):
    """report.json, sample-sheet.png, loss-curve.png and what a measure adds; its rows are samples."""

    name = "evaluate"
    version = 8
    Config = EvaluateConfig
    whole = frozenset({"checkpoint", "codec"})
    names_datasets = "data"
    phases = PHASES

    @classmethod
    def sources(cls, config: EvaluateConfig) -> list[str]:
        return [] if config.prompts is None else [config.prompts]

    @classmethod
    def lists(cls, config: EvaluateConfig) -> dict[str, list[str]]:
        begun = [] if config.before is None else [f"{config.before}/uvit/{name}" for name in ("config.json", "model.safetensors")]
        return files_of(config.checkpoint) | ({"before": begun} if begun else {})

    @classmethod
    def datasets(cls, config: EvaluateConfig, store: Store) -> dict[str, InputRef]:
        if config.data is None or not STORED.fullmatch(config.data):
            return {}
        found = by_prefix(store, config.data)
        Rows(found, config.count)
        return {HELD_OUT: found.manifest.reference()}

    @classmethod
    def check(cls, config: EvaluateConfig, sources: Mapping[str, str], lists: Mapping[str, Mapping[str, str]]) -> None:
        check_prompts(config, sources)

    @classmethod
    def check_before(
        cls,
        config: EvaluateConfig,
        lists: Mapping[str, Mapping[str, str]],
        before: Mapping[str, Sequence[Any]],
        inputs: Mapping[str, Any],
    ) -> None:
        # A folder from outside is a whole model, with a text codec.
        check_world(config, config.data, before if config.checkpoint is None else {"text-codec": ()})

    @classmethod
    def weights(cls, config: EvaluateConfig) -> dict[str, str]:
        return encoder_digests(config) | judge_weights(config)

    @classmethod
    def schema(cls, job: Job, records: list[UnitRecord]) -> dict[str, str]:
        return {"report": "JSON", "sample-sheet": "PNG", "loss-curve": "PNG"}

    @classmethod
    def summary(cls, job: Job, records: Records) -> dict[str, Any]:
        return records["report"][0].notes
