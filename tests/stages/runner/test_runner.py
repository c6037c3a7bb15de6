"""The runner's promises: nothing done twice, nothing lost, nothing half there."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from infra.dataset import find, verify
from infra.store import Store
from stages.evaluate.stage import EvaluateConfig
from stages.runner.attempts import ATTEMPTS
from stages.runner.contract import Bug, StageError, result_fields
from stages.runner.keys import deciding
from stages.runner.ledger import chain_of
from stages.runner.run import make_job, phase_states, run_stage
from tests.stages.toy import Count, Squares, Together, planned
from training.config import TrainConfig
from training.optimizers.adamw import AdamW
from training.optimizers.muon import Muon

ROOT = Path(__file__).parent.parent.parent.parent
pytestmark = pytest.mark.usefixtures("ray_cluster", "short_pauses")


@pytest.fixture
def short_pauses(monkeypatch):
    """A unit that failed is tried again at once."""
    monkeypatch.setattr("stages.runner.attempts.PAUSES", (0.05, 0.05))
    monkeypatch.setattr("stages.runner.attempts.DEATH_PAUSE", 0.1)


def contents(dataset):
    return [dataset.store.read(entry.path).decode() for entry in dataset.files]


def stored(root):
    """Path -> sha256 of every committed file; scratch files of dead writers do not count, since no reader accepts them."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(Path(root).rglob("*"))
        if path.is_file() and path.suffix == ".txt"
    }


def committed(root):
    """What must not depend on when and how often it was interrupted."""
    manifest = json.loads(next(Path(root, "squares").glob("*/manifest.json")).read_text())
    return {name: manifest[name] for name in ("files", "stats", "config", "fingerprint")}


def test_rows_add_up_and_files_come_in_the_order_of_the_plan(store):
    dataset = run_stage(planned(Squares, numbers=[3, 1, 2], limit=5), store, Squares)
    assert contents(dataset) == ["1\n", "4\n"]
    stats = dataset.manifest.stats
    assert (stats.rows_in, stats.rows_out, stats.dropped) == (3, 2, {"over_limit": 1})
    assert verify(dataset) == []


def test_a_committed_dataset_is_returned_untouched(store):
    first = run_stage(planned(Squares), store, Squares)
    before = {path: path.stat().st_mtime_ns for path in Path(store.root).rglob("*") if path.is_file()}
    second = run_stage(planned(Squares), store, Squares)
    assert second.manifest == first.manifest
    assert before == {path: path.stat().st_mtime_ns for path in Path(store.root).rglob("*") if path.is_file()}


def test_only_what_changed_is_done_again(store):
    """Another limit redoes `keep` but not `square`; another number does one unit of each."""
    run_stage(planned(Squares), store, Squares)
    units = {path.parent.name for path in Path(store.root).rglob("unit.json")}
    assert len(units) == 6
    run_stage(planned(Squares, "e" * 24, limit=4), store, Squares)
    after_limit = {path.parent.name for path in Path(store.root).rglob("unit.json")}
    assert len(after_limit - units) == 3
    run_stage(planned(Squares, "d" * 24, numbers=[1, 2, 3, 4]), store, Squares)
    after_number = {path.parent.name for path in Path(store.root).rglob("unit.json")}
    assert len(after_number - after_limit) == 2


def test_operational_fields_stay_out_of_the_identity():
    assert result_fields(Squares.Config(speed=9)) == result_fields(Squares.Config())
    assert result_fields(Squares.Config(limit=9)) != result_fields(Squares.Config())


def test_a_field_at_its_default_decides_nothing_and_what_tells_models_of_a_union_apart_always_does():
    """So a field that a later version adds makes nothing another."""
    assert deciding(Squares.Config(speed=9)) == deciding(Squares.Config()) == {}
    assert deciding(Squares.Config(limit=9)) == {"limit": 9}
    assert deciding(TrainConfig(steps=7, global_batch=8, optimizer=AdamW())) == {"steps": 7, "global_batch": 8}
    assert deciding(TrainConfig(steps=7, global_batch=8, optimizer=Muon(lr=0.5)))["optimizer"] == {"kind": "muon", "lr": 0.5}
    same = {"measures": [{"kind": "shapes", "samples": 64}]}
    assert deciding(EvaluateConfig.model_validate(same)) == same


