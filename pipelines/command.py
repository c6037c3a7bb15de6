"""The `unidiffuser` command. Torch, Ray and Prefect are imported where they are needed, so that the rest answers at once."""

from __future__ import annotations

import gc
import os
import signal
import sys
from typing import Annotated

import typer

from pipelines import DEBUG
from pipelines.cli import data, machine, models, recipes
from pipelines.cli.options import app, console

__all__ = ["app", "console", "main"]

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
    if debug := "--debug" in arguments:
        # Jobs are started by code that knows no command line.
        os.environ[DEBUG] = "1"
    # A terminal that closes, or a `kill`, ends the command as Ctrl-C does: with the servers stopped.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(130))
    try:
        sys.exit(
            app(args=[argument for argument in arguments if argument != "--debug"] or ["--help"], standalone_mode=False) or 0
        )
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        from infra.queries import said
        from infra.store_access import is_clients, store_error

        # What typer says of arguments, without its box; it has a class for each of these.
        if not debug and (told := getattr(error, "format_message", None)) is not None:
            print(said(f"error: {' '.join(told().split()).rstrip('.')}{_help_of(error)}"), file=sys.stderr)
            sys.exit(2)
        if is_clients(error):
            error = store_error("the store", error)
        if debug or not (code := _exit_code(error)):
            raise error
        print(said(f"error: {error}"), file=sys.stderr)
        sys.exit(code)


def _help_of(error: Exception) -> str:
    context = getattr(error, "ctx", None)
    return f"; see `{context.command_path} --help`" if context is not None else ""


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
