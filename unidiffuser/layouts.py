"""Checkpoints on disk in any of three layouts: recognised by what is there, converted into another.

A lone U-ViT, or a whole set with the autoencoder, the CLIP towers and the text codec:

    layout     lone U-ViT                                  whole set
    native     folder with config.json, model.safetensors  export folder: uvit, vae, clip_image, clip_text, text_codec
    official   a .pth file                                 folder with uvit_v0.pth or uvit_v1.pth, autoencoder_kl.pth and
                                                           caption_decoder.pth; CLIP stands beside it (``references.Encoders``)
    diffusers  folder of a UniDiffuserModel, or ``unet``   folder of a UniDiffuserPipeline

A lone file of tensors, .pth or .safetensors, may have the names of any layout: they tell which.

Tensors are renamed and cut, never computed with: every way there and back is exact. Those of the U-ViT keep their types, those of
the other parts are written in fp32. What belongs to training alone (the loss weights, the initial scale of the position table) is
native only, and has its default after a way back. The noise schedule is told by a native folder and by a UniDiffuserPipeline; the
others take the published one for granted, and a model that was trained with another is refused there.
"""

from __future__ import annotations

import errno
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, get_args

import torch

from unidiffuser.clip_settings import context_length
from unidiffuser.convert import check_published_noise, from_tensors, save_diffusers, to_official
from unidiffuser.generation import FOLDERS, UniDiffuser
from unidiffuser.official import CODEC_FILE, VAE_FILE, export_official, import_official, uvit_file
from unidiffuser.pipeline_export import save_pipeline
from unidiffuser.pipeline_import import import_pipeline, load_unet
from unidiffuser.provenance import carry
from unidiffuser.references import Encoders
from unidiffuser.tensors import WeightsError, named, read_settings, read_tensors
from unidiffuser.uvit import UViT
from unidiffuser.weights import build, read_config, read_native, save_native

Layout = Literal["native", "official", "diffusers"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)


def set_layout(source: Path | str) -> Layout | None:
    """The layout of the whole set that lies at ``source``; None where there is none."""
    source = Path(source)
    if (source / "uvit" / "config.json").is_file() and (source / "text_codec").is_dir():
        return "native"
    if (source / "model_index.json").is_file():
        return "diffusers"
    if uvit_file(source) is not None and (source / VAE_FILE).is_file() and (source / CODEC_FILE).is_file():
        return "official"
    return None


def load_uvit(source: Path | str, heads: int | None = None, text_tokens: int = 77) -> UViT:
    """The U-ViT of a checkpoint in any layout, in evaluation mode, every tensor in its own type.

    Args:
        heads: attention heads of a lone file, if not width / 64; folders say it themselves.
        text_tokens: text tokens of a lone file.

    Raises:
        FileNotFoundError: there is nothing at ``source``, or nothing that is known.
        WeightsError: it is damaged, or does not fit together.
    """
    place = _place_of_uvit(Path(source))
    if place.is_file():
        state = read_tensors(place)
        with named(place):
            config, native = from_tensors(state, heads, text_tokens)
        return build(config, native, place)
    return read_native(place) if "modalities" in read_settings(place / "config.json") else load_unet(place)


def _place_of_uvit(source: Path) -> Path:
    """The lone file, or the folder with config.json, of the U-ViT of a checkpoint."""
    if source.is_file():
        return source
    for folder in (source, source / "uvit", source / "unet"):
        if (folder / "config.json").is_file():
            settings = read_settings(folder / "config.json")
            if "modalities" in settings or settings.get("_class_name") == "UniDiffuserModel":
                return folder
    if (file := uvit_file(source)) is not None:
        return file
    raise FileNotFoundError(
        f"{source}: no U-ViT found; expected a .pth file, or a folder with uvit/config.json, unet/config.json, "
        "config.json or uvit_v1.pth"
    )


@contextmanager
def export_folder(source: Path | str, encoders: Encoders | None = None, heads: int | None = None) -> Iterator[Path]:
    """The whole set ``source`` as an export folder: itself if it is one, else converted into a temporary folder.

    Args:
        encoders: what stands beside official files; the published ones if None.
        heads: attention heads of an official U-ViT, if not width / 64.

    Raises:
        FileNotFoundError: there is no whole set at ``source``, or a part of it is missing.
        WeightsError: it is damaged, or does not fit together.
    """
    source, layout = Path(source), set_layout(source)
    if layout == "native":
        yield source
        return
    if layout is None:
        raise FileNotFoundError(
            f"{source}: no whole checkpoint; expected an export folder, a UniDiffuserPipeline of diffusers, or a folder with "
            "uvit_v1.pth, autoencoder_kl.pth and caption_decoder.pth"
        )
    with tempfile.TemporaryDirectory(prefix="unidiffuser-") as scratch:
        folder = Path(scratch, "export")
        if layout == "diffusers":
            import_pipeline(source, folder)
        else:
            import_official(source, folder, encoders or Encoders(), heads)
        carry(source, folder, "native")
        yield folder


