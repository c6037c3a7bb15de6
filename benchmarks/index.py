"""What the start of a training reads of a store that holds latents of 2.3 billion rows: the list of files, and no shard.

The list is what a commit would write of so many shards; the shards themselves are not there. It lies on an S3 server in this
process, which counts requests and bytes. The seconds are those of one worker that reads all of it itself, the driver's look-up of
the dataset and the first batch's places included; several share it out. Bytes and requests are of all workers.
"""

from __future__ import annotations

import base64
import hashlib
import logging
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from benchmarks.counted import counted_s3
from benchmarks.frame import Result, machine, progress
from infra.dataset import FileEntry, Manifest, Stats, commit, find
from infra.store import Store
from training.config import TrainConfig
from training.heldout import LISTED
from training.loader import Loader
from training.told import Told, ToldFile, columns_of

SHARD_ROWS, GROUP = 10_000, 256
FACTS = {"size": 256, "scaling_factor": 0.18215, "moments": [8, 32, 32], "clip": [512], "text": [77, 64]}
LATENTS = 27_264 * SHARD_ROWS
STORE, FINGERPRINT = "s3://data/store", "f" * 24


def told_of(rng: np.random.Generator) -> dict[str, Any]:
    """What encode would note of a shard: hashes are uniform, so those below 1/32 are drawn."""
    groups = [GROUP] * (SHARD_ROWS // GROUP) + [SHARD_ROWS % GROUP]
    listed = rng.binomial(groups, LISTED)
    hashes = rng.integers(0, int(LISTED * 2**32), listed.sum(), np.uint32)
    return {"facts": FACTS, "groups": groups, "listed": listed.tolist(), "hashes": base64.b64encode(hashes.tobytes())}


def write(store: Store, shards: int) -> None:
    """A dataset of latents as its commit leaves it."""
    rng, entries, notes = np.random.default_rng(0), [], []
    for number in range(shards):
        digest = hashlib.sha256(str(number).encode()).hexdigest()
        unit = digest[:24]
        path = f"encode/units/{unit[:2]}/{unit}/@{digest[24:32]}/part-{number // 2000:05d}-{number % 2000:05d}.parquet"
        entries.append(FileEntry(path=path, rows=SHARD_ROWS, bytes=LATENTS, sha256=digest, unit=unit))
        notes.append(told_of(rng))
    rows = shards * SHARD_ROWS
    manifest = Manifest(
        stage="encode", node="laion-encode", fingerprint=FINGERPRINT, generation=0, inputs={}, config={}, sources={}, code={},
        columns={}, stats=Stats(rows_in=rows, rows_out=rows), summary={}, seconds=0.0, created="", files=entries,
    )  # fmt: skip
    commit(store, manifest, columns_of(notes))


def main(
    shards: Annotated[int, typer.Option(min=1, help="Shards of 10,000 rows; 230,000 of them are laion2B-en.")] = 230_000,
    workers: Annotated[int, typer.Option(min=1, help="Workers whose requests count.")] = 88,
    fraction: Annotated[float, typer.Option(min=0, max=LISTED, help="Part of the rows that is held out.")] = 0.02,
    file: Annotated[Path | None, typer.Option("--json", help="Write the result here.", metavar="FILE")] = None,
) -> None:
    """Seconds, requests and bytes of a start without `where`."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    words = machine(torch.device("cpu"))
    config = TrainConfig(steps=1, global_batch=128 * workers, validation={"fraction": fraction})  # type: ignore[arg-type]
    with counted_s3() as counted:
        store = Store(STORE)
        write(store, shards)
        progress(f"a list of {shards} shards is there")
        counted.forget()
        start = time.perf_counter()
        dataset = find(store, "encode", FINGERPRINT)
        assert dataset is not None
        looked_up = time.perf_counter() - start
        told = Told(store.url(f"{dataset.folder}/files.parquet"), store.root)
        loader = Loader(config, [dataset.url(entry) for entry in dataset.files], told=[told])
        places, _ = loader.order.locate(loader.places(0))
        seconds = time.perf_counter() - start
        # The other workers' own: each opens the list, and the pieces are shared out.
        for _ in range(workers - 1):
            ToldFile(told)
    assert len(places) == config.global_batch
    held = int(loader.index.held.sum())
    assert abs(held / (shards * SHARD_ROWS) - fraction) < 0.001
    figures = {"start_s": round(seconds, 1), "requests": counted.requests, "bytes": counted.bytes, "shards": shards}
    latents = shards * LATENTS
    details = {"look_up_s": round(looked_up, 1), "workers": workers, "fraction": fraction, "held_out": held, "latents": latents}
    ratio = round(latents / counted.bytes, 1)
    Result("index", ratio, "all_latents", figures, words, {**figures, **details}).finish(file)


if __name__ == "__main__":
    typer.run(main)
