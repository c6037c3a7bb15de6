"""How well a machine is used: tokens a second, model FLOPs utilisation, and memory.

MFU is the arithmetic of the model that was trained, without what checkpointed blocks compute again, over the peak of the devices.
It is left out where `training.peaks` knows none.
"""

from __future__ import annotations

from collections.abc import Callable

import psutil
import torch

from training.peaks import peak_of, training_flop
from unidiffuser.uvit import UViTConfig


def sample_flop(config: UViTConfig) -> int:
    """FLOP of training on one sample, see `training.peaks.training_flop`."""
    parts = [part for modality in config.modalities for part in modality.parts]
    ends = sum(part.tokens * part.token_width for part in parts)
    return training_flop(config.width, config.depth, config.tokens + config.data_type_token, ends, config.mlp_ratio)


def memory_gib(device: torch.device) -> float:
    """GiB of this worker: allocated at most so far on a GPU; resident now on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return psutil.Process().memory_info().rss / 2**30


def gauges(
    config: UViTConfig, precision: str, device: torch.device, workers: int, adapters: bool
) -> Callable[[float], dict[str, float]]:
    """What can be read off when a row of the history is made: samples a second -> `tokens_per_s`, `mfu`, `memory`.

    Args:
        config: with the shapes that are trained on.
        adapters: whether only adapters are trained, which leaves out most gradients; MFU is then left out.
    """
    peak = None
    if device.type == "cuda" and not adapters:
        peak = peak_of(torch.cuda.get_device_name(device), precision)
    tokens, flop = config.tokens + config.data_type_token, sample_flop(config)

    def read(samples_per_s: float) -> dict[str, float]:
        values = {"tokens_per_s": round(samples_per_s * tokens, 1), "memory": round(memory_gib(device), 3)}
        if peak is not None:
            values["mfu"] = round(samples_per_s * flop / (workers * peak), 4)
        return values

    return read
