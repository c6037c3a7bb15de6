"""Synthetic LAION metadata: deterministic, file by file, with duplicates, nulls and rows that conditions drop."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

FILE_ROWS = 1_000_000
# How many different URLs there are: of ten million rows a fifth have one that an earlier row has.
URLS = 20_000_000
WORDS = (
    "vintage red wooden chair beautiful sunset over the mountain lake portrait of a young woman with flowers blue cotton shirt "
    "for men free shipping kitchen design ideas modern house plan stock photo vector illustration isolated on white background "
    "how to make best recipe chocolate cake wedding invitation card"
).split()


def metadata_file(number: int, rows: int = FILE_ROWS) -> pa.Table:
    """The rows of a file: columns of laion2B-en joined with its scores; what a URL is decides its hash and nothing else."""
    chance = np.random.default_rng([2, number])
    which = chance.integers(0, URLS, rows)
    token = pa.array((which * np.int64(0x5851F42D4C957F2D)) >> 9)
    host = pc.cast(pa.array(which % 50_021), pa.string())
    urls = pc.binary_join_element_wise(
        "https://cdn-", host, ".images.example/wp-content/uploads/", pc.cast(token, pa.string()), "-1024x768.jpg", ""
    )
    words = pa.array(WORDS)
    captions = pc.binary_join_element_wise(*(words.take(pa.array(chance.integers(0, len(WORDS), rows))) for _ in range(9)), " ")

    def some(part: float) -> pa.Array:
        return pa.array(chance.random(rows) < part)

    def score(low: float, high: float) -> pa.Array:
        return pa.array(chance.uniform(low, high, rows).astype(np.float32), mask=chance.random(rows) < 0.02)

    def size() -> pa.Array:
        return pa.array(np.exp(chance.normal(6.3, 0.6, rows)).astype(np.int32))

    return pa.table(
        {
            "URL": pc.if_else(some(0.002), "", pc.if_else(some(0.002), "data:image/png;base64,", urls)),
            "TEXT": pc.if_else(some(0.002), "  ", captions),
            "WIDTH": size(),
            "HEIGHT": size(),
            "similarity": score(0.26, 0.45),
            "hash": pa.array(which * np.int64(-7046029254386353131)),
            "punsafe": score(0, 0.7),
            "pwatermark": score(0, 1),
        }
    )


def write_metadata(folder: Path, files: int) -> list[Path]:
    """Make the files that are not there yet; returns all."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"part-{number:05d}.parquet" for number in range(files)]
    for number, path in enumerate(paths):
        if not path.exists():
            pq.write_table(metadata_file(number), path.with_suffix(".part"), row_group_size=2**18)
            path.with_suffix(".part").rename(path)
    return paths
