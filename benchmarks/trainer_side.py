"""One side of `benchmarks.trainer`, in a process of its own: `trainer_side.py SIDE DATA ROOT SIZES`, the last as JSON.

For every line on its standard input, which is a number of steps, it takes so many and answers with a line of JSON: seconds, and
seconds of CPU time of all its threads, a step.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Steps before those that are measured: they use up what was loaded while the other sides had their turns.
WARM = 2


def config_of(sizes: dict[str, int]) -> Any:
    from training.config import TrainConfig

    model = {"width": sizes["width"], "depth": sizes["depth"], "heads": sizes["width"] // 64}
    return TrainConfig(
        steps=10**6, global_batch=sizes["batch"], precision="fp32", gradient_clip=1.0, log_every=10, checkpoint_every=10**6,
        validation={"fraction": 0.0}, model=model, zero_stage=sizes["zero_stage"], data={"shuffle_window": 8},
    )  # type: ignore[arg-type]  # fmt: skip


def turns() -> Iterator[bool]:
    """Asked before the first step and after each; answers when a turn is over, and gives false when there is none any more."""
    for line in sys.stdin:
        for _ in range(WARM):
            yield True
        wall, cpu, steps = time.perf_counter(), time.process_time(), int(line)
        for _ in range(steps):
            yield True
        found = {"seconds": (time.perf_counter() - wall) / steps, "cpu_seconds": (time.process_time() - cpu) / steps}
        print(json.dumps(found), flush=True)
    yield False


def trainer(shards: tuple[str, ...], sizes: dict[str, int]) -> None:
    """The whole of it: shards, loader, engine, moving average, history."""
    import tempfile

    import torch
    import torch.distributed as dist

    from tests.training.synthetic import KeepIn
    from training.job import TrainJob
    from training.loop import run

    os.environ.setdefault("LOCAL_RANK", "0")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    going = turns()
    with tempfile.TemporaryDirectory() as folder:
        job = TrainJob(config_of(sizes), shards, f"{folder}/work", KeepIn(f"{folder}/kept"))
        # The first step is before the first turn.
        run(job, torch.device("cpu"), lambda *_: not next(going))


def bare(shards: tuple[str, ...], sizes: dict[str, int]) -> None:
    """What every trainer must do, in plain torch on tensors that are there."""
    import torch
    from torch import nn

    from training.loader import Loader
    from training.loop import uvit_config
    from unidiffuser.objective import JointObjective
    from unidiffuser.schedule import NoiseSchedule
    from unidiffuser.uvit import UViT

    config = config_of(sizes)
    loader = Loader(config, shards)
    batches, going = [loader.batch(step) for step in range(4)], turns()
    model, objective = UViT(uvit_config(config, loader.modalities)), JointObjective(loader.modalities, NoiseSchedule())
    optimizer = config.optimizer.build(model.named_parameters())
    weights: list[torch.Tensor] = list(model.parameters())
    average = [weight.detach().clone() for weight in weights]
    number = 0
    while next(going):
        batch = batches[number % len(batches)]
        loss, _ = objective.loss(model, batch.clean, batch.timesteps, batch.noise)
        loss.backward()
        nn.utils.clip_grad_norm_(weights, config.gradient_clip)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(average, weights, 1e-4)
        loss.item()
        number += 1


def main(side: str, data: str, root: str, sizes: str) -> None:
    # Started with -P: this file has neighbours named like modules of Python and rooms of ours.
    sys.path.insert(0, root)
    os.environ["DS_ACCELERATOR"] = "cpu"
    import torch

    torch.set_num_threads(1)
    shards = tuple(str(path) for path in sorted(Path(data).glob("*.parquet")))
    (bare if side == "bare" else trainer)(shards, json.loads(sizes))


if __name__ == "__main__":
    main(*sys.argv[1:])
