"""What travels with the weights of a CLIP, by reference: architecture, activation, tokenizer and preprocessing.

All of it is used, or the model is refused by its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unidiffuser.clip_preprocess import Preprocess
from unidiffuser.imports import import_open_clip
from unidiffuser.references import local_folder, public_name
from unidiffuser.tensors import WeightsError, read_settings

_FIELDS = {"embed_dim": int, "vision_cfg": dict, "text_cfg": dict}
_PREPROCESS = ("size", "mode", "mean", "std", "interpolation", "resize_mode", "fill_color")


def clip_settings(ref: str) -> dict[str, Any]:
    """open_clip's configuration of a model by reference, without its weights.

    Raises:
        FileNotFoundError: a folder without the model. OSError: an unknown public name. ValueError: one without weights.
        WeightsError: its configuration is damaged, or asks for what is not computed here.
    """
    folder = local_folder(ref, "clip")
    settings = _of_folder(folder)["model_cfg"] if folder is not None else published(ref)[0]
    _refuse_unsupported(settings, ref)
    return settings


def context_length(ref: str) -> int:
    """Tokens of a text of a model by reference. Raises as ``clip_settings``."""
    return int(clip_settings(ref)["text_cfg"].get("context_length", 77))


def clip_preprocess(ref: str) -> Preprocess:
    """How a model by reference sees pictures.

    Raises:
        FileNotFoundError, OSError, ValueError, WeightsError: see ``clip_settings``.
    """
    folder = local_folder(ref, "clip")
    if folder is not None:
        document = _of_folder(folder)
        settings, told = document["model_cfg"], document.get("preprocess_cfg") or {}
    else:
        settings, told = published(ref)
    # open_clip takes the size that the network has.
    return Preprocess.read({**told, "size": settings["vision_cfg"].get("image_size", 224)}, f"clip {ref!r}")


def _of_folder(folder: Path) -> dict[str, Any]:
    file = folder / "open_clip_config.json"
    document = read_settings(file)
    settings, told = document.get("model_cfg"), document.get("preprocess_cfg") or {}
    if not isinstance(settings, dict) or not all(isinstance(settings.get(name), kind) for name, kind in _FIELDS.items()):
        raise WeightsError(f"{file}: expected a model_cfg with {', '.join(_FIELDS)}, as open_clip writes it")
    if not isinstance(told, dict) or (unknown := sorted(set(told) - set(_PREPROCESS))):
        what = ", ".join(unknown) if isinstance(told, dict) else repr(told)
        raise WeightsError(f"{file}: preprocess_cfg has {what}, unknown to open_clip: name another CLIP")
    return document


def published(ref: str) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """The configuration of a public model, and what open_clip's table says of its weights.

    Raises:
        OSError, ValueError: see ``clip_settings``.
    """
    import_open_clip()
    import open_clip

    name, _, weights = public_name(ref)[0].partition("/")
    if not weights:
        raise ValueError(f"clip {ref!r}: expected MODEL/WEIGHTS like 'ViT-B-32/openai', 'embedded' or a folder")
    settings = open_clip.get_model_config(name)
    if settings is None:
        raise OSError(f"clip {ref!r}: open_clip knows no model {name}")
    told = open_clip.get_pretrained_cfg(name, weights)
    if not told:
        known = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        raise OSError(f"clip {ref!r}: open_clip knows no weights {weights} of {name}; it knows {known}")
    # One architecture has weights that were trained with QuickGELU and others that were not; only the table tells.
    return settings | ({"quick_gelu": True} if told.get("quick_gelu") else {}), told


def _refuse_unsupported(settings: Mapping[str, Any], ref: str) -> None:
    text, vision = settings["text_cfg"], settings["vision_cfg"]
    reasons = {
        "is a CoCa (multimodal_cfg), whose text tower pools over padding": "multimodal_cfg" in settings,
        f"has a text tower of transformers ({text.get('hf_model_name')})": bool(text.get("hf_model_name")),
        "drops tokens at random (tokenizer_kwargs.reduction_mask)": bool(
            (text.get("tokenizer_kwargs") or {}).get("reduction_mask")
        ),
        "gives tokens beside its embedding (output_tokens)": bool(text.get("output_tokens") or vision.get("output_tokens")),
    }
    for reason, given in reasons.items():
        if given:
            raise WeightsError(f"clip {ref!r}: {reason}, which is not supported: name another CLIP")
