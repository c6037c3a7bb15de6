"""`unidiffuser list` and `keep`: what a store holds, and what of it stays whatever the recipes say."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from infra.entries import entries, stages_in
from infra.nearest import nearest
from infra.pins import pin, pinned, unpin
from infra.store import NotThere, Store
from pipelines.commands.brief import short
from stages.catalog import STAGES

# No more is imported here than a listing needs: it is to be there at once.


def dataset_rows(store: Store, stage: str | None) -> list[dict[str, Any]]:
    """A dictionary a dataset, in the order of the stages and of time.

    Raises:
        NotThere: there is no such store or stage.
    """
    store.check_there()
    known = dict.fromkeys([*STAGES, *stages_in(store)])
    if stage is not None and stage not in known:
        raise NotThere(f"{stage}: no such stage{nearest(stage, known, 2)}")
    order = {name: number for number, name in enumerate(STAGES)}
    pins = pinned(store)
    found = entries(store, *([stage] if stage else []))
    found.sort(key=lambda entry: (order.get(entry.stage, len(order)), entry.created, entry.fingerprint))
    return [{**vars(entry), "pinned": (entry.stage, entry.fingerprint) in pins} for entry in found]


def dataset_table(rows: list[dict[str, Any]]) -> Table:
    """Six columns of fixed width and the node's, which folds: 80 characters hold them, and programs can read them."""
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("node", overflow="fold")
    for head in ("stage", "fingerprint"):
        table.add_column(head, no_wrap=True)
    for head in ("rows", "size"):
        table.add_column(head, no_wrap=True, justify="right")
    for head in ("made", "pinned"):
        table.add_column(head, no_wrap=True)
    for row in rows:
        size = "" if row["bytes"] is None else decimal(row["bytes"])
        about = (row["node"], row["stage"], short(row["fingerprint"]), f"{row['rows']:,}", size, row["created"][:10])
        table.add_row(*about, "yes" if row["pinned"] else "")
    return table


def keep(text: str, store: Store, remove: bool, console: Console) -> None:
    """Pin a dataset, or unpin it.

    Raises:
        NotThere: there is no such store or dataset, or it is not pinned.
    """
    from infra.dataset import by_prefix

    manifest = by_prefix(store, text).manifest
    name = f"{manifest.node} {manifest.stage}/{manifest.fingerprint}"
    if not remove:
        pin(store, manifest.stage, manifest.fingerprint)
        console.print(f"{name} stays, with all that it was made from, until `keep --remove`", soft_wrap=True)
    elif unpin(store, manifest.stage, manifest.fingerprint):
        console.print(f"{name} is no longer pinned", soft_wrap=True)
    else:
        raise NotThere(f"{name} is not pinned; `unidiffuser list` shows what is")
