"""Which page of the UI shows which version of a node's dataset: links that lead to exactly that one.

A node's pages share a key, and a page's description names its dataset. A version has one page, whichever runs reuse it.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import ArtifactUpdate
from prefect.client.schemas.filters import (
    ArtifactCollectionFilter,
    ArtifactCollectionFilterKey,
    ArtifactFilter,
    ArtifactFilterId,
)
from prefect.client.schemas.objects import ArtifactCollection

from infra.dataset import InputRef, Manifest
from pipelines.flows.run import Run
from pipelines.pages.lineage import artifact_key, artifact_link, box, version_link, words

# A page is read, changed and written: of two nodes that were made from one dataset, both must stay on its page.
_CHANGING = threading.Lock()
_GRAPH = re.compile(r"^```mermaid\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def page_name(stage: str, fingerprint: str) -> str:
    """The description of a page in the UI, which says which version it shows."""
    return f"{stage} {fingerprint}"


def newest(client: SyncPrefectClient, keys: Iterable[str]) -> dict[str, ArtifactCollection]:
    """The newest page of each key that has one."""
    asked = ArtifactCollectionFilter(key=ArtifactCollectionFilterKey(any_=list(keys)))
    return {str(page.key): page for page in client.read_latest_artifacts(artifact_filter=asked)}


def find_others(client: SyncPrefectClient, run: Run) -> None:
    """Note the pages of those nodes of the recipe that this run leaves out, once a run."""
    wanted = {artifact_key(run.recipe.name, node): node for node in run.planned if node not in (*run.nodes, *run.pages)}
    for key, page in newest(client, wanted).items() if wanted else ():
        planned = run.planned[wanted[key]]
        if found := _id_of(page, planned.stage, planned.fingerprint):
            run.pages[planned.name] = found


def _id_of(page: ArtifactCollection, stage: str, fingerprint: str) -> str | None:
    """The newest page itself, or that of an older version in its list."""
    if page.description == page_name(stage, fingerprint):
        return str(page.latest_id)
    listed = re.search(rf"^- \[`{fingerprint}`\]\(/v2/artifacts/artifact/([0-9a-f-]+)\)", str(page.data), re.MULTILINE)
    return listed[1] if listed else None


def link_of(run: Run, node: str, reference: InputRef) -> str:
    """Where the UI shows a dataset: the page of that version, or all pages of its node where that one is not known."""
    planned = run.planned.get(node)
    if node in run.pages and planned is not None and planned.fingerprint == reference.fingerprint:
        return version_link(run.pages[node])
    return artifact_link(run.recipe.name, node)


def add_user(client: SyncPrefectClient, page: str, made: Manifest, user: Manifest, link: str) -> None:
    """Add a dataset to the graph on the page of one that it was made from."""
    with _CHANGING:
        asked = ArtifactFilter(id=ArtifactFilterId(any_=[UUID(page)]))
        text = next((str(found.data) for found in client.read_artifacts(artifact_filter=asked)), "")
        graph = _GRAPH.search(text)
        if graph is None or f"  {box(user.fingerprint)}[" in graph[1]:
            return
        lines = f"{version_box(user, link)}\n  {box(made.fingerprint)} --> {box(user.fingerprint)}\n"
        client.update_artifact(UUID(page), ArtifactUpdate(data=text[: graph.end(1)] + lines + text[graph.end(1) :]))


def version_box(manifest: Manifest, link: str, kind: str = "reused") -> str:
    """A dataset as a box of a mermaid graph."""
    text = f"{words(manifest.node)}<br/>{manifest.stats.rows_out:,} rows<br/>{manifest.fingerprint[:8]}"
    return f'  {box(manifest.fingerprint)}["{text}"]:::{kind}\n  click {box(manifest.fingerprint)} href "{link}"'
