"""What the model models, as a declaration: modalities, each with one timestep, made of one or more tensors.

The paper's model is ``paper_modalities()``: an image (autoencoder latent and CLIP embedding, which share a timestep) and a
text. Any other list of modalities trains and samples with the same code.

What a person sees of a modality, and its parts, are turned into each other by its codec, which it names; see `codecs`. A
codec belongs to the modality and not to a part, since it may make several parts at once, of which some are encoded and never
decoded. Network, objective and samplers need none: they see tensors and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator


class Part(BaseModel):
    """One tensor of a modality.

    The length of ``shape`` says what it is: ``(C, H, W)`` a grid, cut into patches of ``patch`` x ``patch``; ``(L, D)`` a
    sequence of L tokens; ``(D,)`` a vector, which is one token. ``weight`` is its weight in the loss, see
    ``objective.JointObjective``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
    shape: Annotated[tuple[PositiveInt, ...], Field(min_length=1, max_length=3)]
    patch: PositiveInt = 1
    weight: Annotated[float, Field(ge=0)] = 1.0

    @model_validator(mode="after")
    def _patch_divides_the_grid(self) -> Part:
        if not self.is_grid and self.patch != 1:
            raise ValueError(f"part {self.name}: only a grid (C, H, W) has patches, its shape is {self.shape}")
        if self.is_grid and (self.shape[1] % self.patch or self.shape[2] % self.patch):
            raise ValueError(f"part {self.name}: patches of {self.patch} do not divide {self.shape[1]}x{self.shape[2]}")
        return self

    @property
    def is_grid(self) -> bool:
        return len(self.shape) == 3

    @property
    def patches(self) -> tuple[int, int]:
        """Rows and columns of patches of a grid."""
        return self.shape[1] // self.patch, self.shape[2] // self.patch

    @property
    def tokens(self) -> int:
        """Number of tokens this part takes in the transformer."""
        if self.is_grid:
            return self.patches[0] * self.patches[1]
        return self.shape[0] if len(self.shape) == 2 else 1

    @property
    def token_width(self) -> int:
        """Numbers in one token: C * patch^2, or D."""
        return self.shape[0] * self.patch**2 if self.is_grid else self.shape[-1]


class Modality(BaseModel):
    """Parts that are noised together, with one timestep.

    ``codec`` names what makes the parts out of what people see, and that out of drawn parts; without one it is called like the
    modality.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
    parts: Annotated[tuple[Part, ...], Field(min_length=1)]
    codec: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")] = ""

    @model_validator(mode="before")
    @classmethod
    def _codec_of_its_name(cls, fields: Any) -> Any:
        return {"codec": fields["name"], **fields} if isinstance(fields, dict) and "name" in fields else fields


def check_modalities(modalities: Sequence[Modality]) -> None:
    """Raise ValueError unless there is a modality and the names of modalities, and of parts, are unique."""
    if not modalities:
        raise ValueError("a model needs at least one modality")
    for kind, names in (
        ("modality", [modality.name for modality in modalities]),
        ("part", [part.name for part in all_parts(modalities)]),
    ):
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"{kind} names must be unique, these are not: {', '.join(twice)}")


def all_parts(modalities: Sequence[Modality]) -> list[Part]:
    """All parts in declared order."""
    return [part for modality in modalities for part in modality.parts]


def token_order(modalities: Sequence[Modality]) -> list[Part]:
    """Parts in the order of their tokens: sequences, then vectors, then grids, each kind in declared order.

    For the paper's declaration this is the published order (text, CLIP image, patches). Grids come last because only
    their number of tokens changes with the resolution, so that the other rows of the position table never move.
    """
    kind = {2: 0, 1: 1, 3: 2}
    return sorted(all_parts(modalities), key=lambda part: kind[len(part.shape)])


def resized(modalities: Sequence[Modality], shapes: dict[str, tuple[int, ...]]) -> tuple[Modality, ...]:
    """The same declaration with other shapes for the named parts, for example another latent size.

    >>> resized(paper_modalities(), {"latent": (4, 32, 32)})[0].parts[0].tokens
    256
    """
    unknown = sorted(set(shapes) - {part.name for part in all_parts(modalities)})
    if unknown:
        raise ValueError(f"no part named {', '.join(unknown)}; there are {[p.name for p in all_parts(modalities)]}")
    return tuple(
        Modality(
            name=modality.name,
            codec=modality.codec,
            parts=tuple(Part(**{**part.model_dump(), "shape": shapes.get(part.name, part.shape)}) for part in modality.parts),
        )
        for modality in modalities
    )


def paper_modalities(
    latent: tuple[int, int, int] = (4, 64, 64),
    clip: int | None = 512,
    text: tuple[int, int] = (77, 64),
    patch: int = 2,
    weights: tuple[float, float, float] = (0.75, 0.02, 0.23),
) -> tuple[Modality, Modality]:
    """The paper's declaration: an image (parts ``latent``, ``clip``) and a text (part ``text``).

    Args:
        latent: channels, height and width of the autoencoder's latent; the position table is sized for it.
        clip: width of the CLIP image embedding; None for an image that is its latent alone.
        text: tokens and width of the text latent.
        patch: side of a patch of the latent.
        weights: loss weights of latent, clip and text; for the default's arithmetic see ``objective``.
    """
    embedding = () if clip is None else (Part(name="clip", shape=(clip,), weight=weights[1]),)
    image = Modality(name="image", parts=(Part(name="latent", shape=latent, patch=patch, weight=weights[0]), *embedding))
    return image, Modality(name="text", parts=(Part(name="text", shape=text, weight=weights[2]),))
