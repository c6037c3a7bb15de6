"""The pages that a run leaves in the Prefect UI, as Markdown: one a dataset, and the run's graph."""

from __future__ import annotations

import base64
import io
import json
import tarfile
from collections.abc import Iterable
from contextlib import suppress
from itertools import islice

from infra.dataset import Dataset, FileEntry, Manifest
from pipelines.lineage import artifact_link, maker, mermaid
from pipelines.run import Outcome, Run
from pipelines.scores import scores_section
from stages.contract import StageError
from stages.graph import Planned
from stages.tar import Sample, read_samples

# A page of the UI is one JSON reply: pictures are shrunk until they fit, and only the first few are shown.
PICTURE_BYTES = 500_000
PICTURES = 4
# Of a dataset of images: how many are shown, and how large, in pixels.
THUMBNAILS = 6
THUMBNAIL_SIDE = 160
CAPTION = 80
_MARKUP = frozenset("|<>&`*_[]()!#\\~$")


def dataset_page(run: Run, planned: Planned, outcome: Outcome) -> str:
    """A dataset's page: identity, where it came from, what was thrown away and why, how long it took, pictures."""
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
        *_changes(planned, outcome),
        "## Inputs",
        _inputs(run, planned),
        "## Dropped",
        _drops(manifest),
        *_pictures(outcome.dataset),
        *thumbnails(outcome.dataset),
        *scores_section(manifest.summary.get("scores", {}), manifest.config),
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


def _changes(planned: Planned, outcome: Outcome) -> list[str]:
    """What made this version another one than the version before."""
    if outcome.result != "made" or planned.state != "stale":
        return []
    return ["## Since the version before", "\n".join(f"- `{reason}`" for reason in planned.reasons)]


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


def _pictures(dataset: Dataset) -> list[str]:
    entries = [entry for entry in dataset.files if entry.name.endswith(".png")][:PICTURES]
    return [f"![{entry.name}]({data_uri(dataset, entry)})" for entry in entries]


def data_uri(dataset: Dataset, entry: FileEntry) -> str:
    """A dataset's picture, see `picture_uri`."""
    with dataset.open(entry) as file:
        return picture_uri(file.read())


def picture_uri(data: bytes) -> str:
    """A PNG as a data URI of at most `PICTURE_BYTES`: as it is, or as a smaller JPEG."""
    kind = "png"
    if len(data) * 4 / 3 > PICTURE_BYTES:
        from PIL import Image

        picture, kind = Image.open(io.BytesIO(data)).convert("RGB"), "jpeg"
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
        with suppress(StageError, OSError, tarfile.TarError), dataset.open(entry) as file:
            samples += islice(read_samples(file), -(-THUMBNAILS // len(shards)))
    shown = samples[:THUMBNAILS]
    if not shown:
        return []
    return ["## Pictures", _table(map(_thumbnail, shown), [tuple(_words(sample.caption) for sample in shown)])]


def _thumbnail(sample: Sample) -> str:
    from PIL import Image

    picture, buffer = Image.open(io.BytesIO(sample.image)).convert("RGB"), io.BytesIO()
    picture.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    picture.save(buffer, "JPEG", quality=80)
    return f"![{sample.key}](data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()})"


def _words(caption: str) -> str:
    """A caption of the web as a cell of a table: none of its characters means anything there."""
    line = " ".join(caption.split())
    line = line if len(line) <= CAPTION else line[: CAPTION - 1] + "…"
    return "".join(f"&#{ord(letter)};" if letter in _MARKUP else letter for letter in line)
