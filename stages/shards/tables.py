"""Parquet in the store: written with a checksum a page, which is compared whenever it is read back.

A page that was damaged after its commit is one line that names its file, never another number. Arrow neither writes these
checksums nor looks at them unless it is told to.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from infra.dataset import VERIFY
from stages.runner.contract import ATTEMPTS, Job, StageError


def write_table(table: pa.Table, path: Path, row_group_size: int | None = None) -> None:
    """Write a table of the store."""
    pq.write_table(
        table, path, compression="zstd", row_group_size=row_group_size, write_page_checksum=True,
        use_dictionary=with_dictionary(table.schema),
    )  # fmt: skip


def with_dictionary(schema: pa.Schema) -> list[str]:
    """The columns that a dictionary may make smaller, as Arrow's writers take them: all but latents, embeddings and pictures.

    Arrow looks at the size of a dictionary once in 1,024 values: of large binaries it has become megabytes by then.
    """
    return [field.name for field in schema if not (pa.types.is_binary(field.type) or pa.types.is_fixed_size_binary(field.type))]


def read_table(job: Job, path: str, columns: Sequence[str] | None = None, filters: Any = None) -> pa.Table:
    """A stored table, or some of its columns and rows, as `pyarrow.parquet.read_table` takes them.

    Raises:
        StageError: the file is not a complete Parquet file, or a page of it is damaged.
    """
    with open_table(job, path) as file:
        return pq.read_table(file, columns=columns, filters=filters, page_checksum_verification=True)


@contextmanager
def open_table(job: Job, path: str) -> Iterator[BinaryIO]:
    """A stored Parquet file, to be read in the block.

    Raises:
        StageError: what the block reads is not a complete Parquet file, or a page of it is damaged.
    """
    try:
        with job.store.ranges(path) as file:
            yield file
    except (pa.ArrowInvalid, OSError) as error:
        # What the stage made on its way is in no manifest that `verify` reads, but can be made again.
        given = any(entry.path == path for dataset in job.inputs.values() for entry in dataset.files)
        own = path.startswith((f"{job.stage}/units/", f"{job.stage}/{ATTEMPTS}/")) and not given
        fix = f"delete {job.store.url(job.unit_folder(path.split('/')[3]))} and run again" if own else VERIFY
        raise StageError(f"{job.store.url(path)}: {' '.join(str(error).split())}{_where(job, path)}; {fix}") from None


def _where(job: Job, path: str) -> str:
    """`` in row group 3``: the first that cannot be read, where that is what is wrong."""
    try:
        with job.store.ranges(path) as file:
            parquet = pq.ParquetFile(file, page_checksum_verification=True)
            for group in range(parquet.num_row_groups):
                try:
                    parquet.read_row_group(group)
                except (pa.ArrowInvalid, OSError):
                    return f" in row group {group}"
    except (pa.ArrowInvalid, OSError):
        pass
    return ""
