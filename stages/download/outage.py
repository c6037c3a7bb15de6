"""Whether what a shard lost is the web's doing, as ever, or that of something between the web and this machine.

A network, a resolver or a proxy that fails loses pictures of nearly all hosts at once, where the web loses those of some, and
about as many in each shard. So hosts are counted and not rows: one large host that is down is no outage. Rows count where hosts
that give pictures fall silent within a shard, as when few hosts have all of it; of one host no more than of a tenth of the shard.
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
# Why no answer came, not even one that refuses.
SILENCE = frozenset({"timeout", "host_down", "connection", "dns", "proxy"})
# The part of a shard's rows that one host counts for at most, and rows that chance alone does not silence.
ONE_HOST, CHANCE_ROWS = 0.1, 20


@dataclass(frozen=True)
class Tally:
    """The hosts of a shard.

    Attributes:
        hosts: how many there are.
        lost: those of which no picture came.
        silent: those of which no answer came that counts: only failures that can heal.
        broken: rows that got no answer, of hosts that gave pictures.
        broken_part: of the shard, as these count: none for more than `ONE_HOST` of it.
        reasons: why rows of the silent were lost, and the broken ones.
    """

    hosts: int
    lost: int
    silent: int
    broken: int
    broken_part: float
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
        counted = ONE_HOST * sum(reasons.total() for reasons in by_host.values())
        weights = broken_weights = 0.0
        broken: Counter[str] = Counter()
        for reasons in by_host.values():
            weights += min(reasons.total(), counted)
            if "" in reasons and (unheard := Counter({why: reasons[why] for why in SILENCE if reasons[why]})):
                broken += unheard
                broken_weights += min(reasons.total(), counted) * unheard.total() / reasons.total()
        part = broken_weights / weights if weights else 0.0
        return cls(len(by_host), len(lost), len(silent), broken.total(), part, sum(silent, broken))

    @property
    def breaks(self) -> bool:
        """Whether hosts fell silent that gave pictures before."""
        return self.broken >= CHANCE_ROWS and self.broken_part >= SUDDEN

    def in_words(self) -> str:
        told = ", ".join(f"{reason} {rows:,}" for reason, rows in self.reasons.most_common(3))
        also = f", nor did {self.broken:,} rows of others" if self.broken else ""
        return f"{self.silent:,} of {self.hosts:,} hosts gave no answer{also} ({told})" if told else "all hosts answered"


class Usual:
    """What a worker's shards lose, of late: the parts of their hosts that are lost, and that are silent."""

    def __init__(self) -> None:
        self._shares: deque[tuple[float, float]] = deque(maxlen=REMEMBERED)

    def add(self, tally: Tally) -> None:
        if tally.hosts:
            self._shares.append((tally.lost / tally.hosts, tally.silent / tally.hosts))

    def _parts(self) -> tuple[float, float]:
        """Those that are usual."""
        lost, silent = zip(*(self._shares or [(USUAL, USUAL)]), strict=True)
        return fmean(lost), fmean(silent)

    def alarm(self, tally: Tally) -> str | None:
        """What is unusual about a shard, in words; None if nothing is."""
        if not tally.hosts:
            return None
        if tally.lost == tally.hosts:
            return f"not one picture came; {tally.in_words()}"
        lost, silent = self._parts()
        if is_sudden(tally.lost, tally.hosts, lost):
            return (
                f"no picture came of {tally.lost / tally.hosts:.0%} of the hosts, where {lost:.0%} is usual; {tally.in_words()}"
            )
        if is_sudden(tally.silent, tally.hosts, silent):
            share = tally.silent / tally.hosts
            return f"no answer came of {share:.0%} of the hosts, where {silent:.0%} is usual; {tally.in_words()}"
        return f"hosts that gave pictures fell silent; {tally.in_words()}" if tally.breaks else None

    def is_refusal(self, tally: Tally) -> bool:
        """Whether it is the servers themselves that refuse: of what is lost beyond the usual, most is not silent."""
        if tally.lost == tally.hosts:
            return tally.silent * 2 <= tally.lost
        lost, silent = self._parts()
        if tally.breaks or is_sudden(tally.silent, tally.hosts, silent):
            return False
        return (tally.silent - silent * tally.hosts) * 2 <= tally.lost - lost * tally.hosts


def is_sudden(found: int, hosts: int, usual: float) -> bool:
    """Whether so many of the hosts are far more than the usual part of them."""
    # The shares of shards differ by more than chance makes those of samples differ; hence the 1, and `SUDDEN`.
    chance = math.sqrt(hosts * usual * (1 - usual) + 1)
    return found - usual * hosts >= max(SUDDEN * hosts, SPREADS * chance)
