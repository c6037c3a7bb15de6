"""The commit that manifests carry: of the checkout, or of the image that the code runs in."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from infra.commit import VARIABLE, git_commit

ROOT = Path(__file__).parent.parent.parent


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), "-c", "user.name=x", "-c", "user.email=x@example.org", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_a_checkout_tells_its_own_commit_and_whether_files_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "of another image")
    git(tmp_path, "init", "--quiet")
    (tmp_path / "code.py").write_text("1")
    git(tmp_path, "add", "code.py")
    git(tmp_path, "commit", "--quiet", "--message", "one")
    assert git_commit(tmp_path) == git(tmp_path, "rev-parse", "HEAD")[:12]
    (tmp_path / "code.py").write_text("2")
    assert git_commit(tmp_path) == git(tmp_path, "rev-parse", "HEAD")[:12] + "+"


def test_an_image_tells_the_commit_that_it_was_built_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "0123456789ab+")
    assert git_commit(tmp_path) == "0123456789ab+"
    for untold in ("", None):  # a build without the argument leaves the variable empty
        monkeypatch.delenv(VARIABLE) if untold is None else monkeypatch.setenv(VARIABLE, untold)
        assert git_commit(tmp_path) is None


def test_the_image_is_told_its_commit_under_the_name_that_is_read() -> None:
    lines = (ROOT / "infra" / "Dockerfile").read_text(encoding="utf-8").splitlines()
    (argument,) = re.findall(r"--build-arg (\w+)=", "\n".join(lines))
    assert lines.index(f"ARG {argument}") < lines.index(f"ENV {VARIABLE}=${argument}")
