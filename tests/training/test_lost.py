"""What becomes of a training that loses workers or machines."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
from pydantic import ValidationError

from tests.training.gang import ROOT
from tests.training.synthetic import KeepIn, config
from training.gang.attempt import Attempt, Lost, _how_it_ended
from training.gang.signs import Sign
from training.gang.silence import STILL_TIMES, Silence
from training.job import Outcome, TrainingError
from training.launch import GIVE_UP, _Growth, _Room, train


def sign(rank: int, step: int = 0, **changes: Any) -> Sign:
    return Sign(rank, f"n{rank}", f"10.0.0.{rank}", 100 + rank, f"/tmp/{rank}", step, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"workers": 3}, "global_batch 8 is not divisible by workers 3"),
        ({"workers": {"min": 3, "max": 8}}, "global_batch 8 is not divisible by workers 3; of 3 to 8: 4, 8"),
        ({"workers": {"min": 1, "max": 7}}, "global_batch 8 is not divisible by workers 7; of 1 to 7: 1, 2, 4"),
        ({"workers": {"min": 2, "max": 8}, "micro_batch": 2}, "micro_batch 2 does not divide the 1 samples of a worker"),
        ({"workers": {"min": 4, "max": 2}}, "min 4 is more than max 2"),
    ],
)
def test_a_batch_that_workers_cannot_share_is_refused_with_the_numbers(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(message)):
        config(**changes)


def test_a_worker_without_signs_is_silent_and_a_slow_first_step_is_not() -> None:
    silence = Silence(60)
    for now in range(0, 7200, 10):  # two hours of compiling, with signs of life
        assert silence.verdict({0: (sign(0), 1.0), 1: (sign(1), 59.0)}, now) is None
    told = silence.verdict({0: (sign(0, 3), 1.0), 1: (sign(1, 3), 61.0)}, 7210)
    assert told == "no sign of life for 61 s of rank 1 on node 10.0.0.1 (pid 101) after step 3"


def test_a_group_that_lives_and_takes_no_step_is_given_up() -> None:
    def heard(first: int, second: int) -> dict[int, tuple[Sign, float]]:
        return {0: (sign(0, first), 1.0), 1: (sign(1, second), 1.0)}

    silence, longest = Silence(60), 100
    assert silence.verdict(heard(1, 1), 0) is None
    assert silence.verdict(heard(2, 1), 10_000) is None  # one step is no measure yet
    assert silence.verdict(heard(2, 2), 10_000 + longest) is None
    began = 10_000 + longest
    silence.longest = longest
    assert silence.verdict(heard(3, 2), began + STILL_TIMES * longest) is None
    assert "no step has ended for 1001 s, after step 2" in str(silence.verdict(heard(3, 2), began + STILL_TIMES * longest + 1))


def test_a_group_that_went_back_takes_steps_again() -> None:
    """It needs longer from the checkpoint of step 10 to step 100 than a group may stand still."""
    silence, allowed = Silence(60), 60 * STILL_TIMES
    for step in range(100):
        assert silence.verdict({0: (sign(0, step), 1.0)}, float(step)) is None
    for step in range(11, 100):
        assert silence.verdict({0: (sign(0, step), 1.0)}, 100 + 20.0 * (step - 10)) is None
    assert silence.verdict({0: (sign(0, 99), 1.0)}, 100 + 20.0 * 89 + allowed + 1) is not None


def test_the_end_of_a_worker_is_told_by_what_it_left() -> None:
    assert _how_it_ended("Fatal Python error: Segmentation fault\n\nThread 0x1:\n", None) == "crashed (Segmentation fault)"
    assert _how_it_ended("", None).startswith("was killed (SIGKILL")
    assert "low on memory" in _how_it_ended("", RuntimeError("Memory on the node was low on memory"))
    assert "node" in _how_it_ended(None, None)


def test_the_step_of_a_loss_is_that_of_the_newest_row_where_no_sign_has_come_since(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many short steps may pass between two signs of life: the driver has their rows already."""
    attempt = object.__new__(Attempt)
    attempt.newest_row, attempt.board = 0, MagicMock()
    heard = {0: (sign(0, 20), 1.0), 1: (sign(1), 1.0)}
    monkeypatch.setattr("ray.get", lambda read: ([{"step": 19}, {"step": 20}], heard))
    attempt._read(lambda row: None, False)
    assert attempt.step == 20
    heard.update({0: (sign(0, 24), 2.0), 1: (sign(1, 23), 2.0)})
    attempt._read(lambda row: None, False)
    assert attempt.step == 23


