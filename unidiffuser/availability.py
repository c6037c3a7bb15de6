"""Whether public weights can be loaded here: they are in the cache, or the hub answers one request for them."""

from __future__ import annotations

from typing import Any

from unidiffuser.references import Kind, local_folder, public_name

SECONDS = 5.0
_WEIGHTS = {
    "vae": ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"),
    "gpt2": ("model.safetensors", "pytorch_model.bin", "model.safetensors.index.json"),
    "clip": ("open_clip_model.safetensors", "open_clip_pytorch_model.bin"),
}
FIX = "name a local folder or `embedded`"


def unavailable(ref: str, kind: Kind) -> str | None:
    """Why the weights of a reference cannot be loaded, with the fix; None if they can, as far as one request tells.

    Raises:
        FileNotFoundError: see `local_folder`.
    """
    if local_folder(ref, kind) is not None:
        return None
    if kind != "clip":
        return _of_hub(ref, public_name(ref)[0], "config.json", _WEIGHTS[kind])
    from unidiffuser.clip_settings import published

    try:
        told = published(ref)[1]
    except (OSError, ValueError) as error:
        return str(error)
    # open_clip's table ends the name of a whole repository with a slash, and that of a file with the file.
    repository, _, file = told["hf_hub"].rpartition("/")
    return _of_hub(ref, repository, file or "open_clip_config.json", (file,) if file else _WEIGHTS["clip"])


def _of_hub(ref: str, repository: str, asked: str, weights: tuple[str, ...]) -> str | None:
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    commit = public_name(ref)[1]
    try:
        if any(isinstance(try_to_load_from_cache(repository, file, revision=commit), str) for file in weights):
            return None
        if constants.HF_HUB_OFFLINE:
            return f"{ref} is not in the cache, and HF_HUB_OFFLINE is set: fetch it before, or {FIX}"
        get_hf_file_metadata(hf_hub_url(repository, asked, revision=commit), timeout=SECONDS)
    except EntryNotFoundError:
        return f"{ref} is no such model: {constants.ENDPOINT}/{repository} has no {asked}; {FIX}"
    except RevisionNotFoundError:
        return f"{ref}: {constants.ENDPOINT}/{repository} has no such commit; correct it, or {FIX}"
    except GatedRepoError:
        return f"{ref} is gated: accept its terms at {constants.ENDPOINT}/{repository}, and set HF_TOKEN"
    except (RepositoryNotFoundError, HFValidationError):
        return f"{ref} is no public model of {constants.ENDPOINT}: correct the name, or {FIX}"
    except Exception as error:
        return _silent(ref, constants.ENDPOINT, error)
    return None


def _silent(ref: str, address: str, error: Any) -> str:
    words = " ".join(str(error).split()) or type(error).__name__
    return f"{ref} is not in the cache, and {address} cannot be reached ({words[:160]}): mend the network, or {FIX}"
