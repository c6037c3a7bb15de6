"""The names that a column goes by in LAION's sets and their relatives, by the name that it has here."""

from __future__ import annotations

from collections.abc import Iterable

NAMES: dict[str, tuple[str, ...]] = {
    "url": ("URL", "url"),
    "caption": ("TEXT", "caption", "text"),
    "width": ("WIDTH", "width", "original_width"),
    "height": ("HEIGHT", "height", "original_height"),
    "similarity": ("similarity", "SIMILARITY"),
    "punsafe": ("punsafe", "PUNSAFE"),
    "pwatermark": ("pwatermark", "PWATERMARK"),
    "aesthetic": ("AESTHETIC_SCORE", "aesthetic", "aesthetic_score"),
    "language": ("LANGUAGE", "language"),
    "hash": ("hash", "HASH"),
    # Of the image's bytes, as DataComp and LAION's md5 sets have them.
    "sha256": ("sha256", "SHA256"),
    "md5": ("md5", "MD5"),
}


def column_of(name: str, columns: Iterable[str]) -> str | None:
    """Which of some columns a name means: the one that is called so, or else one that goes by another name of the same column.

    Upper and lower case are alike, except where columns differ in nothing else.
    """
    found = list(columns)
    if name in found:
        return name
    same = next(({other.lower() for other in names} for names in NAMES.values() if name.lower() in map(str.lower, names)), set())
    for wanted in ({name.lower()}, same):
        if (column := next((column for column in found if column.lower() in wanted), None)) is not None:
            return column
    return None
