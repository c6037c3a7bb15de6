"""On a local Ray: two workers, progress, one that is killed, a request to stop, and a failure told in one line."""

from __future__ import annotations

import re
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import ray
import torch
from ray.exceptions import RayTaskError
from ray.train import ControllerError
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback
from ray.train.v2._internal.execution.worker_group.poll import WorkerGroupPollStatus, WorkerStatus

from infra.code import code_digest
from infra.store import StoreError
from tests.infra.listening import beyond_loopback, family
from tests.training.synthetic import KeepIn, config, losses, write_shards
from training.gang import group
from training.gang.attempt import Attempt, Lost, _work, failure_of
from training.history import Row
from training.job import TrainingBug, TrainingError, TrainJob
from training.launch import train
from training.loop import run


def test_a_run_whose_worker_is_killed_goes_on_and_stops_when_it_is_asked_to(
    ray_cluster: None, alone: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Rank 0 dies in the middle of its share of step 10; the next group takes the same steps as a run that nobody kills."""
    shards, kept = write_shards(tmp_path / "shards"), str(tmp_path / "kept")
    settings = config(workers=2, steps=100_000, checkpoint_every=5, log_every=5)
    stop, rows, plans, doors = threading.Event(), [], [], []

    def plan() -> TrainJob:
        keeper = KeepIn(kept, None if plans else (10, 0, 1000))
        newest = max(keeper.steps(), default=None)
        plans.append(newest)
        resume = keeper.fetch(newest, "") if newest is not None else None
        return TrainJob(settings, shards, str(tmp_path / f"work-{len(plans)}"), keeper, resume)

    def on_row(row: Row) -> None:
        rows.append(row)
        if row["step"] >= 10 and len(plans) > 1 and not stop.is_set():
            doors.append(beyond_loopback(family(psutil.Process())))
            stop.set()

    outcome = train(plan, on_row, stop)
    assert plans == [None, 5]
    # The driver, Ray's own parts, two workers, where these meet, and where each waits for the other.
    ((open_to_others, count),) = doors
    assert open_to_others == [] and count > 8
    assert outcome.stopped and 10 <= outcome.step < 50_000 and outcome.step in KeepIn(kept).steps()
    steps = [row["step"] for row in rows if row["kind"] == "train" and row["step"] > 5]
    assert rows[0]["kind"] == "validation" and rows[0]["step"] == 0 and steps == list(range(10, outcome.step + 1, 5))
    whole = config(steps=12, checkpoint_every=10, log_every=5)
    run(TrainJob(whole, shards, str(tmp_path / "work"), KeepIn(str(tmp_path / "whole"))), torch.device("cpu"))
    assert losses(tmp_path / "kept/10") == pytest.approx(losses(tmp_path / "whole/10"), abs=1e-5)
    messages = [record.getMessage() for record in caplog.records]
    (at,) = [number for number, said in enumerate(messages) if said.endswith("the stacks of the ranks that answer follow")]
    assert messages[at + 1].startswith("rank 1 on node ") and "training/loop.py" in messages[at + 1]
    (told,) = [said for said in messages if "going on" in said]
    host = ray.util.get_node_ip_address()
    assert re.fullmatch(
        rf"rank 0 on node {re.escape(host)} \(pid \d+\) was killed \(SIGKILL, .*\)(, after step \d+)?; "
        "going on from the newest checkpoint with 2 workers",
        told,
    )


def test_a_damaged_file_is_a_reason() -> None:
    told = Exception("a traceback of many lines")
    told._base_exc = StoreError("step.safetensors: damaged; delete it")  # type: ignore[attr-defined]
    failed = Exception("workers failed")
    failed.worker_failures = {0: told}  # type: ignore[attr-defined]
    assert str(failure_of(failed.worker_failures)) == "step.safetensors: damaged; delete it"


def test_a_worker_whose_memory_is_not_enough_names_micro_batch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*_: object) -> None:
        raise MemoryError

    monkeypatch.setitem(sys.modules, "training.loop", SimpleNamespace(run=full))
    monkeypatch.setattr("ray.train.torch.get_device", lambda: SimpleNamespace(type="cuda"))
    monkeypatch.setattr("ray.train.get_context", lambda: SimpleNamespace(get_world_rank=lambda: 0))
    job = TrainJob(config(global_batch=8, micro_batch=4), (), str(tmp_path), KeepIn(str(tmp_path)))
    with pytest.raises(TrainingError, match=r"^memory is not enough; lower micro_batch \(now 4\) or the model$"):
        _work({"job": job, "board": None, "code": code_digest()})


def test_a_bug_is_a_line_that_is_caused_by_the_workers_traceback() -> None:
    told = Exception("a traceback of many lines")
    told._base_exc = KeyError("step")  # type: ignore[attr-defined]
    failed = Exception("workers failed")
    failed.worker_failures = {0: told}  # type: ignore[attr-defined]
    error = failure_of(failed.worker_failures)
    assert (type(error), str(error), error.__cause__) == (TrainingBug, "KeyError: 'step'", told)


@pytest.mark.parametrize("raised", [ValueError("patches of 2\n  do not divide 1x1"), OSError(5, "Input/output error")])
def test_what_a_worker_raises_is_a_bug_and_no_worker_that_was_killed(raised: Exception) -> None:
    """As Ray Train hands it on, beside one that another's end took along."""
    told = UserExceptionWithTraceback(raised, "a traceback of many lines")
    statuses = {0: WorkerStatus(running=False, error=told), 1: WorkerStatus(running=True)}
    attempt = Attempt.__new__(Attempt)
    attempt.verdict, attempt.heard = None, {}
    error = attempt._failure(WorkerGroupPollStatus(statuses).get_worker_group_error(), {})
    assert (type(error), str(error)) == (TrainingBug, " ".join(str(raised).split()))


def test_workers_that_cannot_meet_are_a_loss_told_in_a_line() -> None:
    met_nobody = Lost("rank 1 on 10.0.0.2 could not meet the others, of which rank 0 is on 10.0.0.1: refused")
    failure = ControllerError(RayTaskError("execute", "a traceback of many lines", met_nobody))
    error = failure_of({0: failure})
    assert type(error) is Lost and str(error) == str(met_nobody) and error.__cause__ is failure


def test_a_group_meets_where_ray_knows_its_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    """gloo would ask what the machine's name stands for, which on Debian is 127.0.1.1."""
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    cards = {"lo": "127.0.0.1", "eth0": "10.0.0.7", "ib0": "fd00::7"}
    monkeypatch.setattr(group, "net_if_addrs", lambda: {name: [SimpleNamespace(address=a)] for name, a in cards.items()})
    assert group.interfaces("10.0.0.7") == {"GLOO_SOCKET_IFNAME": "eth0"}
    assert group.interfaces("fd00::7") == {"GLOO_SOCKET_IFNAME": "ib0"}
    assert group.interfaces("192.0.2.1") == {}  # an address that is not on a card, as behind a NAT
    # Listeners of a Ray on loopback are there too, whatever has been set.
    assert group.interfaces("127.0.0.2") == {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth1")
    assert group.interfaces("10.0.0.7") == {}


def test_the_reason_of_a_failure_and_a_cluster_that_is_too_small(ray_cluster: None, tmp_path: Path) -> None:
    missing = str(tmp_path / "gone.parquet")
    job = TrainJob(config(), (missing,), str(tmp_path / "work"), KeepIn(str(tmp_path)))
    with pytest.raises(TrainingError, match="gone.parquet: cannot be read"):
        train(lambda: job)
    with pytest.raises(TrainingError, match="workers is 4, but the Ray cluster has 2 CPUs"):
        train(lambda: replace(job, config=config(workers=4)))


def test_a_cluster_of_nothing_is_told_with_its_size(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    job = TrainJob(config(), (), str(tmp_path), KeepIn(str(tmp_path)))
    for resources, words in (({}, "has 0 CPUs"), ({"GPU": 0.0}, "has 0 CPUs"), ({"GPU": 1.0, "CPU": 9.0}, "has 1 GPUs")):
        monkeypatch.setattr("ray.cluster_resources", lambda resources=resources: resources)
        with pytest.raises(TrainingError, match=words):
            train(lambda: replace(job, config=config(workers=2, global_batch=8)))
