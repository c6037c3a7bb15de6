"""Pictures on a page: those of a dataset's files, and thumbnails of its shards.

A page of the UI is one JSON reply: pictures are shrunk until they fit, and only the first few are shown.
"""

from __future__ import annotations

import base64
import io
from itertools import islice

from infra.dataset import Dataset, FileEntry
from pipelines.pages.harmless import harmless
from pipelines.pages.markdown import table
from stages.shards.tar import Sample, read_samples

PICTURE_BYTES = 500_000
PICTURES = 4
# Of a dataset of images: how many are shown, and how large, in pixels.
THUMBNAILS = 6
THUMBNAIL_SIDE = 160
CAPTION = 80
_MARKUP = frozenset("|<>&`*_[]()!#\\~$")


def pictures(dataset: Dataset) -> list[str]:
    shown = []
    for entry in [entry for entry in dataset.files if entry.name.endswith(".png")][:PICTURES]:
        with harmless(entry.path):
            shown.append(f"![{entry.name}]({data_uri(dataset, entry)})")
    return shown


def data_uri(dataset: Dataset, entry: FileEntry) -> str:
    """A dataset's picture, see `picture_uri`."""
    with dataset.open(entry) as file:
        return picture_uri(file.read())


def picture_uri(data: bytes) -> str:
    """A PNG as a data URI of at most `PICTURE_BYTES`: as it is, or as a smaller JPEG."""
    kind = "png"
    if len(data) * 4 / 3 > PICTURE_BYTES:
        from unidiffuser.images import open_picture

        picture, kind = open_picture(data), "jpeg"
        while True:
            buffer = io.BytesIO()
            picture.save(buffer, "JPEG", quality=85)
            data = buffer.getvalue()
            if len(data) * 4 / 3 <= PICTURE_BYTES:
                break
            picture = picture.resize((max(1, picture.width * 3 // 4), max(1, picture.height * 3 // 4)))
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def thumbnails(dataset: Dataset) -> list[str]:
    """Markdown: a few images of a dataset's shards with their captions, from as many shards as there are places."""
    shards = [entry for entry in dataset.files if entry.name.endswith(".tar")][:THUMBNAILS]
    samples: list[Sample] = []
    for entry in shards:
        # A shard that was damaged after it was committed is for `verify` to find, and no reason to go without a page.
        with harmless(entry.path), dataset.open(entry) as file:
            samples += islice(read_samples(file), -(-THUMBNAILS // len(shards)))
    shown: list[tuple[str, str]] = []
    for sample in samples[:THUMBNAILS]:
        with harmless(f"the picture {sample.key}"):
            shown.append((_thumbnail(sample), _words(sample.caption)))
    if not shown:
        return []
    images, captions = zip(*shown, strict=True)
    return ["## Pictures", table(images, [captions])]


def _thumbnail(sample: Sample) -> str:
    from unidiffuser.images import open_picture

    picture, buffer = open_picture(sample.image), io.BytesIO()
    picture.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    picture.save(buffer, "JPEG", quality=80)
    return f"![{sample.key}](data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()})"


def _words(caption: str) -> str:
    """A caption of the web as a cell of a table: none of its characters means anything there."""
    line = " ".join(caption.split())
    line = line if len(line) <= CAPTION else line[: CAPTION - 1] + "…"
    return "".join(f"&#{ord(letter)};" if letter in _MARKUP else letter for letter in line)
