"""For Ray's workers, each of which begins with one of these: units and steps take longer, so that there is something to disturb.

It imports little: a machine starts many workers.
"""

from __future__ import annotations

import time
from typing import Any

# Seconds that a unit and a step take longer than they would.
UNIT, STEP = 1.0, 0.3


def units() -> None:
    """Half of it passes before anything is done."""
    from stages.runner.worker import PoolWorker

    done = PoolWorker._done

    def paced(self: PoolWorker, worker: Any, *more: Any) -> Any:
        class Paced:
            def run(self, unit: Any, out: Any) -> None:
                time.sleep(UNIT / 2)
                worker.run(unit, out)
                time.sleep(UNIT / 2)

        return done(self, Paced(), *more)

    PoolWorker._done = paced  # type: ignore[method-assign]


def steps() -> None:
    from training.loop import _Run

    loss = _Run._loss

    def paced(self: _Run, *arguments: Any) -> Any:
        time.sleep(STEP)
        return loss(self, *arguments)

    _Run._loss = paced  # type: ignore[method-assign]
