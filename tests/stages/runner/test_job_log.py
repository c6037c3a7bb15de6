"""How `python -m stages` ends: one error line, last; and the traceback of what nobody foresaw."""

from __future__ import annotations

from pathlib import Path

import pytest

from stages import __main__ as job
from stages.runner.contract import Bug, StageError


def ends(error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> int:
    def fail(*_: object) -> None:
        try:
            raise LookupError("deep inside")
        except LookupError as cause:
            raise error from cause

    monkeypatch.setattr(job, "run_node", fail)
    monkeypatch.setattr(job, "load_recipe", lambda *_: None)
    return job.main(["recipe.yaml", "good-select", "--store", str(tmp_path / "store"), *options])


@pytest.mark.parametrize(
    ("error", "options", "line", "traced"),
    [
        (StageError("good-select: no row is left"), (), "good-select: no row is left", False),
        (StageError("good-select: no row is left"), ("--debug",), "good-select: no row is left", True),
        (Bug("good-select: pick part-0 failed: KeyError: 'url'"), (), "good-select: pick part-0 failed: KeyError: 'url'", True),
        (ZeroDivisionError("division\nby zero"), (), "good-select: ZeroDivisionError: division by zero", True),
    ],
)
def test_a_bug_leaves_its_traceback_and_any_error_its_line_last(
    error: Exception,
    options: tuple[str, ...],
    line: str,
    traced: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert ends(error, tmp_path, monkeypatch, *options) == 1
    *before, last = capsys.readouterr().out.splitlines()
    assert last == f"error: {line}"
    assert ("LookupError: deep inside" in before) is traced and (not before or before[0].startswith("Traceback "))
