"""A line of chains is found whatever its recipe is called, what was changed in `from`, and what of it is damaged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from infra.store import StoreError
from pipelines.commands.preflight import chain_lines, chain_problems
from stages.runner.contract import StageError
from tests.stages.train.trainings import Trainings

SLOWER: dict[str, Any] = {"optimizer": {"lr": 1e-4}}
ALL = ["weights", "optimizer", "ema", "schedule", "order"]


def said(training: Trainings, **changes: Any) -> list[str]:
    """What a dry run says, or refuses with."""
    plan = {"train-256": training.planned(**changes)}
    problems = chain_problems(training.store, plan, ["train-256"])
    return [*chain_lines(training.store, plan, ["train-256"]), *map(str, problems)]


def ledgers(training: Trainings) -> list[Path]:
    return [path for path in Path(training.store.url("chains")).rglob("*.json") if path.name != "last.json"]


def test_a_renamed_recipe_refuses_and_grows_as_the_one_before(training: Trainings, tmp_path: Path) -> None:
    training(steps=5)
    training.recipe = "renamed"
    training(steps=8)
    with pytest.raises(StageError, match=r"would begin at step 0; 8 steps are there \(optimizer.lr: 0.0002 -> 0.0001\)"):
        training(steps=10, **SLOWER)
    training.grow(tmp_path / "more", 4)
    training(steps=10)
    assert training.began == [0, 5, 8]


def test_a_chain_that_has_grown_is_found_under_another_name(training: Trainings, tmp_path: Path) -> None:
    training(steps=5)
    training.grow(tmp_path / "more", 4)
    training(steps=9)
    training.recipe = "renamed"
    again = training(steps=12)
    assert training.began == [0, 5, 9] and again.manifest.summary["began"]["step"] == 5
    # Nor does the first one lose sight of it.
    training.recipe = "r"
    training(steps=13)
    assert training.began[-1] == 12


def test_a_fork_is_found_under_another_name_and_a_line_of_its_own_comes_first(training: Trainings) -> None:
    fork = {"from": {"run": "train-256", "step": "newest", "keep": ALL}}
    training(steps=5)
    training(steps=8, **SLOWER, **fork)
    training.recipe = "renamed"
    training(steps=9, **SLOWER, **fork)
    training.recipe = "own"
    training(steps=3, seed=1)
    training(steps=6, **SLOWER, **{"from": {**fork["from"], "keep": ["weights", "schedule"]}})
    training(steps=7, **SLOWER, **{"from": {**fork["from"], "keep": ["weights", "ema", "schedule"]}})
    assert training.began == [0, 5, 8, 0, 3, 6]


def test_what_the_damage_of_a_ledger_tells_to_delete_loses_no_step(training: Trainings) -> None:
    training(steps=5)
    (ledger,) = ledgers(training)
    ledger.write_text("{")
    with pytest.raises(StoreError, match="no record of a chain; delete the file and run again"):
        training(steps=8)
    ledger.unlink()
    training(steps=9)
    with pytest.raises(StageError, match="would begin at step 0; 9 steps are there"):
        training(steps=10, **SLOWER)
    assert training.began == [0, 5]


def test_a_recipe_that_is_renamed_and_changed_is_another_and_says_what_it_leaves(training: Trainings, tmp_path: Path) -> None:
    assert said(training, steps=5) == ["train-256: begins at step 0"]
    training(steps=5)
    training.recipe = "copied"
    line = "train-256: begins at step 0; recipe r has 5 steps of it with other {}: give this one its name to go on from them"
    assert said(training, steps=8, **SLOWER) == [line.format("optimizer")]
    training.grow(tmp_path / "more", 4)
    assert said(training, steps=8) == [line.format("data")]
    assert said(training, steps=8, **SLOWER) == ["train-256: begins at step 0"], "nothing but the name is the same"
