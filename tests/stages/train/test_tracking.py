"""The rows of a training in outside trackers, read back by each one's own reader, and a trace of its steps."""

from __future__ import annotations

import gzip
import json
import struct
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from infra.dataset import Dataset
from stages.runner.contract import StageError
from stages.train import stage as train_stage
from stages.train.stage import Train, TrainStageConfig
from tests.stages.train.trainings import Trainings
from training.damage import Damage
from training.job import TrainJob
from training.loop import run

Points = dict[str, list[tuple[int, float]]]


def of_tensorboard(folder: Path, name: str, purge: bool = False) -> Points:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard" / name), size_guidance={"scalars": 0}, purge_orphaned_data=purge)
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def of_mlflow(folder: Path, name: str) -> Points:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("r").experiment_id])
    assert run.info.run_name == name and run.info.status == "FINISHED"
    tags = {tag: client.get_metric_history(run.info.run_id, tag) for tag in run.data.metrics}
    return {tag: [(metric.step, metric.value) for metric in found] for tag, found in tags.items()}


def of_trackio(folder: Path, name: str) -> Points:
    from trackio.sqlite_storage import SQLiteStorage

    points: Points = {}
    for row in SQLiteStorage.get_logs("r", name):
        for tag, value in row.items():
            if "/" in tag:
                points.setdefault(tag, []).append((row["step"], value))
    return points


