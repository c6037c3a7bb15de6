"""`micro_batch: auto` on the device where it is run: the same number for all workers, and the same whenever a run goes on."""

from __future__ import annotations

import logging

import torch
import torch.distributed as dist

from training.config import TrainConfig
from training.footprint import fitting

log = logging.getLogger(__name__)


def fitted(config: TrainConfig, half: bool, tokens: int, device: torch.device) -> TrainConfig:
    """The configuration with a number for `auto`: what the smallest GPU of all workers holds, and all on a CPU. All must call it.

    Args:
        half: whether it computes in bf16.
        tokens: of a sample.

    Raises:
        ValueError: not even one sample has room.
    """
    if config.micro_batch != "auto" or device.type != "cuda":
        return config
    # All that the card has, not what is free: a run that goes on is to come to the same.
    have = torch.tensor(torch.cuda.get_device_properties(device).total_memory, device=device)
    dist.all_reduce(have, op=dist.ReduceOp.MIN)
    samples = fitting(config, half, tokens, int(have))
    log.info("micro_batch: auto is %d of the %d samples of a worker", samples, config.worker_batch)
    return config.model_copy(update={"micro_batch": samples})
