"""One worker of one side of `benchmarks.checkpoint`: `checkpoint_side.py RANK WORLD FOLDER ROOT SETTINGS`.

Trains with the trainer of ROOT, which writes checkpoints into a store in FOLDER, and writes what it measured to FOLDER/RANK.json.
An earlier trainer stops for all of `_checkpoint`, a later one where its `Saver` is called. The last checkpoint of a run has
nothing to go on with and does not count.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

COPIES = 7


def peak_mib() -> float:
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 2**10


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


class Stopwatch:
    """Seconds that calls of some methods take; those that one of them makes itself count with it."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, float]] = []
        self.depth = 0

    def on(self, owner: Any, name: str, before: Callable[..., None] = lambda *_: None) -> None:
        method = getattr(owner, name)

        def timed(*args: Any, **more: Any) -> Any:
            before(*args)
            self.depth += 1
            started = time.perf_counter()
            try:
                return method(*args, **more)
            finally:
                self.depth -= 1
                if self.depth == 0:
                    self.calls.append((name, time.perf_counter() - started))

        setattr(owner, name, timed)


def main() -> None:
    rank, world, folder, root = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
    settings = json.loads(sys.argv[5])
    sys.path.insert(0, root)
    os.environ.update(LOCAL_RANK=str(rank), RANK=str(rank), WORLD_SIZE=str(world), DS_ACCELERATOR="cpu")
    import torch
    import torch.distributed as dist

    from infra.store import Store
    from stages.runner.chain import Chain
    from stages.runner.contract import Job
    from stages.train.stage import TrainStageConfig
    from training import loop
    from training.job import TrainJob

    earlier = hasattr(loop, "write_checkpoint")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=world)
    shards = tuple(str(path) for path in sorted(Path(settings.pop("data")).glob("*.parquet")))
    keep: dict[str, Any] = {"keep_every": 10**9} if earlier else {"keep": {"last": 1}}
    config = TrainStageConfig.model_validate({**settings, **keep})
    job = Job(Store(str(folder / "store")), "train", "train-x", config, {}, {}, {})
    chain, watch = Chain(job, "0" * 24, config.steps), Stopwatch()
    pieces: list[Any] = []
    peaks: list[float] = []

    def begun(*args: Any) -> None:
        # Up to the first checkpoint, what the steps alone take.
        if not peaks:
            peaks.append(peak_mib())
        if not earlier:
            pieces[:] = [tensor for _, tensor in args[3]]

    publish: Any
    if earlier:
        from stages.train import stage

        publish = stage.Publisher(chain, time.time(), ())  # type: ignore[call-arg]
        watch.on(loop._Run, "_checkpoint", begun)
    else:
        from stages.train.kept import Publisher
        from training.saving import Saver

        publish = Publisher(chain, time.time(), (), "bench")
        watch.on(Saver, "begin", begun)
        for name in ("seal", "commit", "finish"):
            watch.on(Saver, name)
    forget_peak()
    started = time.perf_counter()
    loop.run(TrainJob(config, shards, str(folder / "work"), publish), torch.device("cpu"))
    seconds = time.perf_counter() - started
    peaks.append(peak_mib())
    # The last call is the end's.
    calls = watch.calls[:-1]
    checkpoints = config.steps // config.checkpoint_every - 1
    found: dict[str, Any] = {"blocked": sum(taken for _, taken in calls) / checkpoints, "seconds": seconds, "peak_mib": peaks[-1]}
    found |= {"peak_of_steps_mib": peaks[0], "copy": copy_seconds(pieces) if pieces else 0.0, "calls": calls}
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def copy_seconds(pieces: list[Any]) -> float:
    """Seconds in which all workers at once copy their shares into memory that is there already."""
    import torch
    import torch.distributed as dist

    room = torch.zeros(sum(map(len, pieces)))
    taken = []
    for _ in range(COPIES):
        dist.barrier()
        started, start = time.perf_counter(), 0
        for piece in pieces:
            room.narrow(0, start, len(piece)).copy_(piece)
            start += len(piece)
        taken.append(time.perf_counter() - started)
    return median(taken)


if __name__ == "__main__":
    main()
