"""The same measure of an earlier commit: its files in a folder of their own, and which commits were compared."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]


def _git(*arguments: str) -> str:
    return subprocess.run(["git", "-C", str(ROOT), *arguments], check=True, capture_output=True, text=True).stdout.strip()


def commit_of(revision: str = "HEAD") -> str:
    """The commit of a revision; HEAD has "-changed" behind it when files were changed since."""
    changed = revision == "HEAD" and _git("status", "--porcelain", "--untracked-files=no")
    return _git("rev-parse", f"{revision}^{{commit}}") + ("-changed" if changed else "")


@contextmanager
def worktree(revision: str) -> Iterator[Path]:
    """The files of a commit, while here."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder, "before")
        _git("worktree", "add", "--quiet", "--detach", str(place), revision)
        try:
            yield place
        finally:
            _git("worktree", "remove", "--force", str(place))