def of_wandb(folder: Path, name: str) -> Points:
    """Of what an offline run leaves for `wandb sync`: one folder for each time that the run went on."""
    from wandb.proto import wandb_internal_pb2

    points: Points = {}
    for file in sorted((folder / "wandb").glob("offline-run-*/*.wandb")):
        for data in logged(file.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            items = {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            for tag, value in items.items():
                if "/" in tag:
                    points.setdefault(tag, []).append((items["step"], value))
    return points


def logged(file: bytes) -> Iterator[bytes]:
    """The records of a log in LevelDB's format: blocks of 32 KiB of pieces, each with checksum, length and type before it."""
    at, record = 7, b""
    while at + 7 <= len(file):
        if (left := 2**15 - at % 2**15) < 7:
            at += left
            continue
        length, kind = struct.unpack_from("<HB", file, at + 4)
        record += file[at + 7 : at + 7 + length]
        at += 7 + length
        # Whole, or the last piece of several.
        if kind in (1, 4):
            yield record
            record = b""


READERS: dict[str, Callable[[Path, str], Points]] = {
    "tensorboard": of_tensorboard, "mlflow": of_mlflow, "trackio": of_trackio, "wandb": of_wandb,
}  # fmt: skip


@pytest.fixture(
    params=["tensorboard", *(pytest.param(name, marks=pytest.mark.trainer) for name in ("mlflow", "trackio", "wandb"))]
)
def tracker(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if find_spec(request.param) is None:
        pytest.skip(f"{request.param} is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    # It reads where it keeps its runs when it is imported.
    monkeypatch.delenv("TRACKIO_DIR", raising=False)
    for module in [module for module in sys.modules if module.partition(".")[0] == "trackio"]:
        monkeypatch.delitem(sys.modules, module)
    return str(request.param)


def broken_and_gone_on(training: Trainings, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> Dataset:
    """A training whose driver breaks at the row of step 10, and that then goes on from the checkpoint of step 5."""
    told = train_stage.emit_progress

    def broken(node: str, kind: str, step: int, *more: Any) -> None:
        if step == 10:
            raise StageError("broken")
        told(node, kind, step, *more)

    with monkeypatch.context() as first:
        first.setattr(train_stage, "emit_progress", broken)
        with pytest.raises(StageError, match="broken"):
            training(**settings)
    return training(**settings)


def test_a_tracker_holds_every_row_once_after_a_run_that_broke_and_went_on(
    training: Trainings, tracker: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {
        "steps": 12, "log_every": 2, "validation": {"fraction": 0.2, "every": 4, "samples": 4}, "track": [tracker]
    }  # fmt: skip
    # Steps 6 and 8 were told already, and come again from the checkpoint of step 5.
    dataset = broken_and_gone_on(training, monkeypatch, **settings)
    rows = history(dataset)
    folder, chain = tmp_path / "store" / ".state" / "tracking", training.chain(**settings)
    found = READERS[tracker](folder, f"train-256-{chain.key[:8]}")
    for kind in ("train", "validation"):
        expected = [(row["step"], row) for row in rows if row["kind"] == kind]
        assert len(expected) == {"train": 6, "validation": 4}[kind]
        for figure in ("loss", "loss_image_t1", "lr" if kind == "train" else "ema_loss"):
            points = [(step, pytest.approx(row[figure], rel=1e-6)) for step, row in expected if figure in row]
            assert found[f"{kind}/{figure}"] == points
    assert len(found["train/samples_per_s"]) == len(found["train/memory"]) == 6


def test_rows_of_steps_that_are_taken_again_after_a_rollback_follow_those_that_were_given_up(
    training: Trainings, tracker: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The ninth step is refused, so that the sixth is taken once more, on other samples; both before and after the run breaks."""
    monkeypatch.setattr(Damage, "refuses", lambda self, norm, config: self.steps == 8 and not self.skipped)
    settings: dict[str, Any] = {
        "steps": 12, "log_every": 2, "validation": {"fraction": 0.2, "every": 4, "samples": 4}, "track": [tracker],
        "damage": {"steps_in_a_row": 0},
    }  # fmt: skip
    dataset = broken_and_gone_on(training, monkeypatch, **settings)
    kept = {kind: [row for row in history(dataset) if row["kind"] == kind] for kind in ("train", "validation", "damage")}
    assert ["went back from step 9 to the checkpoint of step 5" in row["said"] for row in kept["damage"]] == [True]
    folder, name = tmp_path / "store" / ".state" / "tracking", f"train-256-{training.chain(**settings).key[:8]}"
    found = READERS[tracker](folder, name)
    for kind, given_up, rollbacks in (("train", [6, 8], [0, 0, 1, 1, 1, 1]), ("validation", [8], [0, 0, 1, 1])):
        losses = [(row["step"], row["loss"]) for row in kept[kind]]
        assert [row.get("rollbacks", 0) for row in kept[kind]] == rollbacks
        told = found[f"{kind}/loss"]
        assert sorted(step for step, _ in told) == sorted([step for step, _ in losses] + given_up)
        # The newest of a step counts, as it does for who draws them.
        assert dict(told) == {step: pytest.approx(loss, rel=1e-6) for step, loss in losses}
        assert found[f"{kind}/rollbacks"] == [(step, 1.0) for step, _ in losses if step > 5]
    if tracker == "tensorboard":
        drawn = of_tensorboard(folder, name, purge=True)
        for kind in ("train", "validation"):
            assert [step for step, _ in drawn[f"{kind}/loss"]] == [row["step"] for row in kept[kind]]


def points(training: Trainings, folder: Path, **settings: Any) -> list[int]:
    """The steps of the rows that TensorBoard holds."""
    found = of_tensorboard(folder / "store/.state/tracking", f"train-256-{training.chain(**settings).key[:8]}")
    return [step for step, _ in found["train/loss"]]


def test_rows_that_killed_workers_had_not_told_of_come_from_their_checkpoint(
    training: Trainings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def killed(plan: Callable[[], TrainJob], **more: Any) -> Any:
        """Of the first workers, nothing is heard; they leave a checkpoint of step 5."""
        job = plan()
        run(replace(job, config=job.config.model_copy(update={"steps": 5})), torch.device("cpu"))
        return training.train(plan, **more)

    monkeypatch.setattr("training.launch.train", killed)
    training(steps=8, track=["tensorboard"])
    assert points(training, tmp_path, steps=8) == list(range(1, 9))


def test_a_checkpoint_without_its_history_is_a_damaged_one_for_trackers_too(training: Trainings, tmp_path: Path) -> None:
    training.stop_at = 7
    with pytest.raises(StageError, match="stopped at step 7"):
        training(steps=8, track=["tensorboard"])
    training.stop_at = None
    chain = training.chain(steps=8)
    (told,) = Path(training.store.url(chain.job.unit_folder(chain.key_of(7)))).glob("@*/history.jsonl")
    told.unlink()
    training(steps=8, track=["tensorboard"])
    assert training.began == [0, 5] and points(training, tmp_path, steps=8) == list(range(1, 9))


def history(dataset: Dataset) -> list[dict[str, Any]]:
    lines = dataset.store.read(dataset.file("history.jsonl").path).decode().splitlines()
    return [json.loads(line) for line in lines]


def test_a_tracker_that_fails_is_left_alone_and_gets_what_it_missed(
    training: Trainings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from stages.train.trackers import TensorBoard

    def full(*arguments: Any) -> None:
        raise OSError("no space is left")

    with monkeypatch.context() as first:
        first.setattr(TensorBoard, "write", full)
        training(steps=5, track=["tensorboard"])
    assert "train-256: tensorboard is left out until the run goes on anew: no space is left" in caplog.text
    training(steps=10, track=["tensorboard"])
    name = f"train-256-{training.chain(steps=10, track=['tensorboard']).key[:8]}"
    found = of_tensorboard(tmp_path / "store/.state/tracking", name)
    assert [step for step, _ in found["train/loss"]] == list(range(1, 11))


def test_a_tracker_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.train.trackers.find_spec", lambda name: None)
    config = TrainStageConfig(steps=1, global_batch=1, track=("trackio",))
    with pytest.raises(StageError, match=r"^track names trackio, which is not installed: pip install 'unidiffuser\[trackio\]'$"):
        Train.check(config, {}, {})


def test_a_profile_is_a_chrome_trace_of_its_steps_on_the_store(training: Trainings, tmp_path: Path) -> None:
    dataset = training(steps=5, profile={"from": 4, "steps": 3})
    (file,) = (tmp_path / "store/.state/profiles").glob("*/*")
    assert file.parent.name == f"train-256-{training.chain(steps=5).key}" and file.name == "steps-00000004-00000005.json.gz"
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    names = [event["name"] for event in events]
    # The forward pass of a U-ViT of two blocks and a middle one: attention three times, in each of two steps.
    assert names.count("aten::softmax") == 6
    assert "[memory]" in names and dataset.manifest.summary["step"] == 5
