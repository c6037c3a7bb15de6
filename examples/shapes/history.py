"""How a training went, in a file that survives an interruption."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

ROW_EVERY = 25


class History:
    """Rows of figures by step, with the minutes of training until then, by the clock and of processor time.

    Rows of steps that are done again after an interruption are replaced; the time that they took still counts.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.rows: list[dict[str, Any]] = []
        if file.exists():
            self.rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        self.before = self.minutes, self.core_minutes
        self.started = time.monotonic(), time.process_time()
        self.noted: list[dict[str, float]] = []

    @property
    def minutes(self) -> float:
        """Minutes of training until the last row."""
        return max((row["minutes"] for row in self.rows), default=0.0)

    @property
    def core_minutes(self) -> float:
        """Minutes of one core's time: on a busy machine, less than minutes times cores."""
        return max((row["core_minutes"] for row in self.rows), default=0.0)

    def note(self, **figures: float) -> None:
        """Figures of one step, for the mean in the next row."""
        self.noted.append(figures)

    def row(self, step: int, steps: int) -> None:
        """Every few steps, and after the last one, a row with the means of what was noted."""
        if step % ROW_EVERY == 0 or step == steps:
            self.add(step, **{name: round(sum(n[name] for n in self.noted) / len(self.noted), 5) for name in self.noted[0]})
            self.noted.clear()

    def add(self, step: int, **figures: Any) -> None:
        """A row as of now."""
        minutes = self.before[0] + (time.monotonic() - self.started[0]) / 60
        cores = self.before[1] + (time.process_time() - self.started[1]) / 60
        self.rows = [row for row in self.rows if row["step"] < step or (row["step"] == step and row.keys().isdisjoint(figures))]
        self.rows.append({"step": step, "minutes": round(minutes, 3), "core_minutes": round(cores, 3), **figures})
        self.file.parent.mkdir(parents=True, exist_ok=True)
        partial = self.file.with_suffix(".partial")
        partial.write_text("".join(json.dumps(row) + "\n" for row in self.rows), encoding="utf-8")
        partial.replace(self.file)
