"""What a stage says about its rate and the time left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from infra.store import Store
from stages.runner.chain import Chain
from stages.runner.contract import Job
from stages.runner.run import Progress, time_left
from stages.train.stage import TrainStageConfig, train_chain


@pytest.mark.parametrize(
    ("steps", "per_s", "expected"),
    [
        (30, 2.0, {"left": "0:15"}),
        (3600, 1.0, {"left": "1:00:00"}),
        (400_000, 1.0, {"left": "111:06:40"}),
        (3, 0.0, {}),
        (0, 2.0, {}),
    ],
)
def test_time_left_is_said_where_it_is_known(steps: int, per_s: float, expected: dict[str, str]) -> None:
    assert time_left(steps, per_s) == expected


def said(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    lines = capsys.readouterr().out.splitlines()
    return [json.loads(line.removeprefix("@progress ")) for line in lines if line.startswith("@progress ")]


def test_a_phase_judges_by_the_units_of_this_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = [1000.0]
    monkeypatch.setattr("stages.runner.run.time.monotonic", lambda: clock[0])
    progress = Progress("a-select", "write", total=100, done=90)
    for _ in range(10):
        clock[0] += 20
        progress.advance(rows=400)
    first, second, *_, last = said(capsys)
    assert "left" not in first and (second["rows_per_s"], second["left"]) == (20.0, "3:00")
    assert last["done"] == 100 and "left" not in last


def test_training_says_the_time_left_with_its_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Ended:
        stopped = False

    def train(run: Any, on_row: Any) -> Ended:
        on_row({"kind": "train", "step": 100, "loss": 0.5, "samples_per_s": 16.0, "lr": 0.1})
        on_row({"kind": "validation", "step": 100, "loss": 0.5})
        return Ended()

    monkeypatch.setattr("training.launch.train", train)
    config = TrainStageConfig.model_validate({"steps": 300, "global_batch": 8})
    job = Job(Store(str(tmp_path)), "train", "train-256", config, {}, {}, {}, {})
    train_chain(Chain(job, "k" * 24, config.steps))
    row, validation = said(capsys)
    assert (row["samples_per_s"], row["left"]) == (16.0, "1:40") and "left" not in validation