def test_a_worker_that_dies_is_replaced(store, tmp_path):
    trap = tmp_path / "trap"
    trap.mkdir()
    (trap / "n2").write_text("2")
    dataset = run_stage(planned(Squares, trap=str(trap)), store, Squares)
    assert contents(dataset) == ["1\n", "4\n", "9\n"]
    assert (trap / "n2").read_text() == "-1"


def test_units_that_keep_failing_are_set_aside_and_named_when_the_rest_is_done(store, tmp_path, caplog):
    """One kills its worker every time, one raises every time, one raises once, one is not to be tried again: no other is lost."""
    for name, trap in {"n1": "-1", "n2": "once", "n3": "99", "n4": "aside"}.items():
        (tmp_path / name).write_text(trap)
    with pytest.raises(StageError) as raised:
        run_stage(planned(Squares, trap=str(tmp_path), numbers=[1, 2, 3, 4, 5, 6]), store, Squares)
    line = str(raised.value)
    assert line.startswith("toy-squares: square n") and all(name in line for name in ("n1", "n3", "n4"))
    assert "and 1 more" not in line and "n4 (1 rows) failed" not in line and line.count("\n") == 0
    aside = [line for line in caplog.messages if "set aside" in line]
    assert any("n1 is set aside: ValueError: number is cursed" in line for line in aside)
    assert any("n3 is set aside: its worker died: " in line for line in aside)
    assert find(store, "squares", "f" * 24) is None
    assert any("n4 is set aside: nobody answers" in line for line in aside) and "n4 is tried again" not in caplog.text
    assert len(list(Path(store.root).rglob("square.txt"))) == 3
    assert int((tmp_path / "n3").read_text()) == 99 - ATTEMPTS and (tmp_path / "n1").read_text() == f"{-1 - ATTEMPTS}"


def test_a_worker_may_begin_a_unit_while_others_end_and_its_death_counts_for_the_guilty_one(store, tmp_path, caplog):
    """The third kills their worker each time: with others besides at first, then alone."""
    (tmp_path / "n3").write_text("99")
    with pytest.raises(StageError, match=r"square n3 \(1 rows\) failed 3 times and is set aside: its worker died: "):
        run_stage(planned(Together, trap=str(tmp_path), numbers=[1, 2, 3, 4, 5]), store, Together)
    assert len(list(Path(store.root).rglob("square.txt"))) == 4, "each of them waits for the next to begin"
    assert not (tmp_path / "early").exists() and (tmp_path / "n3").read_text() == f"{99 - ATTEMPTS - 1}"


@pytest.mark.parametrize(("kind", "line"), [("stage", "no encoder"), ("bug", "toy-squares: KeyError: 'no encoder'")])
def test_a_worker_that_cannot_be_built_has_not_died_and_is_built_once(store, tmp_path, kind, line, caplog):
    (tmp_path / "built").write_text(kind)
    with pytest.raises(StageError) as raised:
        run_stage(planned(Squares, trap=str(tmp_path), numbers=[1]), store, Squares)
    assert (str(raised.value), type(raised.value)) == (line, Bug if kind == "bug" else StageError)
    assert (tmp_path / "count").read_text() == "." and "died" not in caplog.text
    assert "in prepare" in str(raised.value.__cause__), "the worker's traceback is there to be logged"


def test_a_unit_for_which_memory_is_not_enough_names_the_field_to_lower(store, tmp_path):
    (tmp_path / "n1").write_text("-100")
    with pytest.raises(StageError, match=r"^toy-squares: memory is not enough for square n1; lower speed \(now 1\)$"):
        run_stage(planned(Squares, trap=str(tmp_path)), store, Squares)


def test_no_row_left_shows_the_reasons(store):
    with pytest.raises(StageError, match="no row is left of 3: 3 over_limit"):
        run_stage(planned(Squares, limit=0), store, Squares)
    assert find(store, "squares", "f" * 24) is None


