"""Runs a phase's units on workers, as many as the cluster holds at the moment: nodes may come and go while it works.

A unit is only given to a worker that has a place and is ready, so none waits for a node that never comes. A worker without a
unit takes the next that is to be tried again; those that nothing is left for give their place back. What is done for each
answer takes no longer where there are more workers: what needs a look at all of them is done every few seconds.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from infra.code import code_digest
from stages.runner.actors import Actors
from stages.runner.attempts import ATTEMPTS, LEAST_LIMIT, Attempt, Attempts
from stages.runner.cluster import told
from stages.runner.contract import SKIP, Bug, Job, Phase, SetAside, StageError, Unit, UnitRecord
from stages.runner.executor import CallError, Died, Executor, Raised, Unreached
from stages.runner.skipping import that_can_be_skipped
from stages.runner.worker import field_of

log = logging.getLogger("stages")

# Seconds between two looks at the cluster and at all workers, and the longest that it waits for an answer in between.
LOOK, TICK = 5.0, 1.0
# Seconds that a worker may be without a unit before it gives its place back.
IDLE = 60.0
# Seconds that a worker may wait for a place before a line says why, and between two such lines.
PENDING, PENDING_AGAIN = 60.0, 600.0
# Seconds for which a worker that cannot be reached is asked again, as long as it is not known to be dead.
DOUBT = 60.0


def run_pool(
    job: Job,
    phase: Phase,
    pending: Iterable[tuple[Unit, str]],
    units: int,
    done: Callable[[Unit, UnitRecord], None],
    executor: Executor | None = None,
) -> None:
    """Run units on workers and call `done` for each as it finishes, in any order.

    Args:
        executor: where the workers are; on Ray by default.

    Raises:
        StageError: no machine is of the kind that the stage names; a worker cannot be built; a unit cannot be done in any way;
            or, when all others are done, some failed `ATTEMPTS` times.
        Bug: one of them in a way that no stage foresees.
    """
    on = executor or Actors(job, phase)
    attempts = Attempts(pending, units, lambda: on.cluster().nodes, phase.least_limit(job.config))
    Pool(job, phase, attempts, done, on).run()


@dataclass(eq=False)
class Member:
    """One worker, from when it is asked for: first without a node, then not ready, then with or without units.

    `given` counts its units. `doubted` is when contact was lost: until it answers again it has one hand, which is not ready.
    `blamed` is the unit that its death then counts for.
    """

    worker: Any
    node: str = ""
    hands: list[Hand] = field(default_factory=list)
    given: int = 0
    doubted: float | None = None
    blamed: Attempt | None = None

    @property
    def attempts(self) -> list[Attempt]:
        return [hand.attempt for hand in self.hands if hand.attempt is not None]


@dataclass(eq=False)
class Hand:
    """What a worker has a unit in. Where it may have several at once, it has a hand for each, and one more that is ready when
    there is room.

    `since` is when it got what it has now, `call` what it is to answer, `number` that of its unit among those of its worker.
    """

    member: Member
    since: float
    call: Hashable | None = None
    ready: bool = False
    attempt: Attempt | None = None
    number: int = 0


class Pool:
    """The driver's side; see `run_pool`."""

    def __init__(
        self, job: Job, phase: Phase, attempts: Attempts, done: Callable[[Unit, UnitRecord], None], executor: Executor
    ) -> None:
        self.job, self.phase, self.attempts, self.done, self.executor = job, phase, attempts, done, executor
        self.asked = self.resources = replace(phase.resources(job.config), machines=job.config.machines)
        # Sets in the order in which they were filled: all workers, and the hands that are ready for a unit.
        self.members: dict[Member, None] = {}
        self.free: OrderedDict[Hand, None] = OrderedDict()
        self.calls: dict[Hashable, Hand] = {}
        self.looked = self.said = float("-inf")
        self.fits = self.aside = self.stillborn = 0
        self.short = False

    def run(self) -> None:
        try:
            while not self.attempts.over:
                now = self.executor.now()
                if now - self.looked >= LOOK:
                    self.look(now)
                    self.attempts.judge(now)
                    self.end_overtime(now)
                if self.short:
                    self.staff(now)
                self.hand_out(now)
                self.tell_aside()
                self.take_answers()
        finally:
            for member in list(self.members):
                self.dismiss(member)
        self.tell_aside()
        if self.attempts.aside:
            raise self.refusal()

    def look(self, now: float) -> None:
        """See what the cluster is now; those that have no place ask anew where nodes came that are smaller than what they ask."""
        self.looked, self.cluster, before, self.short = now, self.executor.cluster(), self.resources, True
        self.resources = self.cluster.capped(self.asked)
        self.fits = self.cluster.fits(self.resources)
        if self.resources != before:
            log.warning(
                "%s: %s asks for %s a worker, and no node has more than %s, which it takes",
                self.job.node, self.phase.name, told(self.asked), told(self.resources),
            )  # fmt: skip
            for member in [member for member in self.members if not member.node]:
                self.dismiss(member)
        self.tell_pending(now)

    def staff(self, now: float) -> None:
        """Ask for workers that there are units for, and let go of those that there are none for."""
        reached = [member for member in self.members if member.doubted is None]
        free = [hand for member in reached for hand in member.hands if hand.attempt is None]
        needed = self.attempts.waiting - len(free)
        for hand in sorted(free, key=lambda hand: bool(hand.member.node)) if needed < 0 else ():
            idle = hand.ready and now - hand.since > IDLE and len(hand.member.hands) == 1
            if idle or not hand.member.node:
                self.dismiss(hand.member)
                needed += 1
            if needed == 0:
                break
        for _ in range(min(needed, self.most() - len(self.members))):
            self.hire(now)
        self.short = False

    def most(self) -> int:
        """Workers to have or to ask for: what fits, and some more, for which a cluster that can grow brings nodes."""
        placed = sum(bool(member.node) for member in self.members)
        most = max(self.fits, placed + max(1, placed))
        return min(most, self.asked.workers or most)

    def hire(self, now: float) -> None:
        member = Member(self.executor.hire(self.resources))
        self.members[member] = None
        self.ask(self.another(member, now), "where")

    def another(self, member: Member, now: float) -> Hand:
        member.hands.append(Hand(member, now))
        return member.hands[-1]

    def ask(self, hand: Hand, method: str, *arguments: Any) -> None:
        hand.call, hand.since = self.executor.call(hand.member.worker, method, *arguments), self.executor.now()
        self.calls[hand.call] = hand

    def make_room(self, member: Member, now: float) -> None:
        """One more hand of a worker that may have several units at once, if it has none for the next."""
        hands = member.hands
        if len(hands) < self.phase.at_once and all(hand.attempt and not hand.attempt.suspect for hand in hands):
            numbers = [hand.number for hand in hands]
            self.ask(self.another(member, now), "room", numbers)

    def emptied(self, hand: Hand) -> None:
        """What a hand had has ended: it takes the next, or leaves it to another hand of its worker."""
        if self.phase.at_once > 1:
            hand.member.hands.remove(hand)
            self.make_room(hand.member, hand.since)
        else:
            self.free[hand] = None

    def dismiss(self, member: Member) -> None:
        self.forget(member.hands)
        del self.members[member]
        self.short = True
        self.executor.end(member.worker)

    def forget(self, hands: Iterable[Hand]) -> None:
        """Await nothing from these hands, and give them nothing."""
        for hand in hands:
            self.free.pop(hand, None)
            if hand.call is not None:
                self.calls.pop(hand.call, None)

    def hand_out(self, now: float) -> None:
        """Units to those that are ready; when none is left, the slowest to a second worker, where the first to finish wins."""
        while self.free:
            if (attempt := self.attempts.next(now)) is None:
                attempt = self.slowest(now)
                if attempt is None:
                    return
                self.attempts.copy(attempt)
                log.info("%s: %s %s is slow, a second worker tries it too", self.job.node, self.phase.name, attempt.unit.name)
            hand, _ = self.free.popitem(last=False)
            hand.member.given += 1
            hand.attempt, hand.number = attempt, hand.member.given
            self.ask(hand, "run", attempt.unit, attempt.key, hand.number)
            self.make_room(hand.member, now)

    def slowest(self, now: float) -> Attempt | None:
        # On a disk a unit is claimed, and the second would wait for the first. Among units of one worker the slow cost nothing.
        if self.job.store.local or self.attempts.waiting or self.phase.at_once > 1:
            return None
        hands = (hand for member in self.members for hand in member.hands)
        return self.attempts.slow({hand.attempt: hand.since for hand in hands if hand.attempt is not None}, now)

    def end_overtime(self, now: float) -> None:
        for member in list(self.members):
            for hand in member.hands:
                if now - hand.since > LEAST_LIMIT and self.is_overtime(hand, now):
                    self.end_one(hand, now)
                    break

    def is_overtime(self, hand: Hand, now: float) -> bool:
        attempt = hand.attempt or hand.member.blamed
        limit = self.attempts.limit(attempt.unit) if attempt else None
        return limit is not None and now - hand.since > limit

    def end_one(self, hand: Hand, now: float) -> None:
        """End the worker of a unit that takes too long; the others that it had are not to blame."""
        others = [attempt for attempt in hand.member.attempts if attempt is not hand.attempt]
        self.dismiss(hand.member)
        for other in others:
            self.attempts.contact_lost(other, now)
        if hand.attempt is not None:
            reason = f"it took longer than {self.attempts.limit(hand.attempt.unit):.0f} s, far more than the others"
            self.tell_again(hand.attempt, reason, self.attempts.failed(hand.attempt, now, reason))

    def take_answers(self) -> None:
        for answer in self.executor.wait(TICK):
            # Nobody awaits the answers of a worker that was ended since, or all of one that is doubted.
            if (hand := self.calls.pop(answer.call, None)) is None:
                continue
            attempt, hand.attempt, hand.call = hand.attempt, None, None
            if answer.error is None:
                self.answered(hand, attempt, answer.value)
            elif isinstance(answer.error, Raised):
                self.raised(hand, attempt, answer.error)
            else:
                self.gone(hand, attempt, answer.error)

    def answered(self, hand: Hand, attempt: Attempt | None, answer: Any) -> None:
        member, hand.since = hand.member, self.executor.now()
        member.doubted = member.blamed = None
        if not member.node:
            member.node = answer
            self.ask(hand, "prepare", code_digest())
        elif attempt is None:
            hand.ready, self.stillborn = True, 0
            self.free[hand] = None
        else:
            if self.attempts.done(attempt, answer.seconds):
                for other in [other for other in self.members if attempt in other.attempts]:
                    self.dismiss(other)
            self.emptied(hand)
            self.done(attempt.unit, answer)

    def raised(self, hand: Hand, attempt: Attempt | None, error: Raised) -> None:
        if isinstance(cause := error.error, StageError):
            raise type(cause)(str(cause)) from error.__cause__
        if attempt is None or isinstance(cause, ImportError):
            raise Bug(f"{self.job.node}: {self.phase.name}: {error}") from error.__cause__
        hand.since = self.executor.now()
        enough = isinstance(cause, SetAside)
        reason = str(cause) if enough else str(error)
        self.tell_again(attempt, reason, self.attempts.failed(attempt, hand.since, reason, error, enough))
        self.emptied(hand)

    def gone(self, hand: Hand, attempt: Attempt | None, error: CallError) -> None:
        """A worker that died, or that cannot be reached: the first sign of a death, or a network that is cut for a while."""
        now, member, line = self.executor.now(), hand.member, str(error)
        having = [*([attempt] if attempt else []), *member.attempts]
        unreached = isinstance(error, Unreached)
        away = unreached or (isinstance(error, Died) and error.node)
        guilty = guilty_of(having)
        if unreached and member.doubted is None:
            self.forget(each for each in member.hands if each is not hand)
            member.hands, member.doubted, member.blamed, hand.ready = [hand], now, guilty, False
        if unreached and member.doubted is not None and now - member.doubted < DOUBT:
            self.ask(hand, "where")
        else:
            self.dismiss(member)
        for each in having:
            if away or each is not guilty:
                self.tell_again(each, line, self.attempts.contact_lost(each, now))
        reason = f"its worker died: {line}"
        if guilty is not None and not away:
            self.tell_again(guilty, reason, self.attempts.died(guilty, now, member.node, reason, error))
        elif member.blamed is not None and not away:
            self.attempts.found_dead(member.blamed, member.node, reason, error)
        elif not having and member not in self.members:
            self.died_idle(member, error, away)

    def died_idle(self, member: Member, error: CallError, away: bool) -> None:
        """A worker died without a unit; too often before the first one, and there is no use in another."""
        if not member.given and not away:
            self.stillborn += not member.node or member.node in self.executor.cluster().nodes
        if self.stillborn == ATTEMPTS:
            raise StageError(
                f"{self.job.node}: a worker of {self.phase.name} died {ATTEMPTS} times before its first unit: "
                f"{error}{self.memory()}"
            ) from error
        log.warning("%s: a worker of %s died without a unit: %s", self.job.node, self.phase.name, error)

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
        without = [member for member in self.members if not member.node]
        placed = len(self.members) - len(without)
        lacking = min(len(self.members), max(1, self.fits)) - placed
        if lacking > 0 and now - max(self.said + PENDING_AGAIN - PENDING, without[0].hands[0].since) >= PENDING:
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
        names = that_can_be_skipped(self.job, (attempt.unit for attempt in self.attempts.aside))
        fix = (
            f"; mend it, or count its rows as dropped with {SKIP}: [{', '.join(names)}]"
            if names
            else "; what is done is kept: mend it and run again"
        )
        raised = isinstance(first.cause, Raised)
        foreseen = isinstance(first.cause, Raised) and isinstance(first.cause.error, SetAside)
        failed = "" if foreseen else f" failed {ATTEMPTS} times and"
        line = (
            f"{self.job.node}: {self.phase.name} {first.unit.name}{rows}{failed} is set aside{also}{more}: "
            f"{first.reason}{memory}{fix}"
        )
        error = Bug(line) if raised and not foreseen else StageError(line)
        error.__cause__ = first.cause
        return error


def guilty_of(having: list[Attempt]) -> Attempt | None:
    """Of the units that a dead actor had, the one that its death counts for: the only one, or the only one that is suspect.

    Else it counts for none, and all are suspect from now on.
    """
    suspects = having if len(having) == 1 else [attempt for attempt in having if attempt.suspect]
    return suspects[0] if len(suspects) == 1 else None
