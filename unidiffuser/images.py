"""Pictures as people send them, made into the square RGB pictures that the encoders take."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL image as RGB, as a person expects to see it: turned upright by its EXIF orientation, transparency over white,
    greys of 16 bits, or of floats up to 1, scaled to 8 bits, the first frame of an animation."""
    if getattr(image, "n_frames", 1) > 1:
        image.seek(0)
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        levels = np.asarray(image, dtype=np.float64)
        # PIL only clips when it converts these: 16-bit greys would all turn white. Plain "I" holds 8 or 16 bits, and for floats
        # there are two habits: 0 to 1, and 0 to 255.
        wide = image.mode.startswith("I;16") or (image.mode == "I" and levels.max(initial=0) > 255)
        top = 65535.0 if wide else 1.0 if image.mode == "F" and levels.max(initial=0) <= 1 else 255.0
        if (clear := image.info.get("transparency")) is not None:  # the one level of a PNG that is transparent
            levels = np.where(levels == clear, top, levels)
        return Image.fromarray((levels.clip(0, top) * (255 / top)).round().astype(np.uint8)).convert("RGB")
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def to_square(image: Image.Image, size: int) -> Image.Image:
    """The middle square of an RGB image, ``size`` pixels wide, resampled with antialiasing."""
    return ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)


def to_tensor(images: Sequence[Image.Image]) -> Tensor:
    """RGB images of one size as (B, 3, H, W) uint8."""
    return torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images])


def to_pil(images: Tensor) -> list[Image.Image]:
    """(B, 3, H, W) uint8 as PIL images."""
    return [Image.fromarray(image.permute(1, 2, 0).cpu().numpy()) for image in images]
