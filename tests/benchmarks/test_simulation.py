"""A small simulation with all that goes wrong in the large one, and what the large one found."""

from __future__ import annotations

import json
import sqlite3
from dataclasses import replace
from pathlib import Path

from benchmarks.bookkeeping import SHARD_ROWS
from benchmarks.simulated import FATES, Faults, World, number_of
from benchmarks.simulation import lost_rows, play
from benchmarks.simulation_page import page
from benchmarks.simulation_side import drive, prepare
from stages.runner import attempts, packs

# As much as a day brings, within an hour.
MUCH = Faults(
    lost_per_hour=3.0, away=(60.0, 600.0), cut_per_hour=2.0, killed=0.02, refused=0.1, twice=0.03, slow=0.05, hangs=0.01,
    slow_store=(0.2, 300.0, 100.0),
)  # fmt: skip
WORLD = World(240, 40, seed=7, faults=MUCH)
RESULT = Path("docs/results/simulation.json")


def test_whatever_happens_to_a_cluster_every_row_is_there_or_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(packs, "NEW", 16)
    # Nodes live for less than it takes to be sure that a shard hangs.
    monkeypatch.setattr(attempts, "OVERTIME", 3.0)
    prepare(tmp_path, WORLD.shards)
    runs = play(tmp_path, WORLD, drive)
    assert [told.ended for told in runs[:1] + runs[-1:]] == ["head lost", "committed"]
    assert sorted(number_of(name) for told in runs for name in told.skip) == sorted(WORLD.poison())
    assert {what for told in runs for what in told.happened} == {
        "tries", "nodes that vanished", "nodes that could not be reached for a while", "workers that died alone",
        "shards that took long", "shards that hung", "tries that the store refused", "times at which the store was slow",
        "tries that failed for the shard's own reasons", "shards that were done when nobody heard of it",
    }  # fmt: skip

    skipped = [name for told in runs for name in told.skip]
    assert lost_rows(tmp_path, WORLD, skipped) == 0
    assert lost_rows(tmp_path, WORLD, skipped[1:]) >= SHARD_ROWS, "a shard that is not there is missed"
    assert lost_rows(tmp_path, replace(WORLD, seed=8), skipped) > SHARD_ROWS, "so is a count that is wrong"
    # The same by counting shard by shard.
    truth = dict.fromkeys([*FATES, "skipped"], 0)
    for number, rows in enumerate(WORLD.fates().tolist()):
        for reason, count in zip(FATES, rows, strict=True):
            truth["skipped" if number in WORLD.poison() else reason] += count
    database = sqlite3.connect(tmp_path / "all.bucket")
    ((written,),) = database.execute("select data from objects where path like 'store/download/%/manifest.json'")
    stats = json.loads(written)["stats"]
    assert {"": stats["rows_out"], **stats["dropped"]} == truth and sum(truth.values()) == stats["rows_in"] == 2_400_000


def test_the_same_seed_is_the_same_run(tmp_path):
    """Of workers that have some shards more than they can do at once."""
    world, told = replace(WORLD, shards=60, workers=8), []
    for place in (tmp_path / "one", tmp_path / "other"):
        place.mkdir()
        prepare(place, world.shards)
        told.append(drive(place, world, 0.0, 2000.0, []))
    assert [(each.ended, each.simulated_s, each.happened) for each in told][1:] == [("head lost", 2000.0, told[0].happened)]


def test_the_page_shows_what_was_simulated():
    found = json.loads(RESULT.read_text())
    figures = found["figures"]
    assert RESULT.with_suffix(".md").read_text(encoding="utf-8") == page(found)
    assert (figures["shards"], figures["workers"], figures["lost_rows"]) == (230_000, 1000, 0) and figures["cost_growth"] <= 1.2
