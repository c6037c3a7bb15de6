"""The parts of a dataset's page that say where it came from: its graph, its rows from the first on, and its inputs."""

from __future__ import annotations

from itertools import islice

from infra.dataset import Dataset, Manifest, find
from infra.store import Store
from pipelines.flows.run import Run
from pipelines.pages.lineage import CLASSES, COMPACT, box, maker, words
from pipelines.pages.markdown import table
from pipelines.pages.versions import link_of, version_box
from stages.runner.graph import Planned

# How many files from outside a page lists.
OUTSIDE = 50


def own_graph(run: Run, planned: Planned, manifest: Manifest) -> str:
    """What the dataset was made from; what is made from it is added to the page when that is made."""
    lines = [COMPACT, "graph LR", f'  {box(manifest.fingerprint)}["{words(manifest.node)}<br/>this dataset"]:::made']
    for name, reference in manifest.inputs.items():
        before = find(run.store, reference.stage, reference.fingerprint)
        if before is not None:
            lines.append(version_box(before.manifest, link_of(run, _node(run, planned, name), reference)))
            lines.append(f"  {box(reference.fingerprint)} --> {box(manifest.fingerprint)}")
    lines += [f"  {line}" for line in CLASSES]
    return "```mermaid\n" + "\n".join(dict.fromkeys(lines)) + "\n```"


def _node(run: Run, planned: Planned, name: str) -> str:
    """The node of an input, also of one that is no node of this recipe; a parent is an earlier dataset of the node itself."""
    if name in planned.input_nodes or name == "parent":
        return planned.input_nodes.get(name, planned.name)
    reference = planned.inputs[name]
    found = find(run.store, reference.stage, reference.fingerprint)
    return found.manifest.node if found is not None else planned.name


def funnel(run: Run, dataset: Dataset) -> list[str]:
    """The rows of each subset from the first row of its select on, down to the dataset."""
    manifest = dataset.manifest
    parts = []
    for chain in _chains(run.store, dataset):
        first = max(chain[0].stats.rows_in, 1)
        rows = [
            (
                link(run, step, manifest.fingerprint),
                f"{step.stats.rows_in:,}",
                f"{step.stats.rows_out:,}",
                f"{step.stats.rows_out / max(step.stats.rows_in, 1):.1%}",
                f"{step.stats.rows_out / first:.1%}",
            )
            for step in chain
        ]
        parts.append(table(("dataset", "rows in", "rows out", "kept", "of the first"), rows))
    return ["## From the first row", *parts] if parts else []


def link(run: Run, manifest: Manifest, this: str) -> str:
    if manifest.fingerprint == this:
        return f"**{manifest.node}**"
    return f"[{manifest.node}]({link_of(run, manifest.node, manifest.reference())})"


def _chains(store: Store, dataset: Dataset) -> list[list[Manifest]]:
    """From the select or the folder of each subset that a dataset has rows of, down to the dataset."""
    manifest = dataset.manifest
    sources = [ref for name, ref in manifest.inputs.items() if name in ("rows", "captions") or name.startswith("data.")]
    if not sources:
        return [] if manifest.inputs else [[manifest]]
    found = [before for ref in sources if (before := find(store, ref.stage, ref.fingerprint)) is not None]
    # Rows of several subsets meet in a training stage: its own count belongs to none of them.
    last = [manifest] if len(sources) == 1 else []
    return [[*chain, *last] for before in found for chain in _chains(store, before)]


def inputs(run: Run, planned: Planned) -> str:
    lines = []
    for name, reference in planned.inputs.items():
        node = _node(run, planned, name)
        made = maker(run.store, reference)
        by = f", made by [this run](/v2/runs/flow-run/{made})" if made else ""
        lines.append(f"- {name}: [{node}]({link_of(run, node, reference)}) `{reference.stage}/{reference.fingerprint}`{by}")
    for name, digest in planned.weights.items():
        lines.append(f"- {name}: {_encoder(planned, name)}`{digest[:24]}`")
    lines += [f"- `{name}` `{digest[:24]}`" for name, digest in islice(planned.sources.items(), OUTSIDE)]
    if len(planned.sources) > OUTSIDE:
        lines.append(f"- and {len(planned.sources) - OUTSIDE} more files")
    return "\n".join(lines) or "None."


def _encoder(planned: Planned, name: str) -> str:
    """The name of the weights, as the recipe has it."""
    named = getattr(planned.config, name, None)
    return f"`{named}` " if isinstance(named, str) else ""
