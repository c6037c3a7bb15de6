"""Prompts and pictures in, pictures and captions out: an exported model with its encoders and decoders."""

from __future__ import annotations

import warnings
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from unidiffuser.compiling import find_compiler
from unidiffuser.encoders import ClipEncoder, ImageLatents
from unidiffuser.images import to_pil, to_rgb, to_square, to_tensor
from unidiffuser.modalities import all_parts, resized
from unidiffuser.sampling import DETERMINISTIC, SAMPLERS, sample
from unidiffuser.schedule import NoiseSchedule
from unidiffuser.tasks import TASK_NAMES
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


class PromptCut(UserWarning):
    """A prompt has more tokens than the text encoder reads; the message says what is left of it."""


def check_request(
    task: str,
    prompts: Sequence[str] | None,
    images: Sequence[Image.Image] | None,
    sampler: str = "dpm++2m",
    condition_t: int = 0,
    guidance_interval: tuple[int, int] | None = None,
) -> None:
    """Say what is wrong with a request before anything is loaded; see ``UniDiffuser.generate`` for the arguments.

    Raises:
        ValueError: the task or the sampler is unknown, the two do not go together, an input is missing or not taken, or a
            timestep is out of range.
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
    if guidance_interval is not None and not 0 <= guidance_interval[0] <= guidance_interval[1] <= last:
        raise ValueError(f"guidance_interval must be two timesteps in 0 .. {last}, the lower one first, not {guidance_interval}")


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
        self.latent = {part.name: part for part in all_parts(uvit.config.modalities)}["latent"]

    @classmethod
    def load(cls, folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> UniDiffuser:
        """Load an export folder, which holds uvit, vae, clip_image, clip_text and text_codec.

        Args:
            dtype: the type that the U-ViT computes in (by autocast), and that encoders and decoders are loaded in.

        Raises:
            FileNotFoundError: the folder lacks one of these.
            WeightsError: the U-ViT's weights do not fit its configuration.
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
        """
        check_request(task, prompts, images, sampler, condition_t, guidance_interval)
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
        condition = self._condition(prompts, images, size)
        if task != "interpolate":
            condition = {name: part[torch.tensor(sources)] for name, part in condition.items()}
        modalities = resized(self.uvit.config.modalities, {"latent": self.vae.latent_shape(size)})
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            drawn = sample(
                self.uvit, task, modalities, batch, steps, guidance, seeds, sampler, condition, condition_t,
                guidance_interval, data_type,
            )  # fmt: skip
        return self._results(drawn, seeds, sources, batch, beams)

    def _condition(self, prompts: Sequence[str] | None, images: Sequence[Image.Image] | None, size: int) -> dict[str, Tensor]:
        """The parts of the prompts and images, one row each."""
        if prompts:
            for prompt in prompts:
                self._warn_if_cut(prompt)
            with torch.no_grad():
                return {"text": self.text_codec.encode(self.clip_text.tokens(list(prompts))).float()}
        if images:
            squares = [to_square(to_rgb(image), size) for image in images]
            mean = self.vae.moments(to_tensor(squares).to(self.device)).chunk(2, dim=1)[0]
            return {"latent": mean * self.vae.scaling_factor, "clip": self.clip_image.image(squares)}
        return {}

    def _warn_if_cut(self, prompt: str) -> None:
        """Warn with what is left of a prompt that has more tokens than the text encoder takes."""
        length, tokenizer = self.clip_text.context_length, self.clip_text.tokenizer

        def fits(text: str) -> bool:
            # A text that was cut differs from its own beginning: it ends in the end-of-text token.
            return torch.equal(tokenizer([text])[0], tokenizer([text], context_length=4 * length)[0][:length])

        if fits(prompt):
            return
        kept = bisect_left(range(len(prompt)), True, key=lambda last: not fits(prompt[: last + 1]))
        message = f"the prompt has more than the {length} tokens that the model reads; cut after: {prompt[:kept]!r}"
        warnings.warn(message, PromptCut, stacklevel=3)

    def _results(self, drawn: dict[str, Tensor], seeds: list[int], sources: list[int], batch: int, beams: int) -> list[Generated]:
        images: list[Image.Image | None] = [None] * len(seeds)
        captions: list[str | None] = [None] * len(seeds)
        at_once = min(batch, max(1, BEAMS_AT_ONCE // beams)) if self.device.type == "cpu" else batch
        for first in range(0, len(seeds), at_once):
            rows = slice(first, first + at_once)
            if "latent" in drawn:
                images[rows] = to_pil(self.vae.decode(drawn["latent"][rows]))
            if "text" in drawn:
                captions[rows] = self.text_codec.decode(drawn["text"][rows], beams)
        return [Generated(*row) for row in zip(seeds, sources, images, captions, strict=True)]


def _repeat(inputs: int, count: int) -> list[int]:
    """0, 0, 1, 1, ... : each input ``count`` times."""
    return [index for index in range(inputs) for _ in range(count)]
