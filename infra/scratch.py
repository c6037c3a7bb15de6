"""Scratch folders. One that its process did not live to remove is swept by the next worker on the machine.

A folder is locked as long as its process lives, so no name or process id has to be believed: containers that share a folder for
temporary files do not see each other's processes.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir

PREFIX = "unidiffuser-scratch-"
# Seconds for which a folder is left alone: it is locked just after it is made.
YOUNG = 60.0


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder that is gone afterwards, also after an error."""
    with TemporaryDirectory(prefix=PREFIX) as folder:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            # Where nothing can be locked, nothing is swept either.
            with suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield Path(folder)
        finally:
            os.close(descriptor)


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Keep the scratch folder that a path lies in, on a machine that has not made it, and remove it with the last process there.

    Args:
        path: in a scratch folder of that name on another machine or on this one; another path is left alone.
    """
    folder = next((each for each in (path, *path.parents) if each.name.startswith(PREFIX)), None)
    if folder is None:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)
        # Whoever has made it has a lock that no other can share.
        with suppress(OSError):
            _remove_unheld(folder)


def sweep() -> None:
    """Remove the scratch folders of dead processes on this machine, as far as they are this user's."""
    for folder in Path(gettempdir()).glob(f"{PREFIX}*"):
        with suppress(OSError):
            if time.time() - folder.stat().st_mtime > YOUNG:
                _remove_unheld(folder)


def _remove_unheld(folder: Path) -> None:
    """Raises OSError where a process that lives holds it, or another user."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(descriptor)
