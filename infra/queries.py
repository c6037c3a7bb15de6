"""Web addresses without their queries: a signature is needed to open a file, and is no part of its name.

`without_query` gives the name that is kept, shown and sent on; `with_query` gives the address to open. The queries stand in the
environment of the process alone, so that those that it starts have them, and no file has.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections.abc import Callable
from typing import Any

import fsspec

# The variable: name -> query, as JSON.
QUERIES = "UNIDIFFUSER_QUERIES"
WEB = re.compile(r"https?://", re.IGNORECASE)
# What a query leaves behind in a name: addresses that differ in nothing else are other files.
MARK = re.compile(r"#q-[0-9a-f]{8}$")
_turn = threading.Lock()


def known() -> dict[str, str]:
    """Name -> query of all addresses that this process has met, or was told of."""
    return dict(json.loads(os.environ.get(QUERIES, "{}")))


def without_query(address: str) -> str:
    """The name of an address; one that is no web address, and lies in no archive at one, is its own."""
    return _each(address, _remembered)


def with_query(name: str) -> str:
    """The address that a name stands for."""
    queries = known()
    return _each(name, lambda part: f"{unmarked(part)}?{queries[part]}" if part in queries else part)


def said(text: str) -> str:
    """A text for people, or a value to keep, without the queries that it holds."""
    for name, query in known().items():
        text = text.replace(f"{unmarked(name)}?{query}", name).replace(f"?{query}", "")
    return text


def unsigned(value: Any) -> Any:
    """`said` of every text in JSON."""
    if isinstance(value, dict):
        return {key: unsigned(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [unsigned(each) for each in value]
    return said(value) if isinstance(value, str) else value


def unmarked(name: str) -> str:
    """A name without what tells its query from others: another signature of the same address gives the same."""
    return MARK.sub("", name)


def file_name(address: str) -> str:
    """The last part of a name, without the archive that it lies in."""
    return unmarked(address.partition("::")[0]).rsplit("/", 1)[-1]


def opened(name: str, mode: str = "rb", **settings: Any) -> Any:
    """`fsspec.open` of the address that a name stands for."""
    return fsspec.open(with_query(name), mode, **settings)


def place(name: str) -> tuple[Any, str]:
    """The file system of the address that a name stands for, and the path there."""
    fs, path = fsspec.core.url_to_fs(with_query(name))
    return fs, str(path)


def _each(address: str, change: Callable[[str], str]) -> str:
    """An address with its web addresses changed: its own, or that of the archive that it lies in."""
    return "::".join(change(part) if WEB.match(part) else part for part in address.split("::"))


def _remembered(address: str) -> str:
    bare, mark, query = address.partition("?")
    if not mark:
        return address
    name = f"{bare}#q-{hashlib.sha256(query.encode()).hexdigest()[:8]}"
    with _turn:
        os.environ[QUERIES] = json.dumps(known() | {name: query})
    return name
