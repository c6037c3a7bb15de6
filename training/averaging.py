"""How long the moving average of the weights remembers. Imports no torch, as all configuration."""

from __future__ import annotations

from pydantic import Field

from training.section import Section


class EmaConfig(Section):
    """Exponential moving average of the weights, which sampling uses."""

    decay: float = Field(0.9999, ge=0, lt=1, description="Decay once warmed up; U-ViT's is 0.9999.")
    warmup: bool = Field(
        True,
        description="Use min(decay, (1 + n) / (10 + n)) at the n-th update, so that short runs forget their start.",
    )


def ema_decay(updates: int, config: EmaConfig) -> float:
    """Decay of update number `updates`, counted from 0: the configured one, less while there is little to average.

    >>> ema_decay(0, EmaConfig()), ema_decay(10**6, EmaConfig())
    (0.1, 0.9999)
    """
    return min(config.decay, (1 + updates) / (10 + updates)) if config.warmup else config.decay
