"""What workers leave that die is swept; what lives is left alone."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from stages.runner.contract import Job, Phase
from stages.runner.scratch import YOUNG, scratch_folder
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
    foreign = temporary / "unidiffuser-train-1"
    foreign.mkdir()
    Path(store.root).mkdir(exist_ok=True)
    with scratch_folder() as folder:
        (folder / "file").write_text("at work")
        aged(folder), aged(foreign)
        PoolWorker(Job(store, "toy", "toy", None, {}, {}, {}), Phase("p", worker=lambda job: None)).prepare()  # type: ignore[arg-type,return-value]
        assert not dead.exists() and new.exists() and foreign.exists() and (folder / "file").read_text() == "at work"
    assert not folder.exists()
