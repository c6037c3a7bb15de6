"""A node that waits: for its turn in its run, and for GPU slots."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from infra.store import Store
from pipelines.flows import flow, slots
from pipelines.flows.deployed import Unwatched
from pipelines.flows.jobs import NodeStopped
from pipelines.flows.run import Outcome, Run, plan_run
from pipelines.servers.servers import Servers
from stages.runner.recipe import load_recipe
from tests.pipelines.conftest import write_recipe

NODE = "good-select"


def test_a_limit_of_none_at_all_makes_a_node_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = [SimpleNamespace(limit=limit, active_slots=0, active=True) for limit in (0, 0, 2)]
    asked, waited = [], []
    client = SimpleNamespace(read_global_concurrency_limit_by_name=lambda name: limits.pop(0) if len(limits) > 1 else limits[0])

    @contextmanager
    def concurrency(name: str, wanted: int, **_: Any) -> Iterator[None]:
        asked.append(wanted)
        yield

    monkeypatch.setattr(slots, "get_client", contextmanager(lambda sync_client: iter([client])))
    monkeypatch.setattr(slots, "concurrency", concurrency)
    monkeypatch.setattr(slots, "GLANCE", 0.01)
    node: Any = SimpleNamespace(stage="train", config=SimpleNamespace(workers=4))
    stopping = threading.Event()
    with slots.gpu_slots(node, stopping, waited.append):
        assert asked == [2] and waited == [1]
    limits[0] = SimpleNamespace(limit=0, active_slots=0, active=True)
    stopping.set()
    with pytest.raises(NodeStopped), slots.gpu_slots(node, stopping, waited.append):
        raise AssertionError("a node went on without a slot")
    limits[0] = SimpleNamespace(limit=0, active_slots=0, active=False)
    with slots.gpu_slots(node, threading.Event(), waited.append):
        assert asked == [2]


def test_no_gpu_slots_are_held_by_a_node_that_waits_for_its_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, store = load_recipe(write_recipe(tmp_path)), Store(str(tmp_path / "store"))
    run = Run(recipe, store, plan_run(recipe, store), [NODE], Servers(tmp_path), Unwatched())
    monkeypatch.setattr(flow, "get_run_logger", lambda: logging.getLogger("test"))

    def gpu_slots(*_: Any) -> Any:
        raise AssertionError("slots were taken before the turn came")

    monkeypatch.setattr(flow, "gpu_slots", gpu_slots)
    token = flow.RUN.set(run)
    assert run.turn.acquire(blocking=False)
    threading.Timer(0.3, run.stopping.set).start()
    try:
        assert flow.make_node.fn(NODE, {}).is_cancelled()
    finally:
        flow.RUN.reset(token)
    assert run.outcomes[NODE] == Outcome(NODE, "stopped", run.outcomes[NODE].seconds)
