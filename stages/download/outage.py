"""Whether what a shard lost is the web's doing, as ever, or that of something between the web and this machine.

A network, a resolver or a proxy that fails loses pictures of nearly all hosts at once, where the web loses those of some, and
about as many in each shard. So hosts are counted and not rows: one large host that is down is no outage.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean

from stages.download.fetch import can_heal
from stages.download.politeness import host_of

# Seconds before a shard that looks like an outage is tried again.
PAUSES = (10.0, 40.0, 120.0)
# The part of a shard's hosts of which no picture comes, until a worker has shards to tell by: a third of LAION's links is dead.
USUAL = 0.4
# Shards by which it tells.
REMEMBERED = 20
# A change is sudden when so much more of the hosts are lost, and when chance brings it in no shard of thousands.
SUDDEN, SPREADS = 0.25, 4.0
# What is wrong with an address itself says nothing of the web.
ADDRESS = frozenset({"bad_url", "forbidden_address"})


@dataclass(frozen=True)
class Tally:
    """The hosts of a shard.

    Attributes:
        hosts: how many there are.
        lost: those of which no picture came.
        silent: those of which no answer came that counts: only failures that can heal.
        reasons: why rows of the silent were lost.
    """

    hosts: int
    lost: int
    silent: int
    reasons: Counter[str]

    @classmethod
    def of(cls, rows: Iterable[tuple[str, str]]) -> Tally:
        """Of each row's URL and reason, which is empty for a success."""
        by_host: dict[str, Counter[str]] = {}
        for url, reason in rows:
            if reason not in ADDRESS:
                by_host.setdefault(host_of(url), Counter())[reason] += 1
        lost = [reasons for reasons in by_host.values() if "" not in reasons]
        silent = [reasons for reasons in lost if all(map(can_heal, reasons))]
        return cls(len(by_host), len(lost), len(silent), sum(silent, Counter()))

    @property
    def answered(self) -> bool:
        """Whether it was the servers themselves that refused, most of them."""
        return self.silent * 2 <= self.lost

    def in_words(self) -> str:
        told = ", ".join(f"{reason} {rows:,}" for reason, rows in self.reasons.most_common(3))
        return f"{self.silent:,} of {self.hosts:,} hosts gave no answer ({told})" if told else "all hosts answered"


class Usual:
    """What a worker's shards lose, of late."""

    def __init__(self) -> None:
        self._shares: deque[float] = deque(maxlen=REMEMBERED)

    def add(self, tally: Tally) -> None:
        if tally.hosts:
            self._shares.append(tally.lost / tally.hosts)

    def alarm(self, tally: Tally) -> str | None:
        """What is unusual about a shard, in words; None if nothing is."""
        if not tally.hosts:
            return None
        if tally.lost == tally.hosts:
            return f"not one picture came; {tally.in_words()}"
        usual = fmean(list(self._shares) or [USUAL])
        beyond = tally.lost - usual * tally.hosts
        # The shares of shards differ by more than chance makes those of samples differ; hence the 1, and `SUDDEN`.
        chance = math.sqrt(tally.hosts * usual * (1 - usual) + 1)
        if beyond < max(SUDDEN * tally.hosts, SPREADS * chance):
            return None
        share = tally.lost / tally.hosts
        return f"no picture came of {share:.0%} of the hosts, where {usual:.0%} is usual; {tally.in_words()}"
