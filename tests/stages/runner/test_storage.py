"""Stores that fail and runs that meet: a clear error or a right result, never a wrong dataset."""

from __future__ import annotations

import errno
import hashlib
import multiprocessing
import os
import random
import shutil
import subprocess
import threading
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from infra.dataset import find, verify
from infra.store import Store
from stages.__main__ import main
from stages.download.stage import Download
from stages.filter.stage import Filter
from stages.runner.contract import Job, Phase, StageError, Unit, scratch_output
from stages.runner.run import run_stage
from stages.runner.worker import PoolWorker
from tests.stages.hostile_web import HOST, hostile_web
from tests.stages.packed import blots, download, encoded, sample
from tests.stages.pages import selector
from tests.stages.toy import Squares, planned


class Dice:
    """A worker whose result is another each time, as the web's is."""

    def __init__(self, job):
        pass

    def run(self, unit, out):
        out.path("dice", 1).write_bytes(os.urandom(1000))
        time.sleep(0.5)


def throw(root, answers):
    job = Job(Store(root), "dice", "test-dice", None, {}, {}, {})
    record = PoolWorker(job, Phase("throw", lambda *_: (), Dice)).run(Unit("one", ()), "ab" * 12)
    answers.put(record.files[0].sha256)


def test_two_runs_at_the_same_unit_end_with_one_result(tmp_path):
    """The second waits for the first and takes what that has made."""
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    runs = [context.Process(target=throw, args=(str(tmp_path), answers)) for _ in range(3)]
    for run in runs:
        run.start()
    digests = {answers.get(timeout=60) for _ in runs}
    for run in runs:
        run.join()
    stored = Path(tmp_path, "dice", "units", "ab", "ab" * 12, "dice").read_bytes()
    assert digests == {hashlib.sha256(stored).hexdigest()}


def test_the_claim_of_a_run_that_dies_is_gone(tmp_path):
    context = multiprocessing.get_context("fork")
    begun = context.Event()

    def dies():
        with Store(str(tmp_path)).claimed("unit"):
            begun.set()
            time.sleep(60)

    run = context.Process(target=dies)
    run.start()
    assert begun.wait(30)
    run.kill()
    start = time.monotonic()
    with Store(str(tmp_path)).claimed("unit"), Store(str(tmp_path)).claimed("another"):
        assert time.monotonic() - start < 30
    run.join()


def test_a_claim_holds_against_other_threads_and_outlives_theirs(tmp_path):
    store, had = Store(str(tmp_path)), threading.Event()

    def second():
        with store.claimed("unit"):
            had.set()

    with store.claimed("unit"):
        with store.claimed("another"):
            pass
        thread = threading.Thread(target=second)
        thread.start()
        assert not had.wait(0.2)
    assert had.wait(30)
    thread.join()


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize(
    ("number", "error", "line"),
    [
        (errno.EROFS, OSError, "Read-only file system"),
        (errno.ENOSPC, StageError, "no space is left in .*; free some or point --store elsewhere, and run again"),
    ],
)
def test_a_store_that_cannot_be_written_is_one_line_and_no_dataset(store, monkeypatch, number, error, line):
    def refuse(source, target):
        raise OSError(number, os.strerror(number), str(target))

    with monkeypatch.context() as broken:
        broken.setattr("infra.store.shutil.copyfile", refuse)
        with pytest.raises(error, match=line):
            run_stage(planned(Squares), store, Squares)
    assert find(store, "squares", "f" * 24) is None
    assert verify(run_stage(planned(Squares), store, Squares)) == [], "and the next run ends as if nothing had been"


