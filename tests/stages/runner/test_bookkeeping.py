"""What the runner keeps of many units: keys, records and progress lines, without work behind them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from infra.store import Store, StoreError
from stages.runner.contract import StageError, digest_of
from stages.runner.run import DISK_RESERVE, check_disk, make_job, run_stage, unit_keys
from tests.stages.committed import dataset_of
from tests.stages.toy import Keep, Squares, planned

MANY = 60


def test_a_unit_key_is_the_digest_of_all_that_decides_it(store):
    plan = planned(Squares, numbers=[7])
    square, keep = Squares.phases
    job = make_job(plan, store)
    (unit,) = square.plan(job, {})
    assert unit_keys(Squares, square, job, 4)(unit) == digest_of(["squares", 1, "square", {}, {}, {}, 4, "n7", "7"])
    assert unit_keys(Squares, keep, job, 0)(unit) == digest_of(["squares", 1, "keep", {"limit": 1000}, {}, {}, 0, "n7", "7"])


def test_many_units_are_found_again_and_committed_alike(store, in_process, capsys, monkeypatch):
    """More files than a manifest holds inline; the second run finds every record."""
    monkeypatch.setattr("infra.dataset.FILES_INLINE", 10)
    monkeypatch.setattr("stages.runner.run.SAY_EVERY", 1000)
    numbers = list(range(1000, 1000 + MANY))
    first = run_stage(planned(Squares, numbers=numbers, limit=10**9), store, Squares)
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("@progress ")]
    said = [json.loads(line.removeprefix("@progress ")) for line in printed]
    assert [(line["phase"], line["done"]) for line in said] == [(p, n) for p in ("square", "keep") for n in (0, MANY)]
    again = run_stage(planned(Squares, "e" * 24, numbers=numbers, limit=10**9), store, Squares)
    assert again.files == first.files and len(again.files) == MANY and again.manifest.stats == first.manifest.stats
    assert [entry.name for entry in first.files] == [f"n{number}.txt" for number in numbers]
    assert run_stage(planned(Squares, "e" * 24), store, Squares).manifest == again.manifest, "read back from the store"


def test_what_a_stage_will_take_must_be_free_beside_a_reserve(tmp_path, store, monkeypatch):
    class Large(Squares):
        @classmethod
        def bytes_needed(cls, job):
            return 3 * 2**30

    (tmp_path / "rows").mkdir()
    for number, size in enumerate((1000, 234)):
        (tmp_path / "rows" / str(number)).write_bytes(bytes(size))
    plan = planned(Squares)
    job = replace(make_job(plan, store), inputs={"rows": dataset_of(store, "select", tmp_path / "rows", {})})
    # A stage that says nothing of its own takes as much as what it reads.
    for stage, needed, said in ((Large, 3 * 2**30, "3.5"), (Squares, 1234, "0.5")):
        monkeypatch.setattr(Store, "free_bytes", lambda self, free=needed + DISK_RESERVE: free)
        check_disk(stage, job)
        monkeypatch.setattr(Store, "free_bytes", lambda self, free=needed + DISK_RESERVE - 1: free)
        with pytest.raises(StageError, match=rf"^toy-squares: needs about {said} GiB, .* GiB free; free some space or point"):
            check_disk(stage, job)
    # An object store has no end.
    monkeypatch.setattr(Store, "free_bytes", lambda self: None)
    check_disk(Large, job)


def test_a_damaged_record_is_named(store, in_process):
    run_stage(planned(Squares), store, Squares)
    (damaged, *_) = sorted(Path(store.root, "squares").rglob("unit.json"))
    damaged.write_text(damaged.read_text()[:-20])
    with pytest.raises(StoreError, match=f"{damaged.parent.name}/unit.json: no record of a unit; delete the file"):
        run_stage(planned(Squares, "e" * 24), store, Squares)
    damaged.unlink()
    assert run_stage(planned(Squares, "e" * 24), store, Squares).manifest.stats.rows_out == 3


def test_records_on_an_object_store_are_asked_for_together(monkeypatch):
    monkeypatch.setattr("infra.store.READ_AT_ONCE", 4)
    store = Store("memory://bookkeeping")
    for number in (0, 1, 5, 9):
        store.write(f"units/{number}.json", b"%d" % number)
    found = list(store.read_many([f"units/{number}.json" for number in range(10)]))
    assert found == [b"0", b"1", None, None, None, b"5", None, None, None, b"9"]
    assert list(store.read_many([])) == []


@pytest.mark.parametrize("can_heal", [False, True])
def test_units_of_an_empty_result_are_tried_again_where_that_can_help(store, in_process, monkeypatch, can_heal):
    class Moody(Squares):
        """The second phase drops all as long as the mood is bad, which no key knows of."""

    done: list[str] = []

    class Keeping(Keep):
        def run(self, unit, out):
            done.append(unit.name)
            super().run(unit if mood else replace(unit, payload={"square": 10**6}), out)

    square, keep = Squares.phases
    Moody.can_heal, Moody.phases = can_heal, (square, replace(keep, worker=Keeping))
    mood = False
    with pytest.raises(StageError, match="run again, which tries all of them again" if can_heal else "loosen the conditions"):
        run_stage(planned(Moody), store, Moody)
    mood = True
    if not can_heal:
        with pytest.raises(StageError, match="no row is left of 3: 3 over_limit"):
            run_stage(planned(Moody), store, Moody)
        assert done == ["n1", "n2", "n3"]
        return
    assert run_stage(planned(Moody), store, Moody).manifest.stats.rows_out == 3
    assert done == ["n1", "n2", "n3"] * 2

    # Units that a committed dataset holds are not touched.
    mood = False
    assert run_stage(planned(Moody, "e" * 24), store, Moody).manifest.stats.rows_out == 3
    assert done == ["n1", "n2", "n3"] * 2
