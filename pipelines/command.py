"""The `unidiffuser` command. Torch, Ray and Prefect are imported where they are needed, so that the rest answers at once."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

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
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override a field of the recipe (repeatable; the last of a field counts).", metavar="a.b=c"),
]
JobsOption = Annotated[int, typer.Option("--jobs", min=1, help="How many nodes work at a time.")]
KeepOption = Annotated[bool, typer.Option("--keep", help="Leave the servers and the UI up until Ctrl-C.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def _nodes_of(context: typer.Context, incomplete: str) -> list[str]:
    """What a shell completes a NODE to: the nodes of the recipe that was named before it."""
    from stages.runner.recipe import RecipeError, load_recipe

    try:
        # The option that is being completed lacks its value yet, so the arguments have not been given their names.
        return [node for node in load_recipe(context.args[0]).nodes if node.startswith(incomplete)]
    except (IndexError, OSError, RecipeError):
        return []


def _node_option(name: str, words: str) -> Any:
    return typer.Option(name, help=words, metavar="NODE", autocompletion=_nodes_of)


@app.callback()
def options(debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False) -> None:
    """Common options; `main` reads them from the command line."""


@app.command(epilog="Example: unidiffuser run configs/demo.yaml --set subsets.little.filter.min_side=256")
def run(
    recipe: RecipeArgument,
    only: Annotated[list[str] | None, _node_option("--only", "Only this node (repeatable).")] = None,
    start: Annotated[str | None, _node_option("--from", "This node and what follows from it.")] = None,
    until: Annotated[str | None, _node_option("--until", "This node and what it needs.")] = None,
    force: Annotated[list[str] | None, _node_option("--force", "Make this node again (repeatable).")] = None,
    overrides: SetOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say for each node hit, stale or miss, and why.")] = False,
    jobs: JobsOption = 1,
    keep: KeepOption = False,
    store: StoreOption = "runs",
) -> None:
    """Run a recipe; what is committed and unchanged is reused."""
    from infra.store import Store
    from pipelines.commands import conduct
    from stages.runner.recipe import load_recipe

    wish = conduct.Wish(only or (), start, until, force or (), overrides or (), jobs, keep)
    loaded = load_recipe(recipe, wish.overrides)
    if dry_run:
        conduct.dry_run(loaded, Store(store), wish, console)
    else:
        raise typer.Exit(conduct.run_recipe(loaded, Store(store), wish, console))


@app.command(epilog="Example: unidiffuser demo --keep")
def demo(overrides: SetOption = None, jobs: JobsOption = 1, keep: KeepOption = False, store: StoreOption = "runs") -> None:
    """Build a little web of images, and train a model on it from metadata to samples."""
    from infra.store import Store
    from pipelines.commands import conduct
    from pipelines.commands.demo import run_demo

    raise typer.Exit(run_demo(Store(store), conduct.Wish(overrides=overrides or (), jobs=jobs, keep=keep), console))


@app.command(epilog="Example: unidiffuser status configs/demo.yaml --json")
def status(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    watch: Annotated[bool, typer.Option("--watch", help="Show it again as it changes, until Ctrl-C.")] = False,
    as_json: JsonOption = False,
    store: StoreOption = "runs",
) -> None:
    """Nodes of a recipe with fingerprints, rows, state, and where they lie."""
    from infra.store import Store
    from pipelines.commands.inspection import funnel_table, status_rows, status_table, watch_status
    from stages.runner.recipe import load_recipe

    checked = load_recipe(recipe, overrides or ())
    if watch:
        watch_status(checked, Store(store), console)
    rows = status_rows(checked, Store(store))
    if as_json:
        print(json.dumps(rows, indent=1))
    else:
        console.print(status_table(rows), funnel_table(checked, rows))


@app.command(epilog="Example: unidiffuser lineage 3f9a2c")
def lineage(dataset: DatasetArgument, as_json: JsonOption = False, store: StoreOption = "runs") -> None:
    """The tree of what made a dataset, and what it made."""
    from infra.dataset import by_prefix
    from infra.store import Store
    from pipelines.commands.inspection import lineage_tree
    from pipelines.pages.lineage import ancestors, descendants

    place = Store(store)
    found = by_prefix(place, dataset)
    up, down = ancestors(place, found), descendants(place, found)
    if as_json:
        print(json.dumps({**up.as_json("inputs"), "made": down.as_json("made")["made"]}, indent=1))
    else:
        console.print(lineage_tree("made from", up))
        console.print(lineage_tree("used by", down))


@app.command(epilog="Example: unidiffuser inspect filter/3f9a2c")
def inspect(dataset: DatasetArgument, store: StoreOption = "runs") -> None:
    """Schema, counts, a few rows, and a picture where there is one."""
    from infra.dataset import by_prefix
    from infra.store import Store
    from pipelines.commands.inspection import inspect_dataset

    inspect_dataset(by_prefix(Store(store), dataset), console)


@app.command(epilog="Example: unidiffuser verify 3f9a2c")
def verify(dataset: DatasetArgument, store: StoreOption = "runs") -> None:
    """Compare every file of a dataset with its manifest; exit code 1 and the names on damage."""
    from infra.dataset import by_prefix
    from infra.dataset import verify as problems_of
    from infra.store import Store

    found = by_prefix(Store(store), dataset)
    problems = problems_of(found)
    for problem in problems:
        print(problem)
    if problems:
        raise typer.Exit(1)
    console.print(f"{found.manifest.node} {found.manifest.fingerprint}: {len(found.files)} files are as the manifest says")


@app.command(epilog="Example: unidiffuser gc configs/demo.yaml --delete")
def gc(
    recipes: Annotated[list[Path], typer.Argument(help="Every recipe whose data is to be kept.", metavar="RECIPE...")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Keep also what `run --set` gave (repeatable).", metavar="a.b=c")
    ] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option("--keep", help="Keep this too, and all it was made from (repeatable).", metavar="DATASET"),
    ] = None,
    delete: Annotated[bool, typer.Option("--delete", help="Remove it; otherwise it is only listed.")] = False,
    as_json: JsonOption = False,
    store: StoreOption = "runs",
) -> None:
    """Datasets and units that no named recipe refers to, nor any dataset that is kept."""
    from infra.store import Store
    from pipelines.commands import garbage

    view = Console(stderr=True) if as_json else console
    found = garbage.gc(recipes, overrides or (), keep or (), Store(store), delete, view)
    if as_json:
        print(json.dumps(found, indent=1))


@app.command(epilog="Example: unidiffuser retry-failed download/3f9a2c")
def retry_failed(
    dataset: DatasetArgument,
    recipe: Annotated[
        Path | None, typer.Option("--recipe", help="Recipe that it belongs to; else the one that made it.", metavar="RECIPE")
    ] = None,
    overrides: SetOption = None,
    store: StoreOption = "runs",
) -> None:
    """Fetch again the rows of a download whose failure can heal, as a new dataset that the recipe goes on from."""
    from infra.dataset import by_prefix
    from infra.store import Store
    from pipelines.commands import retry
    from stages.runner.recipe import load_recipe

    place = Store(store)
    loaded = load_recipe(recipe, overrides or ()) if recipe else None
    raise typer.Exit(retry.retry_failed(by_prefix(place, dataset), place, loaded, console))


@app.command(
    epilog="Example: unidiffuser sample 3f9a2c --task t2i --prompt 'a large red apple on the left of a blue background' --out out"
)
def sample(
    checkpoint: CheckpointArgument,
    task: Annotated[str, typer.Option("--task", help="t2i, i2t, joint, i, t, i2t2i, t2i2t, gibbs or interpolate.")],
    prompt: Annotated[list[str] | None, typer.Option("--prompt", help="What the picture shows (repeatable).")] = None,
    image: Annotated[list[Path] | None, typer.Option("--image", help="Picture of any kind (repeatable).")] = None,
    steps: Annotated[int, typer.Option("--steps", min=1, max=999, help="Network calls a draw.")] = 50,
    guidance: Annotated[float, typer.Option("--guidance", help="Scale s of c + s (c - u); 0 is none.")] = 7.0,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the first result; the n-th has seed + n.")] = 0,
    count: Annotated[int, typer.Option("--count", min=1, help="Results of every input, or in all.")] = 1,
    condition_t: Annotated[
        int, typer.Option("--condition-t", help="Noise on the condition: 0 conditions fully, 1000 not at all.")
    ] = 0,
    sampler: Annotated[str, typer.Option("--sampler", help="dpm++2m, dpm++3m, unipc, ddim or dpm++2m-sde.")] = "dpm++2m",
    size: Annotated[int | None, typer.Option("--size", help="Pixels a side, if not those it was trained for.")] = None,
    beams: Annotated[int, typer.Option("--beams", min=1, help="Beams of the captions; 1 writes greedily.")] = 5,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Rounds of gibbs: each draws every modality once.")] = 4,
    interval: Annotated[
        tuple[int, int] | None, typer.Option("--guidance-interval", help="Guide only at timesteps from .. to.", metavar="FROM TO")
    ] = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Results drawn at once.")] = 16,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for pictures and results.jsonl.", metavar="DIR")] = None,
    device: Annotated[str, typer.Option("--device", help="auto takes CUDA where there is one.")] = "auto",
    dtype: Annotated[str, typer.Option("--dtype", help="fp32, bf16, fp16; auto: bf16 on CUDA, else fp32.")] = "auto",
    compile: Annotated[bool, typer.Option("--compile", help="Compile the network first.")] = False,
    vae: VaeOption = None,
    clip: ClipOption = None,
    text: TextOption = None,
    gpt2: Gpt2Option = None,
    as_json: JsonOption = False,
    store: StoreOption = "runs",
) -> None:
    """Draw pictures and captions from a checkpoint."""
    from infra.store import Store
    from pipelines.commands import sampling
    from pipelines.commands.checkpoints import Named

    request = sampling.Request(
        checkpoint, task, prompt or (), image or (), count, seed,
        sampling.Settings(steps, guidance, sampler, condition_t, interval, size, beams, rounds), batch, device, dtype, compile,
    )  # fmt: skip
    # Progress is no result: with --json it goes to stderr.
    view = Console(stderr=True) if as_json else console
    rows = sampling.run(request, Store(store), Named(vae, clip, text, gpt2), out, view)
    if as_json:
        print("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
        return
    console.print(sampling.results_table(rows))
    if out is not None:
        console.print(f"in {out}, with their settings in {sampling.RESULTS}", soft_wrap=True)


@app.command(epilog="Example: unidiffuser convert runs/export/3f9a2c my-pipeline --to diffusers")
def convert(
    source: Annotated[str, typer.Argument(help="CHECKPOINT as of `sample`, or a lone U-ViT: a folder or .pth.", metavar="SRC")],
    target: Annotated[Path, typer.Argument(help="Folder, or .pth file for a lone official U-ViT.", metavar="DST")],
    to: Annotated[str, typer.Option("--to", help="native, official or diffusers.", metavar="LAYOUT")],
    heads: Annotated[int | None, typer.Option("--heads", min=1, help="Heads of an official U-ViT, if not width / 64.")] = None,
    vae: VaeOption = None,
    clip: ClipOption = None,
    text: TextOption = None,
    gpt2: Gpt2Option = None,
    store: StoreOption = "runs",
) -> None:
    """Write a checkpoint in another layout: ours, that of the official files, or a pipeline of diffusers."""
    from infra.store import Store
    from pipelines.commands import checkpoints

    with console.status(f"converting {source}"):
        checkpoints.convert(source, target, to, Store(store), checkpoints.Named(vae, clip, text, gpt2), heads)
    console.print(f"{to}: {target}", soft_wrap=True)


@app.command(epilog="Example: unidiffuser up --store runs")
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


@app.command(epilog="Example: unidiffuser deploy configs/demo.yaml")
def deploy(recipe: RecipeArgument, overrides: SetOption = None, store: StoreOption = "runs") -> None:
    """Register a recipe on the Prefect server: a deployment of all and one of every node, with its schedules.

    Pools of type docker and kubernetes take an image of `infra/Dockerfile` as `deploy.pool.variables.image`.
    """
    from infra.external import state_folder
    from infra.store import Store
    from pipelines.commands.conduct import deploy_recipe
    from stages.runner.recipe import load_recipe

    place = Store(store)
    deploy_recipe(load_recipe(recipe, overrides or ()), place, state_folder(place), console)


@app.command(epilog="Example: unidiffuser down --store runs")
def down(store: StoreOption = "runs") -> None:
    """Stop what `up` has started, and nothing else; runs on the worker are interrupted first."""
    from infra.external import state_folder
    from infra.store import Store
    from pipelines.servers.machine import bring_down

    bring_down(state_folder(Store(store)), lambda text: console.print(text, soft_wrap=True))


@app.command(epilog="Example: unidiffuser ui --store runs")
def ui(store: StoreOption = "runs") -> None:
    """Open the Prefect UI of the servers that are up, signed in; the link is printed as well."""
    from infra.external import state_folder
    from infra.store import Store
    from pipelines.servers.machine import open_ui

    open_ui(state_folder(Store(store)), console)


def main() -> None:
    """Entry point: errors that a person can mend are one line; 2 means misuse, 1 failure, 130 an interruption."""
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
    from infra.store import StoreError
    from pipelines.commands.checkpoints import Misuse
    from stages.runner.contract import StageError
    from stages.runner.recipe import RecipeError

    if isinstance(error, RecipeError | Misuse):
        return 2
    return 1 if isinstance(error, StageError | StoreError | ServerError | OSError) else 0


if __name__ == "__main__":
    main()
