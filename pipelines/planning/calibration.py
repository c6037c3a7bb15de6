"""How fast this machine is at a recipe's work: measured by processes side by side, in up to a minute."""

from __future__ import annotations

import json
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import BrokenBarrierError
from typing import Any

from infra.machine_memory import gpu_bytes
from pipelines.planning.plan import Asked
from pipelines.planning.probe import Probe
from pipelines.planning.training import Training
from stages.runner.contract import StageError
from stages.runner.recipe import Recipe
from unidiffuser.references import local_folder

# Processes that measure at most, and seconds that they are waited for.
PROCESSES, PATIENCE = 8, 900.0
# A training is measured by its own steps up to so many numbers and samples at once; a larger one by the machine's arithmetic.
LARGEST, LARGEST_BATCH = 2e7, 512
# Fields of encoders, and the kinds of what they name.
KINDS = {"vae": "vae", "clip": "clip", "text": "clip", "gpt2": "gpt2"}


@dataclass(frozen=True)
class Machine:
    """What was measured, in seconds by name, the mean of all processes.

    Of a process: `start` until a stage's modules are there, `ray` and `torch` until these are imported as well, `load_clip`,
    `load_vae` and `load_codec`. Of a picture: `look`, `score`, `square NODE`, `vae NODE`, `text`, `decode`. Of a step:
    `step NODE`, `codec_step`; `begin NODE` until the first step is done. Of a sample drawn: `call TASK`, `around TASK`. And
    `flops`, the FLOP/s of a matrix product in one process.
    """

    cores: int
    processes: int
    gpus: int
    seconds: float
    found: Mapping[str, float]

    def told(self) -> dict[str, Any]:
        words = f"{self.cores} cores" + (f", {self.gpus} GPUs" if self.gpus else "")
        return {"words": words, "cores": self.cores, "gpus": self.gpus, "seconds": self.seconds, "measured": dict(self.found)}


def calibrated(asked: Asked) -> Machine:
    """Measure this machine at what the recipe does.

    Raises:
        StageError: a measuring process failed, with the last line of what it said.
    """
    cores, gpus = os.cpu_count() or 1, len(gpu_bytes())
    processes = 1 if gpus else min(cores, PROCESSES)
    recipe, small = _here(asked.recipe), [each for each in asked.trainings if _is_small(each, processes)]
    # One group of processes trains: what has another number of workers is told by the others.
    trained = [each for each in small if each.config.fewest_workers == small[0].config.fewest_workers]
    start = time.time()
    with tempfile.TemporaryDirectory(prefix="unidiffuser-plan-") as folder:
        context = multiprocessing.get_context("spawn")
        meeting = context.Barrier(processes)
        children = [
            context.Process(target=_measure, args=(recipe, trained, rank, processes, meeting, folder, start), daemon=True)
            for rank in range(processes)
        ]
        for child in children:
            child.start()
        try:
            for child in children:
                child.join(max(0.0, start + PATIENCE - time.time()))
        finally:
            for child in children:
                child.kill()
        found = [_read(Path(folder), rank, child.exitcode) for rank, child in enumerate(children)]
    means = {
        name: _mean([each[name] for each in found if name in each]) for name in dict.fromkeys(n for each in found for n in each)
    }
    return Machine(cores, processes, gpus, round(time.time() - start, 1), means)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _here(recipe: Recipe) -> Recipe:
    """The recipe without nodes whose encoders are not on this machine: these are told by their arithmetic."""
    nodes = {
        name: node for name, node in recipe.nodes.items() if all(_is_near(ref, kind) for ref, kind in _encoders(node.config))
    }
    return Recipe(recipe.name, "", nodes, {}, recipe.folder, recipe.deploy)


def _encoders(config: Any) -> list[tuple[str, Any]]:
    return [(ref, kind) for field, kind in KINDS.items() if (ref := getattr(config, field, None)) is not None]


def _is_near(ref: str, kind: Any) -> bool:
    try:
        return local_folder(ref, kind) is not None
    except FileNotFoundError:
        return False


def _is_small(training: Training, processes: int) -> bool:
    from pipelines.planning.training import weights

    config = training.config
    return config.fewest_workers <= processes and weights(training) <= LARGEST and config.worker_batch <= LARGEST_BATCH


def _measure(recipe: Recipe, trained: list[Training], rank: int, world: int, meeting: Any, folder: str, start: float) -> None:
    """A measuring process; what libraries print goes into a file, for the command's output is a script's."""
    begun = time.time() - start
    log = os.open(f"{folder}/{rank}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        found = Probe(recipe, trained, rank, world, meeting.wait).measure(Path(folder))
    except BrokenBarrierError:
        raise SystemExit(1) from None
    except BaseException:
        meeting.abort()
        Path(folder, f"{rank}.failed").write_text(traceback.format_exc(), encoding="utf-8")
        raise
    Path(folder, f"{rank}.json").write_text(json.dumps({"start": begun, **found}), encoding="utf-8")


def _read(folder: Path, rank: int, code: int | None) -> dict[str, float]:
    for failed in folder.glob("*.failed"):
        raise StageError(f"measuring this machine failed: {failed.read_text(encoding='utf-8').strip().splitlines()[-1]}")
    try:
        return dict(json.loads((folder / f"{rank}.json").read_text(encoding="utf-8")))
    except OSError:
        why = f"took more than {PATIENCE:.0f} s" if code is None else f"ended with {code}"
        raise StageError(f"measuring this machine failed: a process {why}; name GPUs with --gpu to plan without") from None
