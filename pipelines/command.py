"""The `unidiffuser` command. Torch, Ray and Prefect are imported where they are needed, so that the rest answers at once."""

from __future__ import annotations

import gc
import signal
import sys
from typing import Annotated

import typer

from pipelines.cli import data, machine, models, recipes
from pipelines.cli.options import app

# New objects between two looks for garbage; Python's own 700 costs a reused run a tenth of its time.
GARBAGE_EVERY = 20_000

for each in (recipes, data, models, machine):
    app.add_typer(each.group)


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(version("unidiffuser"))
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)] = False,
) -> None:
    """Common options; `main` reads them from the command line."""


def main() -> None:
    """Entry point: errors that a person can mend are one line; 2 means misuse, 1 failure, 130 an interruption."""
    # Most of a short command is imports, which make many objects and no garbage.
    gc.set_threshold(GARBAGE_EVERY)
    arguments = sys.argv[1:]
    debug = "--debug" in arguments
    # A terminal that closes, or a `kill`, ends the command as Ctrl-C does: with the servers stopped.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(130))
    try:
        app(args=[argument for argument in arguments if argument != "--debug"])
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if debug or not (code := _exit_code(error)):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(code)


def _exit_code(error: Exception) -> int:
    from infra.processes import ServerError
    from infra.store import NotThere, StoreError
    from pipelines.commands.checkpoints import Misuse
    from stages.runner.contract import StageError
    from stages.runner.recipe import RecipeError

    if isinstance(error, RecipeError | Misuse | NotThere):
        return 2
    return 1 if isinstance(error, StageError | StoreError | ServerError | OSError) else 0


if __name__ == "__main__":
    main()
