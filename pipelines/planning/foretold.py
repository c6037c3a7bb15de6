"""Seconds of work of every node on this machine, from what was measured of its pieces."""

from __future__ import annotations

import math
from typing import Any

from pipelines.planning.calibration import Machine
from pipelines.planning.plan import Asked
from pipelines.planning.training import Training
from pipelines.planning.work import Work, drawn, passed_on, scored_before
from stages.measuring.samples import SAYS
from stages.runner.recipe import Node

# Seconds a row: of select; of reading a picture out of a shard and writing what was made of it; of a download beside the picture.
SELECTED, MOVED, FETCHED = 6e-6, 5e-4, 2e-3
# The stages whose workers have a GPU each where there are GPUs.
NETWORKS = ("filter", "encode", "evaluate")
# Of what a machine's matrix products reach, what a large network does; nothing of it was measured here.
REACHED = 0.5
# Processes that begin one after the other until a group of workers trains: its coordinator, its queue, the group.
BEFORE_A_GROUP = 4
# Of the seconds of a process that draws beside a training, what it takes from the training: they share the cores.
BESIDE = 0.7
# Tasks on a sheet of samples beside a training, two of which end in captions.
SHEET = ("t2i", "i2t", "t2i", "i2t")


def foretold(asked: Asked, machine: Machine) -> dict[str, float]:
    """Node -> seconds."""
    tell = _Foretelling(asked, machine)
    return {work.node: tell.seconds(work) for work in asked.works}


class _Foretelling:
    def __init__(self, asked: Asked, machine: Machine) -> None:
        self.asked, self.found = asked, machine.found
        self.cores, self.workers = machine.cores, machine.gpus or machine.cores
        self.start = self.found["start"] + self.found["ray"]
        self.trained = {training.node: training for training in asked.trainings}

    def seconds(self, work: Work) -> float:
        node = self.asked.recipe.nodes[work.node]
        tell = getattr(self, f"_{work.stage.replace('-', '_')}")
        return float(tell(node, work))

    def loaded(self, *what: str) -> float:
        """Until a process has torch, and the networks that it needs."""
        return self.found["start"] + self.found["torch"] + sum(self.found.get(f"load_{name}", 0.0) for name in what)

    def shared(self, work: Work) -> float:
        """How many workers are at the units of a node: one a GPU where it has networks, else one a core."""
        have = self.workers if work.stage in NETWORKS else self.cores
        return max(1.0, min(have, work.wide))

    def computed(self, flop: float, workers: float) -> float:
        """Seconds of a network that was not measured."""
        return flop / (self.found["flops"] * REACHED * workers)

    def _select(self, node: Node, work: Work) -> float:
        config: Any = node.config
        phases = 3 + (3 if config.allow or config.deny else 0)
        return phases * self.start + work.rows_in * SELECTED / self.shared(work)

    def _download(self, node: Node, work: Work) -> float:
        """The last rows of all wait for a server that does not answer."""
        config: Any = node.config
        each = FETCHED + self.found["store"]
        return self.start + work.rows_in * each / self.shared(work) + min(config.timeout, config.deadline)

    def _folder(self, node: Node, work: Work) -> float:
        return self.start + work.rows_in * (MOVED + self.found["store"]) / self.shared(work)

    def _world(self, node: Node, work: Work) -> float:
        config: Any = node.config
        return self.loaded() + config.codec_steps * 0.02 + work.rows_out * 1e-4 / self.shared(work)

    def _filter(self, node: Node, work: Work) -> float:
        config: Any = node.config
        after = 4 if config.duplicate_tolerance is not None else 2
        seconds = after * self.start + work.rows_in * MOVED / self.shared(work)
        if scored_before(self.asked.recipe, node):
            return seconds
        each = self.found.get("look", MOVED) + MOVED
        measured = "score" in self.found or not config.clip_scores
        rest = 0.0 if measured else self.computed(work.flop, self.shared(work))
        return seconds + self.loaded("clip") + work.rows_in * (each + self.found.get("score", 0.0)) / self.shared(work) + rest

    def _encode(self, node: Node, work: Work) -> float:
        workers = self.shared(work)
        begin = self.loaded("vae", "clip", "codec")
        if f"vae {node.name}" not in self.found:
            return begin + self.computed(work.flop, workers) + work.rows_in * MOVED / workers
        parts = (f"square {node.name}", f"vae {node.name}", "text", *(() if passed_on(self.asked.recipe, node) else ("score",)))
        return begin + work.rows_in * (sum(self.found.get(part, 0.0) for part in parts) + MOVED) / workers

    def _text_codec(self, node: Node, work: Work) -> float:
        config: Any = node.config
        held = min(config.validation_captions, work.rows_in / 10) * self.found.get("decode", 0.0)
        if config.weights is not None:
            return self.loaded("clip", "codec") + held
        looks = math.ceil(config.steps / config.validate_every)
        steps = config.steps * self.found["codec_step"] if "codec_step" in self.found else self.computed(work.flop, 1)
        return self.loaded("clip", "codec") + steps + (looks + 1) * held

    def _train(self, node: Node, work: Work) -> float:
        training = self.trained[node.name]
        config, step = training.config, self._step(training)
        # Held-out rows: a forward pass, with the weights and with their average.
        looks = (training.steps // config.validation.every + 1) * 2 * config.validation.samples / (3 * config.global_batch)
        steps = (training.steps + looks) * step
        begin = max((seconds for name, seconds in self.found.items() if name.startswith("begin ")), default=self.start)
        return BEFORE_A_GROUP * self.start + self.loaded() + begin + steps + self._previews(training, steps)

    def _step(self, training: Training) -> float:
        """Of a training that was not measured, by one of the recipe that was and their arithmetic, or by the machine's."""
        flop = training.config.global_batch * training.sample_flop
        workers = min(training.config.fewest_workers, self.workers)
        for other in (training, *self.asked.trainings):
            if (step := self.found.get(f"step {other.node}")) is not None:
                each = other.config.global_batch * other.sample_flop / other.config.fewest_workers
                return step * flop / workers / each
        return self.computed(flop, workers)

    def _previews(self, training: Training, seconds: float) -> float:
        """Sheets are drawn beside the training, one at a time, where there is no core for them but those that it has."""
        config = training.config.preview
        if not config.count:
            return 0.0
        each = self.loaded("vae", "clip", "codec") + sum(self._draw(task, config.steps) * config.count for task in SHEET)
        # The last one is not waited for.
        return min(training.checkpoints - 1, seconds / each) * each * BESIDE

    def _draw(self, task: str, steps: int) -> float:
        """Seconds of one sample in one process."""
        kind = "i2t" if task in SAYS else "t2i"
        if f"call {kind}" in self.found:
            return steps * self.found[f"call {kind}"] + self.found[f"around {kind}"]
        training = self.asked.trainings[-1]
        return self.computed(steps * 2 * training.sample_flop / 3, 1)

    def _evaluate(self, node: Node, work: Work) -> float:
        samples = drawn(node.config)
        every = sum(self._draw(kind.task, kind.steps) * count for kind, count in samples.items()) / self.shared(work)
        seen = work.rows_in * (self.found.get("look", MOVED) + MOVED)
        looked = (seen + work.rows_in * self.found.get("score", 0.0)) / self.shared(work)
        return self.loaded("vae", "clip", "codec") + every + self.loaded("clip") + looked + self.loaded("clip") + seen

    def _export(self, node: Node, work: Work) -> float:
        return self.loaded("vae", "clip", "codec") + work.stored / 2e8
