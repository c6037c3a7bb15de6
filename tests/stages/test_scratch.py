"""What workers leave that die is swept; what lives is left alone."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from infra.scratch import PREFIX, YOUNG, held, scratch_folder, sweep
from stages.runner.contract import Job, Phase
from stages.runner.worker import PoolWorker


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def aged(folder: Path) -> Path:
    long_ago = folder.stat().st_mtime - YOUNG - 1
    os.utime(folder, (long_ago, long_ago))
    return folder


def left_by_a_death(temporary: Path) -> Path:
    before = set(temporary.iterdir())
    child = os.fork()
    if child == 0:
        with scratch_folder() as folder:
            (folder / "part.tar").write_bytes(b"half")
            os._exit(0)
    os.waitpid(child, 0)
    (folder,) = set(temporary.iterdir()) - before
    return folder


def test_a_worker_sweeps_what_dead_ones_left_and_nothing_that_is_held_or_new_or_not_its_own(temporary, store):
    dead, new = aged(left_by_a_death(temporary)), left_by_a_death(temporary)
    foreign = temporary / "another-scratch-1"
    foreign.mkdir()
    Path(store.root).mkdir(exist_ok=True)
    with scratch_folder() as folder:
        (folder / "file").write_text("at work")
        aged(folder), aged(foreign)
        PoolWorker(Job(store, "toy", "toy", None, {}, {}, {}), Phase("p", worker=lambda job: None)).prepare()  # type: ignore[arg-type,return-value]
        assert not dead.exists() and new.exists() and foreign.exists() and (folder / "file").read_text() == "at work"
    assert not folder.exists()


def test_a_folder_that_another_machine_made_goes_with_the_last_worker_that_holds_it(temporary):
    """Workers of a training have the same path everywhere, and only one machine's has been made by who removes it."""
    folder = temporary / f"{PREFIX}elsewhere"
    with held(folder / "0"):
        (folder / "0").mkdir()
        with held(folder / "1"):
            (folder / "1").mkdir()
        assert (folder / "0").exists() and (folder / "1").exists()
    assert not folder.exists()


def test_a_folder_stays_while_who_made_it_lives_and_one_of_somebodys_own_for_good(temporary):
    with scratch_folder() as folder:
        with held(folder / "0"):
            pass
        assert folder.exists()
    own = temporary / "work"
    own.mkdir()
    with held(own / "0"):
        pass
    assert own.exists() and not folder.exists()


def test_what_a_killed_worker_held_is_swept(temporary):
    folder = temporary / f"{PREFIX}elsewhere"
    child = os.fork()
    if child == 0:
        with held(folder / "0"):
            os._exit(0)
    os.waitpid(child, 0)
    assert folder.exists()
    aged(folder)
    sweep()
    assert not folder.exists()
