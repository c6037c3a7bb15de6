"""`unidiffuser evaluate`: a recipe's evaluation, or one of any checkpoint on any held-out data, without servers."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console
from rich.table import Table

from infra.dataset import Dataset, InputRef, fetch_files, find
from infra.store import Store
from pipelines.commands.checkpoints import Misuse, Named, dataset_of, training_job
from pipelines.commands.conduct import Wish, run_recipe
from pipelines.commands.terminal import TerminalView
from pipelines.flows.run import Outcome, Run
from stages.catalog import LATENT_STAGES, MADE_STAGES, stage_class
from stages.runner.graph import Planned, plan_node
from stages.runner.recipe import load_recipe, lone_node
from stages.runner.run import run_stage
from unidiffuser.references import local_folder

NODE = "evaluate"
# Folder of a whole model, with the CLIP that it was trained with.
JUDGE = "clip_image"
PROGRESS = "@progress "


@dataclass(frozen=True)
class Request:
    """What the person asked for; `settings` are fields of evaluate as ``a.b=c``."""

    target: str
    prompts: str | None = None
    preset: str | None = None
    settings: list[str] = field(default_factory=list)

    @property
    def all_settings(self) -> list[str]:
        # A preset first, then what the person says besides.
        named = [f"{name}={json.dumps(value)}" for name, value in (("preset", self.preset), ("prompts", self.prompts)) if value]
        return [*named, *self.settings]


def run(request: Request, store: Store, named: Named, console: Console) -> tuple[int, Dataset | None]:
    """Evaluate; gives the exit code, and the dataset that the report is in.

    Raises:
        Misuse, RecipeError: the request cannot mean anything.
        StageError, StoreError, ServerError: it cannot be done.
    """
    if request.target.endswith((".yaml", ".yml")):
        return _of_recipe(request, store, console)
    return 0, _of_checkpoint(request, store, named, console)


def _of_recipe(request: Request, store: Store, console: Console) -> tuple[int, Dataset | None]:
    overrides = [f"{NODE}.{setting}" for setting in request.all_settings]
    found: list[Dataset | None] = []

    def keep(run: Run) -> None:
        found.append(run.outcomes.get(NODE, Outcome(NODE, "not run")).dataset)

    wish = Wish(only=[NODE], overrides=overrides)
    code = run_recipe(load_recipe(request.target, overrides), store, wish, console, keep)
    return code, found[0] if found else None


def _of_checkpoint(request: Request, store: Store, named: Named, console: Console) -> Dataset:
    planned, place = _planned(request, store, named)
    if (made := find(place, planned.stage, planned.fingerprint)) is not None:
        return made
    from stages.__main__ import connect_ray

    with TerminalView(console) as view, _progress(view):
        connect_ray()
        return run_stage(planned, place, stage_class(NODE))


def _planned(request: Request, store: Store, named: Named) -> tuple[Planned, Store]:
    """The node that the evaluation is, and the store that it goes to: that of its checkpoint."""
    from unidiffuser.layouts import set_layout

    target, inputs = request.target, dict[str, Dataset]()
    values: dict[str, Any]
    if set_layout(target) is not None and not Path(target, "manifest.json").is_file():
        values = {"checkpoint": str(Path(target).resolve()), **_judge(target, named)}
    else:
        checkpoint = dataset_of(target, store)
        store = checkpoint.store
        inputs, values = _inputs(checkpoint, named)
    node = lone_node(NODE, values, request.all_settings, Path())
    references = {name: dataset.manifest.reference() for name, dataset in inputs.items()}
    # What the checks ask for: whether the captions are a codec's, or a world's own.
    own = "codec" in inputs and inputs["codec"].manifest.stage in MADE_STAGES
    return plan_node(NODE, node, references, store, {} if own else {"text-codec": ()}, {}), store


def _inputs(checkpoint: Dataset, named: Named) -> tuple[dict[str, Dataset], dict[str, Any]]:
    """The inputs of an evaluation, and which encoders go with the checkpoint."""
    if checkpoint.manifest.stage == "export":
        judge = _judge(checkpoint.where, named)
        if named.clip is None:
            # It counts by what it is now: what its record says of it, only this compares.
            with TemporaryDirectory() as scratch:
                own = [entry for entry in checkpoint.files if entry.name.startswith(f"{JUDGE}/")]
                fetch_files(checkpoint.store, own, Path(scratch))
        return {"checkpoint": checkpoint}, judge
    inputs = {"checkpoint": checkpoint, f"history.{checkpoint.manifest.node}": checkpoint}
    if (world := _world(checkpoint)) is not None:
        return inputs | {"codec": world}, {}
    job = training_job(checkpoint, named)
    return inputs | {"codec": job.inputs["codec"]}, {part: getattr(job.config, part) for part in ("vae", "clip", "text")}


def _world(checkpoint: Dataset) -> Dataset | None:
    """The world of its own that a checkpoint was trained on."""
    references: Mapping[str, InputRef] = checkpoint.manifest.inputs
    data = next(reference for name, reference in references.items() if name.startswith("data."))
    assert data.stage in LATENT_STAGES
    return find(checkpoint.store, data.stage, data.fingerprint) if data.stage in MADE_STAGES else None


def _judge(folder: str, named: Named) -> dict[str, Any]:
    """The CLIP of a whole model, which judges unless another is named."""
    try:
        own = local_folder(str(Path(folder, JUDGE)), "clip")
    except FileNotFoundError:
        own = None
    if named.clip is None and own is None:
        raise Misuse(f"{folder}: name the CLIP that judges with --clip, as `ViT-B-32/openai`: this layout has no whole one")
    return {"clip": named.clip or str(own)}


@contextmanager
def _progress(view: TerminalView) -> Iterator[None]:
    """What a stage prints for programs, as bars."""
    view.started(NODE)
    with redirect_stdout(_Lines(lambda fields: view.progress(NODE, fields))):
        yield


class _Lines(io.TextIOBase):
    """Takes lines; those of progress go to `told`."""

    def __init__(self, told: Callable[[dict[str, Any]], None]) -> None:
        self.told, self.begun = told, ""

    def write(self, text: str) -> int:
        *lines, self.begun = (self.begun + text).split("\n")
        for line in lines:
            if line.startswith(PROGRESS):
                self.told(json.loads(line.removeprefix(PROGRESS)))
        return len(text)


def as_json(dataset: Dataset) -> dict[str, Any]:
    """The report as one document, with the dataset that it is of."""
    report = json.loads(dataset.store.read(dataset.file("report.json").path))
    return {"dataset": f"{dataset.manifest.stage}/{dataset.manifest.fingerprint}", **report}


def figures_table(dataset: Dataset) -> Table:
    """A line a figure."""
    table = Table(box=None, pad_edge=False)
    for title, side in (("figure", "left"), ("value", "right"), ("samples", "right"), ("seen by", "left"), ("", "left")):
        table.add_column(title, justify=side)  # type: ignore[arg-type]
    for figure in dataset.manifest.summary["figures"]:
        table.add_row(figure["name"], f"{figure['value']:g}", f"{figure['samples']:,}", figure["by"], figure["note"])
    return table
