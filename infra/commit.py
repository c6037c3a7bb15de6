"""The commit that the running code is of."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

# An image of infra/Dockerfile has no history: it is told its commit when it is built.
VARIABLE = "UNIDIFFUSER_COMMIT"


def git_commit(root: Path = Path(__file__).parent.parent) -> str | None:
    """12 hex digits of the checkout's commit, with ``+`` when files differ from it; without a checkout, what the image was told.

    None where neither is known.
    """
    if not (root / ".git").exists():
        return os.environ.get(VARIABLE) or None
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=12", "--dirty=+"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip() or None
