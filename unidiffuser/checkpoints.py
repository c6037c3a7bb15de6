"""What a person may mean by a checkpoint, as a local export folder: a folder in any layout, or the name of a dataset.

Stores and datasets are no business of this package. Who knows them registers a resolver under the entry point `RESOLVERS`, as the
pipeline of this project does: a context manager that takes (name, store or None, encoders or None), and yields an export folder.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import entry_points
from pathlib import Path

from unidiffuser.layouts import export_folder, set_layout
from unidiffuser.references import Encoders

RESOLVERS = "unidiffuser.checkpoints"


@contextmanager
def export_of(
    checkpoint: str | Path, store: str | None = None, encoders: Encoders | None = None, heads: int | None = None
) -> Iterator[Path]:
    """The export folder of a checkpoint, gone afterwards unless the checkpoint is such a folder itself.

    Args:
        checkpoint: a folder with a whole set in any layout; or what a resolver knows, such as a fingerprint.
        store: where datasets lie, if not where the resolver looks by itself.
        encoders: what stands beside official files, or beside a network alone; the published ones if None.
        heads: attention heads of an official U-ViT, if not width / 64.

    Raises:
        FileNotFoundError: it is neither, or a part of it is missing.
        WeightsError: it is damaged, or does not fit together.
    """
    resolvers = list(entry_points(group=RESOLVERS))
    if set_layout(checkpoint) is not None or Path(checkpoint).exists() and not resolvers:
        with export_folder(checkpoint, encoders, heads) as folder:
            yield folder
        return
    if not resolvers:
        raise FileNotFoundError(f"{checkpoint}: no such folder")
    with resolvers[0].load()(str(checkpoint), store, encoders) as folder:
        yield folder
