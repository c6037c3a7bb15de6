"""Five kills at random moments, of the fifty and more that `make chaos` does."""

from __future__ import annotations

from pathlib import Path

from tests.pipelines.chaos import KINDS, trial


def test_what_was_killed_five_times_ends_like_what_was_not(tmp_path: Path) -> None:
    rows = list(trial(tmp_path, kills=5, seed=3))
    kills, ends = [row for row in rows if "kind" in row], [row for row in rows if "kind" not in row]
    assert len(kills) == 5 and {row["kind"] for row in kills} == set(KINDS)
    # A run may come to its end before the fifth; the rest of the kills then meet another one.
    assert ends and all(end == {"nodes": 3, "nodes_that_differ": [], "processes_left": 0, "runs_left_running": 0} for end in ends)
