"""What `sample` can be asked for, and whether its results can be written: said before anything is loaded or drawn."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.commands.checkpoints import Misuse
from stages.runner.contract import StageError
from unidiffuser.memory import out_of_memory

if TYPE_CHECKING:
    from pipelines.commands.sampling import Request

# As of encode: no larger picture was ever trained on.
LARGEST = 4096


def check_size(size: int | None) -> None:
    """Raises Misuse: no picture is this small or large. Which sizes a model can draw is up to the model."""
    if size is not None and not 1 <= size <= LARGEST:
        raise Misuse(f"--size {size}: expected 1 to {LARGEST} pixels a side")


def check_out(out: Path) -> None:
    """Whether a folder can be made and written, as far as can be tried without leaving anything.

    Raises:
        Misuse: it cannot.
    """
    there = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not there.is_dir():
        raise Misuse(f"--out {out}: {'there is a file of that name' if there == out else f'{there} is a file'}; name a folder")
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b"\0")
    except OSError as error:
        raise Misuse(f"--out {out}: {there} cannot be written ({error.strerror}); name another folder") from None


@contextmanager
def memory_said(request: Request, drawing: bool) -> Iterator[None]:
    """Puts memory that is not enough into a line.

    Raises:
        StageError: it was not, for loading or for drawing.
    """
    try:
        yield
    except Exception as error:
        if (which := out_of_memory(error)) is None:
            raise
        size = "" if request.settings.size is None else f" (now {request.settings.size})"
        lower = f"lower --batch (now {request.batch}) or --size{size}"
        fix = lower if drawing else "take --dtype bf16, or another --device"
        raise StageError(f"{which} is not enough to {'draw' if drawing else 'load the model'}; {fix}") from error
