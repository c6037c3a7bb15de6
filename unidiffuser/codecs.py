"""Codecs: what makes the parts of a modality out of what people see, and that again out of drawn parts.

A modality names its codec (`modalities.Modality`). The paper's two are here: a picture is an autoencoder's latent and a CLIP
embedding, a caption the projected states of CLIP's text tower, which GPT-2 reads (arXiv 2303.06555, section 4.1). Network,
objective and samplers see tensors and know of none of this.
"""

from __future__ import annotations

import warnings
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from unidiffuser.encoders import ClipEncoder, ImageLatents
from unidiffuser.images import to_pil, to_rgb, to_square, to_tensor
from unidiffuser.modalities import Modality
from unidiffuser.tensors import WeightsError
from unidiffuser.text_decoder import TextCodec


class Codec(Protocol):
    """The way between values of one modality and its parts."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each part, without the batch."""

    def encode(self, values: Sequence[Any]) -> dict[str, Tensor]:
        """Clean parts (B, *shape) of B values."""

    def decode(self, parts: Mapping[str, Tensor]) -> list[Any]:
        """The values of drawn parts, (B, *shape) each."""


class PromptCut(UserWarning):
    """A prompt has more tokens than the text encoder reads; the message says what is left of it."""


@dataclass(frozen=True)
class PictureCodec:
    """PIL images of any size, mode and orientation in, ``size`` x ``size`` RGB out; the parts are ``latent`` and ``clip``.

    A condition is the mean of the autoencoder's posterior. The CLIP embedding is drawn with the latent and not needed to decode.
    """

    vae: ImageLatents
    clip: ClipEncoder
    size: int

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {"latent": self.vae.latent_shape(self.size), "clip": (self.clip.embed_dim,)}

    def encode(self, values: Sequence[Image.Image]) -> dict[str, Tensor]:
        squares = [to_square(to_rgb(image), self.size) for image in values]
        mean = self.vae.moments(to_tensor(squares).to(self.vae.model.device)).chunk(2, dim=1)[0]
        return {"latent": mean * self.vae.scaling_factor, "clip": self.clip.image(squares)}

    def decode(self, parts: Mapping[str, Tensor]) -> list[Image.Image]:
        return to_pil(self.vae.decode(parts["latent"]))


@dataclass(frozen=True)
class CaptionCodec:
    """Captions in and out; the part is ``text``. Written with ``beams`` beams, greedily with one.

    Encoding warns with `PromptCut` of a caption that is longer than CLIP reads.
    """

    clip: ClipEncoder
    codec: TextCodec
    beams: int

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {"text": (self.clip.context_length, self.codec.latent_width)}

    def encode(self, values: Sequence[str]) -> dict[str, Tensor]:
        for prompt in values:
            self._warn_if_cut(prompt)
        with torch.no_grad():
            return {"text": self.codec.encode(self.clip.tokens(list(values))).float()}

    def decode(self, parts: Mapping[str, Tensor]) -> list[str]:
        return self.codec.decode(parts["text"], self.beams)

    def _warn_if_cut(self, prompt: str) -> None:
        """Warn with what is left of a prompt that has more tokens than the text encoder takes."""
        length, tokenizer = self.clip.context_length, self.clip.tokenizer

        def fits(text: str) -> bool:
            # A text that was cut differs from its own beginning: it ends in the end-of-text token.
            return torch.equal(tokenizer([text])[0], tokenizer([text], context_length=4 * length)[0][:length])

        if fits(prompt):
            return
        kept = bisect_left(range(len(prompt)), True, key=lambda last: not fits(prompt[: last + 1]))
        message = f"the prompt has more than the {length} tokens that the model reads; cut after: {prompt[:kept]!r}"
        warnings.warn(message, PromptCut, stacklevel=4)


def check_codecs(modalities: Sequence[Modality], codecs: Mapping[str, Codec]) -> None:
    """Raise WeightsError unless every modality's codec is there and makes its parts; grids may be of another size."""
    for modality in modalities:
        if modality.codec not in codecs:
            raise WeightsError(f"modality {modality.name}: there is no codec {modality.codec}, only {', '.join(codecs)}")
        made = codecs[modality.codec].shapes()
        declared = {part.name: part.shape for part in modality.parts}
        if {name: _fixed(shape) for name, shape in made.items()} != {name: _fixed(shape) for name, shape in declared.items()}:
            raise WeightsError(f"modality {modality.name}: the model has {declared}, its codec {modality.codec} makes {made}")


def _fixed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """What of a shape does not change with the size of a picture: the channels of a grid, all of anything else."""
    return shape[:1] if len(shape) == 3 else shape
