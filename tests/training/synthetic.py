"""Small latent shards of known content, and jobs that train on them."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from training.config import TrainConfig
from training.history import TIMINGS, Row, read_history

MOMENTS, CLIP, TEXT, SCALE = (4, 4, 4), (6,), (3, 5), 0.18215


def write_shards(
    folder: Path, files: int = 2, rows: int = 40, group: int = 8, logvar: float = 0.0, side: int = 4, clip: bool = True
) -> tuple[str, ...]:
    """Shards whose row i of file f has the key FFFFIIII, random moments, and `aesthetic` = i % 10 (null where i % 10 is 9)."""
    moments = (MOMENTS[0], side, side)
    told = {"size": 64, "moments": moments, "clip": CLIP, "text": TEXT, "scaling_factor": SCALE}
    paths = []
    folder.mkdir(parents=True, exist_ok=True)
    for file in range(files):
        rng = np.random.default_rng(file)
        mean_logvar = rng.standard_normal((rows, *moments)).astype(np.float16)
        mean_logvar[:, moments[0] // 2 :] = logvar
        columns: dict[str, Any] = {
            "key": [f"{file:04d}{row:04d}" for row in range(rows)],
            "caption": [f"caption {row}" for row in range(rows)],
            "moments": _binary(mean_logvar),
            "clip": _binary(rng.standard_normal((rows, *CLIP)).astype(np.float16)),
            "text": _binary(rng.standard_normal((rows, *TEXT)).astype(np.float16)),
            "aesthetic": pa.array([None if row % 10 == 9 else float(row % 10) for row in range(rows)], pa.float32()),
        }
        if not clip:
            columns.pop("clip")
            told.pop("clip", None)
        table = pa.table(columns).replace_schema_metadata({b"unidiffuser": json.dumps(told).encode()})
        path = folder / f"{file:05d}.parquet"
        pq.write_table(table, path, row_group_size=group, compression="none", use_dictionary=False, write_page_checksum=True)
        paths.append(str(path))
    return tuple(paths)


def _binary(values: np.ndarray) -> pa.Array:
    return pa.array([row.tobytes() for row in values], pa.binary(values[0].nbytes))


def config(**changes: Any) -> TrainConfig:
    """A run of 6 steps of 8 samples of a model of a few thousand parameters."""
    fields: dict[str, Any] = {
        "steps": 6,
        "global_batch": 8,
        "precision": "fp32",
        "seed": 5,
        "gradient_clip": 0.5,
        "log_every": 1,
        "checkpoint_every": 3,
        "model": {"width": 16, "depth": 2, "heads": 2},
        "optimizer": {"lr": 5e-3},
        "schedule": {"warmup_steps": 2},
        "validation": {"fraction": 0.2, "every": 3, "samples": 11},
        "data": {"shuffle_window": 3},
    }
    return TrainConfig(**{**fields, **changes})


@dataclass(frozen=True)
class KeepIn:
    """A publish function that copies each checkpoint to `folder/STEP`, then does what `kill_at` says."""

    folder: str
    kill_at: int | None = None

    def __call__(self, checkpoint: str, step: int, metrics: Row) -> None:
        shutil.copytree(checkpoint, Path(self.folder) / str(step))
        if step == self.kill_at:
            import os
            import signal

            os.kill(os.getpid(), signal.SIGKILL)


def history(folder: Path | str) -> list[Row]:
    """The history of a checkpoint without its timings."""
    return [{k: v for k, v in row.items() if k not in TIMINGS} for row in read_history(Path(folder) / "history.jsonl")]


def losses(folder: Path | str) -> list[float]:
    """All training and validation losses of a checkpoint's history."""
    return [row["loss"] for row in history(folder)]