class Cluster:
    """Numbers of CPUs that Ray tells, one after the other, and groups that end as they are told, in place of Ray Train's."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cpus: list[int], ends: list[Any]) -> None:
        self.cpus, self.ends, self.workers = cpus, ends, []
        monkeypatch.setattr("training.launch.total", lambda kind, machines: self.next() if kind == "CPU" else 0.0)
        monkeypatch.setattr("training.launch.may_come", lambda kind, machines: 0.0)
        monkeypatch.setattr("training.launch.missing", lambda machines: None)
        monkeypatch.setattr("ray.nodes", lambda: [])
        monkeypatch.setattr("training.launch.Attempt", self.attempt)

    def next(self) -> float:
        return self.cpus.pop(0) if len(self.cpus) > 1 else self.cpus[0]

    def attempt(self, job: Any, workers: int, gpus: bool) -> Any:
        self.workers.append(workers)
        cluster = self

        class Group:
            step, termed = 0, [sign(1, termed=True)]

            def run(self, on_row: Any, stop: Any) -> Outcome:
                self.step, end = cluster.ends.pop(0)
                if isinstance(end, Exception):
                    raise end
                return Outcome(self.step, end)

        return Group()


def job(**changes: Any) -> Any:
    from training.job import TrainJob

    return lambda: TrainJob(config(**changes), (), "", KeepIn(""))


def test_a_group_goes_on_with_the_greatest_number_that_fits_and_shares_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = [(5, Lost("a", frozenset())), (9, True), (12, False)]
    cluster = Cluster(monkeypatch, [9, 7, 3], ends)
    outcome = train(job(workers={"min": 1, "max": 8}))
    assert (cluster.workers, outcome) == ([8, 4, 2], Outcome(12, False))


def test_a_run_that_loses_workers_gives_up_where_it_comes_no_further(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    further = [(step, Lost("gone")) for step in range(1, 3 * GIVE_UP)]
    Cluster(monkeypatch, [1], [*further, *[(0, Lost("rank 0 is gone"))] * GIVE_UP])
    with pytest.raises(
        TrainingError, match=rf"^rank 0 is gone; lost {GIVE_UP} times by step {3 * GIVE_UP - 1}, so the run ends$"
    ):
        train(job())


def test_a_failure_of_its_own_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(monkeypatch, [1], [(3, TrainingError("step 3: loss is nan"))])
    with pytest.raises(TrainingError, match="loss is nan"):
        train(job())
    assert cluster.workers == [1]


def test_a_stop_is_kept_to_while_there_is_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    stop = threading.Event()
    cluster = Cluster(monkeypatch, [2, 0], [(3, Lost("gone"))])
    monkeypatch.setattr(threading.Event, "wait", lambda event, timeout: event.set() or True)
    assert train(job(workers=2), stop=stop) == Outcome(3, True)
    assert cluster.workers == [2]


def test_more_workers_are_taken_when_there_has_been_room_for_them_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    Cluster(monkeypatch, [2], [])
    room = _Room(config(workers={"min": 1, "max": 4}))
    growth, now = _Growth(room, 2), [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    growth.looked = 0.0
    for free, wanted in ((2, False), (1, False), (2, False), (2, True), (0, True)):
        now[0] += 31
        monkeypatch.setattr("ray.available_resources", lambda free=free: {"CPU": free})
        assert growth.wanted() is wanted


@pytest.mark.trainer
def test_workers_and_nodes_that_are_lost_on_a_cluster(tmp_path: Path) -> None:
    """Killed, termed and stopped workers, and a node that is removed: all by the benchmark, which is a driver of its own."""
    command = [sys.executable, "-m", "benchmarks.deadnode", "--silent-after", "15", "--json", str(tmp_path / "found.json")]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=550)
    assert said.returncode == 0, said.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    figures, told = found["figures"], {name: line for name, (line,) in found["details"]["told"].items()}
    who = r"rank [01] on node \S+ \(pid \d+\)"
    assert re.match(rf"{who} was killed \(SIGKILL, .*\), after step \d+; going on .* with 2 workers$", told["killed"])
    assert re.match(rf"SIGTERM of {who} at step \d+; going on .* with 2 workers$", told["termed"])
    assert re.match(rf"no sign of life for 1\d s of {who} after step \d+; going on .* with 2 workers$", told["stopped"])
    assert re.match(rf"{who} is gone with its node, which does not answer, after step \d+; .* with 1 workers$", told["node"])
    assert all(figures[f"{way}_extra_s"] < 30 for way in ("killed", "termed", "node")) and figures["stopped_detect_s"] < 30
    assert figures["steps_compared"] >= 40 and figures["loss_difference"] < 1e-5
    # The stopped one is read from outside, the other answers.
    stacks = said.stderr[said.stderr.index("the stacks of all ranks follow") :]
    assert stacks.count("training/loop.py") >= 1 and stacks.count("in run") + stacks.count("run (training/loop.py") >= 2
