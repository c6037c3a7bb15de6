"""`unidiffuser plan`: what a recipe will take, as tables, and as a page in the Prefect UI where one is up."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from infra.external import state_folder
from infra.store import Store
from pipelines.commands.checkpoints import Misuse
from pipelines.commands.conduct import QUIET_PREFECT, server_errors
from pipelines.commands.terminal import Words
from pipelines.planning.calibration import calibrated
from pipelines.planning.devices import gpu_of
from pipelines.planning.foretold import foretold
from pipelines.planning.plan import Wish, asked_of, on_cluster, on_this_machine
from pipelines.planning.words import Block, blocks
from pipelines.servers.machine import find_server
from stages.runner.recipe import Recipe

# No GPU reaches its peak, and one that does next to nothing is not trained on.
LEAST_MFU = 1e-4


def wish_of(gpus: int | None, gpu: str | None, mfu: float | None, price: float | None) -> Wish:
    """What was asked, checked.

    Raises:
        Misuse: a GPU that is not known, or a number that cannot be.
    """
    if gpu is None:
        for name, value in (("--gpus", gpus), ("--mfu", mfu), ("--price", price)):
            if value is not None:
                raise Misuse(
                    f"{name} {value}: of which GPUs? name them too, such as --gpu a100-80g; without, it is for this machine"
                )
        return Wish()
    if gpus is not None and gpus < 1:
        raise Misuse(f"--gpus {gpus}: expected 1 or more")
    if mfu is not None and not LEAST_MFU <= mfu <= 1:
        raise Misuse(f"--mfu {mfu}: expected a share of the peak, above 0 and up to 1, such as 0.45")
    if price is not None and not 0 <= price < float("inf"):
        raise Misuse(f"--price {price}: expected dollars a GPU-hour, 0 or more")
    return Wish(gpu_of(gpu), gpus, mfu, price)


def make_plan(recipe: Recipe, store: Store, wish: Wish, console: Console) -> dict[str, Any]:
    """The plan of a recipe as JSON; for this machine it is measured first, which takes up to a minute.

    Raises:
        RecipeError: an encoder that the recipe names is not there.
        StageError: the measurement failed.
    """
    asked = asked_of(recipe, store)
    if wish.gpu is not None:
        return on_cluster(asked, store, wish)
    with console.status("measuring this machine, up to a minute"):
        machine = calibrated(asked)
    return on_this_machine(asked, machine.told(), foretold(asked, machine))


def show(plan: Mapping[str, Any], console: Console) -> None:
    """Print a plan as tables."""
    for block in blocks(plan):
        if block.rows:
            console.print(_table(block))
        for line in block.lines:
            console.print(line, soft_wrap=True, highlight=False, markup=False)
        console.print()


def publish(plan: Mapping[str, Any], store: Store, console: Console) -> str | None:
    """Put a plan on its recipe's page in the Prefect UI; gives the address, None where no server is up."""
    if not store.is_there() or (address := find_server(state_folder(store))) is None:
        return None
    os.environ.update(QUIET_PREFECT)
    from pipelines.pages.plan import publish_plan

    with server_errors(address):
        link = f"{address}{publish_plan(plan)}"
    console.print(f"Its page in the Prefect UI: {link}", soft_wrap=True, highlight=False)
    return link


def _table(block: Block) -> Table:
    table = Table(title=block.title, title_justify="left", title_style="bold")
    for name in block.head:
        table.add_column(name, justify="left" if name in block.words else "right")
    for row in block.rows:
        table.add_row(*(Words(cell) if name in block.words else cell for name, cell in zip(block.head, row, strict=True)))
    return table
