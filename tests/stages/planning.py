"""Nodes of a single stage, planned without a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from infra.dataset import Dataset
from infra.external import resolve
from infra.store import Store
from stages.runner.contract import Stage, digest_of, result_fields
from stages.runner.graph import Planned


def planned_of(stage: type[Stage], store: Store, inputs: Mapping[str, Dataset], config: Mapping[str, Any]) -> Planned:
    """The node as `stages.runner.graph.plan` plans it."""
    model = stage.Config.model_validate(config)
    references = {name: dataset.manifest.reference() for name, dataset in inputs.items()}
    sources, weights = resolve(stage.sources(model), store), stage.weights(model)
    lists = {part: resolve(patterns, store) for part, patterns in stage.lists(model).items()}
    stage.check(model, sources, lists)
    content = [
        sorted((address.rsplit("/", 1)[-1], digest) for address, digest in found.items()) for found in (sources, *lists.values())
    ]
    before = {name: reference.fingerprint for name, reference in references.items()}
    fingerprint = digest_of([stage.name, stage.version, result_fields(model), before, content, weights])
    names = {name: name for name in references}
    return Planned(
        "test", f"test-{stage.name}", stage.name, model, references, names, sources, weights, 0, fingerprint, lists=lists
    )  # fmt: skip
