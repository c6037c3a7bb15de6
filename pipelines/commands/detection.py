"""`unidiffuser detect`: which of our marks a picture has, and which checkpoint it names."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from infra.dataset import by_prefix
from infra.store import NotThere, Store
from pipelines.commands.brief import short
from pipelines.commands.checkpoints import Misuse
from pipelines.commands.sampling import by_weights, read_image


def detect(images: Iterable[Path], store: Store, weights: Path | None) -> Iterator[dict[str, Any]]:
    """A row a picture: `mark`, which is None or a kind, a checkpoint and its dataset, and `lineage` of its text fields or None.

    Args:
        weights: folder of TrustMark's, whose mark is looked for beside ours.

    Raises:
        Misuse: weights are missing; or, behind the rows of the others, files that are no pictures that can be read.
    """
    from unidiffuser.watermarks.tiled import Tiled

    kinds, unread = [*([by_weights(weights, "cpu")] if weights is not None else []), Tiled()], []
    for path in images:
        try:
            picture = read_image(path, "")
        except Misuse as error:
            unread.append(str(error))
            continue
        found = next((mark for kind in kinds if (mark := kind.find(picture)) is not None), None)
        told = {"kind": found.name, "checkpoint": found.checkpoint, **_dataset(found.checkpoint, store)} if found else None
        yield {"image": str(path), "mark": told, "lineage": _lineage(path)}
    if unread:
        raise Misuse("; ".join(unread))


def _dataset(checkpoint: str | None, store: Store) -> dict[str, str | None]:
    """Node and dataset of a checkpoint in the store; None where it has none of that fingerprint, or several."""
    try:
        manifest = by_prefix(store, checkpoint).manifest if checkpoint is not None else None
    except NotThere:
        manifest = None
    named = f"{manifest.stage}/{manifest.fingerprint}" if manifest is not None else None
    return {"node": manifest.node if manifest is not None else None, "dataset": named}


def _lineage(path: Path) -> dict[str, Any] | None:
    """What the text fields of a PNG of ours say of the checkpoint; unlike a mark, anybody can write and remove them."""
    from PIL import Image

    try:
        with Image.open(path, formats=("PNG",)) as image:
            text = image.info
        return json.loads(text["lineage"]) if text.get("Software") == "unidiffuser" else None
    # Pillow's readers raise nearly anything of what lies beside the pixels; those have been read.
    except Exception:
        return None


def words(row: dict[str, Any]) -> str:
    """A row in a line.

    Example:
        >>> words({"image": "a.jpg", "mark": None, "lineage": None})
        'a.jpg: no mark found'
    """
    mark, lineage = row["mark"], row["lineage"]
    told = "no mark found"
    if mark is not None:
        of = f"checkpoint {mark['checkpoint']}" if mark["checkpoint"] else "a checkpoint that knew no fingerprint of its own"
        told = f"mark {mark['kind']}, {of}" + (f": {mark['node']} {mark['dataset']}" if mark["dataset"] else "")
    named = (lineage or {}).get("fingerprint") or (lineage or {}).get("sha256")
    return f"{row['image']}: {told}" + (f"; its text fields name {short(named)}" if named else "")
