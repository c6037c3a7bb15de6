"""What turns pictures and captions into the numbers that UniDiffuser models (paper, section 4.1), and back into pictures.

`ImageLatents` wraps diffusers' AutoencoderKL, `ClipEncoder` an open_clip model with a separate text tower. Both take the
small embedded weights, a local folder or a public name (see `unidiffuser.references`); a local folder is loaded offline.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from unidiffuser.clip_preprocess import Preprocess
from unidiffuser.clip_settings import clip_settings, published
from unidiffuser.images import to_pil
from unidiffuser.imports import import_open_clip
from unidiffuser.references import local_folder, public_name
from unidiffuser.tensors import NotFinite, WeightsError, load_checked, pretrained, reading


def sample_latent(moments: Tensor, scaling_factor: float, generator: torch.Generator | None = None) -> Tensor:
    """Draw a latent from stored moments and scale it: z = scaling_factor * (mean + exp(logvar / 2) * noise).

    Args:
        moments: (B, 2C, h, w), means and then log-variances, unscaled.
    Returns:
        (B, C, h, w) fp32.
    """
    mean, logvar = moments.float().chunk(2, dim=1)
    noise = torch.randn(mean.shape, generator=generator, device=mean.device)
    return scaling_factor * (mean + torch.exp(0.5 * logvar) * noise)


class ImageLatents:
    """An AutoencoderKL, frozen.

    Examples:
        >>> vae = ImageLatents.load("embedded")
        >>> moments = vae.moments(images)                       # (B, 3, 256, 256) uint8 -> (B, 12, 8, 8)
        >>> vae.decode(vae.sample_latent(moments)).shape        # (B, 3, 256, 256)
    """

    def __init__(self, model: Any, ref: str = "autoencoder") -> None:
        _refuse_shifted(model.config, ref)
        self.model = model.eval().requires_grad_(False)
        self.scaling_factor = float(model.config.scaling_factor)
        self.channels = int(model.config.latent_channels)
        self.reduction = 2 ** (len(model.config.block_out_channels) - 1)
        self.laid_out = False

    @classmethod
    def load(cls, ref: str = "embedded", device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> ImageLatents:
        """Load weights by reference. One that says ``force_upcast`` (SDXL's) overflows in fp16, and computes in fp32 then.

        Raises:
            FileNotFoundError: a folder without the model. OSError: an unknown public name. WeightsError: tensors do not fit,
            or latents that are not only scaled.
        """
        from diffusers import AutoencoderKL

        folder = local_folder(ref, "vae")
        kind = torch.float32 if dtype == torch.float16 else dtype
        model = pretrained(AutoencoderKL, folder or ref, torch_dtype=kind, low_cpu_mem_usage=False)
        return cls(model, f"vae {ref!r}").to(device, dtype)

    def to(self, device: str | torch.device, dtype: torch.dtype) -> ImageLatents:
        """Move to a device and a type; one that says ``force_upcast`` stays in fp32 where fp16 is asked for."""
        upcast = dtype == torch.float16 and self.model.config.force_upcast
        self.model = self.model.to(device=device, dtype=torch.float32 if upcast else dtype)
        if self.model.device.type != "cpu":
            self._lay_out()
        return self

    def _lay_out(self) -> None:
        """Lay the weights out as convolutions want them, in memory of their own.

        On a CPU that waits for the first picture that is decoded: until then weights are pages of their file, and who only
        encodes never reads the decoder's.
        """
        for weight in self.model.parameters():
            layout = torch.channels_last if weight.dim() == 4 else torch.contiguous_format
            weight.data = weight.data.clone(memory_format=layout)
        self.laid_out = True

    def latent_shape(self, px: int) -> tuple[int, int, int]:
        """(C, h, w) of the latent of a px x px picture. Raises ValueError if the autoencoder cannot halve px evenly."""
        if px % self.reduction:
            raise ValueError(f"size {px}: this autoencoder needs a multiple of {self.reduction} pixels")
        return self.channels, px // self.reduction, px // self.reduction

    @torch.inference_mode()
    def moments(self, images: Tensor) -> Tensor:
        """Encode (B, 3, H, W) uint8 pictures into (B, 2C, h, w) fp32: means and log-variances, not scaled."""
        if images.dtype != torch.uint8:
            raise TypeError(f"images: expected uint8 values 0..255, got {images.dtype}")
        x = images.to(self.model.device).to(self.model.dtype).div(127.5).sub(1)
        posterior = self.model.encode(x.contiguous(memory_format=torch.channels_last)).latent_dist
        return torch.cat([posterior.mean, posterior.logvar], dim=1).float().contiguous()

    def sample_latent(self, moments: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw (B, C, h, w) scaled latents from (B, 2C, h, w) moments."""
        return sample_latent(moments, self.scaling_factor, generator)

    @torch.inference_mode()
    def decode(self, z: Tensor) -> Tensor:
        """Decode (B, C, h, w) scaled latents into (B, 3, H, W) uint8 pictures.

        Raises:
            NotFinite: the decoder overflows.
        """
        if not self.laid_out:
            self._lay_out()
        z = (z.to(self.model.device) / self.scaling_factor).to(self.model.dtype)
        y = self.model.decode(z.contiguous(memory_format=torch.channels_last)).sample.float()
        if not y.isfinite().all():
            kind = str(self.model.dtype).removeprefix("torch.")
            raise NotFinite(f"the autoencoder decodes to values that are not finite, in {kind}: take another dtype")
        return y.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).contiguous()

    def save(self, folder: str) -> None:
        """Write config.json and safetensors weights that `load` takes."""
        self.model.save_pretrained(folder, safe_serialization=True)


