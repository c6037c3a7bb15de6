"""Evaluations of checkpoints while a training stage is at work, by the measures of any evaluation.

One decides nothing and is no part of a dataset. Its report lies below `FOLDER` in the store; what it has drawn are units of the
stage evaluate, so one that was interrupted draws the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from infra.external import local_or_url
from infra.listing import Listing
from stages.measuring.beside import STAGE, evaluation_of, measured
from stages.measuring.config import EvaluationConfig, check_prompts, check_world
from stages.measuring.networks import inception_missing
from stages.runner.chain import Chain
from stages.runner.contract import StageError, UnitRecord
from stages.runner.run import emit_progress
from stages.train.beside import Beside

FOLDER = ".state/evaluations"


class BesideConfig(EvaluationConfig):
    every: int = Field(0, ge=0, description="checkpoints from one that is measured to the next; 0 measures none")
    gpus: float = Field(0, ge=0, le=1, description="share of a GPU that measuring takes; with 0 it computes on a CPU")


def check_beside(config: BesideConfig) -> None:
    """Whether there is what the evaluations need.

    Raises:
        StageError: there is not.
    """
    try:
        files = Listing().files(config.prompts) if config.prompts is not None else None
    except OSError as error:
        raise StageError(f"evaluate.prompts: {error}") from None
    check_prompts(config, {local_or_url(files.fs, path): "" for path in files.paths()} if files is not None else {})
    if config.inception is not None and not Path(config.inception).is_file():
        raise StageError(f"evaluate.{inception_missing(config.inception)}")


def check_beside_before(config: BesideConfig, before: Mapping[str, Sequence[Any]]) -> None:
    """Whether the measures go with the data.

    Raises:
        StageError: they do not.
    """
    try:
        check_world(config, None, before)
    except StageError as error:
        raise StageError(f"evaluate.{error}") from None


class Evaluations(Beside):
    """The evaluations of one training run; `told` gets each as a row of its history."""

    what = "evaluation"

    def __init__(self, chain: Chain, told: Callable[[dict[str, Any]], None]) -> None:
        config = chain.job.config
        super().__init__(chain, config.evaluate.every * config.checkpoint_every, config.evaluate.gpus)
        self.told = told

    def path(self, step: int) -> str:
        """Where the report of a step lies in the store."""
        return f"{FOLDER}/{self.job.node}-{self.chain.key}/{step:08d}.json"

    def work(self, step: int, record: UnitRecord) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return measured, (evaluation_of(self.job, step, record), self.path(step))

    def finished(self, step: int, result: Any) -> None:
        figures = {figure["name"]: figure["value"] for figure in result["figures"]}
        emit_progress(self.job.node, STAGE, step, max(self.chain.end, 1), "steps", {**figures, "report": self.path(step)})
        self.told({"kind": STAGE, "step": step, **figures})
