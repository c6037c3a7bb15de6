"""Room on the disks of machines: what is fetched to one must fit there, and leave room for others."""

from __future__ import annotations

import shutil
from pathlib import Path
from socket import gethostname

from infra.store import StoreError

# Never fill a disk to the brim: other programs and the stages' own scratch files need room too.
DISK_RESERVE = 512 * 2**20


class NoRoom(StoreError):
    """The disk of a local folder is too small for what is to be fetched there; the message names both, and the fix."""


def check_room(folder: Path, needed: int, what: str) -> None:
    """Whether `needed` bytes of `what` can be fetched to a local folder, which need not be there yet.

    Raises:
        NoRoom: they cannot.
    """
    there = next(above for above in (folder, *folder.absolute().parents) if above.exists())
    if (free := shutil.disk_usage(there).free) < needed + DISK_RESERVE:
        raise NoRoom(
            f"{what}: {needed / 2**30:.1f} GiB are to be fetched to {there} of the machine {gethostname()}, which has "
            f"{free / 2**30:.1f} GiB free; free some there, or point TMPDIR elsewhere"
        )
