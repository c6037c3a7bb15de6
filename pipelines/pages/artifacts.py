"""The pages that a run leaves in the Prefect UI, as Markdown: one a version of a dataset, and the run's graph."""

from __future__ import annotations

import json
import re

from prefect.artifacts import create_link_artifact, create_markdown_artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import ArtifactCollection
from prefect.context import TaskRunContext

from infra.dataset import Manifest, find
from infra.processes import ServerError
from pipelines.flows.run import Outcome, Run
from pipelines.pages.harmless import harmless
from pipelines.pages.lineage import artifact_key, artifact_link, maker, mermaid, version_link
from pipelines.pages.markdown import table
from pipelines.pages.origins import funnel, inputs, own_graph
from pipelines.pages.pictures import pictures, thumbnails
from pipelines.pages.results import results
from pipelines.pages.scores import scores_section
from pipelines.pages.versions import add_user, find_others, newest, page_name
from stages.catalog import stage_class
from stages.runner.graph import Planned, changes

# How many versions of a node its page lists.
VERSIONS = 20


def publish_page(run: Run, planned: Planned, outcome: Outcome) -> None:
    """Publish a dataset's page under its node's key, and put the dataset on the pages of those that it was made from.

    A version that has the newest page already gets no second one: the run is given a link to it, without a key, so that its graph
    and its list of artifacts show the dataset and the history of the node stays one of versions.
    """
    with harmless(f"the page of {planned.name}"):
        assert outcome.dataset is not None
        key, name = artifact_key(run.recipe.name, planned.name), page_name(planned.stage, planned.fingerprint)
        with get_client(sync_client=True) as client:
            before = newest(client, [key]).get(key)
            if before is not None and before.description == name:
                run.pages[planned.name] = str(before.latest_id)
                create_link_artifact(version_link(run.pages[planned.name]), name, description=f"{outcome.result}: {name}")
                return
            find_others(client, run)
            page = str(create_markdown_artifact(dataset_page(run, planned, outcome, before), key, name))
            run.pages[planned.name] = page
            for node in planned.input_nodes.values():
                dataset = find(run.store, run.planned[node].stage, run.planned[node].fingerprint)
                if node in run.pages and dataset is not None:
                    add_user(client, run.pages[node], dataset.manifest, outcome.dataset.manifest, version_link(page))


def publish_run_page(run: Run) -> None:
    """Publish the page of a whole run under the recipe's key."""
    with harmless("the page of the run"):
        create_markdown_artifact(run_page(run), artifact_key(run.recipe.name, "lineage"), "datasets of a run")


def dataset_page(run: Run, planned: Planned, outcome: Outcome, before: ArtifactCollection | None = None) -> str:
    """A dataset's page: what came out of it, identity, where it came from, what was thrown away and why, pictures.

    Args:
        before: the newest page of the node so far, if there is one.
    """
    assert outcome.dataset is not None
    dataset, manifest = outcome.dataset, outcome.dataset.manifest
    reasons = _reasons(run, planned, outcome, before)
    parts = [
        f"# {planned.name}",
        _made(run, manifest, outcome),
        *_results(run, outcome),
        table(
            ("", ""),
            [
                ("rows in", f"{manifest.stats.rows_in:,}"),
                ("rows out", f"{manifest.stats.rows_out:,}"),
                ("files", f"{len(manifest.files):,}, {sum(f.bytes for f in manifest.files) / 1e6:,.1f} MB"),
                ("seconds to make", f"{manifest.seconds:,.1f}"),
                ("made", f"{manifest.created}, generation {manifest.generation}"),
                ("code", _code(manifest)),
                ("where", f"`{run.store.url(dataset.folder)}`"),
            ],
        ),
        *_changed(reasons, before),
        "## Made from, used by",
        own_graph(run, planned, manifest),
        *funnel(run, dataset),
        "## Dropped",
        _drops(manifest),
        "## Versions",
        "\n".join(_versions(manifest, reasons, before)),
        "## Inputs",
        inputs(run, planned),
        *pictures(dataset),
        *thumbnails(dataset),
        *_scores(run, manifest),
        *_block("Summary", {name: value for name, value in manifest.summary.items() if name != "scores"}),
        *_block("Configuration", manifest.config),
        *_block("Schema", manifest.columns),
    ]
    return "\n\n".join(parts)


