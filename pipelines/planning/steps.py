"""A few steps of the trainer itself, on random latents of a recipe's shapes."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines.planning.training import GROUP, Training
from training.history import Row
from training.job import TrainJob, Written

# Steps that do not count, and seconds of those that do.
WARM, SECONDS = 3, 2.0
# Rows of latents to train on.
ROWS = 2 * GROUP


@dataclass
class _Nothing:
    """A file that is written and kept nowhere."""

    size: int = 0
    sha256: str = ""

    def write(self, data: bytes | memoryview) -> None:
        self.size += len(data)


@dataclass(frozen=True)
class Nowhere:
    """A keeper of checkpoints that keeps none."""

    written: list[int] = field(default_factory=list)

    @contextmanager
    def writing(self, step: int, name: str) -> Iterator[_Nothing]:
        yield _Nothing()

    def commit(self, step: int, files: Sequence[Written], rows: int, metrics: Row) -> None:
        self.written.append(step)

    def steps(self) -> list[int]:
        return []

    def fetch(self, step: int, folder: str) -> str:
        raise FileNotFoundError(folder)

    def set_aside(self, step: int) -> None:
        pass


def modalities(training: Training) -> Any:
    """What the training models, with the shapes of its latents."""
    from unidiffuser.modalities import paper_modalities

    shapes = training.shapes
    latent = (shapes.channels, shapes.side, shapes.side)
    return paper_modalities(latent, shapes.clip or None, (shapes.text_tokens, shapes.text_width), training.config.model.patch)


def write_latents(training: Training, path: Path) -> None:
    """A shard of random latents, as encode writes them."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    from stages.shards.latents import binaries

    shapes, rng = training.shapes, np.random.default_rng(0)
    parts = {"moments": (2 * shapes.channels, shapes.side, shapes.side), "text": (shapes.text_tokens, shapes.text_width)}
    parts |= {"clip": (shapes.clip,)} if shapes.clip else {}
    columns: dict[str, Any] = {"key": pa.array([f"{row:09d}" for row in range(ROWS)]), "caption": pa.array(["a caption"] * ROWS)}
    columns |= {name: binaries(rng.standard_normal((ROWS, *shape)).astype(np.float16)) for name, shape in parts.items()}
    facts = {"size": 256, "scaling_factor": 1.0, **{name: list(shape) for name, shape in parts.items()}}
    table = pa.table(columns).replace_schema_metadata({"unidiffuser": json.dumps(facts)})
    pq.write_table(table, path, row_group_size=GROUP, compression="none", use_dictionary=False, write_page_checksum=True)


def seconds_a_step(training: Training, rank: int, workers: int, folder: Path, device: str) -> tuple[float, float]:
    """Seconds until the first step is done, and of a step after the first few; each of the `workers` processes calls it.

    They stay a group: DeepSpeed knows one in the life of a process.
    """
    import os

    import torch
    import torch.distributed as dist

    from training.loop import run

    shard = folder / f"{training.node}-{rank}.parquet"
    write_latents(training, shard)
    # No validation, checkpoint or page: they are counted apart.
    changes = {
        "steps": 10**6, "workers": workers, "checkpoint_every": 10**6, "log_every": 10**6, "profile": None, "lora": None,
        "validation": training.config.validation.model_copy(update={"fraction": 0.0}),
        "data": training.config.data.model_copy(update={"where": (), "data_type": None, "captions": {}, "weights": None}),
        "schedule": training.config.schedule.model_copy(update={"decay": "none"}),
    }  # fmt: skip
    config = training.config.model_copy(update=changes)
    os.environ["LOCAL_RANK"] = str(rank)
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
    if not dist.is_initialized():
        store = dist.FileStore(str(folder / "meeting"), workers)
        dist.init_process_group("nccl" if device == "cuda" else "gloo", store=store, rank=rank, world_size=workers)
    start, marks = time.perf_counter(), list[float]()

    def enough(step: int) -> bool:
        marks.append(time.perf_counter())
        return len(marks) > WARM + 1 and marks[-1] - marks[WARM] > SECONDS

    job = TrainJob(config, (str(shard),), str(folder / f"work-{training.node}-{rank}"), Nowhere())
    run(job, torch.device(device), enough)
    torch.set_num_threads(1)
    counted = marks[WARM:]
    return marks[0] - start, (counted[-1] - counted[0]) / (len(counted) - 1)
