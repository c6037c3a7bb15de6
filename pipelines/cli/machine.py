"""What stays up on this machine."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console

from pipelines.cli.options import JsonOption, StoreOption, console

group = typer.Typer()


@group.command(rich_help_panel="This machine", epilog="Example: unidiffuser up --store runs")
def up(
    pool: Annotated[
        str, typer.Option("--pool", help="Work pool (of type process) that the worker serves.", metavar="NAME")
    ] = "local",
    port: Annotated[
        int | None, typer.Option("--port", min=1024, max=65535, help="Port of the Prefect server, kept from then on.")
    ] = None,
    systemd: Annotated[
        bool, typer.Option("--systemd", help="Print a systemd user unit that does it after every reboot; start nothing.")
    ] = False,
    as_json: JsonOption = False,
    store: StoreOption = "runs",
) -> None:
    """Start a Prefect server, a worker and Ray on this machine, and leave them running.

    Says what other shells must export for `prefect` and `ray` to talk to them.
    """
    from infra.external import state_folder
    from infra.store import Store
    from pipelines.servers.machine import bring_up
    from pipelines.servers.shells import systemd_unit

    place = Store(store)
    if systemd:
        print(systemd_unit(place.root, pool, port), end="")
        return
    found = bring_up(state_folder(place), pool, port, Console(stderr=True) if as_json else console)
    if as_json:
        print(json.dumps(found, indent=1))


@group.command(rich_help_panel="This machine", epilog="Example: unidiffuser down --store runs")
def down(store: StoreOption = "runs") -> None:
    """Stop what `up` has started, and nothing else; runs on the worker are interrupted first."""
    from infra.external import state_folder
    from infra.store import Store
    from pipelines.servers.machine import bring_down

    bring_down(state_folder(Store(store)), lambda text: console.print(text, soft_wrap=True))


@group.command(rich_help_panel="This machine", epilog="Example: unidiffuser ui --store runs")
def ui(store: StoreOption = "runs") -> None:
    """Open the Prefect UI of the servers that are up, signed in; the link is printed as well."""
    from infra.external import state_folder
    from infra.store import Store
    from pipelines.servers.machine import open_ui

    open_ui(state_folder(Store(store)), console)