def _made(run: Run, manifest: Manifest, outcome: Outcome) -> str:
    """One line: which dataset, and the run, the log and the job that made it, as far as they are known."""
    by = maker(run.store, manifest.reference()) or run.flow_run
    parts = [f"`{manifest.stage}/{manifest.fingerprint}`" + (f", made by [this run](/v2/runs/flow-run/{by})" if by else "")]
    task = TaskRunContext.get()
    if outcome.result == "made" and task is not None:
        parts.append(f"[the log of its job](/v2/runs/task-run/{task.task_run.id})")
    if job := run.job_ids.get(manifest.node):
        parts.append(f"[{job} in Ray's dashboard]({_dashboard(run)}/#/jobs/{job})")
    if live := run.pages.get(f"{manifest.node}-training"):
        parts.append(f"[losses and samples as they came]({version_link(live)})")
    return "; ".join(parts)


def _dashboard(run: Run) -> str:
    try:
        return run.servers.ray().address
    except ServerError:
        return ""


def _results(run: Run, outcome: Outcome) -> list[str]:
    assert outcome.dataset is not None
    with harmless(f"the results of {outcome.node}"):
        return results(outcome.dataset)
    return []


def run_page(run: Run) -> str:
    """The page of a whole run: its graph of datasets, then a line a node."""
    rows = [
        (
            f"[{name}]({version_link(run.pages[name]) if name in run.pages else artifact_link(run.recipe.name, name)})",
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
            table(("node", "result", "rows in", "rows out", "seconds", "fingerprint"), rows),
        ]
    )


def _code(manifest: Manifest) -> str:
    code = manifest.code
    return f"stage version {code['stage_version']}, package {code['package']}, commit {code.get('git') or 'unknown'}"


def _reasons(run: Run, planned: Planned, outcome: Outcome, before: ArtifactCollection | None) -> list[str]:
    """What differs from the dataset that the node had before: fields, inputs, files, the stage's version."""
    if outcome.result == "made" and planned.state == "stale":
        return planned.reasons
    # Made by a run that was killed before it could publish, or made long ago and now returned to.
    stage, _, fingerprint = ((before.description if before is not None else None) or "").partition(" ")
    earlier = find(run.store, stage, fingerprint) if fingerprint else None
    return changes(planned, earlier, stage_class(planned.stage).version) if earlier is not None else []


def _changed(reasons: list[str], before: ArtifactCollection | None) -> list[str]:
    if not reasons:
        return []
    against = f"Against [the version before]({version_link(str(before.latest_id))}):\n\n" if before is not None else ""
    return ["## Changed", against + "\n".join(f"- `{reason}`" for reason in reasons)]


def _versions(manifest: Manifest, reasons: list[str], before: ArtifactCollection | None) -> list[str]:
    """A line for every version that the node has had, the newest first: what made it another one than that before it.

    Older versions link to their own pages; the newest is the page itself.
    """
    listed = re.search(r"^## Versions\n\n((?:- .*\n)+)", str(before.data), re.MULTILINE) if before is not None else None
    older = listed[1].splitlines() if listed is not None else []
    if before is not None and older:
        older[0] = re.sub(r"^- (`[0-9a-f]+`)", rf"- [\1]({version_link(str(before.latest_id))})", older[0])
    because = f": {', '.join(f'`{reason}`' for reason in reasons)}" if reasons else ""
    return [f"- `{manifest.fingerprint}`, {manifest.stats.rows_out:,} rows, {manifest.created}{because}", *older][:VERSIONS]


def _drops(manifest: Manifest) -> str:
    dropped = manifest.stats.dropped
    if not dropped:
        return "Nothing."
    share = max(manifest.stats.rows_in, 1)
    return table(("reason", "rows", "share"), [(reason, f"{rows:,}", f"{rows / share:.1%}") for reason, rows in dropped.items()])


def _block(title: str, value: object) -> list[str]:
    return [f"## {title}", f"```json\n{json.dumps(value, indent=1)}\n```"] if value else []


def _scores(run: Run, manifest: Manifest) -> list[str]:
    with harmless(f"the scores of {manifest.node}"):
        return scores_section(manifest.summary.get("scores", {}), manifest.config, run.servers.state / "drawings")
    return []
