"""Which unit of a phase is next, what a failure means for it, and how long it may take. It decides; `pool` acts, and Ray is
unknown here.

    an exception or a limit that is passed   counts; tried again after a pause, `ATTEMPTS` times in all, then set aside
    a worker that dies                       counts too, unless its node turns out to have gone with it
    contact that is lost                     never counts
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from itertools import count
from statistics import median

from stages.runner.contract import Unit

# Seconds before a unit that failed is tried again. Together they outlast a store that answers 503 for a while.
PAUSES = (5.0, 30.0)
ATTEMPTS = len(PAUSES) + 1
# The same after a death, for each that the unit has seen: time in which the death of the node becomes known.
DEATH_PAUSE, LONGEST_PAUSE = 2.0, 60.0
# A phase ends early when more than this number of its units, or this part of them, are set aside: then it is not the units.
ASIDE, ASIDE_PART = 10, 0.01
# Units that must be done before their median says how long one takes, and of how many it is, of the newest.
KNOWN_FROM, REMEMBERED = 5, 500
# How many times as long a unit may take, and what it may take in any case, in seconds.
OVERTIME, LEAST_LIMIT = 20.0, 600.0
# A unit that takes this many times as long as it should is slow, but not before so many seconds.
SLOW, LEAST_SLOW = 2.0, 10.0


@dataclass(eq=False)
class Attempt:
    """A unit that is not done, with what became of earlier tries: how many failed, and the nodes on which its worker died."""

    unit: Unit
    key: str
    failed: int = 0
    deaths: list[str] = field(default_factory=list)
    lost: int = 0
    reason: str = ""
    cause: Exception | None = None

    @property
    def suspect(self) -> bool:
        """Whether a worker that had it was lost: the next one is not to have others besides that begin after it."""
        return bool(self.deaths or self.lost)

    def counted(self, alive: Collection[str]) -> int:
        """Tries that count: a death does where its node lives on."""
        return self.failed + sum(node in alive for node in self.deaths)


class Attempts:
    """The units of a phase that are to be done.

    Args:
        pending: units and their keys, in the order of the plan; taken one by one.
        units: how many these are.
        alive: the ids of the nodes that are alive, asked when it matters.
        least_limit: seconds that a try may take in any case.
    """

    def __init__(
        self, pending: Iterable[tuple[Unit, str]], units: int, alive: Callable[[], Collection[str]], least_limit: float = 0.0
    ):
        self._pending, self._alive, self._least_limit = iter(pending), alive, max(LEAST_LIMIT, least_limit)
        self._fresh, self.units = units, units
        # Those that are to be tried again, the one that is due next first; the numbers tell apart what is due at once.
        self._again: list[tuple[float, int, Attempt]] = []
        self._numbers = count()
        self._flying: Counter[Attempt] = Counter()
        self._took: deque[tuple[float, int]] = deque(maxlen=REMEMBERED)
        self._typical: tuple[float, float] | None = None
        self.aside: list[Attempt] = []

    @property
    def waiting(self) -> int:
        """Units that no worker has, those included that pause."""
        return self._fresh + len(self._again)

    @property
    def over(self) -> bool:
        return not self.waiting and not self._flying

    @property
    def hopeless(self) -> bool:
        """Whether so many units were set aside that it is not worth going on."""
        return len(self.aside) > max(ASIDE, ASIDE_PART * self.units)

    def next(self, now: float) -> Attempt | None:
        """The unit to hand out now: one whose pause is over, else a fresh one."""
        while self._again and self._again[0][0] <= now:
            attempt = heappop(self._again)[-1]
            if self._is_condemned(attempt):
                self.aside.append(attempt)
            else:
                return self._handed(attempt)
        if self._fresh:
            following = next(self._pending, None)
            if following is not None:
                self._fresh -= 1
                return self._handed(Attempt(*following))
            self._fresh = 0
        return None

    def judge(self, now: float) -> None:
        """Set aside those whose deaths were too many, now that it is known which nodes went too, though no worker may be free."""
        condemned = [entry for entry in self._again if entry[0] <= now and self._is_condemned(entry[-1])]
        for entry in condemned:
            self._again.remove(entry)
            self.aside.append(entry[-1])
        heapify(self._again)

    def _is_condemned(self, attempt: Attempt) -> bool:
        # Asked of few, for the cluster is asked which nodes live.
        return attempt.failed + len(attempt.deaths) >= ATTEMPTS and attempt.counted(self._alive()) >= ATTEMPTS

    def _handed(self, attempt: Attempt) -> Attempt:
        self._flying[attempt] += 1
        return attempt

    def copy(self, attempt: Attempt) -> None:
        """A second worker is at this unit."""
        self._handed(attempt)

    def slow(self, since: dict[Attempt, float], now: float) -> Attempt | None:
        """The slowest of the units that one worker has, if one is slow; `since` says when each was begun."""
        late: dict[Attempt, float] = {}
        for attempt, begun in since.items():
            expected = self._expected(attempt.unit)
            if expected is not None and self._flying[attempt] == 1 and now - begun > max(LEAST_SLOW, SLOW * expected):
                late[attempt] = (now - begun) / max(expected, 1e-3)
        return max(late, key=late.__getitem__, default=None)

    def done(self, attempt: Attempt, seconds: float) -> bool:
        """It is done, and took so long; gives whether a copy is at it still, which is of no interest now."""
        has_copy = self._flying.pop(attempt) > 1
        self._took.append((seconds, attempt.unit.rows))
        self._typical = None
        return has_copy

    def failed(
        self, attempt: Attempt, now: float, reason: str, cause: Exception | None = None, enough: bool = False
    ) -> float | None:
        """A try failed, and `enough` says that another is not worth it.

        Returns:
            The seconds after which it is tried again; None if it is not, for a copy is at it, or it is set aside.
        """
        if self._has_copy(attempt):
            return None
        attempt.failed, attempt.reason, attempt.cause = attempt.failed + 1, reason, cause
        if enough or self._is_condemned(attempt):
            self.aside.append(attempt)
            return None
        return self._later(attempt, now, PAUSES[attempt.failed - 1])

    def died(self, attempt: Attempt, now: float, node: str, reason: str, cause: Exception) -> float | None:
        """Its worker died; `judge` decides later whether that counts. Gives what `failed` does."""
        if self._has_copy(attempt):
            return None
        self.found_dead(attempt, node, reason, cause)
        return self._later(attempt, now, min(DEATH_PAUSE * len(attempt.deaths), LONGEST_PAUSE))

    def found_dead(self, attempt: Attempt, node: str, reason: str, cause: Exception) -> None:
        """Contact to the worker that had it was lost, and was never to come back: it had died."""
        attempt.deaths.append(node)
        attempt.reason, attempt.cause = reason, cause

    def contact_lost(self, attempt: Attempt, now: float) -> float | None:
        """Nobody knows what became of it. Gives what `failed` does."""
        if self._has_copy(attempt):
            return None
        attempt.lost += 1
        return self._later(attempt, now, min(DEATH_PAUSE * attempt.lost, LONGEST_PAUSE))

    def _has_copy(self, attempt: Attempt) -> bool:
        self._flying[attempt] -= 1
        if self._flying[attempt] > 0:
            return True
        del self._flying[attempt]
        return False

    def _later(self, attempt: Attempt, now: float, pause: float) -> float:
        heappush(self._again, (now + pause, next(self._numbers), attempt))
        return pause

    def limit(self, unit: Unit) -> float | None:
        """Seconds that a try may take, None while nothing is known."""
        expected = self._expected(unit)
        return None if expected is None else max(self._least_limit, OVERTIME * expected)

    def _expected(self, unit: Unit) -> float | None:
        """The median of those that are done; more for a unit of more rows than theirs."""
        if len(self._took) < KNOWN_FROM:
            return None
        if self._typical is None:
            self._typical = median(took for took, _ in self._took), median(rows for _, rows in self._took)
        seconds, rows = self._typical
        return seconds * (max(1.0, unit.rows / rows) if rows else 1.0)
