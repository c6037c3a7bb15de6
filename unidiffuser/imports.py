"""Libraries without what they import beside, and never use here: it takes its time, and what it makes in /tmp stays behind."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType


@contextmanager
def hidden(modules: Mapping[str, ModuleType | None]) -> Iterator[None]:
    """While here, an import of these modules gives what stands in their place, or fails where that is None."""
    before = {name: sys.modules[name] for name in modules if name in sys.modules}
    sys.modules |= modules  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in modules:
            del sys.modules[name]
        sys.modules |= before


@functools.cache
def import_open_clip() -> None:
    """To be called before what is imported from open_clip: timm, which that imports, takes wandb where it is installed.

    That makes folders in /tmp, which stay when a worker is killed, as all are in the end.
    """
    with hidden({} if "wandb" in sys.modules else {"wandb": None}):
        import open_clip  # noqa: F401
