"""Rows of the history: sums over an interval, and the speed that a person reads."""

from __future__ import annotations

import pytest

from training.history import Meter


def test_a_row_is_the_mean_of_its_steps_and_the_speed_of_its_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("training.history.time.perf_counter", lambda: now[0])
    monkeypatch.setattr("training.history.time.process_time", lambda: 2 * now[0])
    meter = Meter(4, lambda steps: steps * 4 / 16, 2)
    now[0] += 1.5
    assert meter.step(1, 0.1, {"loss": 1.0}) is None
    with meter.excluded():
        now[0] += 50  # a validation or a checkpoint
    now[0] += 1.5
    row = meter.step(2, 0.2, {"loss": 0.5})
    assert row == {
        "kind": "train", "step": 2, "epoch": 0.5, "samples": 8, "loss": 0.75, "lr": 0.2, "samples_per_s": 2.67, "seconds": 3.0,
        "core_seconds": 6.0,
    }  # fmt: skip
    assert (meter.rows, meter.pending, meter.pending_steps) == ([row], {}, 0)
