"""What the runner keeps of many units: keys, records and progress lines, without work behind them."""

from __future__ import annotations

import gc
import io
import json
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from infra.cycles import SELDOM
from infra.dataset import Stats, find
from infra.room import DISK_RESERVE
from infra.store import Store, StoreError
from stages.download.stage import Download
from stages.folder.stage import Folder
from stages.runner import packs
from stages.runner.contract import Job, StageError, UnitRecord, canonical, digest_of
from stages.runner.keys import unit_keys
from stages.runner.run import add_up, check_disk, describe_drops, make_job, run_stage
from stages.select.stage import Select
from tests.stages.committed import dataset_of
from tests.stages.killed import in_process
from tests.stages.toy import Keep, Squares, planned

MANY = 60


def test_a_digest_does_not_know_the_order_in_which_fields_were_written():
    one, other = {"b": [1, 2], "a": {"d": 1, "c": "ä"}}, {"a": {"c": "ä", "d": 1}, "b": [1, 2]}
    assert canonical(one) == canonical(other) == '{"a":{"c":"ä","d":1},"b":[1,2]}'
    assert digest_of(one) == digest_of(other) != digest_of({**one, "b": [2, 1]})


def test_a_unit_key_is_the_digest_of_all_that_decides_it(store):
    plan = planned(Squares, numbers=[7], limit=500)
    square, keep = Squares.phases
    job = make_job(plan, store)
    (unit,) = square.plan(job, {})
    assert unit_keys(Squares, square, job, 4)(unit) == digest_of(["squares", 1, "square", {}, {}, {}, 4, "n7", "7"])
    assert unit_keys(Squares, keep, job, 0)(unit) == digest_of(["squares", 1, "keep", {"limit": 500}, {}, {}, 0, "n7", "7"])


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


def test_what_stages_will_take_grows_with_the_rows_and_with_the_area_of_their_pictures(tmp_path, store):
    def needed(stage, inputs, sources, **fields):
        return stage.bytes_needed(Job(store, stage.name, "x", stage.Config(**fields), inputs, sources, {}))

    (tmp_path / "rows").mkdir()
    for number in range(10):
        (tmp_path / "rows" / str(number)).write_bytes(bytes(1000))
    rows = {"rows": dataset_of(store, "select", tmp_path / "rows", {})}
    pairs = {f"{number}.{ending}": "d" for number in range(10) for ending in ("jpg", "txt")}
    for side, each in ((512, 50_000), (1024, 200_000), (256, 12_500)):
        assert needed(Download, rows, {}, image_size=side) == 10 * each
        assert needed(Folder, {}, pairs, images=["*.jpg"], image_size=side) == 10 * each
    # Files on another machine have no size that can be asked for here.
    metadata = {str(tmp_path / "rows" / str(number)): "d" for number in range(4)} | {"s3://bucket/more.parquet": "d"}
    assert needed(Select, {}, metadata, metadata=["*.parquet"]) == 6000


def test_rows_come_in_with_the_first_phase_and_out_with_the_last_and_are_dropped_in_any():
    def record(rows_in, rows_out, **dropped):
        return UnitRecord("k", "n", [], Stats(rows_in, rows_out, dropped))

    records = {
        "square": [record(10, 7, small=3), record(5, 1, small=1, wide=3)],
        "keep": [record(7, 2, wide=1, twin=4), record(1, 1)],
    }
    stats = add_up(Squares, records)
    assert (stats.rows_in, stats.rows_out, stats.dropped) == (15, 3, {"small": 4, "wide": 4, "twin": 4}) and stats.adds_up()
    assert describe_drops(Stats(9, 0, {"few": 1, "b": 3, "many": 5, "a": 3})) == "5 many, 3 a, 3 b, 1 few"
    assert describe_drops(Stats()) == "nothing dropped"


def test_a_phase_that_ends_without_a_unit_makes_nothing(store, monkeypatch):
    def forgetful(job, phase, pending, units, done):
        in_process(job, phase, list(pending)[:-2], units - 2, done)

    monkeypatch.setattr("stages.runner.pool.run_pool", forgetful)
    with pytest.raises(StageError, match=r"^toy-squares: square ended without n2 \(2 units missing\)$"):
        run_stage(planned(Squares, numbers=[1, 2, 3]), store, Squares)
    assert find(store, "squares", "f" * 24) is None


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


def test_records_that_a_store_puts_into_no_pack_now_go_into_a_later_one(monkeypatch):
    monkeypatch.setattr(packs, "NEW", 2)
    store, write = Store("memory://packs"), Store.write
    paths = [f"empty/units/{number}/unit.json" for number in range(4)]
    kept = packs.Packs(store, "empty")

    def refuses(*_: object) -> bool:
        raise ConnectionError("503")

    monkeypatch.setattr(Store, "write", refuses)
    for path in paths[:3]:
        kept.add(path, b"{}")
    monkeypatch.setattr(Store, "write", write)
    assert list(store.walk("empty/packs")) == []
    for path in paths:
        store.write(path, b"{}")
    kept.add(paths[3], b"{}")
    ((pack, *_),) = store.walk("empty/packs")
    assert pq.read_table(io.BytesIO(store.read(pack)))["path"].to_pylist() == paths


def test_python_looks_for_cycles_as_often_as_before_once_a_stage_is_done(store, in_process, monkeypatch):
    before, during, run = gc.get_threshold(), [], Keep.run
    monkeypatch.setattr(Keep, "run", lambda self, unit, out: (during.append(gc.get_threshold()), run(self, unit, out)))
    gc.set_threshold(701, 11, 12)
    try:
        run_stage(planned(Squares), store, Squares)
        assert gc.get_threshold() == (701, 11, 12) and set(during) == {SELDOM}
    finally:
        gc.set_threshold(*before)


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
