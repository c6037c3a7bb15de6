"""Score heads of the filter: which score is computed by which network on which CLIP's embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from infra.store import sha256_of
from stages.runner.contract import StageConfig, StageError
from stages.runner.recipe import encoder, external_file
from stages.shards.feed import on_device
from unidiffuser.references import weights_digest

if TYPE_CHECKING:
    from torch import Tensor

    from unidiffuser.clip_preprocess import Preprocess
    from unidiffuser.encoders import ClipEncoder
    from unidiffuser.heads import ScoreHead

# What is known of an architecture by its name.
KNOWN: dict[str, dict[str, Any]] = {"laion-aesthetic-v2": {"activation": "none", "output": "raw", "normalise": True}}


class HeadConfig(StageConfig):
    """A network of Linear layers on CLIP image embeddings; their sizes are read off the file."""

    weights: str = external_file(..., "file of the head's tensors: .safetensors, or a state dict (.pth, .pt, .bin)")
    architecture: Literal["laion-aesthetic-v2", "linear", "mlp"] = Field(
        description="laion-aesthetic-v2 takes ViT-L/14 embeddings; linear is one layer (LAION's aesthetic predictor v1)"
    )
    clip: str | None = encoder(None, "open_clip model that the head was trained on; the filter's own when not given")
    activation: Literal["none", "relu", "gelu"] = Field("none", description="between the layers")
    output: Literal["raw", "sigmoid"] = Field("raw", description="sigmoid: the head ends in a logit, the score is a probability")
    normalise: bool = Field(True, description="bring embeddings to length 1 first, as LAION's heads expect")

    @model_validator(mode="after")
    def _as_known(self) -> HeadConfig:
        for field, value in KNOWN.get(self.architecture, {}).items():
            if getattr(self, field) != value:
                raise ValueError(f"{self.architecture} has {field} {value}: leave it out, or name the architecture mlp")
        return self


class Heads(StageConfig):
    """The scores that are computed here; the others are the metadata's."""

    aesthetic: HeadConfig | None = Field(None, description="LAION's scale of 0 to 10 where its own heads are used")
    punsafe: HeadConfig | None = Field(None, description="probability that the image is unsafe")
    pwatermark: HeadConfig | None = Field(None, description="probability of a watermark")

    def named(self) -> dict[str, HeadConfig]:
        """Score -> head, of those that are given."""
        return {name: head for name in type(self).model_fields if (head := getattr(self, name)) is not None}


def head_digests(heads: Heads) -> dict[str, str]:
    """Config field -> digest of the heads' weights, and of the CLIPs that they name.

    Raises:
        FileNotFoundError: there is no such file.
    """
    digests = {}
    for name, head in heads.named().items():
        try:
            digests[f"heads.{name}"] = sha256_of(head.weights)
        except OSError as error:
            raise FileNotFoundError(f"{head.weights}: cannot be read ({error.strerror}); heads.{name}.weights names it") from None
        if head.clip is not None:
            digests[f"heads.{name}.clip"] = weights_digest(head.clip, "clip")
    return digests


def load_head(name: str, config: HeadConfig, clip: ClipEncoder, device: str) -> ScoreHead:
    """A head that fits the CLIP whose embeddings it will get.

    Raises:
        StageError: the file holds no such head, or one for embeddings of another width.
    """
    from unidiffuser.heads import ScoreHead
    from unidiffuser.tensors import WeightsError

    try:
        head = ScoreHead.load(
            config.weights, config.architecture, config.activation, config.output == "sigmoid", config.normalise, device
        )
    except (FileNotFoundError, WeightsError) as error:
        raise StageError(f"heads.{name}: {error}") from None
    if head.width != clip.embed_dim:
        raise StageError(
            f"heads.{name}: {config.weights} takes embeddings of {head.width} numbers, clip {clip.ref} gives {clip.embed_dim}; "
            f"name the CLIP that it was trained on in heads.{name}.clip"
        )
    return head


class Scorer:
    """The CLIPs and heads of a filter, each loaded once.

    Args:
        clip: the filter's CLIP, for similarity and for heads that name none.
        similarity: whether captions are compared with images and the embeddings kept.

    Raises:
        StageError: see `load_head`.
    """

    def __init__(self, clip: str, similarity: bool, heads: Heads, precision: str):
        import torch

        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        half = precision == "bf16" or (precision == "auto" and self.device == "cuda")
        self.dtype = torch.bfloat16 if half else torch.float32
        self.similarity = clip if similarity else None
        named = heads.named()
        self.reads = {name: head.clip or clip for name, head in named.items()}
        wanted = {*self.reads.values(), *((clip,) if similarity else ())}
        self.clips = {ref: self.load_clip(ref) for ref in sorted(wanted)}
        self.heads = {
            name: load_head(name, head, self.clips[self.reads[name]], self.device) for name, head in heads.named().items()
        }

    def load_clip(self, ref: str) -> ClipEncoder:
        from unidiffuser.encoders import ClipEncoder

        return ClipEncoder.load(ref, self.device, self.dtype)

    @property
    def preprocesses(self) -> tuple[Preprocess, ...]:
        """How each CLIP sees pictures."""
        return tuple(clip.preprocess for clip in self.clips.values())

    def __call__(self, views: Sequence[tuple[np.ndarray, ...]], captions: Sequence[str]) -> dict[str, Tensor]:
        """Scores of images with their captions, (B,) fp32 each; with similarity also `clip`, the embeddings, (B, D) fp16.

        Args:
            views: of each image what the CLIPs see, (h, w, 3) uint8, in the order of `preprocesses`.
        """
        import torch
        from torch.nn.functional import cosine_similarity

        with torch.inference_mode():
            pixels = [on_device(pictures, self.device) for pictures in zip(*views, strict=True)]
            seen = {ref: clip.seen(of) for (ref, clip), of in zip(self.clips.items(), pixels, strict=True)}
            scores = {name: head(seen[self.reads[name]]) for name, head in self.heads.items()}
            if self.similarity is not None:
                embeddings = seen[self.similarity]
                read = self.clips[self.similarity].text(captions)
                scores |= {"clip_similarity": cosine_similarity(embeddings, read), "clip": embeddings.half()}
        return scores
