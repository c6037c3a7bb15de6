"""Progress without a terminal: a line for what is new, not one for every unit."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from pipelines.commands import terminal


def test_a_log_gets_a_line_a_phase_one_in_a_while_and_one_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    file = io.StringIO()
    view = terminal.TerminalView(Console(file=file, width=200))
    every = terminal.PLAIN_EVERY

    def printed(phase: str, done: int, after: float) -> bool:
        now[0] += after
        before = file.getvalue()
        view.progress("node", {"phase": phase, "done": done, "total": 9, "unit": "units"})
        return file.getvalue() != before

    now[0] = every / 2  # a machine that has just started
    assert printed("read", 1, 0)
    assert not printed("read", 2, every - 0.1)
    assert printed("read", 3, 0.1)
    assert not printed("read", 4, every / 2)
    assert printed("write", 0, 0) and not printed("write", 5, 1)
    assert printed("write", 9, 1)
