"""One side of `benchmarks.loader`, in a process and, for a peer, an environment of its own: `loader_side.py SIDE DATA ROOT`.

For every line on its standard input, which is a number of batches, it reads and draws so many and answers with a line of JSON.
A peer draws what ours draws, the latents, the noise and two timesteps a row, for a whole batch at once.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

BATCH, SCALE = 64, 0.18215
SHAPES = {"moments": (8, 32, 32), "clip": (512,), "text": (77, 64)}
# Rows that are mixed with each other, as many as litdata has in one of its chunks of 64 MB, 2,300.
SHUFFLED = 2048
GROUP = 256
WARM = 8


def ours(data: Path) -> Iterator[Any]:
    from training.config import TrainConfig
    from training.loader import Loader

    order: Any = {"lanes": 1, "shuffle_window": SHUFFLED // GROUP}
    config = TrainConfig(steps=10**6, global_batch=BATCH, data=order, validation={"fraction": 0.0})  # type: ignore[arg-type]
    yield None
    yield from Loader(config, [str(path) for path in sorted((data / "parquet").glob("*.parquet"))]).batches(0, config.steps)


def litdata(data: Path) -> Iterator[Any]:
    from litdata import StreamingDataLoader, StreamingDataset  # type: ignore[import-not-found]

    yield None
    dataset = StreamingDataset(str(data / "litdata"), shuffle=True, seed=0)
    yield from drawn(StreamingDataLoader(dataset, batch_size=BATCH, num_workers=0, drop_last=True))


def npy(data: Path) -> Iterator[Any]:
    class Rows(torch.utils.data.Dataset):
        files = sorted((data / "npy").glob("*.npy"))

        def __len__(self) -> int:
            return len(self.files)

        def __getitem__(self, number: int) -> dict[str, np.ndarray]:
            return parted(np.load(self.files[number]))

    yield None
    yield from drawn(torch.utils.data.DataLoader(Rows(), BATCH, shuffle=True, num_workers=0, drop_last=True))


def webdataset(data: Path) -> Iterator[Any]:
    import webdataset as wds

    yield None
    shards = [str(path) for path in sorted((data / "webdataset").glob("*.tar"))]
    rows = wds.WebDataset(shards, shardshuffle=len(shards), seed=0).shuffle(SHUFFLED).decode()
    yield from drawn(torch.utils.data.DataLoader(rows.map(lambda row: parted(row["npy"])), BATCH, num_workers=0, drop_last=True))


SIDES: dict[str, Callable[[Path], Iterator[Any]]] = {
    "ours": ours, "before": ours, "litdata": litdata, "npy": npy, "webdataset": webdataset,
}  # fmt: skip


def parted(row: np.ndarray) -> dict[str, np.ndarray]:
    """The parts of a row of fp16 that holds them one after the other."""
    sizes = np.cumsum([int(np.prod(shape)) for shape in SHAPES.values()])[:-1]
    return {part: values.reshape(SHAPES[part]) for part, values in zip(SHAPES, np.split(row, sizes), strict=True)}


def drawn(batches: Iterable[dict[str, torch.Tensor]]) -> Iterator[Any]:
    """Batches of a peer, epoch after epoch, as training takes them."""
    generator = torch.Generator().manual_seed(0)
    while True:
        for batch in batches:
            mean, logvar = batch["moments"].float().chunk(2, 1)
            z = torch.randn(mean.shape, generator=generator)
            latent = z.mul_(logvar.clamp_(-30.0, 20.0).mul_(0.5).exp_()).add_(mean).mul_(SCALE)
            clean = {"latent": latent, "clip": batch["clip"].float(), "text": batch["text"].float()}
            noise = {part: torch.randn(values.shape, generator=generator) for part, values in clean.items()}
            yield clean, noise, torch.randint(1, 1001, (2, BATCH), generator=generator)


def resident(kind: str) -> float:
    """MiB of this process: VmRSS now, VmHWM at its greatest."""
    return int(Path("/proc/self/status").read_text().split(f"{kind}:")[1].split()[0]) / 2**10


def main(side: str, data: str, root: str) -> None:
    # Started with -P: this file has neighbours named like modules of Python and rooms of ours.
    sys.path.insert(0, root)
    torch.set_num_threads(1)
    batches = SIDES[side](Path(data))
    next(batches)
    imported = resident("VmRSS")
    for line in sys.stdin:
        for _ in range(WARM):
            next(batches)
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(int(line)):
            next(batches)
        rows = int(line) * BATCH
        rate, cost = rows / (time.perf_counter() - wall), (time.process_time() - cpu) / rows * 1e6
        peak = resident("VmHWM")
        print(json.dumps({"rows_per_s": rate, "cpu_us": cost, "mib": peak - imported, "whole_mib": peak}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
