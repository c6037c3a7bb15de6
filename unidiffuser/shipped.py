"""The weights that are shipped with this package, as files of a file system of their own: ``embedded://base/uvit/config.json``.

A path would name them where one machine has the package. So they have a name that means the same on every machine that has it.
"""

from __future__ import annotations

from typing import Any, ClassVar

from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem

from unidiffuser.references import EMBEDDED


class ShippedFiles(DirFileSystem):
    """What lies in `unidiffuser/embedded`, to be read.

    Example:
        >>> fsspec.url_to_fs("embedded://base")[0].isfile("base/uvit/config.json")
        True
    """

    protocol: ClassVar[str] = "embedded"

    def __init__(self, **_: Any) -> None:
        super().__init__(path=str(EMBEDDED), fs=LocalFileSystem())

    def info(self, path: str, **settings: Any) -> dict[str, Any]:
        """Without times: those of two installations tell nothing of whether their files are the same."""
        info = super().info(path, **settings)
        return {key: info[key] for key in ("name", "size", "type")}
