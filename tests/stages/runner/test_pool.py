"""The pool on a cluster that is made up, second by second: nodes come and go, units hang, contact is lost and comes back."""

from __future__ import annotations

import math
import threading
from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from infra.store import Store
from stages.runner import pool
from stages.runner.attempts import ATTEMPTS, KNOWN_FROM, LEAST_LIMIT
from stages.runner.contract import Job, NodeConfig, Phase, Resources, StageError, Unit
from stages.runner.worker import PoolWorker
from tests.stages.paper_cluster import Actor, PaperCluster


class World(PaperCluster):
    """`each_second` changes it; `seconds` is what a unit takes, which leaves room for another a second after it has begun."""

    def __init__(
        self,
        nodes: dict[str, float] | None = None,
        seconds: Callable[[str], float] = lambda name: 10.0,
        each_second: Callable[[World], None] = lambda world: None,
        start: float = 0.0,
    ) -> None:
        super().__init__(self._begun, start=start)
        self.seconds, self.each_second = seconds, each_second
        self.hired: list[Actor] = []
        self.tries: dict[Actor, list[str]] = defaultdict(list)
        for node, cpus in (nodes or {}).items():
            self.add(node, cpus)
        self.every(1.0, self._second)

    def _second(self) -> None:
        assert self.time < 20_000, "it hangs"
        self.each_second(self)

    def hire(self, resources: Resources) -> Actor:
        self.hired.append(super().hire(resources))
        return self.hired[-1]

    def placed(self) -> list[Actor]:
        return [actor for actor in self.hired if actor.node]

    def _begun(self, actor: Actor, unit: Unit, _: str) -> tuple[float, float, Callable[[], Any]]:
        self.tries[actor].append(unit.name)
        begun, seconds = self.time, self.seconds(unit.name)
        return 1.0, seconds, lambda: SimpleNamespace(seconds=self.time - begun)


@pytest.fixture
def run(store: Store) -> Callable[..., list[str]]:
    def run(world: World, units: int, at_once: int = 1, least_limit: float = 0.0, **resources: float) -> list[str]:
        world.at_once = at_once
        asked = Resources(**resources)  # type: ignore[arg-type]
        phase = Phase("score", resources=lambda _: asked, at_once=at_once, least_limit=lambda _: least_limit)
        pending = [(Unit(f"n{number}", (), rows=7), f"key-{number}") for number in range(units)]
        done: list[str] = []
        job = Job(store, "toy", "toy", NodeConfig(), {}, {}, {})
        pool.run_pool(job, phase, pending, units, lambda unit, _: done.append(unit.name), world)
        assert not world.actors
        return sorted(done, key=lambda name: int(name[1:]))

    return run


def names(count: int) -> list[str]:
    return [f"n{number}" for number in range(count)]


def test_a_cluster_that_grows_by_itself_grows_from_nothing_to_all_that_it_may_have(run):
    def autoscaler(world: World) -> None:
        if world.time % 20 == 0:
            for _ in list(world.pending)[: 8 - len(world.nodes)]:
                world.add(f"node-{len(world.nodes)}", 1.0)
                came.append(world.time)

    came: list[float] = []
    assert run(World(each_second=autoscaler), 200) == names(200)
    assert came == [20, 40, 60, 60, 80, 80, 80, 80], "it is asked for twice as much each time"


def test_of_two_nodes_one_is_lost_and_the_other_does_the_rest_with_the_worker_it_has(run, caplog):
    world = World({"a": 1.0, "b": 1.0}, lambda name: 300.0 if name == "n0" else 10.0)
    world.at(100.0, lambda: world.lose("a"))
    assert run(world, 8) == names(8)
    lost, other = world.placed()
    assert [world.tries[actor] for actor in (lost, other)] == [["n0"], [*names(8)[1:], "n0"]]
    assert "toy: score n0 is tried again in 2 s: The actor died because its node has died." in caplog.messages


def test_a_worker_without_a_unit_gives_its_place_back(run):
    world = World({"a": 2.0}, lambda name: 500.0 if name == "n1" else 10.0)
    run(world, 2)
    idle, busy = sorted(actor.gone or 0 for actor in world.placed())
    assert 10 + pool.IDLE <= idle <= 10 + pool.IDLE + 20 and busy >= 500


