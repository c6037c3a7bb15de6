"""On a local Ray: two workers, progress, a request to stop, and a failure told in one line."""

from __future__ import annotations

import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from infra.store import StoreError
from tests.training.synthetic import KeepIn, config, write_shards
from training.history import Row
from training.job import TrainingBug, TrainingError, TrainJob
from training.launch import _failure, _work, train


def test_progress_checkpoints_and_a_request_to_stop(ray_cluster: None, tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards")
    settings = config(workers=2, steps=100_000, checkpoint_every=50_000, log_every=5)
    stop, rows = threading.Event(), []

    def on_row(row: Row) -> None:
        rows.append(row)
        if row["kind"] == "train":
            stop.set()

    outcome = train(TrainJob(settings, shards, str(tmp_path / "work"), KeepIn(str(tmp_path / "kept"))), on_row, stop)
    assert outcome.stopped and 5 <= outcome.step < 50_000
    assert [path.name for path in (tmp_path / "kept").iterdir()] == [str(outcome.step)]
    assert rows[0]["kind"] == "validation" and rows[0]["step"] == 0
    steps = [row["step"] for row in rows if row["kind"] == "train"]
    assert steps == list(range(5, outcome.step + 1, 5))


def test_a_damaged_file_is_a_reason() -> None:
    told = Exception("a traceback of many lines")
    told._base_exc = StoreError("step.safetensors: damaged; delete it")  # type: ignore[attr-defined]
    failed = Exception("workers failed")
    failed.worker_failures = {0: told}  # type: ignore[attr-defined]
    assert str(_failure(failed)) == "step.safetensors: damaged; delete it"


def test_a_worker_whose_memory_is_not_enough_names_micro_batch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*_: object) -> None:
        raise MemoryError

    monkeypatch.setitem(sys.modules, "training.loop", SimpleNamespace(run=full))
    monkeypatch.setattr("ray.train.torch.get_device", lambda: SimpleNamespace(type="cuda"))
    monkeypatch.setattr("training.launch.Reporter", lambda _: SimpleNamespace(stop_requested=None, add=None, close=lambda: None))
    job = TrainJob(config(global_batch=8, micro_batch=4), (), str(tmp_path), KeepIn(str(tmp_path)))
    with pytest.raises(TrainingError, match=r"^memory is not enough; lower micro_batch \(now 4\) or the model$"):
        _work({"job": job, "board": None})


def test_a_bug_is_a_line_that_is_caused_by_the_workers_traceback() -> None:
    told = Exception("a traceback of many lines")
    told._base_exc = KeyError("step")  # type: ignore[attr-defined]
    failed = Exception("workers failed")
    failed.worker_failures = {0: told}  # type: ignore[attr-defined]
    error = _failure(failed)
    assert (type(error), str(error), error.__cause__) == (TrainingBug, "KeyError: 'step'", told)


def test_the_reason_of_a_failure_and_a_cluster_that_is_too_small(ray_cluster: None, tmp_path: Path) -> None:
    missing = str(tmp_path / "gone.parquet")
    job = TrainJob(config(), (missing,), str(tmp_path / "work"), KeepIn(str(tmp_path)))
    with pytest.raises(TrainingError, match="gone.parquet: cannot be read"):
        train(job)
    with pytest.raises(TrainingError, match="workers is 4, but the Ray cluster has 2 CPUs"):
        train(TrainJob(config(workers=4), (missing,), str(tmp_path / "work"), KeepIn(str(tmp_path))))


def test_a_cluster_of_nothing_is_told_with_its_size(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    job = TrainJob(config(), (), str(tmp_path), KeepIn(str(tmp_path)))
    for resources, words in (({}, "has 0 CPUs"), ({"GPU": 0.0}, "has 0 CPUs"), ({"GPU": 1.0, "CPU": 9.0}, "has 1 GPUs")):
        monkeypatch.setattr("ray.cluster_resources", lambda resources=resources: resources)
        with pytest.raises(TrainingError, match=words):
            train(replace(job, config=config(workers=2, global_batch=8)))
