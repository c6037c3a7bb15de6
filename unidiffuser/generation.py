"""Prompts and pictures in, pictures and captions out: a checkpoint with its encoders and decoders."""

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
from unidiffuser.pictures import Picture, as_pictures
from unidiffuser.provenance import PROVENANCE
from unidiffuser.references import Encoders
from unidiffuser.sampling import DETERMINISTIC, SAMPLERS, default_sampler, sample
from unidiffuser.schedule import NoiseSchedule
from unidiffuser.solver import DEFAULT_STEPS, Callback
from unidiffuser.tasks import TASK_NAMES
from unidiffuser.tensors import NotFinite, read_settings
from unidiffuser.text_decoder import TextCodec
from unidiffuser.uvit import UViT
from unidiffuser.watermarks import Watermark, code_of
from unidiffuser.watermarks.tiled import Tiled
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
    sampler: str | None = None,
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
    sampler = sampler or default_sampler(task)
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
    """One result: a picture, a caption, or both.

    Attributes:
        source: the index of the prompt or picture it was made from.
        mark: the name of the watermark in the picture, if it has one.
    """

    seed: int
    source: int
    image: Image.Image | None = None
    caption: str | None = None
    mark: str | None = None


class UniDiffuser:
    """A joint image-text model with everything that sampling needs.

    Attributes:
        device: where it computes; see ``to``.
        dtype: the type that it computes in.
        size: pixels a side of the pictures that it was last trained for.
        provenance: what it was trained from, as ``provenance.json`` beside its weights tells; empty where that is not told.
        watermark: the kind of mark of the pictures that it draws, which names the checkpoint; see ``watermarks``.

    Examples:
        >>> model = UniDiffuser.load("runs/export/3f9a2c").to("cuda")
        >>> model.generate("t2i", "a large red apple", count=4)[0].image.save("apple.png")
        >>> model.generate("i2t", images="apple.png")[0].caption
        'a large red apple'
        >>> model.score("apple.png", ["an apple", "a lion"])          # tensor([0.31, 0.12])
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
        self.provenance: dict[str, Any] = {}
        self.watermark: Watermark = Tiled()
        self.device = uvit.position.device
        check_codecs(uvit.config.modalities, self.codecs(vae.reduction))
        self.latent = {part.name: part for part in all_parts(uvit.config.modalities)}["latent"]

    @classmethod
    def load(
        cls,
        checkpoint: str | Path,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        store: str | None = None,
        encoders: Encoders | None = None,
        heads: int | None = None,
    ) -> UniDiffuser:
        """Load a checkpoint.

        Args:
            checkpoint: a folder with a whole set in any layout (``layouts``), or an export or training dataset: its folder, its
                fingerprint, the first characters of that, or STAGE/FINGERPRINT.
            dtype: the type that the U-ViT computes in (by autocast), and that encoders and decoders are loaded in.
            store: folder or fsspec URL of the datasets; ``./runs`` or what UNIDIFFUSER_STORE names if None.
            encoders: what stands beside official files, or beside a training dataset, if it does not tell itself.
            heads: attention heads of an official U-ViT, if not width / 64.

        Raises:
            FileNotFoundError: there is no such checkpoint, or it lacks a part.
            WeightsError: weights are damaged, do not fit their configuration, or its codecs do not make what it models.
        """
        from unidiffuser.checkpoints import export_of  # which converts whole models

        with export_of(checkpoint, store, encoders, heads) as folder:
            missing = [name for name in FOLDERS if not (folder / name).is_dir()]
            if missing:
                raise FileNotFoundError(f"{folder}: not an export folder, it lacks {', '.join(missing)}")
            model = cls(
                load_native(folder / "uvit").to(device),
                ImageLatents.load(str(folder / "vae"), device, dtype),
                ClipEncoder.load(str(folder / "clip_image"), device, dtype),
                ClipEncoder.load(str(folder / "clip_text"), device, dtype),
                TextCodec.load(folder / "text_codec").to(device),
                dtype,
            )
            if (file := folder / PROVENANCE).is_file():
                model.provenance = read_settings(file)
            return model

    def to(self, *places: str | torch.device | torch.dtype) -> UniDiffuser:
        """Move to a device, compute in another type, or both: ``.to("cuda", torch.bfloat16)``. Returns the model itself.

        Encoders and decoders are cast, so the way back from a narrow type does not bring back what it has rounded.
        """
        for place in places:
            if isinstance(place, torch.dtype):
                self.dtype = place
            else:
                self.device = torch.device(place)
        self.uvit.to(self.device)
        self.text_codec.to(self.device)
        for encoder in (self.vae, self.clip_image, self.clip_text):
            encoder.to(self.device, self.dtype)
        return self

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
        prompts: str | Sequence[str] | None = None,
        images: Picture | Sequence[Picture] | None = None,
        count: int = 1,
        steps: int = DEFAULT_STEPS,
        guidance: float = 7.0,
        seeds: Sequence[int] | None = None,
        sampler: str | None = None,
        condition_t: int = 0,
        guidance_interval: tuple[int, int] | None = None,
        size: int | None = None,
        batch: int = 16,
        beams: int = 5,
        rounds: int = 4,
        data_type: int | None = None,
        mark: bool = True,
        callback: Callback | None = None,
    ) -> list[Generated]:
        """Make ``count`` results of every prompt or image, or ``count`` results in all for tasks that take neither.

        Args:
            task: one of ``tasks.TASK_NAMES``; ``gibbs`` takes prompts, images or neither.
            prompts: one, or several.
            images: one picture, or several, of any size, mode and orientation, as ``pictures.as_pictures`` takes them; two for
                ``interpolate``, of which ``count`` is then the number of frames.
            seeds: one a result; 0, 1, 2, ... if None. All frames of ``interpolate`` are of the first, which they then name.
            size: pixels a side, if another than the model was trained for.
            batch: results computed at once; changes memory and speed, and results by rounding only.
            beams: width of the beam search that writes captions; 1 is greedy.
            data_type: of a model with a data-type token; 1 if None, as in the published version 1.
            mark: whether pictures get the invisible ``watermark``, which ``unidiffuser detect`` reads. What measures the model
                draws without it.
            callback: called after every step with (step, timestep, latents): the step from 0, the timestep 1 .. 1000 that it
                started at, and the drawn parts by name, (B, *shape) each, as noisy as they are then. To end the draw it raises.

        See ``sampling.sample`` for the others.

        Raises:
            FileNotFoundError: there is no picture of that name.
            ValueError: see ``check_request`` and ``as_pictures``; or the number of seeds is wrong, or the model cannot draw this
                size, or has no such type of data.
            NotFinite: an encoder, the network or the autoencoder overflows.
        """
        prompts = [prompts] if isinstance(prompts, str) else prompts
        images = as_pictures(images) if images is not None else None
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
        data_type = self._data_type(data_type)
        codecs = self.codecs(size, beams)
        condition = codecs["image" if images else "text"].encode(inputs) if inputs else {}
        _check_finite(condition, f"encoding in {self._arithmetic}", "take another dtype")
        if task != "interpolate":
            condition = {name: part[torch.tensor(sources)] for name, part in condition.items()}
        modalities = resized(self.uvit.config.modalities, {"latent": self.vae.latent_shape(size)})
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            drawn = sample(
                self.uvit, task, modalities, batch, steps, guidance, seeds, sampler, condition, condition_t,
                guidance_interval, data_type, rounds, callback=callback,
            )  # fmt: skip
        _check_finite(drawn, f"sampling in {self._arithmetic} with guidance {guidance:g}", "take another dtype or less guidance")
        pictures, captions = self.decode(drawn, beams, batch)
        nothing: list[None] = [None] * len(seeds)
        marks = [self.watermark.name if mark and min(picture.size) >= self.watermark.smallest else None for picture in pictures]
        pictures = [self._marked(picture) if name else picture for picture, name in zip(pictures, marks, strict=True)]
        rows = zip(seeds, sources, pictures or nothing, captions or nothing, marks or nothing, strict=True)
        return [Generated(*row) for row in rows]

    def _marked(self, picture: Image.Image) -> Image.Image:
        return self.watermark.embed(picture, code_of(self.provenance))

    def _data_type(self, asked: int | None) -> int | None:
        """What the network is told."""
        if not self.uvit.config.data_type_token:
            if asked is not None:
                raise ValueError(f"data type {asked}: this model does not tell types of data apart; leave it out")
            return None
        if asked not in (None, 0, 1):
            raise ValueError(f"data type {asked}: expected 0 or 1")
        return 1 if asked is None else asked

    def encode(
        self,
        images: Picture | Sequence[Picture] | None = None,
        captions: str | Sequence[str] | None = None,
        size: int | None = None,
    ) -> dict[str, Tensor]:
        """The parts that the network models, clean, of B pictures, of B captions, or of both.

        Args:
            size: pixels a side that pictures are cut and scaled to; those of the training if None.

        Returns:
            Of pictures ``latent`` (B, C, h, w), the scaled mean of the autoencoder, and ``clip`` (B, D); of captions ``text``
            (B, L, d). All are fp32, on the model's device.

        Raises:
            FileNotFoundError, ValueError: see ``as_pictures``.
        """
        codecs = self.codecs(self.size if size is None else size)
        parts = {} if images is None else codecs["image"].encode(as_pictures(images))
        return parts if captions is None else parts | codecs["text"].encode([captions] if isinstance(captions, str) else captions)

    def decode(self, parts: Mapping[str, Tensor], beams: int = 5, batch: int = 16) -> tuple[list[Image.Image], list[str]]:
        """The pictures of ``latent`` (B, C, h, w) and the captions of ``text`` (B, L, d), each an empty list without its part.

        Args:
            parts: as of ``encode``; ``clip`` is not needed, and what else there is must be of this model.
            beams: width of the beam search that writes captions; 1 is greedy.
            batch: results decoded at once, at most.

        Raises:
            NotFinite: the autoencoder overflows.
        """
        at_once = min(batch, max(1, BEAMS_AT_ONCE // beams)) if self.device.type == "cpu" else batch
        codecs, decoded = self.codecs(self.size, beams), {"latent": list[Any](), "text": list[Any]()}
        for name, values in decoded.items():
            codec = codecs["image" if name == "latent" else "text"]
            for some in parts[name].to(self.device).split(at_once) if name in parts else ():
                values += codec.decode({name: some})
        return decoded["latent"], decoded["text"]

    def score(self, images: Picture | Sequence[Picture], captions: str | Sequence[str]) -> Tensor:
        """How well captions fit pictures: the cosines of their CLIP embeddings, in -1 .. 1, by the CLIP that sees the pictures.

        Args:
            images, captions: as many of both, or one of either, which is then compared with all of the other.

        Returns:
            (B,) fp32, on the CPU.

        Raises:
            ValueError: there are other numbers of both; or that CLIP has no text tower, as in a pipeline of diffusers.
        """
        captions = [captions] if isinstance(captions, str) else captions
        pictures = as_pictures(images)
        if len(pictures) != len(captions) and 1 not in (len(pictures), len(captions)):
            raise ValueError(f"{len(pictures)} pictures and {len(captions)} captions: give as many of both, or one of either")
        seen, read = self.clip_image.image(pictures), self.clip_image.text(captions)
        return torch.cosine_similarity(seen, read, dim=1).cpu()


def _check_finite(parts: Mapping[str, Tensor], what: str, fix: str) -> None:
    """Raise NotFinite unless all numbers of all parts are."""
    if wrong := [name for name, part in parts.items() if not part.isfinite().all()]:
        raise NotFinite(f"{what} gave values of {', '.join(wrong)} that are not finite: {fix}")


def _repeat(inputs: int, count: int) -> list[int]:
    """0, 0, 1, 1, ... : each input ``count`` times."""
    return [index for index in range(inputs) for _ in range(count)]
