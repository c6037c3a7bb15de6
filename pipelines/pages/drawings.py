"""Pictures that were drawn for a page once: a reused dataset's page needs them again, and importing matplotlib takes seconds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

from stages.runner.contract import digest_of


def drawn_once(folder: Path, draw: Callable[..., bytes], *told: Any) -> bytes:
    """What ``draw(*told)`` gives, kept in a folder under the digest of what it was told and of the file that draws.

    Args:
        told: JSON.
    """
    file = folder / f"{digest_of([Path(draw.__code__.co_filename).read_text(), draw.__name__, *told])}.png"
    try:
        return file.read_bytes()
    except FileNotFoundError:
        data = draw(*told)
    folder.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(f".{uuid4().hex}.part")
    part.write_bytes(data)
    part.replace(file)
    return data