@pytest.fixture
def small_disk(tmp_path):
    """A file system of two MiB; gives its folder and how to make it larger."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options: str) -> bool:
        return not subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True).returncode

    if not mount("size=2m"):
        pytest.skip("a file system can be mounted by the superuser only")
    yield folder, lambda: mount("remount,size=64m")
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("full", ["store", "scratch"])
def test_a_disk_that_is_really_full(tmp_path, small_disk, monkeypatch, make, digests, full):
    folder, enlarge = small_disk
    monkeypatch.setattr("stages.runner.run.DISK_RESERVE", -(2**40))  # else it is refused before the work starts
    pictures = [Image.frombytes("RGB", (120, 120), random.Random(n).randbytes(120 * 120 * 3)) for n in range(16)]
    shards = [[sample(n, encoded(pictures[n])) for n in range(start, start + 4)] for start in range(0, 16, 4)]
    calm = Store(str(tmp_path / "calm"))
    undisturbed = digests(make(Filter, calm, {"rows": download(calm, shards)}, clip_scores=False, min_side=None))
    work = Store(str((folder if full == "store" else tmp_path) / "work"))
    rows = download(work, shards)
    if full == "scratch":
        (folder / "of another program").write_bytes(bytes(2_000_000))
        monkeypatch.setattr("tempfile.tempdir", str(folder))
    with pytest.raises(StageError, match=f"^no space is left in {folder}.*; free some or point .* elsewhere, and run again"):
        make(Filter, work, {"rows": rows}, clip_scores=False, min_side=None)
    assert not list(Path(work.root).glob("filter/*/manifest.json"))
    assert enlarge()
    dataset = make(Filter, work, {"rows": rows}, clip_scores=False, min_side=None)
    assert digests(dataset) == undisturbed and verify(dataset) == []


def test_a_read_only_store_is_one_line(tmp_path, monkeypatch, capsys, in_process):
    pq.write_table(pa.table({"URL": ["http://a.example/1.png"], "TEXT": ["a picture of light"]}), tmp_path / "m.parquet")
    (tmp_path / "x.yaml").write_text("name: x\nsubsets: {a: {select: {metadata: [m.parquet]}}}\n")

    def refuse(self, *_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))

    monkeypatch.setattr("infra.store.Path.mkdir", refuse)
    monkeypatch.setattr("stages.__main__.connect_ray", lambda: None)
    assert main([str(tmp_path / "x.yaml"), "a-select", "--store", str(tmp_path / "store")]) == 1
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("error: [Errno 30] Read-only file system: ")


@pytest.fixture
def fetched(tmp_path, store, make, in_process):
    """A selection and its download."""
    with hostile_web() as place:
        rows = selector(tmp_path, make)(store, ["jpeg", "png", "status-503"])
        yield rows, make(Download, store, {"rows": rows}, hosts={HOST: place}, retries=0)


def cut(dataset, ending):
    """Leave half of a file, as a disk that lost blocks does; returns where it lies."""
    (entry,) = (entry for entry in dataset.files if entry.name.endswith(ending))
    os.truncate(dataset.url(entry), entry.bytes // 2)
    return dataset.url(entry)


@pytest.mark.parametrize("ending", [".tar", ".parquet"])
def test_a_file_that_was_cut_after_the_commit_is_named_by_verify(fetched, ending):
    _, dataset = fetched
    assert verify(dataset) == []
    where = cut(dataset, ending)
    (line,) = verify(dataset)
    assert line.startswith(f"{where}: damaged (sha256 ")


def test_what_reads_a_file_that_was_cut_names_it_and_makes_nothing(fetched, store, make):
    rows, dataset = fetched
    where = cut(rows, ".parquet")
    with pytest.raises(StageError, match=f"{where}: .*; `unidiffuser verify` names what is damaged"):
        make(Download, store, {"rows": rows}, hosts={HOST: "127.0.0.1:9"}, timeout=1)
    where = cut(dataset, ".tar")
    with pytest.raises(StageError, match=f"{where}: .*; `unidiffuser verify` names what is damaged"):
        make(Filter, store, {"rows": dataset}, clip_scores=False)
    assert store.list("filter") in ([], ["units"])


def cut_half(path):
    os.truncate(path, path.stat().st_size // 2)


def overwrite_the_middle(path):
    """As a disk does that gives back other bytes: the end of the file, where Parquet says what is in it, is whole."""
    with open(path, "r+b") as file:
        file.seek(40)
        file.write(bytes(40))


# What reads a table of the filter's, by what it makes.
READ_BY = [
    ("scores.parquet", "looks.parquet"), ("scores.parquet", "0*.tar"), ("looks.parquet", "firsts.parquet"),
    ("looks.parquet", "drops-00000.parquet"), ("firsts.parquet", "drops-00000.parquet"), ("drops-00000.parquet", "0*.tar"),
]  # fmt: skip


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize(
    ("table", "made", "harm"), [*((*pair, cut_half) for pair in READ_BY), ("scores.parquet", "0*.tar", overwrite_the_middle)]
)
def test_a_table_of_the_filter_that_was_damaged_is_named_and_made_again(store, make, digests, table, made, harm):
    chance = random.Random(2)
    pictures = [blots(chance) for _ in range(4)]
    rows = download(store, [[sample(n, encoded(picture)) for n, picture in enumerate([*pictures, *pictures])]])
    dataset = make(Filter, store, {"rows": rows}, clip_scores=False)
    assert dataset.manifest.stats.dropped == {"near_duplicate": 4}
    store.remove(f"{dataset.folder}/manifest.json")
    units = Path(store.root, "filter", "units")
    (reader,) = units.glob(f"*/*/{made}")
    (damaged,) = units.glob(f"*/*/{table}")
    reader.with_name("unit.json").unlink()
    harm(damaged)
    with pytest.raises(StageError, match=f"^{damaged}: .*; delete {damaged.parent} and run again$"):
        make(Filter, store, {"rows": rows}, clip_scores=False)
    shutil.rmtree(damaged.parent)
    assert digests(make(Filter, store, {"rows": rows}, clip_scores=False)) == digests(dataset)


class Coin:
    """A unit of two files that are never twice the same; `interrupt` is called once the first of them is in the store."""

    def __init__(self, job, interrupt=lambda: None):
        self.job, self.interrupt = job, interrupt

    def publish(self):
        with scratch_output(self.job.store) as out:
            for name in ("heads", "tails"):
                out.path(name, 1).write_bytes(os.urandom(1000))
            publish, told = self.job.store.publish, []

            def interrupted(source, path):
                done = publish(source, path)
                if not told:
                    told.append(True)
                    self.interrupt()
                return done

            self.job.store.publish = interrupted
            return out.publish(self.job, "cd" * 12, "one", 0.0)


@pytest.mark.usefixtures("bucket")
def test_two_runs_at_the_same_unit_of_an_object_store_do_not_mix_their_files():
    """Nothing can be claimed there: the second run does the unit from beginning to end between the two files of the first."""
    jobs = [Job(Store("s3://data/coins"), "coin", "test-coin", None, {}, {}, {}) for _ in range(2)]
    winners = []
    loser = Coin(jobs[0], lambda: winners.append(Coin(jobs[1]).publish())).publish()
    assert [loser] == winners and [file.name for file in loser.files] == ["heads", "tails"]
    for file in loser.files:
        assert hashlib.sha256(jobs[0].store.read(file.path)).hexdigest() == file.sha256
    assert jobs[0].unit_done("cd" * 12) == loser
