"""Five kills at random moments, of the fifty and more that `make chaos` does."""

from __future__ import annotations

from pathlib import Path

from tests.pipelines.chaos import trial


def test_what_was_killed_five_times_ends_like_what_was_not(tmp_path: Path) -> None:
    *kills, end = trial(tmp_path, kills=5, seed=3)
    assert len(kills) == 5 and len({row["kind"] for row in kills}) > 1
    assert end == {"nodes": 3, "nodes_that_differ": [], "processes_left": 0, "runs_left_running": 0}
