"""What stays up on this machine."""

from __future__ import annotations

from typing import Annotated

import typer

from pipelines.cli.options import StoreOption, console

group = typer.Typer()


@group.command(rich_help_panel="This machine", epilog="Example: unidiffuser up --store runs")
def up(
    pool: Annotated[
        str, typer.Option("--pool", help="Work pool (of type process) that the worker serves.", metavar="NAME")
    ] = "local",
    store: StoreOption = "runs",
) -> None:
    """Start a Prefect server, a worker and Ray on this machine, and leave them running."""
    from infra.external import state_folder
    from infra.store import Store
    from pipelines.servers.machine import bring_up

    bring_up(state_folder(Store(store)), pool, console)


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
