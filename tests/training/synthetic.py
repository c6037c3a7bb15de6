"""Small latent shards of known content, and jobs that train on them."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from infra.store import Store, sha256_of
from training.config import TrainConfig
from training.history import WAITS, Row, read_history
from training.job import Written
from training.shares import Shares, merge

MOMENTS, CLIP, TEXT, SCALE = (4, 4, 4), (6,), (3, 5), 0.18215
# What a row of a history has of how a run went, not of what it trained.
TIMINGS = (
    "samples_per_s", "tokens_per_s", "mfu", "memory", "seconds", "core_seconds", *(f"{kind}_wait" for kind in WAITS),
    "damaged_groups",
)  # fmt: skip


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


def poison(shards: tuple[str, ...], key: str) -> None:
    """Make the image embedding of a row infinite, as a bad encoder would."""
    path = shards[int(key[:4])]
    table = pq.read_table(path)
    cells = table["clip"].to_pylist()
    row = table["key"].to_pylist().index(key)
    cells[row] = np.full(len(cells[row]) // 2, np.inf, np.float16).tobytes()
    column = table.schema.get_field_index("clip")
    table = table.set_column(column, table.schema.field(column), pa.array(cells, table.schema.field(column).type))
    pq.write_table(table, path, row_group_size=8, compression="none", use_dictionary=False, write_page_checksum=True)


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


class _Cut:
    """A file whose writing is the end of the process once so many bytes of it are written."""

    def __init__(self, file: Any, after: int) -> None:
        self.file, self.after = file, after

    def write(self, data: Any) -> None:
        if self.file.size + len(data) > self.after:
            self.file.write(bytes(data[: self.after - self.file.size]))
            os.kill(os.getpid(), signal.SIGKILL)
        self.file.write(data)

    @property
    def size(self) -> int:
        return self.file.size

    @property
    def sha256(self) -> str:
        return self.file.sha256


@dataclass(frozen=True)
class KeepIn:
    """Keeps each checkpoint in `folder/STEP`, and beside its shares each kind of tensor merged, such as `model.safetensors`.

    Attributes:
        kill: (step, rank, bytes): the worker of this rank dies when so much of its share of this step is written.
    """

    folder: str
    kill: tuple[int, int, int] | None = None

    @contextmanager
    def writing(self, step: int, name: str) -> Iterator[Any]:
        with Store(self.folder).writing(f"{step}/{name}") as file:
            kill = self.kill is not None and step == self.kill[0] and name.startswith(f"share-{self.kill[1]:05d}-")
            yield _Cut(file, self.kill[2]) if kill and self.kill is not None else file

    def commit(self, step: int, files: Sequence[Written], rows: int, metrics: Row) -> None:
        folder = Path(self.folder, str(step))
        for file in files:
            assert sha256_of(folder / file.name) == file.sha256 and os.path.getsize(folder / file.name) == file.bytes
        # Workers that were lost while they wrote this step may have been more, and have left theirs.
        for path in folder.glob("share-*"):
            if path.name not in {file.name for file in files}:
                path.unlink()
        shares = Shares(folder)
        for kind in shares.kinds:
            if not (folder / f"{kind}.safetensors").exists():
                merge(folder, kind, folder / f"{kind}.safetensors")
        (folder / "committed").write_text("")

    def steps(self) -> list[int]:
        return sorted(int(path.parent.name) for path in Path(self.folder).glob("*/committed"))

    def fetch(self, step: int, folder: str) -> str:
        return str(Path(self.folder, str(step)))

    def set_aside(self, step: int) -> None:
        shutil.rmtree(Path(self.folder, str(step)))


def history(folder: Path | str) -> list[Row]:
    """The history of a checkpoint without its timings."""
    return [{k: v for k, v in row.items() if k not in TIMINGS} for row in read_history(Path(folder) / "history.jsonl")]


def losses(folder: Path | str) -> list[float]:
    """All training and validation losses of a checkpoint's history, the latter with the averaged weights too."""
    return [row[name] for row in history(folder) for name in ("loss", "ema_loss") if name in row]
