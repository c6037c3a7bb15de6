"""A line of chains is found whatever its recipe is called, what was changed in `from`, and what of it is damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from infra.store import StoreError
from pipelines.commands.preflight import chain_lines, chain_problems
from stages.runner.contract import StageError
from stages.runner.document import parse
from stages.runner.ledger import ledger_of
from tests.stages.committed import flip
from tests.stages.train.trainings import SHARE, Trainings

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


def damage(training: Trainings, step: int, name: str = SHARE, **changes: Any) -> None:
    chain = training.chain(steps=step, **changes)
    (path,) = Path(training.store.url(chain.job.unit_folder(chain.key_of(step)))).glob(f"@*/{name}")
    flip(path, path.stat().st_size // 2)


@pytest.mark.parametrize("name", [SHARE, "order.json"])
def test_data_that_has_grown_goes_on_from_an_older_step_where_the_newest_is_damaged(
    training: Trainings, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    training(steps=10)
    damage(training, 10, name)
    training.grow(tmp_path / "more", 4)
    grown = training(steps=12)
    assert training.began == [0, 5] and grown.manifest.summary["began"]["step"] == 5
    assert any("does not begin from" in line and f"{name}: damaged" in line for line in caplog.messages)
    training(steps=13)
    assert training.began[-1] == 12


def test_a_chain_whose_beginning_is_damaged_before_its_first_step_begins_from_an_older_one(training: Trainings) -> None:
    fork = {"from": {"run": "train-256", "keep": ALL}}
    training(steps=10)
    chain = training.chain(steps=15, **SLOWER, **fork)
    assert chain.entry is not None and chain.entry.parent is not None and chain.entry.parent.step == 10
    ledger_of(training.store, training.planned(steps=15, **SLOWER, **fork)).enter(chain.entry)
    damage(training, 10)
    forked = training(steps=15, **SLOWER, **fork)
    assert training.began == [0, 5] and forked.manifest.summary["began"]["step"] == 5


def test_a_certain_step_that_is_damaged_is_refused_with_what_to_write(training: Trainings) -> None:
    training(steps=10)
    fingerprint = training.planned(steps=10).fingerprint
    damage(training, 10)
    with pytest.raises(StageError, match="train-256: from: no whole step 10 of it is there; the newest is 5"):
        training(steps=15, **SLOWER, **{"from": {"run": "train-256", "step": 10, "keep": ALL}})
    training.recipe = "next"
    with pytest.raises(StageError, match="from: step 10 of .* is damaged; name another with `step`; those that are: 5"):
        training(steps=15, **SLOWER, **{"from": {"run": fingerprint, "step": 10}})
    training(steps=15, **SLOWER, **{"from": {"run": fingerprint, "step": "newest", "keep": ALL}})
    assert training.began == [0, 5]


def test_where_no_step_is_whole_nothing_begins_anew_unawares(training: Trainings, tmp_path: Path) -> None:
    training(steps=5)
    damage(training, 5)
    training.grow(tmp_path / "more", 4)
    with pytest.raises(StageError, match="no step to go on from is whole .*: begin anew with --force train-256"):
        training(steps=9)
    training.generation = 1
    training(steps=9)
    assert training.began == [0, 0]


def test_where_all_steps_of_a_grown_chain_are_damaged_it_begins_where_it_began(training: Trainings, tmp_path: Path) -> None:
    training(steps=5)
    training.grow(tmp_path / "more", 4)
    whole = training(steps=9, checkpoint_every=100)
    damage(training, 9)
    again = training(steps=12, checkpoint_every=100)
    assert training.began == [0, 5, 5]
    rows = [json.loads(line) for line in again.open(again.file("history.jsonl")).read().splitlines()]
    assert [row["said"] for row in rows if row["kind"] == "damage"] == [
        "the checkpoint of step 9 is damaged: goes on from that of step 5"
    ]
    losses = {row["step"]: row["loss"] for row in rows if row["kind"] == "train"}
    before = [json.loads(line) for line in whole.open(whole.file("history.jsonl")).read().splitlines()]
    assert all(losses[row["step"]] == row["loss"] for row in before if row["kind"] == "train")


class Weekly:
    """A training and one that begins from it, in two recipes of a store whose data grows."""

    def __init__(self, training: Trainings, **origin: Any) -> None:
        self.training, self.origin, self.first = training, origin, ""

    def parent(self, **changes: Any) -> None:
        self.training.recipe = "r"
        self.training(**changes)
        self.first = self.training.planned(**changes).fingerprint

    def child(self, **changes: Any) -> dict[str, Any]:
        self.training.recipe = "next"
        return {"from": {"run": self.first, **self.origin}, **changes}


def test_a_training_goes_on_from_its_own_steps_when_the_one_it_began_from_went_on(training: Trainings, tmp_path: Path) -> None:
    weekly = Weekly(training)
    weekly.parent(steps=5)
    training(**weekly.child(steps=7))
    weekly.parent(steps=6)
    assert said(training, **weekly.child(steps=9)) == [
        "train-256: begins at step 7 from step 7 of train-256 with its weights, optimizer, ema, schedule, order "
        "(from: step 5 -> 6 of train-256)"
    ]
    training(**weekly.child(steps=9))
    assert training.began == [0, 0, 5, 7]
    # The next week the data of both has grown, and the first has gone on with it; a week later again.
    for week in (1, 2):
        training.grow(tmp_path / f"more{week}", 2 + week, str(week) * 24)
        weekly.parent(steps=6, growth_steps=2)
        grown = training(**weekly.child(steps=9, growth_steps=2))
        assert grown.manifest.summary["step"] == 9 + 2 * week
    assert training.began[4:] == [6, 9, 8, 11]
    assert grown.manifest.summary["began"]["changed"] == ["from: step 8 -> 10 of train-256", "data: 3 -> 4 shards"]


def test_where_all_steps_are_done_and_the_one_it_began_from_went_on_both_ways_are_named(training: Trainings) -> None:
    weekly = Weekly(training)
    weekly.parent(steps=5)
    training(**weekly.child(steps=7))
    weekly.parent(steps=6)
    assert said(training, **weekly.child(steps=7)) == [
        "train-256: what it began from has another step (from: step 5 -> 6 of train-256), and step 7 of 7 is done; raise steps "
        "to go on, or set growth_steps to go so many further each time, or begin anew from there with --force train-256"
    ]
    training.generation = 1
    training(**weekly.child(steps=7))
    assert training.began == [0, 0, 5, 0]


@pytest.mark.parametrize("origin", [{"keep": ["weights"]}, {"step": 4}])
def test_another_step_or_keep_of_from_is_refused_as_any_field(training: Trainings, origin: dict[str, Any]) -> None:
    weekly = Weekly(training)
    weekly.parent(steps=5, checkpoint_every=4)
    training(**weekly.child(steps=7))
    weekly.origin = origin
    (name,) = origin
    (line,) = said(training, **weekly.child(steps=9))
    assert line.startswith(f"train-256: would begin at step 0; 7 steps are there (from.{name}: ")
    assert line.endswith(
        "): fork with `from: {run: train-256, step: newest, keep: [weights, optimizer, ema, schedule, order]}`, "
        "or begin anew with --force train-256"
    )
    fork = parse(line.split("`")[1])
    training(**weekly.child(steps=9) | fork)
    assert training.began == [0, 0, 7]


def test_another_training_to_begin_from_is_refused(training: Trainings) -> None:
    weekly = Weekly(training)
    weekly.parent(steps=5)
    training(**weekly.child(steps=7))
    training.recipe = "slower"
    training(steps=5, **SLOWER)
    weekly.first = training.planned(steps=5, **SLOWER).fingerprint
    (line,) = said(training, **weekly.child(steps=9))
    assert "would begin at step 0; 7 steps are there (input init is another dataset): fork with" in line
