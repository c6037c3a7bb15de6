"""The pages that a run leaves in the Prefect UI, as Markdown: one a dataset, and the run's graph.

Pages and progress tell of the work: what goes wrong in them is a warning in the run's log, and never fails a node.
"""

from __future__ import annotations

import base64
import io
import json
import logging
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

from prefect.artifacts import create_markdown_artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactCollectionFilter, ArtifactCollectionFilterKey
from prefect.client.schemas.objects import ArtifactCollection
from prefect.exceptions import MissingContextError
from prefect.logging import get_run_logger

from infra.dataset import Dataset, FileEntry, Manifest, find
from pipelines.flows.run import Outcome, Run
from pipelines.pages.lineage import artifact_key, artifact_link, maker, mermaid
from pipelines.pages.scores import scores_section
from stages.catalog import stage_class
from stages.runner.graph import Planned, changes
from stages.shards.tar import Sample, read_samples

# A page of the UI is one JSON reply: pictures are shrunk until they fit, and only the first few are shown.
PICTURE_BYTES = 500_000
PICTURES = 4
# Of a dataset of images: how many are shown, and how large, in pixels.
THUMBNAILS = 6
THUMBNAIL_SIDE = 160
CAPTION = 80
# How many versions of a node its page lists.
VERSIONS = 20
_MARKUP = frozenset("|<>&`*_[]()!#\\~$")


@contextmanager
def harmless(what: str) -> Iterator[None]:
    """Turns an error of what only tells of the work into a warning in the log of the run, where there is one."""
    try:
        yield
    except Exception as error:
        log: Any
        try:
            log = get_run_logger()
        except MissingContextError:
            log = logging.getLogger("pipelines")
        log.warning("%s cannot be shown: %s: %s", what, type(error).__name__, error)


def publish_page(run: Run, planned: Planned, outcome: Outcome) -> None:
    """Publish a dataset's page under its node's key.

    A reused dataset is published again, or the run's graph and list of artifacts would lack it; so the page itself lists the
    node's versions, which it takes over from the newest page of the key.
    """
    with harmless(f"the page of {planned.name}"):
        key = artifact_key(run.recipe.name, planned.name)
        with get_client(sync_client=True) as client:
            asked = ArtifactCollectionFilter(key=ArtifactCollectionFilterKey(any_=[key]))
            before = next(iter(client.read_latest_artifacts(artifact_filter=asked, limit=1)), None)
        create_markdown_artifact(dataset_page(run, planned, outcome, before), key, _names(planned.stage, planned.fingerprint))


def publish_run_page(run: Run) -> None:
    """Publish the page of a whole run under the recipe's key."""
    with harmless("the page of the run"):
        create_markdown_artifact(run_page(run), artifact_key(run.recipe.name, "lineage"), "datasets of a run")


def dataset_page(run: Run, planned: Planned, outcome: Outcome, before: ArtifactCollection | None = None) -> str:
    """A dataset's page: identity, where it came from, what was thrown away and why, how long it took, pictures.

    Args:
        before: the newest page of the node so far, if there is one.
    """
    assert outcome.dataset is not None
    manifest = outcome.dataset.manifest
    verb = "reused; nothing that decides it has changed" if outcome.result == "reused" else "made in this run"
    parts = [
        f"# {planned.name}",
        f"`{manifest.stage}/{manifest.fingerprint}` was {verb}.",
        _table(
            ("", ""),
            [
                ("rows in", f"{manifest.stats.rows_in:,}"),
                ("rows out", f"{manifest.stats.rows_out:,}"),
                ("files", f"{len(manifest.files):,}, {sum(f.bytes for f in manifest.files) / 1e6:,.1f} MB"),
                ("seconds to make", f"{manifest.seconds:,.1f}"),
                ("made", f"{manifest.created}, generation {manifest.generation}"),
                ("code", _code(manifest)),
                ("where", f"`{run.store.url(outcome.dataset.folder)}`"),
            ],
        ),
        "## Versions",
        "\n".join(_versions(run, planned, outcome, before)),
        "## Inputs",
        _inputs(run, planned),
        "## Dropped",
        _drops(manifest),
        *_pictures(outcome.dataset),
        *thumbnails(outcome.dataset),
        *_scores(run, manifest),
        *_block("Summary", {name: value for name, value in manifest.summary.items() if name != "scores"}),
        *_block("Configuration", manifest.config),
        *_block("Schema", manifest.columns),
    ]
    return "\n\n".join(parts)


def run_page(run: Run) -> str:
    """The page of a whole run: its graph of datasets, then a line a node."""
    rows = [
        (
            f"[{name}]({artifact_link(run.recipe.name, name)})",
            outcome.result,
            f"{outcome.dataset.manifest.stats.rows_in:,}" if outcome.dataset else "",
            f"{outcome.dataset.manifest.stats.rows_out:,}" if outcome.dataset else "",
            f"{outcome.seconds:.1f}",
            f"`{run.planned[name].fingerprint}`",
        )
        for name, outcome in run.outcomes.items()
    ]
    return "\n\n".join(
        [
            f"# {run.recipe.name}",
            run.recipe.description or "The datasets of this run and what they were made from.",
            f"```mermaid\n{mermaid(run, run.nodes)}\n```",
            _table(("node", "result", "rows in", "rows out", "seconds", "fingerprint"), rows),
        ]
    )


