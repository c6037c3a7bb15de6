"""Rows of the history: sums over an interval, and the speed that a person reads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from training.history import Meter


def test_a_row_is_the_mean_of_its_steps_and_the_speed_of_its_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("training.history.time.perf_counter", lambda: now[0])
    monkeypatch.setattr("training.history.time.process_time", lambda: 2 * now[0])
    meter = Meter(4, lambda steps: {"epoch": steps * 4 / 16}, 2, lambda samples_per_s: {"tokens_per_s": 10 * samples_per_s})
    now[0] += 50  # a model is compiled
    meter.begin()

    def late() -> Iterator[str]:
        now[0] += 0.5
        yield "batch"

    assert list(meter.waited(late())) == ["batch"]
    now[0] += 1
    assert meter.step(1, 0.1, {"loss": 1.0}, {"loss_t1": (3.0, 4.0), "loss_t2": (0.0, 0.0)}) is None
    with meter.excluded():
        now[0] += 20  # a validation
        with meter.waiting("checkpoint"):
            now[0] += 30
    now[0] += 1.5
    row = meter.step(2, 0.2, {"loss": 0.5}, {"loss_t1": (3.0, 2.0), "loss_t2": (0.0, 0.0)})
    assert row == {
        "kind": "train", "step": 2, "epoch": 0.5, "samples": 8, "loss": 0.75, "loss_t1": 1.0, "lr": 0.2, "samples_per_s": 2.67,
        "tokens_per_s": pytest.approx(80 / 3), "data_wait": 0.5, "checkpoint_wait": 30.0, "seconds": 3.0, "core_seconds": 6.0,
    }  # fmt: skip
    assert (meter.rows, meter.pending) == ([row], {})
    # A step that was skipped is in no mean, and an interval of nothing else is told with the next one.
    assert meter.step(3, 0.2, {"loss": 3.0}) is None
    now[0] += 1
    row = meter.step(4, 0.2, {}, {}, {"skipped": 1})
    assert row is not None and (row["loss"], row["skipped"], row["checkpoint_wait"]) == (3.0, 1, 0.0)
    assert (meter.step(5, 0.2, {}, {}, {"skipped": 2}), meter.step(6, 0.2, {}, {}, {"skipped": 3})) == (None, None)
