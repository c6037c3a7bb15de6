"""What encoders make of a picture and a caption, and what that costs, told from their configurations without their weights."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from unidiffuser.references import local_folder, public_name

# Stable Diffusion's autoencoder, which the published model has; what another public name means is only known with its files.
STABLE_DIFFUSION: dict[str, Any] = {
    "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 4, "mid_block_add_attention": True,
}  # fmt: skip
# open_clip's own, so that a plan of the published model need not import it.
CLIPS: dict[str, dict[str, Any]] = {
    "ViT-B-32": {
        "embed_dim": 512, "vision_cfg": {"image_size": 224, "layers": 12, "width": 768, "patch_size": 32},
        "text_cfg": {"context_length": 77, "width": 512, "layers": 12},
    },
    "ViT-L-14": {
        "embed_dim": 768, "vision_cfg": {"image_size": 224, "layers": 24, "width": 1024, "patch_size": 14},
        "text_cfg": {"context_length": 77, "width": 768, "layers": 12},
    },
}  # fmt: skip


@dataclass(frozen=True)
class Autoencoder:
    """An AutoencoderKL's encoder: widths of its levels, residual blocks in each, channels of the latent."""

    widths: tuple[int, ...]
    blocks: int
    channels: int
    attention: bool

    @property
    def reduction(self) -> int:
        return 2 ** (len(self.widths) - 1)

    def flop(self, size: int) -> int:
        """FLOP of encoding a square of `size` pixels a side: its convolutions, and the attention of its middle."""
        area, last = float(size**2), self.widths[-1]
        total, before = _conv(area, 3, self.widths[0]), self.widths[0]
        for level, width in enumerate(self.widths):
            for _ in range(self.blocks):
                total += _residual(area, before, width)
                before = width
            if level < len(self.widths) - 1:
                area /= 4
                total += _conv(area, width, width)
        total += 2 * _residual(area, last, last)
        if self.attention:
            total += 8 * area * last**2 + 4 * area**2 * last
        moments = 2 * self.channels
        return int(total + _conv(area, last, moments) + 2 * area * moments**2)


@dataclass(frozen=True)
class Tower:
    """A transformer of CLIP: width, layers, tokens, numbers of a token before it, and what its result is projected to."""

    width: int
    layers: int
    tokens: int
    patch: int = 0
    out: int = 0

    @property
    def flop(self) -> int:
        """FLOP of one forward pass: 2 T 12 d^2 L, 4 T^2 d L for attention, the patches and the projection of one token."""
        blocks = 24 * self.tokens * self.width**2 * self.layers + 4 * self.tokens**2 * self.width * self.layers
        return blocks + 2 * (self.tokens - 1) * self.patch * self.width + 2 * self.width * self.out


@dataclass(frozen=True)
class Clip:
    """A CLIP: its towers and the width of its embeddings."""

    embedding: int
    image: Tower
    text: Tower


@dataclass(frozen=True)
class Latents:
    """Shapes of a row of latents: channels and side of the picture's, width of the CLIP embedding (0 for none), the text's."""

    channels: int
    side: int
    clip: int
    text_tokens: int
    text_width: int

    def tokens(self, patch: int, data_type: bool) -> int:
        """Tokens of a sample in the U-ViT: two timesteps, patches, CLIP, text, and a data type."""
        return 2 + (self.side // patch) ** 2 + (1 if self.clip else 0) + self.text_tokens + data_type

    @property
    def numbers(self) -> int:
        """Numbers of a sample outside the network, a latent drawn from its moments."""
        return self.channels * self.side**2 + self.clip + self.text_tokens * self.text_width

    @property
    def row_bytes(self) -> int:
        """Bytes of a stored row without key, caption and scores: fp16, of the picture means and variances."""
        return 2 * (2 * self.channels * self.side**2 + self.clip + self.text_tokens * self.text_width)


def _conv(area: float, before: int, behind: int) -> float:
    """FLOP of a convolution of 3 x 3."""
    return 18 * area * before * behind


def _residual(area: float, before: int, behind: int) -> float:
    shortcut = 2 * area * before * behind if before != behind else 0
    return _conv(area, before, behind) + _conv(area, behind, behind) + shortcut


@cache
def autoencoder(ref: str) -> Autoencoder:
    """The autoencoder of a reference; of a public name that of Stable Diffusion.

    Raises:
        FileNotFoundError: a folder without one. ValueError, KeyError: its configuration is damaged.
    """
    folder = local_folder(ref, "vae")
    told = json.loads((folder / "config.json").read_text(encoding="utf-8")) if folder is not None else STABLE_DIFFUSION
    return Autoencoder(
        tuple(told["block_out_channels"]), told["layers_per_block"], told["latent_channels"],
        told.get("mid_block_add_attention", True),
    )  # fmt: skip


@cache
def clip(ref: str) -> Clip:
    """The CLIP of a reference.

    Raises:
        FileNotFoundError: a folder without one. OSError, ValueError, KeyError: an unknown name, or damage.
    """
    folder = local_folder(ref, "clip")
    if folder is not None:
        return _clip(json.loads((folder / "open_clip_config.json").read_text(encoding="utf-8"))["model_cfg"])
    if (known := CLIPS.get(public_name(ref)[0].partition("/")[0])) is None:
        # Imported here: of another public name it asks open_clip, which takes seconds.
        from unidiffuser.clip_settings import clip_settings

        known = clip_settings(ref)
    return _clip(known)


def _clip(told: Mapping[str, Any]) -> Clip:
    vision, text, embedding = told["vision_cfg"], told["text_cfg"], told["embed_dim"]
    side, patch = vision.get("image_size", 224), vision.get("patch_size", 32)
    # Of a convolutional network the layers are a list; it is taken for a ViT-B/32, which is about as dear.
    layers, width = vision.get("layers", 12), vision.get("width", 768)
    layers, width, patch = (12, 768, 32) if isinstance(layers, Sequence) else (layers, width, patch)
    image = Tower(width, layers, (side // patch) ** 2 + 1, 3 * patch**2, embedding)
    words = Tower(text.get("width", 512), text.get("layers", 12), text.get("context_length", 77), 0, embedding)
    return Clip(embedding, image, words)


def latents(size: int, vae: str, clip_ref: str, text_ref: str, text_width: int) -> Latents:
    """What encode makes of a picture of `size` pixels a side.

    Raises:
        OSError, ValueError, KeyError: as `autoencoder` and `clip`.
    """
    made = autoencoder(vae)
    return Latents(made.channels, size // made.reduction, clip(clip_ref).embedding, clip(text_ref).text.tokens, text_width)
