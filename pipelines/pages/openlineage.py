"""OpenLineage: every committed dataset as the run of a job, sent where openlineage-python's own environment variables say.

    OPENLINEAGE_URL=https://lineage.example                     a server, over HTTP
    OPENLINEAGE__TRANSPORT='{"type": "file", ...}'              a file, or any other transport of the library
    OPENLINEAGE_CONFIG=openlineage.yml                          all of its settings

Without any of them nothing is sent, and the library is not even imported.
"""

from __future__ import annotations

import logging
import os
import uuid
from datetime import datetime, timedelta
from importlib.metadata import version

from infra.dataset import Dataset, find
from infra.store import Store
from pipelines.flows.run import Run
from pipelines.pages.lineage import artifact_key
from stages.catalog import stage_class

NAMESPACE = "unidiffuser"


def send(run: Run, dataset: Dataset) -> None:
    """Send a START and a COMPLETE event for a dataset, if somebody wants them; a server that fails costs a warning, no more."""
    if not any(name.startswith("OPENLINEAGE_") for name in os.environ):
        return
    from openlineage.client import OpenLineageClient

    try:
        client = OpenLineageClient()
        for event in events(run, dataset):
            client.emit(event)
        client.close()
    # Transports raise whatever their libraries do; lineage elsewhere is no reason to fail a training run.
    except Exception as error:
        logging.getLogger("pipelines").warning(
            "OpenLineage: %s of %s was not sent: %s", dataset.manifest.node, run.recipe.name, error
        )


def events(run: Run, dataset: Dataset) -> list:
    """The two events of a dataset.

    A node's datasets are one dataset of OpenLineage, `RECIPE-NODE` as in the Prefect UI, whose version is the fingerprint; files
    from outside the store are inputs under the patterns that the recipe names them by.
    """
    from openlineage.client.event_v2 import InputDataset, Job, OutputDataset, RunEvent, RunState
    from openlineage.client.event_v2 import Run as LineageRun
    from openlineage.client.facet_v2 import (
        RunFacet,
        dataset_version_dataset,
        documentation_job,
        output_statistics_output_dataset,
        parent_run,
        schema_dataset,
    )

    manifest, recipe = dataset.manifest, run.recipe.name
    planned = run.planned[manifest.node]
    place = _namespace(run.store)

    def described(found: Dataset) -> dict:
        columns = [schema_dataset.SchemaDatasetFacetFields(name, kind) for name, kind in found.manifest.columns.items()]
        return {
            "version": dataset_version_dataset.DatasetVersionDatasetFacet(found.manifest.fingerprint),
            "schema": schema_dataset.SchemaDatasetFacet(columns),
        }

    inputs = []
    for name, reference in manifest.inputs.items():
        if (before := find(run.store, reference.stage, reference.fingerprint)) is not None:
            key = artifact_key(recipe, planned.input_nodes.get(name, before.manifest.node))
            inputs.append(InputDataset(place, key, facets=described(before)))
    for pattern in stage_class(planned.stage).sources(planned.config):
        inputs.append(InputDataset(*outside(pattern)))
    statistics = output_statistics_output_dataset.OutputStatisticsOutputDatasetFacet(
        manifest.stats.rows_out, sum(entry.bytes for entry in manifest.files), len(manifest.files)
    )
    output = OutputDataset(
        place, artifact_key(recipe, manifest.node), {"outputStatistics": statistics}, facets=described(dataset)
    )
    facets: dict[str, RunFacet] = {}
    if run.flow_run is not None:
        facets["parent"] = parent_run.ParentRunFacet(parent_run.Run(run.flow_run), parent_run.Job(NAMESPACE, recipe))
    ended = datetime.fromisoformat(manifest.created)
    # Of one dataset, whoever announces it: should a killed run have sent the events already, they are the same run's.
    this = LineageRun(str(uuid.uuid5(uuid.NAMESPACE_OID, f"{manifest.stage}/{manifest.fingerprint}")), facets)
    documentation = documentation_job.DocumentationJobFacet(
        f"stage {manifest.stage}, version {manifest.code.get('stage_version')}"
    )
    job = Job(NAMESPACE, artifact_key(recipe, manifest.node), {"documentation": documentation})
    producer = f"urn:unidiffuser:{version('unidiffuser')}"
    return [
        RunEvent(
            eventType=state,
            eventTime=moment.isoformat(),
            run=this,
            job=job,
            inputs=inputs,
            outputs=[output] if state == RunState.COMPLETE else [],
            producer=producer,
        )
        for state, moment in (
            (RunState.START, ended - timedelta(seconds=manifest.seconds)),
            (RunState.COMPLETE, ended),
        )
    ]


def outside(pattern: str) -> tuple[str, str]:
    """Namespace and name of files from outside, so that they are the same datasets to other producers of events.

    Of members of an archive it is the archive.

    Example:
        >>> outside("s3://bucket/metadata/*.parquet")
        ('s3://bucket', 'metadata/*.parquet')
    """
    scheme, _, place = pattern.rpartition("::")[2].rpartition("://")
    if scheme in ("", "file"):
        return "file", place
    host, _, path = place.partition("/")
    return f"{scheme}://{host}", path


def _namespace(store: Store) -> str:
    """The store, as OpenLineage names places: ``file`` or ``s3://bucket/prefix``."""
    return f"file://{store.root}" if store.local else store.root
