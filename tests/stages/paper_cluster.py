"""A cluster that is made up, for the runner's pool: its clock jumps from one event to the next, and no work is done.

Nodes come and go, workers die, contact is lost and comes back; what a unit takes and how it ends is for the one who uses it.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count
from typing import Any

from stages.runner.cluster import Cluster
from stages.runner.contract import Resources, Unit
from stages.runner.executor import Answer, CallError, Died, Unreached

# Seconds until it is known that a call has no answer to wait for.
KNOWN = 1.0

Ending = Callable[[], Any]


@dataclass(eq=False, slots=True)
class Call:
    actor: Actor
    method: str
    given: tuple[Any, ...]
    since: float
    lost: bool = False


@dataclass(eq=False)
class Actor:
    """A worker; `running` are the calls that it is at, `queued` those that wait for one of its threads.

    What it is asked until `silent` ends with `error`. `left_room` are the numbers of its units that leave room for another,
    `waiting` the call that waits for such.
    """

    asked: Resources
    node: str | None = None
    gone: float | None = None
    silent: float = -math.inf
    error: Callable[[], CallError] = lambda: Unreached("the network is cut")
    running: dict[Call, None] = field(default_factory=dict)
    queued: deque[Call] = field(default_factory=deque)
    left_room: set[int] = field(default_factory=set)
    waiting: Call | None = None


@dataclass
class PaperCluster:
    """See `stages.runner.executor.Executor`.

    Attributes:
        nodes: id -> what a node has.
        at_once: calls that a worker has at once.
        start: seconds that a worker takes to be ready.
        run: (actor, unit, key) -> seconds that the unit takes until it leaves room for another, until it ends, and what then
            gives the answer or raises a `CallError`.
    """

    run: Callable[[Actor, Unit, str], tuple[float, float, Ending]]
    nodes: dict[str, dict[str, float]] = field(default_factory=dict)
    at_once: int = 1
    start: float = 0.0
    time: float = 0.0
    actors: dict[Actor, None] = field(default_factory=dict)
    pending: dict[Actor, None] = field(default_factory=dict)
    answers: list[Answer] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.numbers = count()
        self.used: dict[str, float] = {}

    def at(self, time: float, event: Callable[[], None]) -> None:
        heappush(self.events, (time, next(self.numbers), event))

    def after(self, seconds: float, event: Callable[[], None]) -> None:
        self.at(self.time + seconds, event)

    def every(self, seconds: float, event: Callable[[], None]) -> None:
        def again() -> None:
            event()
            self.after(seconds, again)

        self.after(seconds, again)

    # What the pool asks for.

    def now(self) -> float:
        return self.time

    def cluster(self) -> Cluster:
        return Cluster(dict(self.nodes), {})

    def hire(self, resources: Resources) -> Actor:
        actor = Actor(resources)
        self.actors[actor] = self.pending[actor] = None
        self._place()
        return actor

    def call(self, worker: Actor, method: str, *arguments: Any) -> Call:
        call = Call(worker, method, arguments, self.time)
        if self.time < worker.silent:
            self.after(KNOWN, lambda: self._tell(call, error=worker.error()))
        else:
            worker.queued.append(call)
            self._begin(worker)
        return call

    def end(self, worker: Actor) -> None:
        worker.gone = self.time
        del self.actors[worker]
        self.pending.pop(worker, None)
        if worker.node in self.nodes:
            self.used[worker.node] -= worker.asked.cpus
            self._place()

    def wait(self, seconds: float) -> list[Answer]:
        until = self.time + seconds
        while not self.answers or (self.events and self.events[0][0] <= self.time):
            if not self.events or self.events[0][0] > until:
                self.time = until
                return []
            self.time, _, event = heappop(self.events)
            event()
        answers, self.answers = self.answers, []
        return answers

    # What happens to it.

    def add(self, node: str, cpus: float) -> None:
        self.nodes[node], self.used[node] = {"CPU": cpus}, 0.0
        self._place()

    def lose(self, node: str) -> None:
        del self.nodes[node], self.used[node]
        for actor in [actor for actor in self.actors if actor.node == node]:
            self.kill(actor, node=True)

    def kill(self, actor: Actor, line: str = "Worker exits by signal 9.", node: bool = False) -> None:
        """A worker dies, by itself or with its node."""
        line = "The actor died because its node has died." if node else line
        self.silence(actor, math.inf, lambda: Died(line, node))
        actor.running.clear()
        actor.queued.clear()

    def silence(self, actor: Actor, until: float, error: Callable[[], CallError] = Actor.error) -> None:
        """What a worker was asked, and is asked until then, ends with an error; it works on, and what it does is not heard of."""
        actor.silent, actor.error = until, error
        for call in [call for call in (*actor.running, *actor.queued) if not call.lost]:
            call.lost = True
            self.answers.append(Answer(call, error=error()))

    # How it goes on.

    def _place(self) -> None:
        for actor in list(self.pending):
            node = self._with_room(actor.asked)
            if node is None:
                return
            del self.pending[actor]
            actor.node = node
            self.used[node] += actor.asked.cpus
            self._begin(actor)

    def _with_room(self, asked: Resources) -> str | None:
        return next((node for node, has in self.nodes.items() if has["CPU"] - self.used[node] >= asked.cpus), None)

    def _begin(self, actor: Actor) -> None:
        while actor.node is not None and actor.queued and len(actor.running) < self.at_once:
            call = actor.queued.popleft()
            actor.running[call] = None
            if call.method == "where":
                self._finish(call, lambda: actor.node)
            elif call.method == "prepare":
                self._later(call, self.start, lambda: None)
            elif call.method == "room":
                actor.waiting = call
                self._give_room(actor, ())
            else:
                self._begin_unit(call, *call.given)

    def _begin_unit(self, call: Call, unit: Unit, key: str, number: int) -> None:
        room, seconds, ending = self.run(call.actor, unit, key)
        self._later(call, seconds, ending)
        if self.at_once > 1:
            self.after(room, lambda: self._give_room(call.actor, (number,)))

    def _give_room(self, actor: Actor, numbers: Iterable[int]) -> None:
        actor.left_room.update(numbers)
        if actor.waiting and actor.left_room.issuperset(actor.waiting.given[0]):
            waiting, actor.waiting = actor.waiting, None
            self._finish(waiting, lambda: None)

    def _later(self, call: Call, seconds: float, ending: Ending) -> None:
        if seconds < math.inf:
            self.after(seconds, lambda: self._finish(call, ending))

    def _finish(self, call: Call, ending: Ending) -> None:
        actor = call.actor
        if call not in actor.running or actor.gone is not None:
            return
        del actor.running[call]
        if call.method == "run":
            self._give_room(actor, (call.given[2],))
        try:
            value = ending()
        except Died as error:
            actor.running[call] = None
            self.kill(actor, str(error), error.node)
        except CallError as error:
            self._tell(call, error=error)
        else:
            self._tell(call, value)
        self._begin(actor)

    def _tell(self, call: Call, value: Any = None, error: CallError | None = None) -> None:
        if not call.lost:
            self.answers.append(Answer(call, value, error))