def _refuse_shifted(config: Any, ref: str) -> None:
    """What this package knows of an autoencoder's latents is one scaling factor.

    Raises:
        WeightsError: its configuration moves or weighs them in another way too.
    """
    told = {name: getattr(config, name, None) for name in ("shift_factor", "latents_mean", "latents_std")}
    moved = [f"{name} {value}" for name, value in told.items() if value not in (None, 0)]
    if moved:
        raise WeightsError(f"{ref}: has {', '.join(moved)}, where only a scaling_factor is supported: name another autoencoder")


def _model_of_folder(folder: Path) -> Any:
    """The open_clip model of a folder, whose tensors are compared: open_clip stretches positions that do not fit."""
    import_open_clip()
    from open_clip import create_model, factory
    from open_clip.convert import convert_state_dict
    from open_clip.model import convert_to_custom_text_state_dict

    def other(record: logging.LogRecord) -> bool:
        return "No pretrained weights loaded" not in record.getMessage()  # not yet

    logging.getLogger().addFilter(other)
    try:
        with reading(folder / "open_clip_config.json"):
            model = create_model(
                f"local-dir:{folder.resolve()}", load_weights=False, pretrained_text=False, force_custom_text=True
            )
        found = factory._find_checkpoint_in_dir(folder)
    finally:
        logging.getLogger().removeFilter(other)
    if found is None:
        raise FileNotFoundError(f"{folder}: no weights; expected open_clip_model.safetensors")
    with reading(Path(found)):
        state = convert_to_custom_text_state_dict(convert_state_dict(model, factory.load_state_dict(found)))
        if (scale := state.get("logit_scale")) is not None and scale.numel() == 1:
            state["logit_scale"] = scale.reshape(model.logit_scale.shape)  # older files have an axis for it
    load_checked(model, state, found)
    return model