def convert(
    source: Path | str, target: Path | str, to: Layout, heads: int | None = None, encoders: Encoders | None = None
) -> int | None:
    """Write the checkpoint ``source`` as ``target`` in another layout; a whole set becomes a whole set.

    A lone U-ViT becomes a lone U-ViT: a native folder, a .pth file, or a folder with ``unet``.

    Args:
        heads, encoders: see ``export_folder``. A lone official U-ViT has as many text tokens as the CLIP of the captions.

    Returns:
        The heads that must be told when official files that were written are read; None where nothing must.

    Raises:
        FileNotFoundError, WeightsError: see ``load_uvit`` and ``export_folder``; or there is half a set at ``source``.
        FileExistsError: there is something at ``target``.
        ValueError: ``heads`` of a checkpoint that tells its own.
    """
    source, target = Path(source), Path(target)
    if target.exists() and (target.is_file() or any(target.iterdir())):
        raise FileExistsError(f"{target} exists: choose another name, or remove it")
    _refuse_half_a_set(source)
    if heads is not None and not _place_of_uvit(source).is_file():
        raise ValueError(f"--heads {heads} is for official files, which do not tell it; this checkpoint does: leave it out")
    whole = set_layout(source)
    if whole is None and to == "official" and target.suffix != ".pth":
        raise WeightsError(f"{target}: an official U-ViT is a file, give a name that ends in .pth")
    target.parent.mkdir(parents=True, exist_ok=True)
    # Written beside the target and renamed: what is there is whole.
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as scratch:
        made = Path(scratch, "made")
        if whole is None:
            uvit = load_uvit(source, heads, context_length((encoders or Encoders()).text))
            _convert_uvit(uvit, made, to)
            config = uvit.config
        else:
            with export_folder(source, encoders, heads) as folder:
                write_set(folder, made, to)
                config = read_config(folder / "uvit")
        _rename_to_new(made, target)
    return config.heads if to == "official" and config.heads * 64 != config.width else None


def _rename_to_new(made: Path, target: Path) -> None:
    """Give what was made its name, but for a file or a folder that came to be there meanwhile.

    Raises:
        FileExistsError: there is one.
    """
    try:
        if made.is_file():
            target.touch(exist_ok=False)  # an own file, which the renaming may replace
        made.rename(target)  # a folder replaces an empty one, and no other
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise
        raise FileExistsError(f"{target} exists: choose another name, or remove it") from None


def _refuse_half_a_set(source: Path) -> None:
    """A U-ViT with only some of what stands beside it in a set would be converted alone, and the rest be lost.

    Raises:
        FileNotFoundError: that is so.
    """
    sets = (
        (source / "uvit", FOLDERS[1:]),
        (source / "unet", ("model_index.json", "vae")),
        (uvit_file(source), (VAE_FILE, CODEC_FILE)),
    )
    for uvit, beside in sets:
        missing = [name for name in beside if not (source / name).exists()]
        if uvit is not None and uvit.exists() and 0 < len(missing) < len(beside):
            raise FileNotFoundError(f"{source}: half a set, it lacks {', '.join(missing)}; for the U-ViT alone name {uvit}")


def write_set(folder: Path, target: Path, to: Layout) -> None:
    """Write the export folder ``folder`` as ``target`` in a layout, with its provenance and a model card.

    Raises:
        WeightsError: that layout has no place for it.
    """
    if to == "native":
        shutil.copytree(folder, target)
    else:
        _write_foreign(folder, target, to)
    carry(folder, target, to)


def _write_foreign(folder: Path, target: Path, to: Layout) -> None:
    model = UniDiffuser.load(folder)
    # A model that computes is of one type; another layout gets every tensor in its own.
    del model.uvit
    model.uvit = read_native(folder / "uvit")
    if to == "diffusers":
        save_pipeline(target, model)
    else:
        export_official(model, target)


def _convert_uvit(model: UViT, target: Path, to: Layout) -> None:
    if to == "native":
        save_native(target, model)
        return
    check_published_noise(model.config)
    if to == "diffusers":
        save_diffusers(target / "unet", model.state_dict(), model.config)
    else:
        torch.save(to_official(model.state_dict(), model.config), target)
