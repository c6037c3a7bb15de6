"""The pages that a run leaves in the Prefect UI, as Markdown: one a dataset, and the run's graph."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterable

from infra.dataset import Dataset, FileEntry, Manifest
from pipelines.lineage import artifact_link, maker, mermaid
from pipelines.run import Outcome, Run
from pipelines.scores import scores_section
from stages.graph import Planned

# A page of the UI is one JSON reply: pictures are shrunk until they fit, and only the first few are shown.
PICTURE_BYTES = 500_000
PICTURES = 4


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
    """A dataset's picture as a data URI of at most `PICTURE_BYTES`: as it is, or as a smaller JPEG."""
    with dataset.open(entry) as file:
        data, kind = file.read(), "png"
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
