"""Pictures as they come, resized and encoded as shards store them, in a box."""

from __future__ import annotations

import io
from dataclasses import fields
from typing import Any

from stages.shards.box import boxed
from stages.shards.images import ImageConfig
from stages.shards.stored import Storing
from unidiffuser.images import PictureError


class ImageResizer:
    """Turns a picture's bytes into those that a shard stores; img2dataset's interface of a resizer."""

    def __init__(self, config: ImageConfig, with_md5: bool = False):
        told = {field.name: getattr(config, field.name) for field in fields(Storing) if field.name != "with_md5"}
        self.storing = Storing(**told, with_md5=with_md5)
        self.md5: str | None = None

    def __call__(self, stream: io.BytesIO, boxes: None = None) -> tuple[Any, ...]:
        """(bytes, width, height, original width, original height, None), or five times None and the reason.

        Sizes are pixels of the picture as a person sees it. `self.md5` is then that of the stream's bytes, if it was asked for.
        """
        try:
            found = boxed(self.storing, stream.getvalue())
        except PictureError as reason:
            return None, None, None, None, None, str(reason)
        self.md5 = found.md5
        return found.image, found.width, found.height, found.original_width, found.original_height, None
