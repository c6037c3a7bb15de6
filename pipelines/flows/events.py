"""What other deployments can be triggered by: an event for every dataset that is committed."""

from __future__ import annotations

from prefect.events import emit_event

from infra.dataset import Dataset
from pipelines.flows.run import Run
from pipelines.pages import openlineage
from pipelines.pages.lineage import announcement

COMMITTED = "unidiffuser.dataset.committed"


def announce(run: Run, dataset: Dataset) -> None:
    """Emit `unidiffuser.dataset.committed`, and OpenLineage's events, once for a dataset, by whichever run sees it first.

    A run may be killed between the commit, which its job makes, and the event. So the store remembers what was announced:
    the next run makes up for it.

    Example of a trigger on it:
        >>> from prefect.events import DeploymentEventTrigger                      # doctest: +SKIP
        >>> DeploymentEventTrigger(expect={COMMITTED}, match=labels("demo", "little-encode"))    # doctest: +SKIP
    """
    manifest = dataset.manifest
    mark = announcement(manifest.reference())
    if run.store.exists(mark):
        return
    emit_event(
        COMMITTED,
        resource={
            "prefect.resource.id": f"unidiffuser.dataset.{manifest.stage}.{manifest.fingerprint}",
            "prefect.resource.name": f"{manifest.node} {manifest.fingerprint}",
            "unidiffuser.stage": manifest.stage,
            **labels(run.recipe.name, manifest.node),
        },
        payload={
            "recipe": run.recipe.name,
            "node": manifest.node,
            "stage": manifest.stage,
            "fingerprint": manifest.fingerprint,
            "rows": manifest.stats.rows_out,
            "where": run.store.url(dataset.folder),
        },
    )
    openlineage.send(run, dataset)
    run.store.write_json(mark, {"recipe": run.recipe.name, "node": manifest.node, "flow_run": run.flow_run})


def labels(recipe: str, node: str) -> dict[str, str]:
    """What a trigger matches the event of a recipe's node by."""
    return {"unidiffuser.recipe": recipe, "unidiffuser.node": node}
