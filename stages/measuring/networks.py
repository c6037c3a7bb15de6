"""Networks that look at samples: what each makes of pictures or captions, as rows of numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stages.runner.contract import Job, StageError
from unidiffuser.images import to_square, to_tensor

# torch-fidelity's conversion of TensorFlow's Inception-v3, over whose last pooling layer the usual FID and KID are.
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_FROM = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"
SIDE = 299
Look = Callable[[Sequence[Any]], np.ndarray]


def inception_missing(named: str | None) -> str:
    """What is wrong with a name of Inception's weights, and the fix."""
    said = f"{named}: no such file" if named else "field required"
    return f"inception: {said}; it is the path of {INCEPTION_FILE}, from {INCEPTION_FROM}, or take `features: clip`"


def network(name: str, job: Job) -> Look:
    """The network of this name: of (n) pictures or captions it makes (n, D) fp32.

    Raises:
        StageError: its weights cannot be read.
    """
    if name == "inception":
        return _inception(job)
    if name in ("scenes-shown", "scenes-said"):
        from stages.measuring.scenes import said, shown

        return shown if name == "scenes-shown" else said
    return _clip(job, name)


def looks_at(name: str) -> str:
    """image or caption."""
    return "caption" if name in ("clip-text", "scenes-said") else "image"


def _inception(job: Job) -> Look:
    """Of pictures of one size, as torch-fidelity computes it for FID: the 2,048 numbers of the last pooling layer."""
    import torch
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    path = job.config.inception
    if not Path(path).is_file():
        raise StageError(inception_missing(path))
    try:
        extractor = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=path)
    except Exception as error:  # whatever a file that holds other things makes of itself
        raise StageError(f"inception: {path} does not hold those weights ({_first_line(error)}); take {INCEPTION_FROM}") from None
    device = _device()
    extractor.to(device)

    def look(images: Sequence[Any]) -> np.ndarray:
        with torch.inference_mode():
            pixels = to_tensor(list(images)).to(device)
            found = [extractor(some)[0].float().cpu() for some in pixels.split(job.config.batch)]
        return torch.cat(found).numpy()

    return look


def _clip(job: Job, name: str) -> Look:
    """Of the CLIP that judges: embeddings as its towers give them, not normalised."""
    import torch

    from unidiffuser.encoders import ClipEncoder
    from unidiffuser.tensors import WeightsError

    reference = judge_of(job.config)
    try:
        clip = ClipEncoder.load(reference, _device())
    except (WeightsError, OSError, ValueError) as error:
        raise StageError(f"clip {reference}: {_first_line(error)}") from None
    tower = clip.image if name == "clip-image" else clip.text

    def look(values: Sequence[Any]) -> np.ndarray:
        batch = job.config.batch
        with torch.inference_mode():
            return torch.cat([tower(values[at : at + batch]).cpu() for at in range(0, len(values), batch)]).numpy()

    return look


def judge_of(config: Any) -> str:
    """The reference of the CLIP that judges."""
    return str(config.judge or config.clip)


def framed(images: Sequence[Any], side: int | None) -> list[Any]:
    """Real pictures in the frame of drawn ones, which is how the training data is cut; as they are where nothing was drawn."""
    return [to_square(image, side) if side else image for image in images]


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _first_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
