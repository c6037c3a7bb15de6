"""What is known of a training from the nodes before it, while nothing is made yet: what could not be trained is refused then."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from stages.runner.contract import StageError, result_fields
from stages.train.fits import why_not
from stages.train.order import ORDER_STAYS, order_told, other_reading
from training.config import TrainConfig

ENCODERS = ("vae", "clip", "text")


def by_subset(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Subset -> the configuration of the node whose latents a training reads."""
    return {name.removeprefix("data."): node for name, node in inputs.items() if name.startswith("data.")}


def check_sizes(config: TrainConfig, data: Mapping[str, Any]) -> None:
    """Whether all latents will have one size, which the patch divides.

    Args:
        data: as `by_subset` gives it.

    Raises:
        StageError: they will not; or what tells their size cannot be read.
    """
    sizes = {subset: node.size for subset, node in data.items() if hasattr(node, "size")}
    if other := [subset for subset in sizes if sizes[subset] != next(iter(sizes.values()))]:
        first = next(iter(sizes))
        raise StageError(
            f"data: {first} is encoded at {sizes[first]} px (subsets.{first}.encode.size) and {other[0]} at {sizes[other[0]]} px "
            f"(subsets.{other[0]}.encode.size), and a training reads one size: encode both at one, or train one after the other, "
            "the second with `from`"
        )
    for subset, node in data.items():
        side = node.latent_side
        if side is not None and side % config.model.patch:
            told = f" (subsets.{subset}.encode.size {node.size}, vae {node.vae})" if subset in sizes else ""
            fits = ", ".join(str(patch) for patch in range(1, side + 1) if side % patch == 0)
            raise StageError(
                f"model.patch {config.model.patch} does not divide the {side} x {side} latents of {subset}{told}; set it to one "
                f"of {fits}"
            )


def check_encoders(data: Mapping[str, Any], encodes: Iterable[Any], latent_width: int | None) -> None:
    """Whether all latents will be of the same encoders, and of those shapes that the trainings before were of.

    Args:
        data: as `by_subset` gives it.
        encodes: the configurations of all nodes that encode, also those of the trainings before.
        latent_width: numbers of a text token, where that is known.

    Raises:
        StageError: they will not.
    """
    ours = {subset: node for subset, node in data.items() if hasattr(node, "vae")}
    if not ours:
        return
    first, *others = ours
    for subset in others:
        for kind in ENCODERS:
            one, other = getattr(ours[first], kind), getattr(ours[subset], kind)
            if one != other:
                raise StageError(
                    f"data: {first} is encoded with {one} (subsets.{first}.encode.{kind}) and {subset} with {other} "
                    f"(subsets.{subset}.encode.{kind}), and a training reads latents of one {kind}: encode both with the same"
                )
    mine = tuple(getattr(ours[first], kind) for kind in ENCODERS)
    for encode in encodes:
        if tuple(getattr(encode, kind) for kind in ENCODERS) == mine:
            continue
        # It takes torch.
        from stages.train.foreign import made_by
        from training.weights import shapes_to_change

        then, now = (made_by(one, latent_width) for one in (encode, ours[first]))
        # What a public name makes is not known.
        known = [part for part in now if part in then]
        if wrong := shapes_to_change({part: then[part] for part in known}, {part: now[part] for part in known}):
            raise StageError(f"from: {'; '.join(wrong)}")


def check_origin(config: Any, parent: Any) -> None:
    """Whether a training can take over what it keeps of another one of its recipe, whose turn comes before.

    Args:
        config, parent: configurations of both.

    Raises:
        StageError: it cannot.
    """
    keep = config.origin.keep
    if (why := why_not(result_fields(parent), result_fields(config), keep)) is not None:
        raise StageError(why)
    if "order" in keep and (lost := other_reading(config, order_told(parent, []))):
        raise StageError(ORDER_STAYS.format(lost[0]))
