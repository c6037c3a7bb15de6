"""A node that waits: for its turn in its run, and for GPU slots."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prefect.states import Completed, Failed, Pending

from infra.store import Store
from pipelines.flows import slots, turns
from pipelines.flows.deployed import Unwatched
from pipelines.flows.jobs import NodeStopped
from pipelines.flows.run import Outcome, Run, plan_run
from pipelines.servers.servers import Servers
from stages.catalog import STAGES, stage_class
from stages.runner.cluster import Cluster
from stages.runner.recipe import load_recipe
from tests.pipelines.conftest import Kept, ask, write_recipe

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


@pytest.mark.parametrize(("taken", "said"), [(2, []), (3, [2])])
def test_a_node_says_that_it_waits_where_too_few_slots_are_free_and_gives_its_own_back(
    monkeypatch: pytest.MonkeyPatch, taken: int, said: list[int]
) -> None:
    limit = SimpleNamespace(limit=4, active_slots=taken, active=True)
    client = SimpleNamespace(read_global_concurrency_limit_by_name=lambda name: limit)
    asked: list[dict[str, Any]] = []

    class Held:
        """Not a generator, which would give them back when nobody holds it any more."""

        def __init__(self, name: str, wanted: int, **how: Any):
            asked.append(how)
            self.wanted = wanted

        def __enter__(self) -> None:
            limit.active_slots += self.wanted

        def __exit__(self, *_: object) -> None:
            limit.active_slots -= self.wanted

    monkeypatch.setattr(slots, "get_client", contextmanager(lambda sync_client: iter([client])))
    monkeypatch.setattr(slots, "concurrency", Held)
    node: Any = SimpleNamespace(stage="train", config=SimpleNamespace(workers=2))
    waited: list[int] = []
    with pytest.raises(RuntimeError, match="the job failed"), slots.gpu_slots(node, threading.Event(), waited.append):
        assert limit.active_slots == taken + 2
        raise RuntimeError("the job failed")
    assert (waited, limit.active_slots) == (said, taken)
    # A server that is starting again costs no training run its work.
    assert asked[0]["raise_on_lease_renewal_failure"] is False and asked[0]["lease_duration"] == slots.LEASE


def test_the_nodes_that_wait_for_gpus_are_those_whose_workers_take_some(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 8.0, "GPU": 3.0})
    client = SimpleNamespace(
        read_global_concurrency_limit_by_name=lambda name: SimpleNamespace(limit=3, active_slots=0, active=True)
    )
    monkeypatch.setattr(slots, "get_client", contextmanager(lambda sync_client: iter([client])))
    held: list[int] = []
    monkeypatch.setattr(slots, "concurrency", lambda name, wanted, **_: nullcontext(held.append(wanted)))
    waited, taken, cluster = {}, {}, Cluster({"one": {"CPU": 8.0, "GPU": 3.0}}, {})
    for name in STAGES:
        stage = stage_class(name)
        # Of the fields that must be given, none decides about workers.
        config = stage.Config.model_construct()
        node: Any = SimpleNamespace(stage=name, config=config)
        with slots.gpu_slots(node, threading.Event(), lambda _: pytest.fail("slots are free")):
            waited[name] = held.pop() if held else 0
        # A phase of independent units, of which there are many; or a gang, each of whose workers takes a GPU.
        asked = [phase.resources(config) for phase in stage.phases if not phase.gang]
        pools = [min(cluster.fits(each), each.workers or 3) for each in asked if each.gpus]
        taken[name] = max([*pools, *(config.workers for phase in stage.phases if phase.gang)], default=0)
    assert waited == taken == {
        "select": 0, "download": 0, "folder": 0, "filter": 3, "text-codec": 1, "encode": 3,
        "train": 1, "evaluate": 3, "export": 0, "world": 1,
    }  # fmt: skip


def a_run(tmp_path: Path) -> Run:
    recipe, store = load_recipe(write_recipe(tmp_path)), Store(str(tmp_path / "store"))
    return Run(recipe, store, plan_run(recipe, store), list(recipe.nodes), Servers(tmp_path), Unwatched())


class Task:
    """As much of a task that was submitted as is asked of it."""

    def __init__(self, state: Any, seconds: float = 0.0):
        self.state, self.seconds = state, seconds

    def wait(self) -> None:
        time.sleep(self.seconds)


@pytest.fixture(autouse=True)
def logged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "get_run_logger", lambda: logging.getLogger("test"))


def test_no_gpu_slots_are_held_by_a_node_that_waits_for_its_turn_and_it_has_no_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = a_run(tmp_path)
    run.nodes = [NODE]

    def gpu_slots(*_: Any) -> Any:
        raise AssertionError("slots were taken before the turn came")

    monkeypatch.setattr(turns, "gpu_slots", gpu_slots)
    assert run.turn.acquire(blocking=False)
    threading.Timer(0.3, run.stopping.set).start()
    assert turns.tasks_in_turn(run, lambda node, inputs: pytest.fail("it was submitted before its turn")) == {NODE: None}
    assert run.outcomes == {NODE: Outcome(NODE, "stopped")}


def test_a_task_begins_when_the_node_before_it_and_the_one_whose_turn_it_is_have_ended(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    working: list[str] = []
    seen: dict[str, Any] = {}

    class Working(Task):
        def wait(self) -> None:
            super().wait()
            working.clear()

    def submit(node: str, inputs: dict[str, Any]) -> Any:
        assert not working, f"{node} has a task while {working} works"
        working.append(node)
        seen[node] = inputs
        return Working(Completed(), 0.05)

    tasks = turns.tasks_in_turn(run, submit)
    assert set(tasks) == set(run.nodes) == {NODE, "bad-select", "bad-download"}
    assert seen["bad-download"] == {"rows": tasks["bad-select"]}


def test_what_follows_a_failure_is_submitted_at_once_to_say_so_and_holds_no_turn(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    run.nodes = ["bad-select", "bad-download"]

    def submit(node: str, inputs: dict[str, Any]) -> Any:
        if node == "bad-download":
            assert run.turn.acquire(blocking=False), "it holds the turn"
        return Task(Failed() if node == "bad-select" else Pending())

    assert turns.tasks_in_turn(run, submit)["bad-download"].state.is_pending()  # type: ignore[union-attr]


def test_a_server_that_cannot_be_asked_for_slots_fails_the_node_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = a_run(tmp_path)

    def gpu_slots(planned: Any, *_: Any) -> Any:
        if planned.name == "bad-select":
            raise ConnectionError("nobody there")
        return nullcontext()

    monkeypatch.setattr(turns, "gpu_slots", gpu_slots)
    tasks = turns.tasks_in_turn(run, lambda node, inputs: Task(Completed()))
    assert tasks[NODE] is not None and tasks["bad-select"] is tasks["bad-download"] is None
    assert run.outcomes["bad-select"].message == "it could not begin: ConnectionError: nobody there"


def test_in_prefect_the_tasks_of_a_run_of_one_job_at_a_time_lie_one_after_the_other(kept: Kept) -> None:
    tasks = ask(kept.store, "POST", "task_runs/filter", {"task_runs": {"name": {"any_": [NODE, "bad-select"]}}})
    (_, ended), (began, _) = sorted((task["start_time"], task["end_time"]) for task in tasks if task["end_time"])[:2]
    assert ended <= began