@pytest.mark.parametrize(("comes", "lines"), [(55, 0), (70, 1), (600, 1), (700, 2)])
def test_a_worker_that_gets_no_place_says_why_once_a_minute_has_passed_and_seldom_again(run, caplog, comes, lines):
    world = World()
    world.at(comes, lambda: world.add("a", 2.0))
    assert run(world, 2, cpus=4.0) == names(2)
    assert caplog.messages == [
        *["toy: score waits for 1 more workers: a worker takes 4 CPUs, and no node of the cluster takes work; add one"] * lines,
        "toy: score asks for 4 CPUs a worker, and no node has more than 2 CPUs, which it takes",
    ]


def test_a_unit_that_hangs_is_ended_tried_again_and_set_aside_and_the_error_names_it_and_its_rows(run):
    world = World({"a": 2.0}, lambda name: math.inf if name == "n3" else 10.0)
    with pytest.raises(StageError) as raised:
        run(world, KNOWN_FROM + 4)
    assert str(raised.value) == (
        "toy: score n3 (7 rows) failed 3 times and is set aside: it took longer than 600 s, far more than the others; "
        "what is done is kept: mend it and run again"
    )
    assert ATTEMPTS * LEAST_LIMIT < world.time < ATTEMPTS * LEAST_LIMIT + 200


def test_a_unit_may_take_as_long_as_its_phase_says_however_fast_the_others_are(run, caplog):
    world = World({"a": 2.0}, lambda name: 5000.0 if name == "n3" else 10.0)
    assert run(world, KNOWN_FROM + 4, least_limit=6000.0) == names(KNOWN_FROM + 4) and not caplog.messages


@pytest.mark.parametrize("at_once", [1, 3])
def test_a_worker_that_cannot_be_reached_for_a_while_goes_on_and_no_unit_is_blamed(run, at_once):
    """That of several units one is lost does not keep the worker from having as many again."""
    world = World({"a": 1.0})
    for moment in (15, 45, 75):
        world.at(moment, lambda: world.silence(world.hired[0], world.time))
    assert run(world, 30, at_once) == names(30)
    (actor,) = world.placed()
    assert actor.silent == 75 and len(world.tries[actor]) <= 30 + 3 * at_once
    assert world.time < 400 / at_once + 100


def test_a_worker_that_is_never_reached_again_is_replaced(run, caplog):
    world = World({"a": 1.0})
    world.at(15, lambda: world.silence(world.hired[0], math.inf))
    assert run(world, 4) == names(4)
    lost, _ = world.placed()
    assert 15 + pool.DOUBT <= (lost.gone or 0) < 15 + pool.DOUBT + 5
    assert len([line for line in caplog.messages if "is tried again" in line]) == 1


@pytest.mark.parametrize("at_once", [1, 3])
def test_a_unit_that_kills_its_worker_is_found_out_though_contact_is_lost_before_the_death_is_known(run, at_once):
    def kill(world: World) -> None:
        for actor in world.actors:
            if actor.silent < world.time and any(call.method == "run" and call.given[0].name == "n4" for call in actor.running):
                world.silence(actor, world.time)
                world.kill(actor)

    world = World({"a": 1.0}, each_second=kill)
    with pytest.raises(StageError) as raised:
        run(world, 12, at_once)
    assert str(raised.value) == (
        "toy: score n4 (7 rows) failed 3 times and is set aside: its worker died: Worker exits by signal 9.; "
        "what is done is kept: mend it and run again"
    )
    tries = [name for tried in world.tries.values() for name in tried]
    assert set(tries) == set(names(12)) and tries.count("n4") == ATTEMPTS + (at_once > 1)


def test_workers_that_die_with_their_nodes_while_they_start_do_not_count(run):
    def short_lived(world: World) -> None:
        if world.time % 10 == 1:
            world.add(f"node-{world.time}", 4.0)
        if world.time % 10 == 5 and world.time < 50:
            world.lose(f"node-{world.time - 4}")

    world = World(each_second=short_lived, start=8.0)
    assert run(world, 5) == names(5)
    assert sum(actor.silent == math.inf for actor in world.hired) > ATTEMPTS


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
