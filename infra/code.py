"""Which code a machine runs, and the code of this one as a package that Ray hands to machines that have another."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile, ZipInfo

ROOT = Path(__file__).parent.parent
# What works on a cluster. A command's own room stays where the command is.
ROOMS = ("examples", "infra", "stages", "training", "unidiffuser")
SEND = "UNIDIFFUSER_SEND_CODE"


def _files(root: Path) -> Iterator[Path]:
    """Every file of the rooms, weights and tables among them, in a fixed order."""
    for room in ROOMS:
        yield from sorted(path for path in (root / room).rglob("*") if path.is_file() and "__pycache__" not in path.parts)


@cache
def code_digest(root: Path = ROOT) -> str:
    """12 hex digits over names and contents of the rooms' Python files, wherever they lie."""
    digest = hashlib.sha256()
    for path in _files(root):
        if path.suffix == ".py":
            digest.update(path.relative_to(root).as_posix().encode() + b"\0")
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:12]


def other_code(theirs: str, here: str) -> str | None:
    """Why work must not be done: the code `here` is not that of whoever asks for the work; None where it is.

    Example:
        >>> other_code(code_digest(), "this machine") is None
        True
    """
    if theirs == code_digest():
        return None
    return (
        f"{here} runs the code {code_digest()}, and who asks for the work the code {theirs}: install the same on both, or send "
        f"the command's with {SEND}=1"
    )


def is_sent() -> bool:
    """Whether a cluster is to run this machine's code instead of its own."""
    return os.environ.get(SEND, "") not in ("", "0")


def package(root: Path = ROOT) -> tuple[str, bytes]:
    """The rooms as a ZIP, and the name under which Ray keeps it; equal code gives equal bytes."""
    buffer = io.BytesIO()
    with ZipFile(buffer, "w", ZIP_DEFLATED) as archive:
        for path in _files(root):
            # A fixed time; by default it is the earliest that a ZIP can tell.
            entry = ZipInfo(path.relative_to(root).as_posix())
            entry.external_attr, entry.compress_type = 0o644 << 16, ZIP_DEFLATED
            archive.writestr(entry, path.read_bytes())
    return f"_ray_pkg_{hashlib.sha256(buffer.getvalue()).hexdigest()[:32]}.zip", buffer.getvalue()