def _table(head: Iterable[str], rows: Iterable[tuple[str, ...]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _code(manifest: Manifest) -> str:
    code = manifest.code
    return f"stage version {code['stage_version']}, package {code['package']}, commit {code.get('git') or 'unknown'}"


def _versions(run: Run, planned: Planned, outcome: Outcome, before: ArtifactCollection | None) -> list[str]:
    """A line for every version that the node has had, the newest first: what made it another one than that before it."""
    assert outcome.dataset is not None
    name = _names(planned.stage, planned.fingerprint)
    listed = re.search(r"^## Versions\n\n((?:- .*\n)+)", str(before.data), re.MULTILINE) if before is not None else None
    older = listed[1].splitlines() if listed is not None else []
    if before is not None and before.description == name and older:
        return older
    reasons = planned.reasons if outcome.result == "made" and planned.state == "stale" else []
    if before is not None and before.description != name and not reasons:
        # Made by a run that was killed before it could publish, or made long ago and now returned to.
        stage, _, fingerprint = (before.description or "").partition(" ")
        earlier = find(run.store, stage, fingerprint)
        reasons = changes(planned, earlier, stage_class(planned.stage).version) if earlier is not None else []
    because = f": {', '.join(f'`{reason}`' for reason in reasons)}" if reasons else ""
    manifest = outcome.dataset.manifest
    return [f"- `{manifest.fingerprint}`, {manifest.stats.rows_out:,} rows, {manifest.created}{because}", *older][:VERSIONS]


def _names(stage: str, fingerprint: str) -> str:
    """The description of a page in the UI, which says which version it shows."""
    return f"{stage} {fingerprint}"


def _inputs(run: Run, planned: Planned) -> str:
    # A parent is an earlier dataset of the node itself.
    nodes = {name: planned.input_nodes.get(name, planned.name) for name in planned.inputs}
    lines = []
    for name, reference in planned.inputs.items():
        page = f"[{nodes[name]}]({artifact_link(run.recipe.name, nodes[name])})"
        made = maker(run.store, reference)
        by = f", made by [this run](/v2/runs/flow-run/{made})" if made else ""
        lines.append(f"- {name}: {page} `{reference.stage}/{reference.fingerprint}`{by}")
    outside = {**planned.sources, **planned.weights}
    lines += [f"- `{name}` `{digest[:24]}`" for name, digest in list(outside.items())[:50]]
    if len(outside) > 50:
        lines.append(f"- and {len(outside) - 50} more files")
    return "\n".join(lines) or "None."


def _drops(manifest: Manifest) -> str:
    dropped = manifest.stats.dropped
    if not dropped:
        return "Nothing."
    share = max(manifest.stats.rows_in, 1)
    return _table(("reason", "rows", "share"), [(reason, f"{rows:,}", f"{rows / share:.1%}") for reason, rows in dropped.items()])


def _block(title: str, value: object) -> list[str]:
    return [f"## {title}", f"```json\n{json.dumps(value, indent=1)}\n```"] if value else []


def _scores(run: Run, manifest: Manifest) -> list[str]:
    with harmless(f"the scores of {manifest.node}"):
        return scores_section(manifest.summary.get("scores", {}), manifest.config, run.servers.state / "drawings")
    return []


def _pictures(dataset: Dataset) -> list[str]:
    shown = []
    for entry in [entry for entry in dataset.files if entry.name.endswith(".png")][:PICTURES]:
        with harmless(entry.path):
            shown.append(f"![{entry.name}]({data_uri(dataset, entry)})")
    return shown


def data_uri(dataset: Dataset, entry: FileEntry) -> str:
    """A dataset's picture, see `picture_uri`."""
    with dataset.open(entry) as file:
        return picture_uri(file.read())


def picture_uri(data: bytes) -> str:
    """A PNG as a data URI of at most `PICTURE_BYTES`: as it is, or as a smaller JPEG."""
    kind = "png"
    if len(data) * 4 / 3 > PICTURE_BYTES:
        from unidiffuser.images import open_picture

        picture, kind = open_picture(data), "jpeg"
        while True:
            buffer = io.BytesIO()
            picture.save(buffer, "JPEG", quality=85)
            data = buffer.getvalue()
            if len(data) * 4 / 3 <= PICTURE_BYTES:
                break
            picture = picture.resize((max(1, picture.width * 3 // 4), max(1, picture.height * 3 // 4)))
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def thumbnails(dataset: Dataset) -> list[str]:
    """Markdown: a few images of a dataset's shards with their captions, from as many shards as there are places."""
    shards = [entry for entry in dataset.files if entry.name.endswith(".tar")][:THUMBNAILS]
    samples: list[Sample] = []
    for entry in shards:
        # A shard that was damaged after it was committed is for `verify` to find, and no reason to go without a page.
        with harmless(entry.path), dataset.open(entry) as file:
            samples += islice(read_samples(file), -(-THUMBNAILS // len(shards)))
    shown: list[tuple[str, str]] = []
    for sample in samples[:THUMBNAILS]:
        with harmless(f"the picture {sample.key}"):
            shown.append((_thumbnail(sample), _words(sample.caption)))
    if not shown:
        return []
    pictures, captions = zip(*shown, strict=True)
    return ["## Pictures", _table(pictures, [captions])]


def _thumbnail(sample: Sample) -> str:
    from unidiffuser.images import open_picture

    picture, buffer = open_picture(sample.image), io.BytesIO()
    picture.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    picture.save(buffer, "JPEG", quality=80)
    return f"![{sample.key}](data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()})"


def _words(caption: str) -> str:
    """A caption of the web as a cell of a table: none of its characters means anything there."""
    line = " ".join(caption.split())
    line = line if len(line) <= CAPTION else line[: CAPTION - 1] + "…"
    return "".join(f"&#{ord(letter)};" if letter in _MARKUP else letter for letter in line)
