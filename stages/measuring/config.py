"""What an evaluation is told: the held-out data, how samples are drawn, and the measures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

from pydantic import Field, model_validator

from stages.measuring.judged import scenes_of
from stages.measuring.measures import AnyMeasure
from stages.measuring.networks import inception_missing, judge_of
from stages.measuring.presets import PRESETS
from stages.measuring.prompts import Prompts
from stages.measuring.samples import Asked, SamplerName, Samples
from stages.measuring.sweeps import Sweep
from stages.runner.contract import StageConfig, StageError, operational
from stages.runner.recipe import encoder, external_file
from unidiffuser.references import weights_digest


class EvaluationConfig(StageConfig):
    preset: Literal["paper", "small", "laptop"] | None = operational(
        None, "a whole evaluation by name: paper is that of arXiv 2303.06555, small for one GPU, laptop for none"
    )
    measures: tuple[AnyMeasure, ...] = Field(
        cast(Any, ({"kind": "preference"},)), validate_default=True, description="what is measured"
    )
    prompts: str | None = external_file(
        None,
        "held-out captions: text with one a line, or Parquet with a column `caption`, `image` (bytes) where there are real "
        "pictures, and `captions` (a list) where each has several; a world of its own has them itself",
    )
    count: int = Field(200, ge=2, description="captions to use, the first of the files")
    steps: int = Field(25, ge=1, le=999, description="network calls a sample")
    guidance: float = Field(3.0, ge=0, le=100, description="scale s of c + s * (c - u)")
    sampler: SamplerName = Field("dpm++2m-sde", description="sampler's name")
    beams: int = Field(5, ge=1, description="beams of the captions; 1 writes greedily")
    seed: int = Field(0, ge=0, lt=2**62, description="seed of the first sample; the n-th has seed + n")
    judge: str | None = encoder(None, "open_clip model that judges; the one that embeds the model's images when not given")
    inception: str | None = external_file(None, "path of torch-fidelity's Inception-v3, for measures with `features: inception`")
    data_type: Literal[0, 1] | None = Field(None, description="of a model with a data-type token; 1 when not given")
    batch: int = operational(25, "samples drawn at once", ge=1)

    @model_validator(mode="before")
    @classmethod
    def _with_preset(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(name := values.get("preset"), str):
            return PRESETS.get(name, {}) | values
        return values

    @model_validator(mode="after")
    def _each_once(self) -> EvaluationConfig:
        if not self.measures:
            raise ValueError("measures: name at least one")
        # Figures and files of a sweep are named by its kind, whatever scores.
        seen_by = [None if isinstance(measure, Sweep) else getattr(measure, "features", None) for measure in self.measures]
        count = Counter((measure.kind, features) for measure, features in zip(self.measures, seen_by, strict=True))
        if twice := [kind for (kind, _), found in count.items() if found > 1]:
            raise ValueError(f"measures: {twice[0]} is there twice; its figures would have one name, so leave one")
        if any(getattr(measure, "features", None) == "inception" for measure in self.measures) and self.inception is None:
            raise ValueError(inception_missing(None))
        return self


def judge_weights(config: Any) -> dict[str, str]:
    """Digests of the networks that judge, by the name of their field.

    Raises:
        FileNotFoundError: one is not there; the message names the file that is wanted.
    """
    found = {"judge": weights_digest(judge_of(config), "clip")}
    if config.inception is not None:
        if not Path(config.inception).is_file():
            raise FileNotFoundError(inception_missing(config.inception))
        from infra.store import sha256_of

        found["inception"] = sha256_of(Path(config.inception))
    if any(measure.kind == "judge" for measure in config.measures):
        found["scenes"] = weights_digest("embedded", "judge")
    return found


def check_prompts(config: Any, sources: Mapping[str, str]) -> None:
    """Look at the held-out data as far as the measures need it.

    Raises:
        StageError: it cannot be used.
    """
    if config.prompts is None:
        return
    prompts = Prompts(sources, config.count)
    prompts.check()
    asked = Asked(prompts.count, prompts.pictures, Samples("t2i", config.steps, config.guidance, config.sampler))
    for measure in config.measures:
        measure.needs(asked)
    if any(measure.kind == "judge" for measure in config.measures):
        scenes_of(prompts.captions(0, prompts.count))


def check_world(config: Any, data: str | None, before: Mapping[str, Sequence[Any]]) -> None:
    """Whether the measures and the held-out data go with what was trained on.

    Args:
        data: held-out rows of the store, in place of files.

    Raises:
        StageError: they do not.
    """
    own = "text-codec" not in before
    given = config.prompts is not None or data is not None
    if own and given:
        raise StageError(f"{'prompts' if data is None else 'data'}: a world of its own has them itself; leave it out")
    if not own and not given:
        raise StageError("prompts: field required; name a file of held-out captions, or rows of the store as `data`")
    if not own and (of_world := [measure.kind for measure in config.measures if measure.of_world]):
        raise StageError(f"measures: {of_world[0]} knows no pictures but those of the world of shapes; leave it out")
