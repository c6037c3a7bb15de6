"""The pool on a cluster that is made up, second by second: nodes come and go, units hang, contact is lost and comes back."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError

from infra.store import Store
from stages.runner import pool
from stages.runner.attempts import ATTEMPTS, KNOWN_FROM, LEAST_LIMIT
from stages.runner.cluster import Cluster
from stages.runner.contract import Job, NodeConfig, Phase, Resources, StageError, Unit
from stages.runner.worker import PoolWorker


def died(why: str) -> ActorDiedError:
    error = ActorDiedError()
    error.error_msg = why
    return error


@dataclass(eq=False)
class Call:
    actor: Actor
    asked: str
    since: float
    given: tuple[Any, ...]

    @property
    def error(self) -> Exception | None:
        return next((error for until, error in self.actor.errors if self.since < until), None)


@dataclass(eq=False)
class Actor:
    """As much of an actor handle as the pool uses. A call that was made until some time ends with the error of that time."""

    world: World
    cpus: float
    node: str | None = None
    gone: float | None = None
    errors: list[tuple[float, Exception]] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)

    def __getattr__(self, name: str) -> Any:
        def remote(*given: Any) -> Call:
            self.calls.append(Call(self, name, self.world.now, given))
            return self.calls[-1]

        return SimpleNamespace(remote=remote)

    def runs(self) -> list[Call]:
        return [call for call in self.calls if call.asked == "run"]


@dataclass
class World:
    """Ray, the clock and the nodes. `each_second` changes them; `seconds` is what a unit takes, `start` what an actor does."""

    nodes: dict[str, dict[str, float]] = field(default_factory=dict)
    seconds: Callable[[str], float] = lambda name: 10.0
    each_second: Callable[[World], None] = lambda world: None
    start: float = 0.0
    now: float = 0.0
    actors: list[Actor] = field(default_factory=list)

    def put(self, value: Any) -> Any:
        return value

    def remote(self, _: Any) -> Any:
        return SimpleNamespace(options=lambda num_cpus, **_: SimpleNamespace(remote=lambda *_: self.asked(num_cpus)))

    def asked(self, cpus: float) -> Actor:
        self.actors.append(Actor(self, cpus))
        return self.actors[-1]

    def kill(self, actor: Actor) -> None:
        actor.gone = self.now

    def free(self, node: str) -> float:
        return self.nodes[node]["CPU"] - sum(actor.cpus for actor in self.actors if actor.node == node and actor.gone is None)

    def pending(self) -> list[Actor]:
        return [actor for actor in self.actors if actor.node is None and actor.gone is None]

    def lose(self, node: str) -> None:
        del self.nodes[node]
        for actor in self.actors:
            if actor.node == node:
                actor.errors.append((math.inf, died(f"The actor died because {pool.NODE_DIED}.")))

    def sleep(self, _: float) -> None:
        self.now += 1
        assert self.now < 20_000, "it hangs"
        self.each_second(self)
        for actor in self.pending():
            actor.node = next((node for node in self.nodes if self.free(node) >= actor.cpus), None)

    def wait(self, calls: list[Call], num_returns: int, timeout: float) -> tuple[list[Call], list[Call]]:
        ready = [call for call in calls if self.over(call)][:1]
        if not ready:
            self.sleep(timeout)
        return ready, []

    def over(self, call: Call) -> bool:
        if call.actor.node is None or call.error is not None:
            return call.error is not None and self.now > call.since
        if call.asked == "room":
            numbers = {run.given[2] for run in call.actor.runs() if run.error is None and run.since < self.now}
            return numbers.issuperset(call.given[0])
        return self.now >= call.since + (self.seconds(call.given[0].name) if call.asked == "run" else self.start)

    def get(self, call: Call) -> Any:
        if call.error is not None:
            raise call.error
        return call.actor.node if call.asked == "where" else SimpleNamespace(seconds=self.now - call.since)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, store: Store) -> Callable[..., list[str]]:
    def run(world: World, units: int, at_once: int = 1, **resources: float) -> list[str]:
        monkeypatch.setattr(pool, "ray", world)
        monkeypatch.setattr(pool, "time", SimpleNamespace(monotonic=lambda: world.now, sleep=world.sleep))
        monkeypatch.setattr(Cluster, "seen", classmethod(lambda cls: cls(dict(world.nodes), {})))
        phase = Phase("score", resources=lambda _: Resources(**resources), at_once=at_once)  # type: ignore[arg-type]
        pending = [(Unit(f"n{number}", (), rows=7), f"key-{number}") for number in range(units)]
        done: list[str] = []
        pool.run_pool(
            Job(store, "toy", "toy", NodeConfig(), {}, {}, {}), phase, pending, units, lambda unit, _: done.append(unit.name)
        )
        assert all(actor.gone is not None for actor in world.actors)
        return sorted(done, key=lambda name: int(name[1:]))

    return run


def names(count: int) -> list[str]:
    return [f"n{number}" for number in range(count)]


def test_a_cluster_that_grows_by_itself_grows_from_nothing_to_all_that_it_may_have(run):
    def autoscaler(world: World) -> None:
        if world.now % 20 == 0:
            for _ in world.pending()[: 8 - len(world.nodes)]:
                world.nodes[f"node-{len(world.nodes)}"] = {"CPU": 1.0}
                came.append(world.now)

    came: list[float] = []
    assert run(World(each_second=autoscaler), 200) == names(200)
    assert came == [20, 40, 60, 60, 80, 80, 80, 80], "it is asked for twice as much each time"


def test_of_two_nodes_one_is_lost_and_the_other_does_the_rest_with_the_worker_it_has(run, caplog):
    world = World({"a": {"CPU": 1.0}, "b": {"CPU": 1.0}}, lambda name: 300.0 if name == "n0" else 10.0)
    world.each_second = lambda world: world.lose("a") if world.now == 100 else None
    assert run(world, 8) == names(8)
    lost, other = (actor for actor in world.actors if actor.node is not None)
    assert [[call.given[0].name for call in actor.runs()] for actor in (lost, other)] == [["n0"], [*names(8)[1:], "n0"]]
    assert f"toy: score n0 is tried again in 2 s: The actor died because {pool.NODE_DIED}." in caplog.messages


def test_a_worker_without_a_unit_gives_its_place_back(run):
    world = World({"a": {"CPU": 2.0}}, lambda name: 500.0 if name == "n1" else 10.0)
    run(world, 2)
    idle, busy = sorted(actor.gone or 0 for actor in world.actors if actor.node)
    assert 10 + pool.IDLE <= idle <= 10 + pool.IDLE + 20 and busy > 500


@pytest.mark.parametrize(("comes", "lines"), [(55, 0), (70, 1), (600, 1), (700, 2)])
def test_a_worker_that_gets_no_place_says_why_once_a_minute_has_passed_and_seldom_again(run, caplog, comes, lines):
    def late(world: World) -> None:
        if world.now == comes:
            world.nodes["a"] = {"CPU": 2.0}

    assert run(World(each_second=late), 2, cpus=4.0) == names(2)
    assert caplog.messages == [
        *["toy: score waits for 1 more workers: a worker takes 4 CPUs, and no node of the cluster takes work; add one"] * lines,
        "toy: score asks for 4 CPUs a worker, and no node has more than 2 CPUs, which it takes",
    ]


def test_a_unit_that_hangs_is_ended_tried_again_and_set_aside_and_the_error_names_it_and_its_rows(run):
    world = World({"a": {"CPU": 2.0}}, lambda name: math.inf if name == "n3" else 10.0)
    with pytest.raises(StageError) as raised:
        run(world, KNOWN_FROM + 4)
    assert str(raised.value) == (
        "toy: score n3 (7 rows) failed 3 times and is set aside: it took longer than 600 s, far more than the others; "
        "what is done is kept"
    )
    assert ATTEMPTS * LEAST_LIMIT < world.now < ATTEMPTS * LEAST_LIMIT + 200


GONE = ActorUnavailableError("the network is cut", None)


def cut(actor: Actor) -> None:
    """What it was asked until now ends without an answer; it works on."""
    actor.errors.append((actor.world.now, GONE))


@pytest.mark.parametrize("at_once", [1, 3])
def test_a_worker_that_cannot_be_reached_for_a_while_goes_on_and_no_unit_is_blamed(run, at_once):
    """That of several units one is lost does not keep the worker from having as many again."""
    world = World({"a": {"CPU": 1.0}})
    world.each_second = lambda world: cut(world.actors[0]) if world.now in (15, 45, 75) else None
    assert run(world, 30, at_once) == names(30)
    (actor,) = (actor for actor in world.actors if actor.node)
    assert len(actor.errors) == 3 and len(actor.runs()) <= 30 + 3 * at_once
    assert world.now < 400 / at_once + 100


def test_a_worker_that_is_never_reached_again_is_replaced(run, caplog):
    world = World({"a": {"CPU": 1.0}})
    world.each_second = lambda world: world.actors[0].errors.append((math.inf, GONE)) if world.now == 15 else None
    assert run(world, 4) == names(4)
    lost, _ = (actor for actor in world.actors if actor.node)
    assert 15 + pool.DOUBT <= (lost.gone or 0) < 15 + pool.DOUBT + 5
    assert len([line for line in caplog.messages if "is tried again" in line]) == 1


@pytest.mark.parametrize("at_once", [1, 3])
def test_a_unit_that_kills_its_worker_is_found_out_though_contact_is_lost_before_the_death_is_known(run, at_once):
    def kill(world: World) -> None:
        for actor in world.actors:
            if not actor.errors and any(call.given[0].name == "n4" and world.now > call.since for call in actor.runs()):
                cut(actor)
                actor.errors.append((math.inf, died("Worker exits by signal 9.")))

    world = World({"a": {"CPU": 1.0}}, each_second=kill)
    with pytest.raises(StageError) as raised:
        run(world, 12, at_once)
    assert str(raised.value) == (
        "toy: score n4 (7 rows) failed 3 times and is set aside: its worker died: Worker exits by signal 9.; what is done is kept"
    )
    tries = [call.given[0].name for actor in world.actors for call in actor.runs()]
    assert set(tries) == set(names(12)) and tries.count("n4") == ATTEMPTS + (at_once > 1)


def test_workers_that_die_with_their_nodes_while_they_start_do_not_count(run):
    def short_lived(world: World) -> None:
        if world.now % 10 == 1:
            world.nodes[f"node-{world.now}"] = {"CPU": 4.0}
        if world.now % 10 == 5 and world.now < 50:
            world.lose(f"node-{world.now - 4}")

    world = World(each_second=short_lived, start=8.0)
    assert run(world, 5) == names(5)
    assert sum(actor.errors != [] for actor in world.actors) > ATTEMPTS


def test_there_is_room_when_all_that_it_is_asked_for_have_left_some(store):
    worker = PoolWorker(Job(store, "toy", "toy", NodeConfig(), {}, {}, {}), Phase("score", at_once=3))
    waits = threading.Thread(target=worker.room, args=([2, 4],), daemon=True)
    waits.start()
    for number in (1, 2, 3):
        worker._leaves_room(number)
    waits.join(0.1)
    assert waits.is_alive()
    worker._leaves_room(4)
    waits.join(60)
    assert not waits.is_alive()