class ClipEncoder:
    """An open_clip model, frozen: image embeddings, and the hidden states and embeddings of captions.

    A tower of width 1 is none: a pipeline of diffusers holds the image tower of one CLIP and the text tower of another.

    Attributes:
        settings: open_clip's configuration of the model; preprocess: how it sees pictures.
        context_length: L, tokens of a caption; text_width: W of a hidden state; embed_dim: D of an embedding.
    """

    def __init__(self, model: Any, tokenizer: Any, ref: str, settings: Mapping[str, Any]) -> None:
        self.model = model.eval().requires_grad_(False)
        self.model.text.output_tokens = True
        self.tokenizer = tokenizer
        self.ref = ref
        self.settings = dict(settings)
        self.preprocess = Preprocess.read(model.visual.preprocess_cfg, f"clip {ref!r}")
        self.context_length = int(model.context_length)
        self.text_width = int(model.text.token_embedding.embedding_dim)
        self.embed_dim = int(model.text.output_dim)

    def to(self, device: str | torch.device, dtype: torch.dtype) -> ClipEncoder:
        """Move to a device and a type."""
        self.model = self.model.to(device=device, dtype=dtype)
        return self

    @classmethod
    def load(cls, ref: str = "embedded", device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> ClipEncoder:
        """Load by reference; a public name is MODEL/WEIGHTS of open_clip, like "ViT-B-32/openai", with or without a commit.

        Raises:
            FileNotFoundError: a folder without the model. ValueError: a public name without weights. OSError: an unknown
            one, or it cannot be fetched. WeightsError: tensors do not fit, or a setting of the model is not supported.
        """
        import_open_clip()
        import open_clip
        from open_clip.pretrained import download_pretrained_from_hf

        settings, folder = clip_settings(ref), local_folder(ref, "clip")
        if folder is not None:
            model = _model_of_folder(folder)
            with reading(folder):
                tokenizer = open_clip.get_tokenizer(f"local-dir:{folder.resolve()}")
            return cls(model.to(device=device, dtype=dtype), tokenizer, ref, settings)
        public, commit = public_name(ref)
        name, told = public.partition("/")[0], published(ref)[1]
        # open_clip itself takes the newest commit. Its table ends the name of a whole repository with a slash.
        repository, _, file = told["hf_hub"].rpartition("/")
        try:
            model = open_clip.create_model(
                name, pretrained=download_pretrained_from_hf(repository, file, revision=commit), require_pretrained=True,
                force_custom_text=True, force_quick_gelu=bool(settings.get("quick_gelu")), force_preprocess_cfg=dict(told),
            )  # fmt: skip
        except (RuntimeError, FileNotFoundError) as error:
            raise OSError(f"clip {ref!r}: {' '.join(str(error).split())}") from error
        return cls(model.to(device=device, dtype=dtype), open_clip.get_tokenizer(name), ref, settings)

    def save(self, folder: str | Path) -> None:
        """Write a folder that `load` takes: config, safetensors in the type of the weights, tokenizer."""
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        preprocess = {name: value for name, value in asdict(self.preprocess).items() if name != "size"}  # the model's own
        config = {"model_cfg": {**self.settings, "custom_text": True}, "preprocess_cfg": preprocess}
        (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        state = {name: value.contiguous() for name, value in self.model.state_dict().items()}
        save_file(state, folder / "open_clip_model.safetensors")
        # open_clip's own tokenizer is part of the package; one of transformers is a file.
        if hasattr(self.tokenizer, "save_pretrained"):
            self.tokenizer.save_pretrained(str(folder))

    @torch.inference_mode()
    def image(self, images: Sequence[Image.Image] | Tensor) -> Tensor:
        """Embed pictures, PIL of any sizes or (B, 3, H, W) uint8, as (B, D) fp32, not normalised (as in the paper)."""
        return self._embedded(self._preprocess(images))

    @torch.inference_mode()
    def seen(self, pixels: Tensor) -> Tensor:
        """Embed what `preprocess` sees of pictures, (B, 3, h, w) uint8, as `image` does."""
        return self._embedded(self._normalised(pixels))

    def _embedded(self, normalised: Tensor) -> Tensor:
        self._require("vision_cfg", "image")
        return self.model.encode_image(normalised).float()

    def _preprocess(self, images: Sequence[Image.Image] | Tensor) -> Tensor:
        """What the image tower is given of pictures, (B, 3, h, w)."""
        pictures = to_pil(images) if isinstance(images, Tensor) else [picture.convert("RGB") for picture in images]
        return self._normalised(self.preprocess.pixels(pictures))

    def _normalised(self, pixels: Tensor) -> Tensor:
        weight = next(self.model.parameters())
        return self.preprocess.normalised(pixels.to(weight.device)).to(weight.dtype)

    def ids(self, captions: Sequence[str]) -> Tensor:
        """Token ids (B, L), cut at L tokens.

        Behind a caption open_clip's own tokenizer puts zeros; the published model has seen the end-of-text token there, as
        transformers' CLIPTokenizer puts it. It matters: the hidden states of all L tokens are modelled. A tower that looks at
        what is behind (without a causal mask, as MobileCLIP's, or pooling there) gets the zeros that it was trained with.
        """
        ids = self.tokenizer(list(captions))
        text = self.model.text
        looks_behind = text.attn_mask is None or text.cls_emb is not None or text.pool_type == "last"
        if (end := getattr(self.tokenizer, "eot_token_id", None)) is None or looks_behind:
            return ids
        behind = (ids == end).flip(1).cumsum(1).flip(1) == 0
        return ids.masked_fill(behind, end)

    @torch.no_grad()  # not inference mode: the text codec is trained on these hidden states
    def _text(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        self._require("text_cfg", "text")
        pooled, tokens = self.model.text(self.ids(captions).to(next(self.model.parameters()).device))
        return pooled.float(), tokens.float()

    def _require(self, tower: str, name: str) -> None:
        if self.settings[tower].get("width") == 1:
            raise ValueError(f"clip {self.ref!r} has no {name} tower: name a whole CLIP model")

    def tokens(self, captions: Sequence[str]) -> Tensor:
        """Last hidden states of the text tower, after its final norm: (B, L, W) fp32. Longer captions are cut at L tokens."""
        return self._text(captions)[1]

    def text(self, captions: Sequence[str]) -> Tensor:
        """Embed captions as (B, D) fp32, comparable by cosine with `image`; not normalised."""
        return self._text(captions)[0]
