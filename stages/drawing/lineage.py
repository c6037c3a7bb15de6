"""What a checkpoint was made from, told by the manifests: what goes along with its weights wherever they go."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from infra.dataset import Dataset, InputRef, find
from infra.store import Store
from stages.runner.contract import Job


def provenance(job: Job) -> dict[str, Any]:
    """What `unidiffuser.provenance` writes beside the weights of a job's inputs `checkpoint` and `codec`.

    It holds no times: the same datasets give the same file.
    """
    checkpoint, codec = job.inputs["checkpoint"], job.inputs["codec"]
    manifest = checkpoint.manifest
    inputs = {**manifest.inputs, "codec": codec.manifest.reference()}
    return {
        "recipe": job.recipe,
        "node": manifest.node,
        "stage": manifest.stage,
        "fingerprint": manifest.fingerprint,
        "step": manifest.summary.get("step"),
        "weights": job.config.weights,
        "commit": manifest.code.get("git"),
        "package": manifest.code.get("package"),
        "made_from": {name: reference.fingerprint for name, reference in inputs.items()},
        "config": manifest.config,
        "datasets": list(_ancestors(job.store, inputs.values())),
    }


def _ancestors(store: Store, references: Iterable[InputRef]) -> Iterator[dict[str, Any]]:
    """The datasets and all that they were made from, each once and behind what it was made from."""
    seen = set[str]()

    def grow(references: Iterable[InputRef]) -> Iterator[dict[str, Any]]:
        for reference in references:
            if reference.fingerprint not in seen:
                seen.add(reference.fingerprint)
                dataset = find(store, reference.stage, reference.fingerprint)
                yield from grow(dataset.manifest.inputs.values() if dataset else ())
                yield _described(reference, dataset)

    return grow(references)


def _described(reference: InputRef, dataset: Dataset | None) -> dict[str, Any]:
    if dataset is None:
        return {"stage": reference.stage, "fingerprint": reference.fingerprint, "made_from": {}}
    manifest = dataset.manifest
    return {
        "node": manifest.node,
        "stage": manifest.stage,
        "fingerprint": manifest.fingerprint,
        "commit": manifest.code.get("git"),
        "rows_in": manifest.stats.rows_in,
        "rows_out": manifest.stats.rows_out,
        "dropped": dict(sorted(manifest.stats.dropped.items())),
        "made_from": {name: each.fingerprint for name, each in manifest.inputs.items()},
    }
