"""Two commands at one node of one object store, each with a cluster of its own."""

from __future__ import annotations

import threading
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pytest

from infra import lease
from infra.dataset import find, verify
from infra.store import Store
from stages.runner.contract import scratch_output
from stages.runner.garbage import LOST, collect, find_garbage
from stages.runner.run import make_job, run_stage
from stages.runner.worker import PoolWorker
from tests.stages.toy import Square, Squares, planned

UNITS = 12


@pytest.fixture
def together(bucket, monkeypatch):
    """Runs the toy stage by two drivers at once; gives both datasets, and the names of the units that were at work."""
    done, meet = [], threading.Barrier(2, timeout=60)

    def pool(job, phase, pending, units, told):
        worker = PoolWorker(job, phase)
        meet.wait()
        for unit, key in pending:
            told(unit, worker.run(unit, key))

    run = Square.run
    monkeypatch.setattr(Square, "run", lambda self, unit, out: (done.append(unit.name), run(self, unit, out)))
    monkeypatch.setattr("stages.runner.pool.run_pool", pool)
    monkeypatch.setattr(lease, "LOOKS", (0.02, 0.1))
    found = []

    def drive():
        found.append(run_stage(planned(Squares, numbers=list(range(UNITS))), Store(bucket), Squares))

    threads = [threading.Thread(target=drive) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found, done


def test_two_drivers_do_every_unit_once_and_put_one_manifest(together, bucket):
    (one, two), done = together
    assert sorted(done) == sorted(set(done)) and len(done) == UNITS
    assert one.manifest == two.manifest and verify(one) == []
    assert find(Store(bucket), one.manifest.stage, one.manifest.fingerprint).manifest == one.manifest


def test_gc_collects_what_attempts_left_that_another_one_outran(together, bucket, monkeypatch):
    store, ((dataset, _), _) = Store(bucket), together
    node = planned(Squares, numbers=list(range(UNITS)))
    job, key = make_job(node, store), dataset.files[0].unit
    with scratch_output(store) as out:
        out.path("square.txt", 1).write_text("a loser's")
        assert out.publish(job, key, "late", 0.0) == job.unit_done(key)
    with store.claimed("left"):
        (left,) = (path for path, *_ in store.walk(lease.FOLDER))
        told = store.read(left)
    store.write(left, told)
    monkeypatch.setattr("stages.runner.garbage.STAGES", {"squares": ""})
    monkeypatch.setattr("stages.runner.garbage.stage_class", lambda name: Squares)
    monkeypatch.setattr("stages.runner.garbage.plan", lambda recipe, store: {"toy-squares": node})
    recipe, files = SimpleNamespace(name="toys"), sorted(path for path, *_ in store.walk("squares"))
    assert find_garbage([recipe], store).leftovers == [], "a run may still be at it"
    garbage = find_garbage([recipe], store, datetime.now(UTC) + timedelta(hours=25))
    (lost,) = garbage.leftovers
    assert (lost.stage, lost.what, lost.units, lost.bytes) == ("squares", LOST, 1, len("a loser's"))
    collect(garbage, store)
    assert len(files) - len(sorted(path for path, *_ in store.walk("squares"))) == 1 and verify(dataset) == []
    assert store.list(lease.FOLDER) == [left.rsplit("/", 1)[-1]], "it may be held"
    monkeypatch.setattr("stages.runner.garbage.GRACE", timedelta(0))
    collect(garbage, store)
    assert store.list(lease.FOLDER) == []
