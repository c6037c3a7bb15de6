"""Keys of units and of chains: a digest of all that decides the result, and of nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from stages.runner.contract import SKIP, Job, Phase, Stage, Unit, canonical, digest_of_text, result_fields

if TYPE_CHECKING:
    from stages.runner.graph import Planned


def unit_keys(stage: type[Stage], phase: Phase, job: Job, generation: int) -> Callable[[Unit], str]:
    """Unit -> hash(stage, version, phase, the config fields that decide it, weights, whole inputs, the unit's own digests).

    Of a phase by content the unit's own digests stand for configuration, weights and inputs.
    """
    if phase.by_content:
        return _keys(stage, phase, {}, {}, {}, generation)
    inputs = {name: dataset.manifest.fingerprint for name, dataset in job.inputs.items()}
    return _keys(stage, phase, decisive(phase, job.config), job.weights, inputs, generation)


def chain_key(stage: type[Stage], phase: Phase, planned: Planned) -> str:
    """The key of a chain, known before its inputs are made."""
    inputs = {name: reference.fingerprint for name, reference in planned.inputs.items()}
    keys = _keys(stage, phase, decisive(phase, planned.config), planned.weights, inputs, planned.generation)
    return keys(Unit("chain", outside_digests(planned)))


def outside_digests(planned: Planned) -> tuple[str, ...]:
    """The content of all files from outside that a node takes, whatever part they play."""
    return tuple(sorted(planned.all_sources.values()))


def decisive(phase: Phase, config: Any) -> dict[str, Any]:
    """The fields of a configuration that decide a phase's result; which shards are left out decides none of the others."""
    values = {name: value for name, value in result_fields(config).items() if name != SKIP}
    return values if phase.fields is None else {name: value for name, value in values.items() if name in phase.fields}


def _keys(
    stage: type[Stage], phase: Phase, config: Any, weights: Mapping[str, str], inputs: Mapping[str, str], generation: int
) -> Callable[[Unit], str]:
    whole = {name: fingerprint for name, fingerprint in inputs.items() if name.split(".")[0] in stage.whole}
    # The digest of one list: what the units share is written out once, not once a unit.
    shared = canonical([stage.name, stage.version, phase.name, config, dict(weights), whole, generation])[:-1]
    return lambda unit: digest_of_text(f"{shared},{canonical([unit.name, *unit.digests])[1:]}")
