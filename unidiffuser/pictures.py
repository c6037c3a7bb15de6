"""One picture or several, in whatever form a person has them, as PIL images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unidiffuser.images import PictureError, open_picture, to_pil

Picture = Image.Image | str | Path | np.ndarray | Tensor


def as_pictures(given: Picture | Sequence[Picture]) -> list[Image.Image]:
    """PIL images of one picture or a sequence of them.

    Args:
        given: a PIL image of any mode, the path of a file, an array (H, W, 3) or a tensor (3, H, W) of uint8 values 0..255; or
            several of these. A further axis in front makes an array or a tensor several pictures.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file is no picture, or an array has another shape or type.
    """
    if isinstance(given, np.ndarray | Tensor):
        return _from_numbers(given)
    if isinstance(given, Image.Image):
        return [given]
    if isinstance(given, str | Path):
        return [_from_file(given)]
    return [picture for each in given for picture in as_pictures(each)]


def _from_file(path: str | Path) -> Image.Image:
    try:
        return open_picture(path)
    except PictureError as reason:
        raise ValueError(f"{path}: not a picture that can be read ({reason})") from None


def _from_numbers(given: np.ndarray | Tensor) -> list[Image.Image]:
    array = isinstance(given, np.ndarray)
    # A copy of an array: it may be read-only.
    pixels = torch.from_numpy(np.array(given)) if isinstance(given, np.ndarray) else given
    batch = pixels if pixels.dim() == 4 else pixels[None]
    if batch.dim() != 4 or batch.shape[-1 if array else 1] != 3 or batch.dtype != torch.uint8:
        wanted = "an array (H, W, 3)" if array else "a tensor (3, H, W)"
        found = f"{tuple(given.shape)} {str(given.dtype).removeprefix('torch.')}"
        raise ValueError(f"a picture is {wanted} of uint8 values 0..255, not {found}")
    return to_pil(batch.permute(0, 3, 1, 2) if array else batch)