def test_too_little_disk_is_said_before_anything_starts(store, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(StageError, match=r"needs about 0\.5 GiB, .* has 0\.0 GiB free"):
        run_stage(planned(Squares), store, Squares)
    assert not Path(store.root, "squares").exists()


def test_a_chain_goes_on_from_its_last_unit(store):
    with pytest.raises(RuntimeError, match="the gang died"):
        run_stage(planned(Count, die_at=3), store, Count)
    assert len(list(Path(store.root).rglob("unit.json"))) == 2
    dataset = run_stage(planned(Count), store, Count)
    assert contents(dataset) == ["3\n"]
    longer = run_stage(planned(Count, "e" * 24, steps=5, die_at=3), store, Count)
    assert contents(longer) == ["5\n"], "a longer chain goes on from the units of the shorter, past the step that is deadly"


def run_killed(*arguments):
    command = [sys.executable, "-m", "tests.stages.killed", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)


def test_killed_between_any_two_writes_it_ends_with_the_same_files(tmp_path):
    """SIGKILL just before the n-th file appears, for every n; then the same command again."""
    result = run_killed("every", tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    truth, manifest = stored(tmp_path / "whole"), committed(tmp_path / "whole")
    writes = int((tmp_path / "whole" / "writes").read_text())
    assert writes == 3 * 3 + 3 * 2 + 1, "three units of two files and a record, three of a file and a record, a manifest"
    for number in range(1, writes + 1):
        assert stored(tmp_path / str(number)) == truth, f"killed before write {number}"
        assert committed(tmp_path / str(number)) == manifest


@pytest.mark.parametrize("number", [11])
def test_killed_on_ray_it_ends_with_the_same_files(tmp_path, number):
    """Worker and driver die together in the middle of either phase; the next driver goes on."""
    first = run_killed("ray", tmp_path / "store", number)
    assert first.returncode == -9, first.stdout + first.stderr
    assert find(Store(str(tmp_path / "store")), "squares", "f" * 24) is None
    again = run_killed("ray", tmp_path / "store", 0)
    assert again.returncode == 0, again.stdout + again.stderr
    run_stage(planned(Squares), Store(str(tmp_path / "whole")), Squares)
    assert stored(tmp_path / "store") == stored(tmp_path / "whole")
    assert committed(tmp_path / "store") == committed(tmp_path / "whole")


def steps_of(planned_, store):
    (phase,) = Count.phases
    return chain_of(Count, phase, phase.gang, make_job(planned_, store), planned_).done()


def test_a_chain_is_found_by_what_is_there_whatever_length_is_asked_for(store, caplog):
    caplog.set_level("INFO", "stages")
    run_stage(planned(Count, steps=5), store, Count)
    assert list(steps_of(planned(Count, steps=2), store)) == [1, 2, 3, 4, 5]
    for gone in (2, 4):
        store.remove(make_job(planned(Count), store).unit_folder(steps_of(planned(Count), store)[gone].key))
    assert contents(run_stage(planned(Count, "e" * 24, steps=3), store, Count)) == ["3\n"]
    assert contents(run_stage(planned(Count, "d" * 24, steps=4, die_at=3), store, Count)) == ["4\n"]
    assert contents(run_stage(planned(Count, "c" * 24, steps=6, die_at=5), store, Count)) == ["6\n"]
    assert caplog.messages == [
        "toy-count: begins at step 0",
        "toy-count: step 3 of a run that reached 5 is there already",
        "toy-count: goes on at step 3 of a run that reached 5",
        "toy-count: goes on at step 5 of a run that reached 5",
    ]


def test_a_chain_that_has_only_later_steps_says_that_it_begins_anew(store, caplog):
    caplog.set_level("INFO", "stages")
    run_stage(planned(Count, steps=3), store, Count)
    for step in (1, 2):
        store.remove(make_job(planned(Count), store).unit_folder(steps_of(planned(Count), store)[step].key))
    run_stage(planned(Count, "e" * 24, steps=2), store, Count)
    assert caplog.messages[1:] == ["toy-count: begins at step 0: no step up to 2 is left of a run that reached 3"]


def test_of_a_chain_stay_what_its_stage_keeps_the_newest_and_what_a_run_would_go_on_from(store):
    run_stage(planned(Count, steps=7), store, Count)
    (state,) = phase_states(planned(Count, steps=7), store, Count)
    assert (state.done, state.total, state.counted) == (7, 7, "steps")
    (state,) = phase_states(planned(Count, steps=5), store, Count)
    kept = {step for step, record in steps_of(planned(Count), store).items() if record.key in state.keys}
    assert (state.done, state.total, kept) == (5, 5, {2, 4, 5, 6, 7})
    (state,) = phase_states(planned(Count, steps=9), store, Count)
    assert (state.done, state.total) == (7, 9)


def test_a_step_that_is_a_dataset_is_never_removed(store):
    dataset = run_stage(planned(Count, steps=3), store, Count)
    (phase,) = Count.phases
    chain = chain_of(Count, phase, phase.gang, make_job(planned(Count), store), planned(Count))
    for step in (2, 3):
        chain.remove(step)
    assert list(chain.done()) == [1, 3] and verify(dataset) == []
