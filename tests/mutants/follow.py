"""A plugin of coverage: lines count for the test that runs now, in every process that the test started.

`tests.mutants.tell` writes the test's name to a file. Every process below it, Ray's and Prefect's too, runs coverage with a
thread that follows that file, and saves what it has seen so far: such processes are killed, and tell nothing at their end.
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

FOLDER = "MUTANTS_COVERAGE"
SECONDS_BETWEEN_LOOKS, SECONDS_BETWEEN_SAVES = 0.02, 2.0


def coverage_init(registry: Any, options: dict[str, Any]) -> None:
    """Coverage calls this in every process that it starts in. The one that runs pytest needs no thread."""
    if "COVERAGE_PROCESS_START" in os.environ:
        threading.Thread(target=_follow, daemon=True).start()


def _follow() -> None:
    from coverage import Coverage

    now, last, saved = Path(os.environ[FOLDER]) / "now", "", time.monotonic()
    while True:
        time.sleep(SECONDS_BETWEEN_LOOKS)
        running = Coverage.current()
        if running is None:
            continue
        if (name := now.read_text()) != last:
            running.switch_context(name)
            last = name
        if time.monotonic() - saved > SECONDS_BETWEEN_SAVES:
            running.save()
            saved = time.monotonic()
