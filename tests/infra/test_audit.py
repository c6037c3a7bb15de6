"""What `make audit` makes of the answers that its tools give, from stand-ins for these: silence is never a clean bill."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from infra import audit

CLEAN = [{"name": "numpy", "version": "2.0", "vulns": []}]
BAD = [{"name": "urllib3", "version": "1.24.1", "vulns": [{"id": "PYSEC-1"}]}]


@pytest.fixture
def uv(tmp_path: Path):
    """Makes a stand-in for uv, whose tools write these answers of pip-audit: of the known release, and of the lock file."""

    def make(known: list | None, locked: list | None, parts: int = 0) -> str:
        script = tmp_path / "uv"
        for name, answer in (("known", known), ("locked", locked)):
            if answer is not None:
                (tmp_path / name).write_text(json.dumps({"dependencies": answer}))
        script.write_text(
            f"""#!/bin/sh
case "$*" in
  *cyclonedx-py*) exit {parts};;
  *--no-deps*) answer={tmp_path}/known;;
  *) answer={tmp_path}/locked;;
esac
while [ "$1" != --output ]; do shift; done
[ -f $answer ] && cp $answer "$2" && exit 1
echo "ERROR:pip_audit._cli:could not connect" >&2
exit 1
"""
        )
        script.chmod(0o700)
        return str(script)

    return make


def audited(uv: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    code = audit.main([uv, "requirements.lock", str(folder)])
    return code, "".join(capsys.readouterr())


def test_a_clean_bill_needs_advisories_that_answer(uv, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, told = audited(uv(BAD, CLEAN), tmp_path, capsys)
    assert code == 0 and told.endswith("1 packages, 0 with advisories\n")


def test_what_is_known_is_named(uv, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, told = audited(uv(BAD, CLEAN + BAD), tmp_path, capsys)
    assert code == 1 and told.endswith("urllib3 1.24.1: PYSEC-1\n2 packages, 1 with advisories\n")


@pytest.mark.parametrize(
    ("known", "locked", "why"),
    [
        (None, CLEAN, "could not connect"),
        (BAD, None, "could not connect"),
        ([{**BAD[0], "vulns": []}], CLEAN, "they know nothing of urllib3==1.24.1, of which much is known"),
        (BAD, [*CLEAN, {"name": "ours", "skip_reason": "not found"}], "ours could not be asked about"),
    ],
)
def test_where_advisories_cannot_be_asked_nothing_counts_as_clean(
    known: list | None, locked: list | None, why: str, uv, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, told = audited(uv(known, locked), tmp_path, capsys)
    assert code == 1 and told.endswith(f"error: nothing was audited, for the advisories cannot be asked: {why}\n")


def test_without_the_list_of_parts_it_fails(uv, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, told = audited(uv(BAD, CLEAN, parts=2), tmp_path, capsys)
    assert code == 1 and told == "error: no list of parts: it ended with 2 and said nothing\n"
