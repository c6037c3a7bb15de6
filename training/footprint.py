"""The memory that training takes of a worker, known before anything runs or is read.

Counted for N parameters, W workers, T tokens of width d through L blocks, in bytes; weights and gradients are 2 in bf16 and 4 in
fp32, master weights, moving average and each tensor that the optimizer keeps (AdamW: 2) are 4:

    ZeRO 0    N (weights + gradients + average + kept)
    ZeRO 1    N (weights + gradients) + N / W (masters + average + kept + 4 while it steps)
    ZeRO 2    N weights + N / W (gradients and the rest)
    ZeRO 3    N / W of all
    buckets   in which gradients travel, up to 500M numbers; two if communication overlaps
    a block   T d times 16 of its activations, 19 where it merges a skip, or 1 where they are computed again; of the one at work,
              all of them, and 8 of their gradients

That is what tensors hold, up to a third more (`tests/training/test_footprint.py`): a step's own memory and activations are not at
their most at once, and one worker alone needs no buckets under ZeRO 1. A process takes more than its tensors hold. On a CPU freed
memory is kept in pieces, and CUDA and its libraries come on top.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from training.config import ModelConfig, TrainConfig

# Bytes: master weights, moving average and each tensor that the optimizer keeps are always fp32.
MASTER, AVERAGE, KEPT, STEPPING = 4, 4, 4, 4
# Numbers that are reduced at once by DeepSpeed's default.
BUCKET = 500_000_000
# Activations of a block a token and number of the width, and what lies before and behind the blocks.
PLAIN, MERGING, AGAIN, GRADIENTS, ENDS = 16, 19, 1, 8, 5
# A GPU's context and libraries.
LIBRARIES = 3 * 2**29


@dataclass(frozen=True)
class Footprint:
    """Bytes of one worker: what it holds of the model on its device, what of it is offloaded, buckets, and activations."""

    model: int
    offloaded: int
    buckets: int
    activations: int

    @property
    def device(self) -> int:
        """On the device that computes."""
        return self.model + self.buckets + self.activations


def parameters(model: ModelConfig) -> int:
    """Numbers in the blocks of a U-ViT; what stands before and behind them is below a hundredth of the paper's model.

    >>> round(parameters(ModelConfig()) / 1e6)
    948
    """
    block = 12 * model.width**2
    return block * (model.depth + 1) + 2 * model.width**2 * (model.depth // 2)


def footprint(config: TrainConfig, half: bool, tokens: int = 0, samples: int | None = None) -> Footprint:
    """What one worker takes where it has the fewest beside it, see the module.

    Args:
        half: whether it computes in bf16.
        tokens: of a sample; with 0, activations are left out.
        samples: computed at once; by default those of the configuration.
    """
    count, each, workers = parameters(config.model), 2 if half else 4, config.fewest_workers
    activations = activation_bytes(config.model, tokens, each) * (samples or config.worker_micro_batch)
    if config.lora is not None:
        # Adapters are below a hundredth of what they are trained on, which has neither gradients nor an optimizer.
        return Footprint(count * each // (workers if config.zero_stage == 3 else 1), 0, 0, activations)
    weights, gradients, state = float(each), float(each), float(MASTER + AVERAGE + KEPT * config.optimizer.matrix_state)
    buckets = 0
    if config.zero_stage == 0:
        # The weights are their own masters, and nothing is shared out.
        state -= MASTER
    else:
        state = (state + STEPPING) / workers
        gradients /= workers if config.zero_stage >= 2 else 1
        weights /= workers if config.zero_stage == 3 else 1
        overlap = config.zero.overlap_comm if config.zero.overlap_comm is not None else config.zero_stage == 3
        buckets = min(count, BUCKET) * (4 if config.zero.fp32_reduction else each) * (2 if overlap else 1)
    moved = (state if config.zero.offload_optimizer else 0.0) + (weights if config.zero.offload_parameters else 0.0)
    held = weights + gradients + state - moved
    return Footprint(int(count * held), int(count * moved), buckets, activations)


def checkpoint_bytes(config: TrainConfig) -> int:
    """Bytes of one checkpoint: fp32 weights, moving average and what the optimizer keeps. What it keeps of adapters is small.

    >>> round(checkpoint_bytes(TrainConfig(steps=1, global_batch=1)) / 1e9, 1)
    15.2
    """
    kinds = 2 if config.lora is not None else 2 + config.optimizer.matrix_state
    return kinds * 4 * parameters(config.model)


def activation_bytes(model: ModelConfig, tokens: int, each: int) -> int:
    """Bytes of the activations of one sample, at `each` a number."""
    every, held, again = model.activation_checkpointing, ENDS + GRADIENTS, 0
    for number, size in enumerate(_blocks(model)):
        computed_again = bool(every) and number % every == 0
        held += AGAIN if computed_again else size
        again = max(again, size) if computed_again else again
    return tokens * model.width * each * (held + again)


def _blocks(model: ModelConfig) -> Iterator[int]:
    for number in range(model.depth + 1):
        yield MERGING if number > model.depth // 2 else PLAIN


def fitting(config: TrainConfig, half: bool, tokens: int, have: int) -> int:
    """The most samples, a divisor of a worker's share, of which a GPU of `have` bytes can compute the gradients at once.

    Raises:
        ValueError: not even one, with the numbers and what to change.
    """
    room = have - LIBRARIES
    for samples in range(config.worker_batch, 0, -1):
        if config.worker_batch % samples == 0 and footprint(config, half, tokens, samples).device <= room:
            return samples
    one = config.model_copy(update={"micro_batch": 1})
    raise ValueError(f"micro_batch: auto finds no room: {too_much(one, footprint(one, half, tokens), room, 'a GPU has')}")


def too_much(config: TrainConfig, found: Footprint, have: int, whose: str) -> str:
    """In a line, what a worker takes, what there is, and the field to change."""
    parts = [f"weights, gradients and optimizer {_gib(found.model)}"]
    parts += [f"buckets {_gib(found.buckets)}"] if found.buckets else []
    at_once = 1 if config.micro_batch == "auto" else config.worker_micro_batch
    parts += [f"activations of {at_once} samples at once {_gib(found.activations)}"] if found.activations else []
    takes = f"it takes {_gib(found.device)} GiB ({', '.join(parts)}), {whose} {_gib(have)}"
    if found.activations and found.model + found.buckets < have:
        smaller = "" if at_once == 1 else f"lower micro_batch (now {config.micro_batch or 'all'}), or "
        return f"{takes}; {smaller}set model.activation_checkpointing: 1"
    return f"{takes}; raise zero_stage and workers, set zero.offload_optimizer, or lower model.width or model.depth"


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f}"
