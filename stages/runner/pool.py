"""Runs a phase's units on Ray actors, as many as the cluster holds at the moment: nodes may come and go while it works.

A unit is only given to an actor that has a place and is ready, so none waits for a node that never comes. A worker without a
unit takes the next that is to be tried again; those that nothing is left for give their place back.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, cast

import ray
from ray.actor import ActorHandle
from ray.exceptions import ActorUnavailableError, RayError, RayTaskError

from infra.code import code_digest
from infra.ray_nodes import marked, may_come, missing, total
from stages.runner.attempts import ATTEMPTS, Attempt, Attempts
from stages.runner.cluster import Cluster, told
from stages.runner.contract import SKIP, Bug, Job, Phase, SetAside, Stage, StageError, Unit, UnitRecord
from stages.runner.keys import unit_keys
from stages.runner.skipping import can_skip
from stages.runner.worker import PoolWorker, field_of

log = logging.getLogger("stages")

# Seconds between two looks at the cluster, and the longest that it waits for an answer in between.
LOOK, TICK = 5.0, 1.0
# Seconds that a worker may be without a unit before it gives its place back.
IDLE = 60.0
# Seconds that a worker may wait for a place before a line says why, and between two such lines.
PENDING, PENDING_AGAIN = 60.0, 600.0
# Seconds for which a worker that cannot be reached is asked again, as long as it is not known to be dead.
DOUBT = 60.0
# What Ray's error says when an actor died because its node did.
NODE_DIED = "its node has died"


def gpus_each(machines: str | None) -> float:
    """GPUs that one worker of a model takes: a whole one wherever its machines have any, or would when the cluster grows."""
    return 1.0 if total("GPU", machines) or may_come("GPU", machines) else 0.0


def run_pool(
    job: Job, phase: Phase, pending: Iterable[tuple[Unit, str]], units: int, done: Callable[[Unit, UnitRecord], None]
) -> None:
    """Run units on actors and call `done` for each as it finishes, in any order.

    Raises:
        StageError: no machine is of the kind that the stage names; a worker cannot be built; a unit cannot be done in any way;
            or, when all others are done, some failed `ATTEMPTS` times.
        Bug: one of them in a way that no stage foresees.
    """
    if (why := missing(job.config.machines)) is not None:
        raise StageError(f"{job.node}: machines: {why}")
    Pool(job, phase, Attempts(pending, units, lambda: Cluster.seen().nodes), done).run()


def for_workers(job: Job, phase: Phase) -> Job:
    """The job as each worker holds it, which is no larger where there are more files."""
    return job if phase.takes_sources else replace(job, sources={})


@dataclass(eq=False)
class Hand:
    """One actor, from when it is asked for: first without a node, then not ready, then with or without a unit.

    Where a worker may have several units at once, it has a hand for each, and one more that is ready when there is room.
    `since` is when it got the present one of these, `call` what it is to answer, `number` counts the units of its actor.
    `doubted` is when contact was lost: until it answers again it is the actor's only hand, and not ready. `blamed` is the unit
    that its death then counts for.
    """

    actor: ActorHandle
    since: float
    call: ray.ObjectRef | None
    node: str = ""
    ready: bool = False
    attempt: Attempt | None = None
    number: int = 0
    doubted: float | None = None
    blamed: Attempt | None = None


class Pool:
    """The driver's side; see `run_pool`."""

    def __init__(self, job: Job, phase: Phase, attempts: Attempts, done: Callable[[Unit, UnitRecord], None]):
        self.job, self.phase, self.attempts, self.done = job, phase, attempts, done
        self.asked = self.resources = replace(phase.resources(job.config), machines=job.config.machines)
        self.hands: list[Hand] = []
        self.calls: dict[ray.ObjectRef, Hand] = {}
        self.shared, self.actor = ray.put(for_workers(job, phase)), ray.remote(PoolWorker)
        self.looked = self.said = float("-inf")
        self.given: Counter[ActorHandle] = Counter()
        self.aside = self.stillborn = 0

    def run(self) -> None:
        try:
            while not self.attempts.over:
                now = time.monotonic()
                if now - self.looked >= LOOK:
                    self.look(now)
                self.attempts.judge(now)
                self.staff(now)
                self.hand_out(now)
                self.end_overtime(now)
                self.tell_aside()
                self.take_answers()
        finally:
            for hand in list(self.hands):
                self.dismiss(hand)
        self.tell_aside()
        if self.attempts.aside:
            raise self.refusal()

    def look(self, now: float) -> None:
        """See what the cluster is now; those that have no place ask anew where nodes came that are smaller than what they ask."""
        self.looked, self.cluster, before = now, Cluster.seen(), self.resources
        self.resources = self.cluster.capped(self.asked)
        if self.resources != before:
            log.warning(
                "%s: %s asks for %s a worker, and no node has more than %s, which it takes",
                self.job.node, self.phase.name, told(self.asked), told(self.resources),
            )  # fmt: skip
            for hand in [hand for hand in self.hands if not hand.node]:
                self.dismiss(hand)
        self.tell_pending(now)

    def staff(self, now: float) -> None:
        """Ask for workers that there are units for, and let go of those that there are none for."""
        free = [hand for hand in self.hands if hand.attempt is None and hand.doubted is None]
        needed = self.attempts.waiting - len(free)
        for hand in sorted(free, key=lambda hand: bool(hand.node)) if needed < 0 else ():
            if not hand.node or (hand.ready and now - hand.since > IDLE and self.mates(hand) == [hand]):
                self.dismiss(hand)
                needed += 1
            if needed == 0:
                break
        for _ in range(min(needed, self.most() - len({hand.actor for hand in self.hands}))):
            self.hire(now)

    def most(self) -> int:
        """Workers to have or to ask for: what fits, and some more, for which a cluster that can grow brings nodes."""
        placed = len({hand.actor for hand in self.hands if hand.node})
        most = max(self.cluster.fits(self.resources), placed + max(1, placed))
        return min(most, self.asked.workers or most)

    def hire(self, now: float) -> None:
        options = {
            "num_cpus": self.resources.cpus, "num_gpus": self.resources.gpus, "memory": self.resources.memory,
            "resources": marked(self.resources.machines), "max_concurrency": self.phase.at_once,
        }  # fmt: skip
        actor = cast(ActorHandle, cast(Any, self.actor).options(**options).remote(self.shared, self.phase))
        hand = Hand(actor, now, None)
        self.hands.append(hand)
        self.ask(hand, actor.where.remote())

    def ask(self, hand: Hand, call: ray.ObjectRef) -> None:
        hand.call, hand.since = call, time.monotonic()
        self.calls[call] = hand

    def mates(self, hand: Hand) -> list[Hand]:
        """The hands of one actor."""
        return [each for each in self.hands if each.actor is hand.actor]

    def make_room(self, hand: Hand) -> None:
        """One more hand of an actor that may have several units at once, if it has none for the next."""
        mates = self.mates(hand)
        if len(mates) < self.phase.at_once and all(each.attempt and not each.attempt.suspect for each in mates):
            more = Hand(hand.actor, 0.0, None, hand.node)
            self.hands.append(more)
            self.ask(more, hand.actor.room.remote([each.number for each in mates]))

    def free(self, hand: Hand) -> None:
        """What a hand had has ended: it takes the next, or leaves it to another hand of its actor."""
        if self.phase.at_once > 1:
            self.hands.remove(hand)
            self.make_room(hand)

    def dismiss(self, hand: Hand) -> list[Attempt]:
        """End a hand's actor; gives what its other hands had."""
        had = self.forget(*self.mates(hand))
        ray.kill(hand.actor)
        return [attempt for attempt in had if attempt is not hand.attempt]

    def forget(self, *hands: Hand) -> list[Attempt]:
        """Take hands away, and await nothing from them; gives what they had."""
        for hand in hands:
            self.hands.remove(hand)
            if hand.call is not None:
                self.calls.pop(hand.call, None)
        return [hand.attempt for hand in hands if hand.attempt is not None]

    def hand_out(self, now: float) -> None:
        """Units to those that are ready; when none is left, the slowest to a second worker, where the first to finish wins."""
        for hand in [hand for hand in self.hands if hand.ready and hand.attempt is None]:
            if (attempt := self.attempts.next(now)) is None:
                attempt = self.slowest(now)
                if attempt is None:
                    return
                self.attempts.copy(attempt)
                log.info("%s: %s %s is slow, a second worker tries it too", self.job.node, self.phase.name, attempt.unit.name)
            self.given[hand.actor] += 1
            hand.attempt, hand.number = attempt, self.given[hand.actor]
            self.ask(hand, hand.actor.run.remote(attempt.unit, attempt.key, hand.number))
            self.make_room(hand)

    def slowest(self, now: float) -> Attempt | None:
        # On a disk a unit is claimed, and the second would wait for the first. Among units of one worker the slow cost nothing.
        if self.job.store.local or self.attempts.waiting or self.phase.at_once > 1:
            return None
        return self.attempts.slow({hand.attempt: hand.since for hand in self.hands if hand.attempt is not None}, now)

    def end_overtime(self, now: float) -> None:
        for hand in list(self.hands):
            if (at := hand.attempt or hand.blamed) is None or hand not in self.hands:
                continue
            limit = self.attempts.limit(at.unit)
            if limit is None or now - hand.since <= limit:
                continue
            for other in self.dismiss(hand):
                self.attempts.contact_lost(other, now)
            if hand.attempt is not None:
                reason = f"it took longer than {limit:.0f} s, far more than the others"
                self.tell_again(hand.attempt, reason, self.attempts.failed(hand.attempt, now, reason))

    def take_answers(self) -> None:
        if not self.calls:
            time.sleep(TICK / 4)
            return
        for call in ray.wait(list(self.calls), num_returns=1, timeout=TICK)[0]:
            hand = self.calls.pop(call)
            attempt, hand.attempt, hand.call = hand.attempt, None, None
            try:
                answer = ray.get(call)
            except RayTaskError as error:
                self.raised(hand, attempt, error)
            except RayError as error:
                self.gone(hand, attempt, error)
            else:
                self.answered(hand, attempt, answer)

    def answered(self, hand: Hand, attempt: Attempt | None, answer: Any) -> None:
        hand.since, hand.doubted, hand.blamed = time.monotonic(), None, None
        if not hand.node:
            hand.node = answer
            self.ask(hand, hand.actor.prepare.remote(code_digest()))
        elif attempt is None:
            hand.ready, self.stillborn = True, 0
        else:
            self.attempts.done(attempt, answer.seconds)
            for other in [other for other in self.hands if other.attempt is attempt]:
                self.dismiss(other)
            self.free(hand)
            self.done(attempt.unit, answer)

    def raised(self, hand: Hand, attempt: Attempt | None, error: RayTaskError) -> None:
        # Ray's own error holds the worker's traceback, which the log is to have.
        if isinstance(cause := error.cause, StageError):
            raise type(cause)(str(cause)) from error
        line = _last_line(error)
        if attempt is None or isinstance(cause, ImportError):
            raise Bug(f"{self.job.node}: {self.phase.name}: {line}") from error
        hand.since = time.monotonic()
        enough = isinstance(cause, SetAside)
        reason = str(cause) if enough else line
        self.tell_again(attempt, reason, self.attempts.failed(attempt, hand.since, reason, error, enough))
        self.free(hand)

    def gone(self, hand: Hand, attempt: Attempt | None, error: RayError) -> None:
        """An actor that died, or that cannot be reached: the first sign of a death, or a network that is cut for a while."""
        now, line, mates = time.monotonic(), _last_line(error), self.mates(hand)
        having = [each for each in (attempt, *(mate.attempt for mate in mates)) if each is not None]
        unreached = isinstance(error, ActorUnavailableError)
        away = unreached or NODE_DIED in str(error)
        guilty = guilty_of(having)
        if unreached and hand.doubted is None:
            self.forget(*(mate for mate in mates if mate is not hand))
            hand.ready, hand.doubted, hand.blamed = False, now, guilty
        if unreached and hand.doubted is not None and now - hand.doubted < DOUBT:
            self.ask(hand, hand.actor.where.remote())
        else:
            self.dismiss(hand)
        for each in having:
            if away or each is not guilty:
                self.tell_again(each, line, self.attempts.contact_lost(each, now))
        reason = f"its worker died: {line}"
        if guilty is not None and not away:
            self.tell_again(guilty, reason, self.attempts.died(guilty, now, hand.node, reason, error))
        elif hand.blamed is not None and not away:
            self.attempts.found_dead(hand.blamed, hand.node, reason, error)
        elif not having and hand not in self.hands:
            self.died_idle(hand, line, error, away)

    def died_idle(self, hand: Hand, line: str, error: RayError, away: bool) -> None:
        """An actor died without a unit; too often before the first one, and there is no use in another."""
        if not self.given[hand.actor] and not away:
            self.stillborn += not hand.node or hand.node in Cluster.seen().nodes
        if self.stillborn == ATTEMPTS:
            raise StageError(
                f"{self.job.node}: a worker of {self.phase.name} died {ATTEMPTS} times before its first unit: "
                f"{line}{self.memory()}"
            ) from error
        log.warning("%s: a worker of %s died without a unit: %s", self.job.node, self.phase.name, line)

    def memory(self) -> str:
        fields = field_of(self.job.config, self.phase.memory)
        return f" (of too little memory? then lower {fields})" if fields else ""

    def tell_again(self, attempt: Attempt, reason: str, pause: float | None) -> None:
        if pause is not None:
            log.warning(
                "%s: %s %s is tried again in %.0f s: %s", self.job.node, self.phase.name, attempt.unit.name, pause, reason
            )  # fmt: skip

    def tell_pending(self, now: float) -> None:
        """A line for workers that the cluster should have room for, or of which it has not one, and that get no place."""
        without = [hand for hand in self.hands if not hand.node]
        placed = len({hand.actor for hand in self.hands if hand.node})
        lacking = min(placed + len(without), max(1, self.cluster.fits(self.resources))) - placed
        if lacking > 0 and now - max(self.said + PENDING_AGAIN - PENDING, without[0].since) >= PENDING:
            self.said = now
            log.warning(
                "%s: %s waits for %d more workers: %s",
                self.job.node, self.phase.name, lacking, self.cluster.why_not(self.resources),
            )  # fmt: skip

    def tell_aside(self) -> None:
        """Say which units were set aside.

        Raises:
            StageError: they are so many that the rest is not worth trying.
        """
        for attempt in self.attempts.aside[self.aside :]:
            log.warning("%s: %s %s is set aside: %s", self.job.node, self.phase.name, attempt.unit.name, attempt.reason)
        self.aside = len(self.attempts.aside)
        if self.attempts.hopeless:
            raise self.refusal()

    def refusal(self) -> StageError:
        """The error that names what was set aside, the first of it with its reason."""
        first, *others = self.attempts.aside
        rows = f" ({first.unit.rows:,} rows)" if first.unit.rows else ""
        also = f"; so are {', '.join(other.unit.name for other in others[:3])}" if others else ""
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        memory = self.memory() if first.deaths else ""
        names = [attempt.unit.name for attempt in self.attempts.aside if can_skip(self.job, attempt.unit)]
        fix = f"; mend it, or count its rows as dropped with {SKIP}: [{', '.join(names)}]" if names else "; what is done is kept"
        foreseen = isinstance(first.cause, RayTaskError) and isinstance(first.cause.cause, SetAside)
        failed = "" if foreseen else f" failed {ATTEMPTS} times and"
        line = (
            f"{self.job.node}: {self.phase.name} {first.unit.name}{rows}{failed} is set aside{also}{more}: "
            f"{first.reason}{memory}{fix}"
        )
        error = Bug(line) if isinstance(first.cause, RayTaskError) and not foreseen else StageError(line)
        error.__cause__ = first.cause
        return error


def run_here(stage: type[Stage], job: Job) -> dict[str, list[UnitRecord]]:
    """The units of a stage in this process, one after the other, without a dataset in the end: for work beside other work.

    Raises:
        StageError: a unit failed.
    """
    records: dict[str, list[UnitRecord]] = {}
    for phase in stage.phases:
        worker, units = PoolWorker(job, phase), list(phase.plan(job, records))
        key_of = unit_keys(stage, phase, job, 0)
        keys = [unit.shared or key_of(unit) for unit in units]
        done = job.units_done(keys)
        records[phase.name] = [done.get(key) or worker.run(unit, key) for unit, key in zip(units, keys, strict=True)]
    return records


def guilty_of(having: list[Attempt]) -> Attempt | None:
    """Of the units that a dead actor had, the one that its death counts for: the only one, or the only one that is suspect.

    Else it counts for none, and all are suspect from now on.
    """
    suspects = having if len(having) == 1 else [attempt for attempt in having if attempt.suspect]
    return suspects[0] if len(suspects) == 1 else None


def _last_line(error: Exception) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
