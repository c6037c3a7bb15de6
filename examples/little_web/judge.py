"""The judge: a small classifier that says of a picture which drawing it shows, how large, where, and on which background.

It is trained on the little web's own scenes (`examples.encoders.judging`) and ships with the embedded weights. What a U-ViT has
drawn is right where the judge finds all four of its caption's scene.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from examples.little_web.compose import BACKGROUNDS, DRAWINGS, PLACES, SIZES, Scene
from unidiffuser.references import EMBEDDED

WEIGHTS = EMBEDDED / "judge" / "judge.safetensors"
SIDE = 96  # pixels that it looks at
PARTS: dict[str, tuple[str, ...]] = {
    "drawing": tuple(DRAWINGS),
    "background": tuple(BACKGROUNDS),
    "place": tuple(PLACES),
    "size": tuple(SIZES),
}
_WIDTHS = (3, 24, 48, 64, 96)


class Judge(nn.Module):
    """Logits of the four parts, by name, of pictures (B, 3, SIDE, SIDE) in -1..1."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in zip(_WIDTHS, _WIDTHS[1:], strict=False):
            layers += [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), nn.GroupNorm(8, outputs), nn.SiLU()]
        self.layers = nn.Sequential(*layers)
        self.where = nn.Conv2d(_WIDTHS[-1], 8, 1)
        self.heads = nn.Linear(2 * _WIDTHS[-1] + 8 * (SIDE // 16) ** 2, sum(map(len, PARTS.values())))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        seen = self.layers(x)
        features = torch.cat([seen.amax((2, 3)), seen.mean((2, 3)), self.where(seen).flatten(1)], 1)
        logits = self.heads(features).split([len(values) for values in PARTS.values()], 1)
        return dict(zip(PARTS, logits, strict=True))

    @classmethod
    def load(cls, file: Path = WEIGHTS) -> Judge:
        """The shipped judge."""
        judge = cls()
        judge.load_state_dict({name: value.float() for name, value in load_file(file).items()})
        return judge.eval()

    @torch.inference_mode()
    def read(self, pictures: Sequence[Image.Image]) -> list[Scene]:
        """The scene that each picture shows, without a variation."""
        found: list[Scene] = []
        for start in range(0, len(pictures), 64):
            logits = self(pixels(pictures[start : start + 64]))
            chosen = {part: logits[part].argmax(1).tolist() for part in PARTS}
            for row in range(len(chosen["drawing"])):
                found.append(Scene(**{part: PARTS[part][chosen[part][row]] for part in PARTS}))
        return found


def pixels(pictures: Sequence[Image.Image]) -> Tensor:
    """Square pictures of any size as the judge looks at them, (B, 3, SIDE, SIDE) in -1..1."""
    small = [np.asarray(picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX)) for picture in pictures]
    return torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2).float().div(127.5).sub(1)


def agreement(said: Sequence[Scene | None], shown: Sequence[Scene]) -> dict[str, float]:
    """Shares of the pairs that agree in each part, and in `all_four`; what says no scene agrees in none.

    >>> scene = Scene("lion", "small", "left", "red")
    >>> agreement([scene], [Scene("lion", "small", "left", "blue")])
    {'drawing': 1.0, 'background': 0.0, 'place': 1.0, 'size': 1.0, 'all_four': 0.0}
    """
    pairs = list(zip(said, shown, strict=True))
    right = [[a is not None and getattr(a, part) == getattr(b, part) for part in PARTS] for a, b in pairs]
    shares = {part: sum(row[i] for row in right) / len(pairs) for i, part in enumerate(PARTS)}
    shares["all_four"] = sum(map(all, right)) / len(pairs)
    return {name: round(share, 4) for name, share in shares.items()}
