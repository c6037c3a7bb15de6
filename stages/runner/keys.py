"""Keys of units and of chains: a digest of all that decides the result, and of nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from stages.runner.contract import SKIP, Job, Phase, Stage, Unit, canonical, digest_of_text, result_fields, told

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


def deciding(config: BaseModel) -> dict[str, Any]:
    """What tells a configuration from others: its result fields, without those that are at their defaults.

    So a field that a later version adds makes nothing another until somebody sets it; another default is another version of the
    stage.
    """
    model, values = type(config), {}
    for name, value in result_fields(config).items():
        field = next(field for field, info in model.model_fields.items() if name in (field, info.alias))
        info = model.model_fields[field]
        default = info.get_default(call_default_factory=True, validated_data={})
        # What a model of a union is told by has but one value.
        one_of_one = get_origin(info.annotation) is Literal and len(get_args(info.annotation)) == 1
        if one_of_one or default is PydanticUndefined or told(default) != value:
            values[name] = _deciding(getattr(config, field))
    return values


def _deciding(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return deciding(value)
    return [_deciding(each) for each in value] if isinstance(value, list | tuple) else told(value)


def decisive(phase: Phase, config: Any) -> dict[str, Any]:
    """What of a configuration decides a phase's result; which shards are left out decides none of the others."""
    return {
        name: value for name, value in deciding(config).items() if name != SKIP and (phase.fields is None or name in phase.fields)
    }


def _keys(
    stage: type[Stage], phase: Phase, config: Any, weights: Mapping[str, str], inputs: Mapping[str, str], generation: int
) -> Callable[[Unit], str]:
    whole = {name: fingerprint for name, fingerprint in inputs.items() if name.split(".")[0] in stage.whole}
    # The digest of one list: what the units share is written out once, not once a unit.
    shared = canonical([stage.name, stage.version, phase.name, config, dict(weights), whole, generation])[:-1]
    return lambda unit: digest_of_text(f"{shared},{canonical([unit.name, *unit.digests])[1:]}")
