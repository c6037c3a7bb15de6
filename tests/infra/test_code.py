"""Which code a machine runs, and what is sent to machines that have another."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from zipfile import ZipFile

import pytest

from infra import code
from infra.code import ROOMS, code_digest, other_code, package
from stages.__main__ import main
from stages.runner.contract import Job, Phase, StageError
from stages.runner.worker import PoolWorker


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """The rooms with a file each, and what is no code of theirs."""
    for room in (*ROOMS, "tests"):
        (tmp_path / room / "__pycache__").mkdir(parents=True)
        (tmp_path / room / "one.py").write_text(f"{room} = 1\n")
        (tmp_path / room / "__pycache__" / "one.pyc").write_bytes(b"1")
    (tmp_path / "unidiffuser" / "weights.bin").write_bytes(bytes(1000))
    return tmp_path


def digest(root: Path) -> str:
    code_digest.cache_clear()
    return code_digest(root)


def test_code_is_the_same_wherever_it_lies_and_another_when_a_line_or_a_name_is(small: Path, tmp_path: Path) -> None:
    first = digest(small)
    moved = shutil.copytree(small, tmp_path / "elsewhere")
    assert digest(moved) == first and len(first) == 12
    (moved / "tests" / "one.py").write_text("2")
    (moved / "stages" / "__pycache__" / "one.pyc").write_bytes(b"2")
    assert digest(moved) == first, "neither tests nor what Python keeps is code that works"
    (moved / "stages" / "one.py").rename(moved / "stages" / "two.py")
    renamed = digest(moved)
    (moved / "stages" / "two.py").write_text("stages = 2\n")
    assert len({first, renamed, digest(moved)}) == 3


def test_a_package_holds_what_the_rooms_hold_and_is_the_same_twice(small: Path) -> None:
    name, data = package(small)
    assert package(small) == (name, data) and name.startswith("_ray_pkg_") and name.endswith(".zip")
    with ZipFile(io.BytesIO(data)) as archive:
        assert set(archive.namelist()) == {*(f"{room}/one.py" for room in ROOMS), "unidiffuser/weights.bin"}
    (small / "stages" / "one.py").write_text("other")
    assert package(small)[0] != name


def test_other_code_is_refused_by_the_job_and_by_a_worker_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert other_code(code_digest(), "here") is None
    assert main(["recipe.yaml", "a-select", "--code", "0" * 12]) == 1
    told = f"runs the code {code_digest()}, and who asks for the work the code {'0' * 12}: install the same on both, or send "
    assert capsys.readouterr().out.splitlines() == [f"error: a-select: the cluster {told}the command's with {code.SEND}=1"]
    worker = PoolWorker(Job(None, "toy", "toy-a", None, {}, {}, {}), Phase("p", worker=lambda job: None))  # type: ignore[arg-type,return-value]
    with pytest.raises(StageError, match=rf"^toy-a: the machine \S+ {told}"):
        worker.prepare("0" * 12)


@pytest.mark.parametrize(("value", "sent"), [("1", True), ("0", False), ("", False)])
def test_code_is_sent_when_it_is_asked_for(value: str, sent: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(code.SEND, value)
    assert code.is_sent() is sent
