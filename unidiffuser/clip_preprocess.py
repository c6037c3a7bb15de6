"""Pictures as a CLIP was trained to see them: the preprocessing that travels with its weights, as open_clip's own transform."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from unidiffuser.imports import import_open_clip

if TYPE_CHECKING:
    from torch import Tensor

RESIZE_MODES = ("shortest", "squash", "longest")
# open_clip's "random" is one for training; its transform for evaluation is bicubic then.
INTERPOLATIONS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR, "random": Image.Resampling.BICUBIC}


@dataclass(frozen=True)
class Preprocess:
    """What open_clip's ``PreprocessCfg`` holds, checked.

    Attributes:
        size: (height, width) of what the network sees, in pixels.
        resize_mode: shortest takes the middle, squash all of the picture, and longest all of it between bars of ``fill_color``.
        mean, std: of the three channels, 0 to 1.
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    resize_mode: str
    fill_color: int

    @classmethod
    def read(cls, settings: Mapping[str, Any], source: object) -> Preprocess:
        """The ``preprocess_cfg`` of ``source``, where open_clip's defaults stand for what it leaves out.

        Raises:
            WeightsError: a setting has a value that open_clip does not know.
        """
        import_open_clip()
        from open_clip.transform import PreprocessCfg, merge_preprocess_dict

        from unidiffuser.tensors import WeightsError

        told = merge_preprocess_dict(PreprocessCfg(), dict(settings))
        size = told["size"] if isinstance(told["size"], tuple | list) else (told["size"],)
        height, width = (size * 2)[:2] if len(size) == 1 else size if len(size) == 2 else (0, 0)
        mean, std = (_channels(told[name]) for name in ("mean", "std"))
        checks = {
            "size": type(height) is type(width) is int and min(height, width) > 0,
            "mode": told["mode"] == "RGB",
            "mean": mean is not None,
            "std": std is not None and min(std) > 0,
            "interpolation": told["interpolation"] in INTERPOLATIONS,
            "resize_mode": told["resize_mode"] in RESIZE_MODES,
            "fill_color": type(told["fill_color"]) is int and 0 <= told["fill_color"] <= 255,
        }
        if wrong := [f"{name} {told[name]!r}" for name, right in checks.items() if not right]:
            raise WeightsError(f"{source}: preprocess_cfg has {', '.join(wrong)}, unknown to open_clip: name another CLIP")
        assert mean is not None and std is not None
        return cls((height, width), mean, std, told["interpolation"], told["resize_mode"], told["fill_color"])

    @property
    def takes_middle_square(self) -> bool:
        """Whether a picture and its middle square look the same to the network."""
        return self.resize_mode == "shortest" and self.size[0] == self.size[1]

    def pixels(self, pictures: Sequence[Image.Image]) -> Tensor:
        """RGB pictures of any sizes as (B, 3, height, width) uint8."""
        import torch  # seeing pictures needs none of it, and it takes seconds

        return torch.stack([torch.from_numpy(np.array(self.seen(picture))).permute(2, 0, 1) for picture in pictures])

    def normalised(self, pixels: Tensor) -> Tensor:
        """(B, 3, height, width) uint8 as fp32 with the mean and deviation that the network expects."""
        from torchvision.transforms import functional

        return functional.normalize(pixels.float().div(255), list(self.mean), list(self.std))

    def seen(self, picture: Image.Image) -> Image.Image:
        """What the network sees of an RGB picture.

        It is resized and cropped in one step: what is cut off is never made, however thin the picture is.
        """
        height, width = self.size
        whole_width, whole_height = self._resized(*picture.size)
        left, top = (max(0, round((whole - part) / 2)) for whole, part in ((whole_width, width), (whole_height, height)))
        right, bottom = min(left + width, whole_width), min(top + height, whole_height)
        x, y = picture.width / whole_width, picture.height / whole_height
        box = (left * x, top * y, min(right * x, picture.width), min(bottom * y, picture.height))
        seen = picture.resize((right - left, bottom - top), self._resampling, box)
        if seen.size == (width, height):
            return seen
        framed = Image.new("RGB", (width, height), (self.fill_color,) * 3)
        framed.paste(seen, ((width - seen.width) // 2, (height - seen.height) // 2))
        return framed

    @property
    def _resampling(self) -> Image.Resampling:
        # open_clip's transform of a shape that is no square does not ask for the interpolation.
        plain = self.resize_mode == "shortest" and self.size[0] != self.size[1]
        return Image.Resampling.BICUBIC if plain else INTERPOLATIONS[self.interpolation]

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) of a whole picture after open_clip's resizing."""
        if self.resize_mode == "squash":
            return self.size[1], self.size[0]
        if self.takes_middle_square:  # torchvision's Resize to one length
            side, shorter = self.size[0], min(width, height)
            return int(side * width / shorter), int(side * height / shorter)
        ratios = height / self.size[0], width / self.size[1]
        ratio = max(ratios) if self.resize_mode == "longest" else min(ratios)
        return max(1, round(width / ratio)), max(1, round(height / ratio))


def _channels(value: Any) -> tuple[float, ...] | None:
    """Three numbers, of one or three; None if it is something else."""
    values = tuple(value) if isinstance(value, tuple | list) else (value,) * 3
    right = len(values) == 3 and all(isinstance(part, int | float) and math.isfinite(part) for part in values)
    return values if right else None
