"""The leaderboard is what the results say: entered once, kept, and written as a page by nobody's hand."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from website.leaderboard import CLOCKS, ENTRIES, PAGE, enter, machine_class, page
from website.pages import DOCS, SiteError

MACHINE = (
    "2 cores (Intel(R) Xeon(R) Processor), 24 GiB memory, no GPU used, Linux, Python 3.11.7, torch 2.15.0 with 1 threads, load"
)


def measured(folder: Path, rows: int, commit: str, machine: str = MACHINE) -> None:
    told = {
        "ratio": 1.2, "figures": {"rows_per_s": rows, "memory_mib": 175}, "details": {"commit": commit}, "machine": machine,
        "command": "python -m benchmarks.loader --rounds 9", "date": "2026-11-28",
    }  # fmt: skip
    (folder / "loader.json").write_text(json.dumps(told))


def test_the_page_is_that_of_its_entries_and_the_entries_hold_every_result() -> None:
    results = DOCS / "results"
    entries = json.loads((results / ENTRIES).read_text())["entries"]
    assert (results / PAGE).read_text(encoding="utf-8") == page(entries), "run: python -m website leaderboard"
    for clock in CLOCKS:
        file = results / f"{clock.name}.json"
        if file.is_file():
            found: object = json.loads(file.read_text())
            for name in clock.figure.split("."):
                assert isinstance(found, dict)
                found = found[name]
            assert found in [entry["value"] for entry in entries if entry["clock"] == clock.name], (
                f"{clock.name}: make leaderboard"
            )


def test_an_entry_tells_when_where_and_how_and_stays_when_another_comes(tmp_path: Path) -> None:
    measured(tmp_path, 100, "a" * 40)
    (entry,) = enter(tmp_path)
    assert entry == {
        "clock": "loader", "value": 100, "beside": {"times litdata": 1.2, "MiB": 175}, "date": "2026-11-28", "commit": "a" * 12,
        "machine": "2 cores (Intel Xeon Processor), 24 GiB, no GPU", "command": "python -m benchmarks.loader --rounds 9",
    }  # fmt: skip
    assert enter(tmp_path) == [entry]
    measured(tmp_path, 120, "a" * 40)  # measured again: the newer counts
    assert [each["value"] for each in enter(tmp_path)] == [120]
    measured(tmp_path, 150, "b" * 40)
    assert [each["value"] for each in enter(tmp_path)] == [120, 150]
    measured(tmp_path, 150, "c" * 40)  # the same result, whose file was committed again
    assert [(each["value"], each["commit"]) for each in enter(tmp_path)] == [(120, "a" * 12), (150, "b" * 12)]
    text = page(enter(tmp_path))
    assert text.index("**150**") < text.index("**120**") and "No entry yet." in text


def test_a_result_that_does_not_tell_its_commit_is_of_its_own_or_of_head_while_it_is_changed(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        who = [part for name in ("name", "email") for part in ("-c", f"user.{name}=x")]
        around = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
        return subprocess.check_output(["git", "-C", str(tmp_path), *who, *arguments], text=True, env=around).strip()[:12]

    def written(minutes: float) -> str:
        (tmp_path / "demo.json").write_text(json.dumps({"minutes": minutes, "machine": MACHINE, "date": "2026-11-29"}))
        return next(entry["commit"] for entry in enter(tmp_path) if entry["value"] == minutes)

    git("init", "--quiet")
    git("commit", "--quiet", "--allow-empty", "--message", "the code")
    assert written(10.9) == git("rev-parse", "HEAD")  # in no commit yet
    git("add", "demo.json")
    git("commit", "--quiet", "--message", "the result")
    own = git("rev-parse", "HEAD")
    git("commit", "--quiet", "--allow-empty", "--message", "other code")
    (tmp_path / ENTRIES).unlink()
    assert written(10.9) == own
    assert written(7.8) == git("rev-parse", "HEAD") != own


def test_less_is_first_where_less_is_better_and_machines_are_apart(tmp_path: Path) -> None:
    for seconds, commit, cores in ((0.3, "a", 2), (0.1, "b", 2), (0.05, "c", 16)):
        told = {
            "figures": {"blocked_s": seconds},
            "details": {"commit": commit * 40},
            "machine": MACHINE.replace("2 cores", f"{cores} cores"),
        }
        (tmp_path / "checkpoint.json").write_text(json.dumps(told | {"date": "2026-11-28"}))
        entries = enter(tmp_path)
    text = page(entries)
    assert text.index("**0.05**") < text.index("**0.1**") < text.index("**0.3**")


def test_a_result_without_its_figure_is_named(tmp_path: Path) -> None:
    (tmp_path / "loader.json").write_text("{}")
    with pytest.raises(SiteError, match="loader.json: no figure figures.rows_per_s; write it with `python -m benchmarks.loader"):
        enter(tmp_path)


def test_a_machine_of_another_day_is_the_same_class() -> None:
    assert machine_class({"machine": MACHINE}) == machine_class({"machine": MACHINE.replace("3.11.7", "3.12.1")})
    assert machine_class({"cores": 2, "device": "cpu"}) == "2 cores, cpu"
