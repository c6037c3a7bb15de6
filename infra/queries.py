"""Addresses without their secrets: a signature or a password is needed to open a file, and is no part of its name.

`without_query` gives the name that is kept, shown and sent on; `with_query` gives the address to open. The whole addresses
stand in the environment of the process alone, so that those that it starts have them, and no file has.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from typing import Any

import fsspec

# The variable: name -> address, as JSON.
QUERIES = "UNIDIFFUSER_QUERIES"
WEB = re.compile(r"https?://", re.IGNORECASE)
# User and password, and a token in place of a user. What stands alone before an @ elsewhere is a container or a mere name.
_USER = re.compile(r"(?i)(?:(?<=\bhttp://)|(?<=\bhttps://))[^\s/?#@'\"]*@|(?<=://)[^\s/?#@:'\"]*:[^\s/?#@'\"]*@")
# A query that signs its address, by the names that Amazon, Google, Azure and others give to the parts.
_SIGNED = re.compile(
    r"(?i)\?[^\s'\"<>?]*?\b(?:x-amz-\w+|x-goog-\w+|awsaccesskeyid|googleaccessid|signature|sig|token|access_token|api_?key)"
    r"=[^\s'\"<>]*"
)
# What a query leaves behind in a name: addresses that differ in nothing else are other files.
MARK = re.compile(r"#q-[0-9a-f]{8}$")
_turn = threading.Lock()
# By its name: who reads no weights need not import it.
fsspec.register_implementation("embedded", "unidiffuser.shipped.ShippedFiles")


def known() -> dict[str, str]:
    """Name -> address of all that this process has met, or was told of."""
    return dict(json.loads(os.environ.get(QUERIES, "{}")))


def without_query(address: str) -> str:
    """The name of an address, without its password and, on the web, its query; or that of the archive that it lies in."""
    return "::".join(map(_remembered, address.split("::")))


def without_user(address: str) -> str:
    """An address without the user and the password in it.

    Example:
        >>> without_user("ftp://me:secret@host/a"), without_user("abfs://container@account/a")
        ('ftp://host/a', 'abfs://container@account/a')
    """
    return _USER.sub("", address)


def of_nobody(address: str) -> str:
    """An address that all may see.

    Raises:
        ValueError: it holds a password.
    """
    if without_user(address) != address:
        raise ValueError("the address holds a password, which all who use it would see; leave that to the environment")
    return address


def with_query(name: str) -> str:
    """The address that a name stands for."""
    addresses = known()
    return "::".join(addresses.get(part, part) for part in name.split("::"))


def said(text: str) -> str:
    """A text for people, or a value to keep, without the secrets of the addresses that it holds."""
    for name, address in known().items():
        text = text.replace(address, name).replace(without_user(address), name)
        if query := address.partition("?")[2]:
            text = text.replace(f"?{query}", "")
    # Libraries write an address in other escapes than it came in.
    return _SIGNED.sub("", without_user(text))


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


def _remembered(address: str) -> str:
    bare, mark, query = without_user(address).partition("?") if WEB.match(address) else (without_user(address), "", "")
    name = f"{bare}#q-{hashlib.sha256(query.encode()).hexdigest()[:8]}" if mark else bare
    if name != address:
        with _turn:
            os.environ[QUERIES] = json.dumps(known() | {name: address})
    return name
