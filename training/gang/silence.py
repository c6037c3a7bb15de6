"""When a group of workers is given up: one of them is silent, or all of them live and no step comes to its end."""

from __future__ import annotations

from training.board import Heard

# A group stands still when no step has ended for this many times the longest that one took, and the limit of silence. That counts
# from its second step on, when whatever is fetched and compiled at a start is over.
STILL_TIMES = 10


class Silence:
    """Listens to the signs of one group.

    Args:
        limit: seconds without a sign of life after which a worker is silent.
    """

    def __init__(self, limit: float) -> None:
        self.limit, self.longest = limit, 0.0
        self.step, self.since = 0, 0.0

    def verdict(self, heard: Heard, now: float) -> str | None:
        """Why the group is to be given up, by its newest signs at the time `now`, in seconds of one clock."""
        silent = [(sign, age) for sign, age in heard.values() if age > self.limit]
        if silent:
            told = ", ".join(f"{sign} after step {sign.step}" for sign, _ in silent)
            return f"no sign of life for {max(age for _, age in silent):.0f} s of {told}"
        step = min((sign.step for sign, _ in heard.values()), default=0)
        # One that goes back to an earlier checkpoint takes steps as well.
        if step != self.step:
            if self.step > 0:
                self.longest = max(self.longest, now - self.since)
            self.step, self.since = step, now
        still = now - self.since
        if self.longest > 0 and still > STILL_TIMES * max(self.limit, self.longest):
            return f"no step has ended for {still:.0f} s, after step {self.step}, though every rank gives signs of life"
        return None
