"""What looks like a secret among settings that others will read: by the name that it has, or by what it is."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from infra.queries import said

_NAME = re.compile(
    r"(?i)passw(or)?d|passphrase|secret|token(?!iz)|credential|private_?key|access_?key|api_?key|account_?key|auth_?string"
    r"|connection_?string|_pat$"
)
# A name that says where a secret lies, or which one it is.
_PLACE = re.compile(r"(?i)(path|file|name|dir|ref|mode|policy|url|seconds|expir\w*|type|id)$")
# Amazon's keys, keys in PEM, and tokens of GitHub, GitLab, Hugging Face, Slack, Prefect and others that begin with a mark.
_VALUE = re.compile(
    r"\b(AKIA|ASIA)[0-9A-Z]{16}\b|-----BEGIN [A-Z ]*PRIVATE KEY|\b(gh[pousr]_|github_pat_|glpat-|hf_|sk-|xox[abpr]-|pnu_)\w{16,}"
)
# What a worker fills in when it starts a run.
_FILLED = re.compile(r"^\{\{.*\}\}$")


def secrets_in(value: Any, place: str = "") -> Iterator[str]:
    """Where in nested settings something looks like a secret, as ``env.NAME``; what only refers to one does not.

    Example:
        >>> list(secrets_in({"env": {"HF_TOKEN": "abc", "RAY_AUTH_TOKEN": "{{ $RAY_AUTH_TOKEN }}", "HF_TOKEN_PATH": "/a"}}))
        ['env.HF_TOKEN']
    """
    if isinstance(value, dict):
        # As a container's environment is written in a manifest.
        if isinstance(name := value.get("name"), str) and "value" in value:
            yield from secrets_in({name: value["value"]}, place)
            return
        for key, each in value.items():
            inner = f"{place}.{key}" if place else str(key)
            if isinstance(each, str) and each and not _FILLED.match(each.strip()) and _names_one(str(key)):
                yield inner
            else:
                yield from secrets_in(each, inner)
    elif isinstance(value, list | tuple):
        for number, each in enumerate(value):
            key, equals, told = each.partition("=") if isinstance(each, str) else ("", "", "")
            named = equals and told and not _FILLED.match(told.strip()) and _names_one(key)
            yield from [f"{place}.{number}"] if named else secrets_in(each, f"{place}.{number}")
    elif isinstance(value, str) and (_VALUE.search(value) or said(value) != value):
        yield place


def _names_one(name: str) -> bool:
    return bool(_NAME.search(name)) and not _PLACE.search(name)
