"""Histograms of scores over fixed bins, so that shards can be counted apart and added up."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

# Fine enough for a threshold: 0.01 of a similarity, 0.05 of LAION's aesthetic score.
BINS = 200
# Values outside the range count in the outermost bin.
RANGES: dict[str, tuple[float, float]] = {
    "clip_similarity": (-1.0, 1.0),
    "similarity": (-1.0, 1.0),
    "punsafe": (0.0, 1.0),
    "pwatermark": (0.0, 1.0),
    "aesthetic": (0.0, 10.0),
}
# Scores of which less is better: a threshold keeps what lies below it.
UPPER = frozenset({"punsafe", "pwatermark"})
SHARES = (0.99, 0.95, 0.9, 0.75, 0.5, 0.25, 0.1)


def count(score: str, values: pa.ChunkedArray) -> list[int]:
    """Rows by bin, and the rows without a value as the last number: BINS + 1 numbers."""
    low, high = RANGES[score]
    known = values.drop_null().to_numpy().astype(np.float64)
    bins = np.clip(np.floor((known - low) / (high - low) * BINS + 1e-9), 0, BINS - 1).astype(np.int64)
    return [*np.bincount(bins, minlength=BINS).tolist(), values.null_count]


def join(counts: list[list[int]]) -> list[int]:
    return np.sum(counts, axis=0).tolist()


def histogram_of(score: str, counts: list[int]) -> dict[str, Any]:
    """What a picture of it needs: range, counts, rows without a value, and [threshold, rows that it keeps] pairs.

    The thresholds are the bin edges that keep about 99, 95, 90, 75, 50, 25 and 10 percent of the rows with a value.
    """
    low, high = RANGES[score]
    bins, total = np.array(counts[:-1]), sum(counts[:-1])
    kept = np.cumsum(bins) if score in UPPER else np.cumsum(bins[::-1])[::-1]
    edges = low + (high - low) * (np.arange(BINS) + (1 if score in UPPER else 0)) / BINS
    nearest = sorted({int(np.abs(kept - share * total).argmin()) for share in SHARES})
    at = [[round(float(edges[bin]), 4), int(kept[bin])] for bin in nearest]
    return {"low": low, "high": high, "counts": counts[:-1], "unknown": counts[-1], "rows_at": at}
