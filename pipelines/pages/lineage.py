"""What made a dataset and what it made: the tree, from the manifests alone, and the graph of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from infra.dataset import Dataset, InputRef, all_datasets, find
from infra.store import Store
from pipelines.commands.brief import moment, short
from pipelines.flows.run import Run


@dataclass(frozen=True)
class Branch:
    """A dataset in a tree; `dataset` is None when its manifest is gone from the store."""

    reference: InputRef
    dataset: Dataset | None
    branches: list[Branch] = field(default_factory=list)

    @property
    def label(self) -> str:
        if self.dataset is None:
            return f"{self.reference.stage} {short(self.reference.fingerprint)} (removed)"
        manifest = self.dataset.manifest
        began = manifest.summary.get("began")
        of = f", from step {began['step']:,} of {began['node']}" if began else ""
        return f"{manifest.node} {short(manifest.fingerprint)} ({manifest.stats.rows_out:,} rows, {moment(manifest.created)}{of})"

    def as_json(self, below: str) -> dict[str, Any]:
        manifest = self.dataset.manifest if self.dataset else None
        return {
            "stage": self.reference.stage,
            "fingerprint": self.reference.fingerprint,
            "node": manifest.node if manifest else None,
            "rows": manifest.stats.rows_out if manifest else None,
            "created": manifest.created if manifest else None,
            below: [branch.as_json(below) for branch in self.branches],
        }


def ancestors(store: Store, dataset: Dataset) -> Branch:
    """The tree of what made a dataset."""

    def grow(reference: InputRef) -> Branch:
        found = find(store, reference.stage, reference.fingerprint)
        inputs = found.manifest.inputs.values() if found else ()
        return Branch(reference, found, [grow(before) for before in inputs])

    return grow(dataset.manifest.reference())


def descendants(store: Store, dataset: Dataset) -> Branch:
    """The tree of what a dataset made, from every manifest of the store."""
    users: dict[str, list[Dataset]] = {}
    for other in all_datasets(store):
        for reference in other.manifest.inputs.values():
            users.setdefault(reference.fingerprint, []).append(other)

    def grow(found: Dataset) -> Branch:
        return Branch(found.manifest.reference(), found, [grow(user) for user in users.get(found.manifest.fingerprint, ())])

    return grow(dataset)


# Colours that read on the light and the dark page.
CLASSES = (
    "classDef made fill:#2a7d4f,stroke:#1d5737,color:#fff",
    "classDef reused fill:#3b6ea8,stroke:#2a4f79,color:#fff",
    "classDef failed fill:#b23b3b,stroke:#7d2929,color:#fff",
    "classDef waiting fill:#8a8a8a,stroke:#606060,color:#fff",
)
# The UI shrinks a graph that is wider than the page, which is 552 pixels on a laptop, and its text with it: of four boxes side by
# side the text is still 12 pixels high.
COMPACT = '%%{init: {"flowchart": {"nodeSpacing": 24, "rankSpacing": 36}, "themeVariables": {"fontSize": "16px"}}}%%'
NAME = 16


def mermaid(run: Run, nodes: Sequence[str]) -> str:
    """The run's datasets and what they were made from, as a mermaid graph whose boxes lead to their artifacts.

    It goes down: recipes are long chains, a few of them side by side.
    """
    shown = list(dict.fromkeys([*(n for name in nodes for n in run.planned[name].input_nodes.values()), *nodes]))
    lines = [COMPACT, "graph TD"]
    for name in run.planned:
        if name not in shown:
            continue
        outcome = run.outcomes.get(name)
        dataset = outcome.dataset if outcome else find(run.store, run.planned[name].stage, run.planned[name].fingerprint)
        rows = f"{dataset.manifest.stats.rows_out:,} rows" if dataset else "no dataset"
        kind = outcome.result if outcome and outcome.result in ("made", "reused", "failed") else "waiting"
        if outcome is None and dataset is not None:
            kind = "reused"
        link = version_link(run.pages[name]) if name in run.pages else artifact_link(run.recipe.name, name)
        lines.append(f'  {box(name)}["{words(name)}<br/>{rows}<br/>{run.planned[name].fingerprint[:8]}"]:::{kind}')
        lines.append(f'  click {box(name)} href "{link}"')
    for name in nodes:
        lines += [f"  {box(before)} --> {box(name)}" for before in dict.fromkeys(run.planned[name].input_nodes.values())]
    return "\n".join([*lines, *(f"  {line}" for line in CLASSES)])


def box(name: str) -> str:
    """The id of a node or of a fingerprint in a graph."""
    return "n_" + name.replace("-", "_")


def words(node: str) -> str:
    """A node's name in a box; a long one on two lines."""
    return node if len(node) <= NAME else "-<br/>".join(node.rsplit("-", 1))


def version_link(page: str) -> str:
    """Where the UI shows one version, by the id of its artifact; without a host, as `artifact_link`."""
    return f"/v2/artifacts/artifact/{page}"


def artifact_key(recipe: str, node: str) -> str:
    """One key a dataset node: the key's page in the UI is the history of its versions."""
    return f"{recipe}-{node}"


def artifact_link(recipe: str, node: str) -> str:
    """Where the UI shows that history; without a host, since the server's port changes from command to command."""
    return f"/v2/artifacts/key/{artifact_key(recipe, node)}"


def announcement(reference: InputRef) -> str:
    """The store's note that a dataset was announced, and by which flow run."""
    return f"nodes/announced/{reference.stage}-{reference.fingerprint}.json"


def maker(store: Store, reference: InputRef) -> str | None:
    """The flow run that announced a dataset: the one that made it, or the first to see it after that one was killed."""
    found = store.read_json(announcement(reference))
    return found.get("flow_run") if found else None
