"""What a training asks for: arithmetic, data, memory of a GPU by ZeRO stage and micro-batch, checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from pipelines.planning.devices import Gpu
from pipelines.planning.encoders import Latents, latents
from stages.catalog import MADE_STAGES
from stages.runner.recipe import Node, Recipe
from stages.train.kept import kept_at_most
from stages.train.stage import TrainStageConfig
from stages.world.stage import CAPTION_WORDS, LATENT_SIDE
from training.begin import counts_on
from training.footprint import LIBRARIES, Footprint, checkpoint_bytes, fitting, footprint, parameters
from training.peaks import training_flop
from training.zero import ZeroConfig

# A word of the world of shapes, and the channels of its latents.
WORD, CHANNELS = 21, 8
# Rows of a group of latents, which is read at once.
GROUP = 256


@dataclass(frozen=True)
class Training:
    """A node of stage train: what it computes, reads and keeps. Bytes, FLOP and samples of all its steps."""

    node: str
    config: TrainStageConfig
    shapes: Latents
    steps: int
    tokens: int
    sample_flop: int

    @property
    def samples(self) -> int:
        return self.steps * self.config.global_batch

    @property
    def flop(self) -> int:
        return self.samples * self.sample_flop

    @property
    def read(self) -> int:
        return self.samples * self.shapes.row_bytes

    @property
    def gets(self) -> float:
        return self.samples / GROUP

    @property
    def checkpoint(self) -> int:
        return checkpoint_bytes(self.config)

    @property
    def checkpoints(self) -> int:
        """How many are written."""
        return -(-self.steps // self.config.checkpoint_every) or 1

    @property
    def kept(self) -> int:
        """How many lie in the store at most, with the one that is being written."""
        return kept_at_most(self.config)


@dataclass(frozen=True)
class Memory:
    """What a GPU's worker takes with a ZeRO stage at a micro-batch, in bytes; the most samples at once that it has room for, with
    activations kept and with all of them computed again, 0 where there is room for none."""

    zero_stage: int
    micro_batch: int
    footprint: Footprint
    most: int
    most_again: int

    @property
    def bytes(self) -> int:
        return self.footprint.device + LIBRARIES


def trainings(recipe: Recipe) -> list[Training]:
    """The trainings of a recipe, in its order.

    Raises:
        OSError, ValueError, KeyError: an encoder's configuration is not there or damaged.
    """
    return [_training(recipe, node) for node in recipe.nodes.values() if node.stage == "train"]


def _training(recipe: Recipe, node: Node) -> Training:
    config = cast(TrainStageConfig, node.config)
    # Of several inputs that with the most tokens: all rows of a batch have one shape.
    shapes = max((shapes_of(recipe, name) for name in data_of(node)), key=lambda found: found.side)
    tokens = shapes.tokens(config.model.patch, config.model.data_type_token)
    flop = training_flop(config.model.width, config.model.depth, tokens, shapes.numbers)
    return Training(node.name, config, shapes, _steps(recipe, config), tokens, flop)


def data_of(node: Node) -> list[str]:
    """The nodes whose latents a training reads."""
    return [name for part, name in node.inputs.items() if part.startswith("data.")]


def shapes_of(recipe: Recipe, name: str) -> Latents:
    """What a node of latents makes."""
    node, config = recipe.nodes[name], cast(Any, recipe.nodes[name].config)
    if node.stage in MADE_STAGES:
        return Latents(CHANNELS, LATENT_SIDE, 0, CAPTION_WORDS, WORD)
    width = cast(Any, recipe.nodes["text-codec"].config).latent_width
    return latents(config.size, config.vae, config.clip, config.text, width)


def _steps(recipe: Recipe, config: TrainStageConfig) -> int:
    """The steps that this node itself takes: its count may go on from that of another."""
    origin = config.origin
    if origin is None or not counts_on(origin.keep) or origin.run not in recipe.nodes:
        return config.steps
    return max(0, config.steps - cast(TrainStageConfig, recipe.nodes[origin.run].config).steps)


def on_workers(training: Training, gpus: int) -> TrainStageConfig:
    """Its configuration on so many GPUs, which is only looked at: it need not divide the batch."""
    return training.config.model_copy(update={"workers": gpus})


def memory(training: Training, gpu: Gpu, gpus: int) -> list[Memory]:
    """What a GPU's worker takes with every ZeRO stage, at the micro-batch of the recipe or the largest that there is room for."""
    config = on_workers(training, gpus)
    found = []
    for stage in (0, 1, 2, 3):
        half = gpu.half(config.precision) and stage > 0
        zero = config.zero if stage == config.zero_stage else ZeroConfig()
        tried = config.model_copy(update={"zero_stage": stage, "zero": zero, "micro_batch": "auto"})
        model = config.model.model_copy(update={"activation_checkpointing": 1})
        most = _most(tried, half, training.tokens, gpu.memory)
        again = _most(tried.model_copy(update={"model": model}), half, training.tokens, gpu.memory)
        micro = config.worker_micro_batch if config.micro_batch != "auto" else max(most, 1)
        found.append(Memory(stage, micro, footprint(tried, half, training.tokens, micro), most, again))
    return found


def by_micro_batch(training: Training, gpu: Gpu, gpus: int) -> dict[int, int]:
    """Samples at once -> bytes of a GPU's worker, with the recipe's ZeRO stage: the divisors of a worker's share."""
    config = on_workers(training, gpus)
    half, share = gpu.half(config.precision), max(config.worker_batch, 1)
    sizes = [size for size in range(1, share + 1) if share % size == 0]
    return {size: footprint(config, half, training.tokens, size).device + LIBRARIES for size in sizes}


def _most(config: TrainStageConfig, half: bool, tokens: int, have: int) -> int:
    try:
        return fitting(config, half, tokens, have)
    except ValueError:
        return 0


def weights(training: Training) -> int:
    """Numbers in the blocks of the network."""
    return parameters(training.config.model)
