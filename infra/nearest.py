"""What a person may have meant by a name that is not there."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(wanted: str, known: Iterable[str], most: int = 3) -> str:
    """The known names that are spelled most like this one, as the end of a line; empty where nothing is known.

    Example:
        >>> nearest("flter", ["select", "filter"], most=1)
        '; nearest is filter'
    """
    near = difflib.get_close_matches(wanted, list(known), n=most, cutoff=0.0)
    return f"; nearest {'is' if len(near) == 1 else 'are'} {', '.join(near)}" if near else ""
