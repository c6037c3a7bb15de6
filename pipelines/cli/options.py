"""The application, and the arguments and options that several commands share."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

if TYPE_CHECKING:
    from infra.store import Store

app = typer.Typer(
    name="unidiffuser",
    help="From image-text metadata to a trained any-to-any model, step by step and each step only once.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
# A file or a pipe has no width of its own; tables need some.
console = Console() if sys.stdout.isatty() else Console(width=160)

StoreOption = Annotated[
    str,
    typer.Option("--store", envvar="UNIDIFFUSER_STORE", help="Folder or fsspec URL of the datasets.", metavar="STORE"),
]
RecipeArgument = Annotated[Path, typer.Argument(help="Recipe file (YAML).", metavar="RECIPE")]
DatasetArgument = Annotated[
    str, typer.Argument(help="Fingerprint or its first characters, STAGE/FINGERPRINT, or the folder's path.", metavar="DATASET")
]
CheckpointArgument = Annotated[
    str,
    typer.Argument(help="Export folder, folder in another layout, or export or train DATASET.", metavar="CHECKPOINT"),
]
VaeOption = Annotated[str | None, typer.Option("--vae", help="Autoencoder, where the checkpoint does not say.", metavar="REF")]
ClipOption = Annotated[str | None, typer.Option("--clip", help="CLIP of the images, likewise.", metavar="REF")]
TextOption = Annotated[str | None, typer.Option("--text", help="CLIP of the captions, likewise.", metavar="REF")]
Gpt2Option = Annotated[str | None, typer.Option("--gpt2", help="GPT-2 of official files.", metavar="REF")]
MarkWeightsOption = Annotated[
    Path | None, typer.Option("--mark-weights", help="Folder with TrustMark's files: its mark, not ours.", metavar="DIR")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override a field of the recipe (repeatable; the last of a field counts).", metavar="a.b=c"),
]
JobsOption = Annotated[int, typer.Option("--jobs", min=1, help="How many nodes work at a time.")]
KeepOption = Annotated[bool, typer.Option("--keep", help="Leave the servers and the UI up until Ctrl-C.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def nodes_of(context: typer.Context, incomplete: str) -> list[str]:
    """What a shell completes a NODE to: the nodes of the recipe that was named before it."""
    from stages.runner.recipe import RecipeError, load_recipe

    try:
        # The option that is being completed lacks its value yet, so the arguments have not been given their names.
        return [node for node in load_recipe(context.args[0]).nodes if node.startswith(incomplete)]
    except (IndexError, OSError, RecipeError):
        return []


def node_option(name: str, words: str) -> Any:
    return typer.Option(name, help=words, metavar="NODE", autocompletion=nodes_of)


def say_where_nothing_is(store: Store) -> None:
    """Before a first run there is nothing to read, which is no error; beside a script's JSON it must be said all the same."""
    if not store.is_there():
        print(f"{store.root}: there is no store yet; a run makes it", file=sys.stderr)
