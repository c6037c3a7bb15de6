"""What a checkpoint was made from, told by the manifests: what goes along with its weights wherever they go."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from infra.dataset import Dataset, InputRef, find
from infra.store import Store
from stages.runner.contract import Job


def provenance(job: Job) -> dict[str, Any]:
    """What `unidiffuser.provenance` writes beside the weights of a job's inputs `checkpoint` and `codec`.

    It holds no times: the same datasets give the same file.
    """
    checkpoint, codec = job.inputs["checkpoint"], job.inputs["codec"]
    manifest, evaluation = checkpoint.manifest, job.inputs.get("evaluation")
    inputs = {**manifest.inputs, "codec": codec.manifest.reference()}
    evaluated = {} if evaluation is None else {"evaluation": _evaluated(evaluation)}
    return evaluated | {
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


def _evaluated(evaluation: Dataset) -> dict[str, Any]:
    """Which evaluation it was, and its figures: name and value of each, and what is told beside it."""
    summary = evaluation.manifest.summary
    return {
        "fingerprint": evaluation.manifest.fingerprint,
        "figures": list(_figures(summary.get("figures", summary), ())),
    }


def _figures(found: Any, names: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """Every number of a report: one that tells its own name, or one that stands under names."""
    if isinstance(found, Mapping) and "name" in found and _is_number(found.get("value")):
        yield {name: value for name, value in found.items() if value not in (None, "")}
    elif isinstance(found, Mapping):
        for name, inside in found.items():
            yield from _figures(inside, (*names, name))
    elif isinstance(found, list):
        for inside in found:
            # Numbers in a list are a curve or a table, and no figures.
            if isinstance(inside, Mapping):
                yield from _figures(inside, names)
    elif _is_number(found):
        yield {"name": " ".join(names), "value": found}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


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
