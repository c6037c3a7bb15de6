"""Prompts and pictures in, pictures and captions out: an exported model with its encoders and decoders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from unidiffuser.codecs import CaptionCodec, Codec, PictureCodec, check_codecs
from unidiffuser.compiling import find_compiler
from unidiffuser.encoders import ClipEncoder, ImageLatents
from unidiffuser.guidance import MOST_GUIDANCE, check_interval
from unidiffuser.modalities import all_parts, resized
from unidiffuser.sampling import DETERMINISTIC, SAMPLERS, sample
from unidiffuser.schedule import NoiseSchedule
from unidiffuser.tasks import TASK_NAMES
from unidiffuser.tensors import NotFinite
from unidiffuser.text_decoder import TextCodec
from unidiffuser.uvit import UViT
from unidiffuser.weights import load_native

FOLDERS = ("uvit", "vae", "clip_image", "clip_text", "text_codec")
TAKES_PROMPTS = ("t2i", "t2i2t")
TAKES_IMAGES = ("i2t", "i2t2i", "interpolate")
DRAWS_IMAGES = tuple(task for task in TASK_NAMES if task not in ("i2t", "t"))
# The tasks whose condition may be noised: the spectrum between conditional and marginal.
TAKES_CONDITION_T = ("t2i", "i2t")
# Beams of captions that a CPU follows side by side: more are a quarter faster in the decoder, and take 350 MiB more, which
# would be the peak of all. Pictures it decodes one by one; other devices decode the whole batch.
BEAMS_AT_ONCE = 5
# Seeds are below this, as everywhere in this project.
SEEDS = 2**63


def check_request(
    task: str,
    prompts: Sequence[str] | None,
    images: Sequence[Image.Image] | None,
    sampler: str = "dpm++2m",
    condition_t: int = 0,
    guidance_interval: tuple[int, int] | None = None,
    guidance: float = 0.0,
    steps: int = 1,
    seeds: Sequence[int] = (),
) -> None:
    """Say what is wrong with a request before anything is loaded; see ``UniDiffuser.generate`` for the arguments.

    Raises:
        ValueError: the task or the sampler is unknown, the two do not go together, an input is missing or not taken, or a
            timestep, the guidance, the number of steps or a seed is out of range.
    """
    last = NoiseSchedule().steps
    if task not in TASK_NAMES:
        raise ValueError(f"no task named {task!r}; there are {', '.join(TASK_NAMES)}")
    if sampler not in SAMPLERS:
        raise ValueError(f"no sampler named {sampler!r}; there are {', '.join(SAMPLERS)}")
    if task in TAKES_PROMPTS and (not prompts or images):
        raise ValueError(f"{task} takes prompts, and no images")
    if task in TAKES_IMAGES and (not images or prompts):
        raise ValueError(f"{task} takes images, and no prompts")
    if task == "interpolate" and len(images or ()) != 2:
        raise ValueError(f"interpolate takes two images, not {len(images or ())}")
    if task == "interpolate" and sampler not in DETERMINISTIC:
        raise ValueError(f"interpolate takes a sampler that adds no noise ({', '.join(DETERMINISTIC)}), not {sampler}")
    if task in ("joint", "i", "t") and (prompts or images):
        raise ValueError(f"{task} takes neither prompts nor images")
    if task == "gibbs" and prompts and images:
        raise ValueError("gibbs starts from prompts or from images, not from both")
    if not 0 <= condition_t <= last:
        raise ValueError(f"condition_t must be in 0 .. {last}, not {condition_t}")
    if condition_t and task not in TAKES_CONDITION_T:
        raise ValueError(f"condition_t goes with {' and '.join(TAKES_CONDITION_T)}, not with {task}")
    check_interval(guidance_interval, last)
    if not 0 <= guidance <= MOST_GUIDANCE:  # also what is no number
        raise ValueError(f"guidance must be in 0 .. {MOST_GUIDANCE:g}, not {guidance}")
    if not 1 <= steps < last:
        raise ValueError(f"steps must be in 1 .. {last - 1}, not {steps}")
    if wrong := [seed for seed in seeds if not 0 <= seed < SEEDS]:
        raise ValueError(f"a seed must be in 0 .. {SEEDS - 1}, not {wrong[0]}")


@dataclass(frozen=True)
class Generated:
    """One result: a picture, a caption, or both; ``source`` is the index of the prompt or picture it was made from."""

    seed: int
    source: int
    image: Image.Image | None = None
    caption: str | None = None


class UniDiffuser:
    """A joint image-text model with everything that sampling needs.

    Example:
        >>> model = UniDiffuser.load("runs/export")
        >>> model.generate("t2i", prompts=["a large red apple"], count=4)[0].image.save("apple.png")
    """

    def __init__(
        self,
        uvit: UViT,
        vae: ImageLatents,
        clip_image: ClipEncoder,
        clip_text: ClipEncoder,
        text_codec: TextCodec,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.uvit, self.vae, self.text_codec, self.dtype = uvit.eval(), vae, text_codec.eval(), dtype
        # Picture by picture: the decoder's activations are the peak of memory, and a single picture keeps it as busy.
        vae.model.enable_slicing()
        self.clip_image, self.clip_text = clip_image, clip_text
        self.device = uvit.position.device
        check_codecs(uvit.config.modalities, self.codecs(vae.reduction))
        self.latent = {part.name: part for part in all_parts(uvit.config.modalities)}["latent"]

    @classmethod
    def load(cls, folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> UniDiffuser:
        """Load an export folder, which holds uvit, vae, clip_image, clip_text and text_codec.

        Args:
            dtype: the type that the U-ViT computes in (by autocast), and that encoders and decoders are loaded in.

        Raises:
            FileNotFoundError: the folder lacks one of these.
            WeightsError: the U-ViT's weights do not fit its configuration, or its codecs do not make what it models.
        """
        folder = Path(folder)
        missing = [name for name in FOLDERS if not (folder / name).is_dir()]
        if missing:
            raise FileNotFoundError(f"{folder}: not an export folder, it lacks {', '.join(missing)}")
        return cls(
            load_native(folder / "uvit").to(device),
            ImageLatents.load(str(folder / "vae"), device, dtype),
            ClipEncoder.load(str(folder / "clip_image"), device, dtype),
            ClipEncoder.load(str(folder / "clip_text"), device, dtype),
            TextCodec.load(folder / "text_codec").to(device),
            dtype,
        )

    def codecs(self, size: int, beams: int = 5) -> dict[str, Codec]:
        """The codecs by name, of pictures ``size`` pixels wide and of captions written with ``beams`` beams."""
        return {
            "image": PictureCodec(self.vae, self.clip_image, size),
            "text": CaptionCodec(self.clip_text, self.text_codec, beams),
        }

    def compile(self) -> None:
        """Compile the U-ViT for sampling: the first draw takes a minute more, and the first of another batch size again.

        On a CPU the weights become constants of the compiled code, laid out once for its matrix products.

        Raises:
            RuntimeError: there is no compiler.
        """
        if find_compiler(self.device) is None:
            raise RuntimeError("no compiler found: install g++ or clang++ (for a GPU: gcc or clang)")
        self.uvit.compile(options={"freezing": self.device.type == "cpu"})

    @property
    def _arithmetic(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def size(self) -> int:
        """Pixels a side of the pictures that the model was last trained for."""
        return self.latent.shape[1] * self.vae.reduction

    def generate(
        self,
        task: str,
        prompts: Sequence[str] | None = None,
        images: Sequence[Image.Image] | None = None,
        count: int = 1,
        steps: int = 50,
        guidance: float = 7.0,
        seeds: Sequence[int] | None = None,
        sampler: str = "dpm++2m",
        condition_t: int = 0,
        guidance_interval: tuple[int, int] | None = None,
        size: int | None = None,
        batch: int = 16,
        beams: int = 5,
        rounds: int = 4,
        data_type: int | None = None,
    ) -> list[Generated]:
        """Make ``count`` results of every prompt or image, or ``count`` results in all for tasks that take neither.

        Args:
            task: one of ``tasks.TASK_NAMES``; ``gibbs`` takes prompts, images or neither.
            images: PIL images of any size, mode and orientation; two of them for ``interpolate``, of which ``count`` is then the
                number of frames.
            seeds: one a result; 0, 1, 2, ... if None. All frames of ``interpolate`` are of the first, which they then name.
            size: pixels a side, if another than the model was trained for.
            batch: results computed at once; changes memory and speed, and results by rounding only.
            beams: width of the beam search that writes captions; 1 is greedy.
            data_type: of a model with a data-type token; 1 if None, as in the published version 1.

        See ``sampling.sample`` for the others.

        Raises:
            ValueError: see ``check_request``; or the number of seeds is wrong, or the model cannot draw this size.
            NotFinite: an encoder, the network or the autoencoder overflows.
        """
        check_request(
            task, prompts, images, sampler, condition_t, guidance_interval, guidance, steps, seeds if seeds is not None else ()
        )
        if min(count, batch, beams, rounds) < 1:
            raise ValueError(f"count, batch, beams and rounds must be 1 or more, not {count}, {batch}, {beams} and {rounds}")
        inputs = prompts or images or None
        sources = [0] * count if inputs is None or task == "interpolate" else _repeat(len(inputs), count)
        seeds = list(seeds) if seeds is not None else list(range(len(sources)))
        if len(seeds) != len(sources):
            raise ValueError(f"{len(sources)} results need {len(sources)} seeds, not {len(seeds)}")
        if task == "interpolate":
            seeds = seeds[:1] * count
        size = self.size if size is None else size
        if size < 1 or size % (self.vae.reduction * self.latent.patch):
            raise ValueError(f"size {size}: this model needs a multiple of {self.vae.reduction * self.latent.patch} pixels")
        if data_type is None and self.uvit.config.data_type_token:
            data_type = 1
        codecs = self.codecs(size, beams)
        condition = codecs["image" if images else "text"].encode(inputs) if inputs else {}
        _check_finite(condition, f"encoding in {self._arithmetic}", "take another dtype")
        if task != "interpolate":
            condition = {name: part[torch.tensor(sources)] for name, part in condition.items()}
        modalities = resized(self.uvit.config.modalities, {"latent": self.vae.latent_shape(size)})
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            drawn = sample(
                self.uvit, task, modalities, batch, steps, guidance, seeds, sampler, condition, condition_t,
                guidance_interval, data_type, rounds,
            )  # fmt: skip
        _check_finite(drawn, f"sampling in {self._arithmetic} with guidance {guidance:g}", "take another dtype or less guidance")
        at_once = min(batch, max(1, BEAMS_AT_ONCE // beams)) if self.device.type == "cpu" else batch
        values: dict[str, list[Any]] = {name: [None] * len(seeds) for name in codecs}
        for modality in modalities:
            parts = {part.name: drawn[part.name] for part in modality.parts if part.name in drawn}
            if parts:
                rows = (slice(first, first + at_once) for first in range(0, len(seeds), at_once))
                decode = codecs[modality.codec].decode
                values[modality.codec] = [value for some in rows for value in decode({n: p[some] for n, p in parts.items()})]
        return [Generated(*row) for row in zip(seeds, sources, values["image"], values["text"], strict=True)]


def _check_finite(parts: Mapping[str, Tensor], what: str, fix: str) -> None:
    """Raise NotFinite unless all numbers of all parts are."""
    if wrong := [name for name, part in parts.items() if not part.isfinite().all()]:
        raise NotFinite(f"{what} gave values of {', '.join(wrong)} that are not finite: {fix}")


def _repeat(inputs: int, count: int) -> list[int]:
    """0, 0, 1, 1, ... : each input ``count`` times."""
    return [index for index in range(inputs) for _ in range(count)]
