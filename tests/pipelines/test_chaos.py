"""Five kills at random moments in each scene, of the many that `make chaos` does."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.pipelines.chaos import RECIPE, SCENES, Undisturbed, trial, undisturbed


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Undisturbed]:
    with undisturbed(tmp_path_factory.mktemp("calm"), RECIPE) as found:
        yield found


# Each kill may cost a restart of everything, on a machine that does other things too.
@pytest.mark.timeout(1500)
@pytest.mark.parametrize(("name", "seed"), [("data", 3), ("deployed", 0)])
def test_what_was_killed_five_times_ends_like_what_was_not(tmp_path: Path, calm: Undisturbed, name: str, seed: int) -> None:
    scene = replace(SCENES[name], recipe=RECIPE, latest=8.0)
    rows = list(trial(scene, calm, tmp_path, kills=5, seed=seed))
    kills, ends = [row for row in rows if "kind" in row], [row for row in rows if "kind" not in row]
    assert len(kills) == 5 and {row["kind"] for row in kills} == set(scene.kinds)
    # A run may come to its end before the fifth; the rest of the kills then meet another one.
    well = {"nodes": 3, "nodes_that_differ": [], "runs_left": 0, "jobs_left": 0, "processes_left": 0}
    assert ends and all({key: end[key] for key in well} == well for end in ends)
