"""DeepSpeed around the U-ViT: configuration, precision, compilation."""

from __future__ import annotations

import ctypes
import logging
import os
from typing import Any

import torch
from torch import nn

from training.arithmetic import has_bf16
from training.config import TrainConfig
from unidiffuser.compiling import find_compiler

log = logging.getLogger(__name__)


def resolve_precision(precision: str, device: torch.device) -> str:
    """`"auto"` becomes bf16 where the GPU computes in it, and fp32 elsewhere (CPUs emulate bf16, tens of times slower)."""
    if precision != "auto":
        return precision
    return "bf16" if device.type == "cuda" and has_bf16(device) else "fp32"


def deepspeed_config(config: TrainConfig, world: int, precision: str, pin: bool) -> dict[str, Any]:
    """DeepSpeed's configuration for this run. The learning rate is set by the loop, so there is no scheduler."""
    micro_batch = config.micro_batch if isinstance(config.micro_batch, int) else config.global_batch // world
    return {
        "train_batch_size": config.global_batch,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": config.global_batch // world // micro_batch,
        # Without ZeRO, `training.guard` clips.
        "gradient_clipping": config.gradient_clip if config.zero_stage else 0.0,
        "bf16": {"enabled": precision == "bf16"},
        "zero_optimization": {"stage": config.zero_stage, **config.zero.deepspeed(pin)},
        **({"communication_data_type": "fp32"} if config.zero.fp32_reduction else {}),
        # torch's AdamW: DeepSpeed's CPU Adam is compiled at the first start, which takes a minute and a compiler.
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }


def compiled(model: nn.Module, config: TrainConfig, device: torch.device) -> bool:
    """Compile in place when asked for and possible; gives whether it was."""
    if not config.compile:
        return False
    if find_compiler(device) is None:
        log.warning("compile: no compiler found (g++ or clang++, for a GPU gcc or clang), training goes on without")
        return False
    model.compile()
    return True


def keep_freed_memory() -> None:
    """Have glibc hold on to freed memory: a step's tensors find the last one's pages, which need not be mapped and cleared again.

    Saves about a twentieth of a step on a CPU, for about a tenth more resident memory. Another C library is left as it is.
    """
    trim_threshold, mmap_max = -1, -4  # parameters of mallopt(3)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(trim_threshold, -1)
        mallopt(mmap_max, 0)


def initialise_engine(model: nn.Module, config: TrainConfig, world: int, device: torch.device) -> tuple[Any, str]:
    """A DeepSpeed engine for `model` and the precision it computes in. torch.distributed must be initialised.

    Raises:
        ValueError: ZeRO stage 0 with bf16, which has no fp32 master weights.
    """
    precision = resolve_precision(config.precision, device)
    if config.zero_stage == 0 and precision == "bf16":
        raise ValueError("zero_stage 0 keeps no fp32 master weights for bf16; use zero_stage 1, or precision fp32")
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    import deepspeed
    import deepspeed.ops

    if device.type == "cpu":
        # Otherwise the first start on a machine compiles a shared-memory collective for a minute; gloo does without.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # type: ignore[attr-defined]
        keep_freed_memory()
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    model.to(device)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=config.optimizer.build((name, p) for name, p in model.named_parameters() if p.requires_grad),
        config=deepspeed_config(config, world, precision, pin=device.type == "cuda"),
        dist_init_required=False,
    )
    if world == 1 and config.zero_stage == 0:
        # Nobody to sum with: DeepSpeed would copy all gradients together and apart again.
        engine.enable_backward_allreduce = False
    return engine, precision
