"""`unidiffuser compare`: the facts, the samples, the file, and the page in the Prefect UI."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from rich.console import Console

from infra.external import state_folder
from infra.store import Store
from pipelines.commands.checkpoints import Misuse, Named
from pipelines.commands.comparison import compare, histories
from pipelines.commands.comparison_page import page
from pipelines.commands.conduct import QUIET_PREFECT, server_errors
from pipelines.commands.paired_samples import Wanted, draw
from pipelines.commands.sides import side_of
from pipelines.pages.compared_curves import curves
from pipelines.servers.machine import find_server
from stages.runner.contract import StageError


def run(one: str, other: str, store: Store, wanted: Wanted, named: Named, out: Path | None, console: Console) -> dict[str, Any]:
    """Compare two sides and write the file; returns what a script would read.

    Raises:
        Misuse, NotThere, StoreError, ServerError: with one line that says what to do.
    """
    sides = (side_of(one, store), side_of(other, store))
    file = out or state_folder(store) / "comparisons" / f"{_slug(one)}-against-{_slug(other)}.html"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    except OSError as error:
        raise Misuse(f"--out {file}: cannot be written ({error.strerror}); name another file") from None
    facts = compare(*sides)
    curve = curves([histories(side) for side in sides])
    try:
        samples = draw(sides, wanted, named, console)
    except (Misuse, StageError) as error:
        # All else can be compared without.
        samples = {}
        facts["glance"].append(f"No samples: {error}.")
    file.write_text(page(facts, curve, samples), encoding="utf-8")
    for line in facts["glance"]:
        console.print(f"- {line}", highlight=False, markup=False)
    console.print(f"The comparison: {file}", soft_wrap=True, highlight=False, markup=False)
    return facts | {"file": str(file.resolve()), "page": _published(store, facts, curve, console)}


def _published(store: Store, facts: dict[str, Any], curve: bytes | None, console: Console) -> str | None:
    """The address of the page in the UI; None where no server is up."""
    address = find_server(state_folder(store))
    if address is None:
        return None
    os.environ.update(QUIET_PREFECT)
    from pipelines.pages.comparison import publish_comparison

    with server_errors(address):
        link = f"{address}{publish_comparison(facts, curve)}"
    console.print(f"Its page in the Prefect UI: {link}", soft_wrap=True, highlight=False)
    return link


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9-]+", "-", name).strip("-")[-60:]
