"""The least memory that training holds of a model, known before anything runs: weights and what goes with each of them.

Activations come on top; how much they take is up to `micro_batch`.
"""

from __future__ import annotations

from training.config import ModelConfig, TrainConfig

# Bytes: master weights, moving average and each tensor that the optimizer keeps are always fp32.
MASTER, AVERAGE, KEPT = 4, 4, 4


def parameters(model: ModelConfig) -> int:
    """Numbers in the blocks of a U-ViT; what stands before and behind them is below a hundredth of the paper's model.

    >>> round(parameters(ModelConfig()) / 1e6)
    948
    """
    block = 12 * model.width**2
    return block * (model.depth + 1) + 2 * model.width**2 * (model.depth // 2)


def worker_bytes(config: TrainConfig, half: bool) -> int:
    """Bytes that one worker holds at least, where it has the fewest beside it; see `training.engine` and `training.masters`.

    Args:
        half: whether it computes in bf16.
    """
    each, share = 2 if half else 4, config.fewest_workers
    if config.lora is not None:
        # Adapters are below a hundredth of what they are trained on, which has neither gradients nor an optimizer.
        return parameters(config.model) * each // (share if config.zero_stage == 3 else 1)
    weights, gradients, state = float(each), float(each), float(MASTER + AVERAGE + KEPT * config.optimizer.matrix_state)
    if config.zero_stage == 0:
        # The weights are their own masters, and nothing is shared out.
        state -= MASTER
    else:
        state /= share
        gradients /= share if config.zero_stage >= 2 else 1
        weights /= share if config.zero_stage == 3 else 1
    return int(parameters(config.model) * (weights + gradients + state))
