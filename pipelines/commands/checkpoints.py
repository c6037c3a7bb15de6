"""What a person may mean by CHECKPOINT, as a local export folder: a folder in any layout, or a dataset of the store."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

from infra.dataset import Dataset, by_prefix, find, pointed
from infra.store import Store, StoreError
from stages.catalog import MADE_STAGES
from stages.drawing.assembly import assemble
from stages.evaluate.export import ExportConfig
from stages.runner.contract import Job, StageError
from unidiffuser.references import Encoders, weights_digest

Part = Literal["vae", "clip", "text"]


class Misuse(Exception):
    """A command that cannot mean anything; one line that names the argument and the fix."""


@dataclass(frozen=True)
class Named:
    """Encoders that the person named; None leaves the choice to the checkpoint."""

    vae: str | None = None
    clip: str | None = None
    text: str | None = None
    gpt2: str | None = None

    @property
    def or_published(self) -> Encoders:
        return Encoders(**{name: ref for name, ref in asdict(self).items() if ref is not None})


def quiet_libraries() -> None:
    """No bars and notes of the model libraries while a command loads: what matters of them is raised as an error."""
    import logging

    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    # transformers imports DeepSpeed, which then writes to stdout that it found no GPU.
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)


@contextmanager
def said_in_a_line() -> Iterator[None]:
    """What goes wrong with files and weights, as this command's own errors.

    Raises:
        Misuse: the target exists, or an encoder's name cannot be one.
        StageError: a file is missing, tensors do not fit, or a public encoder cannot be fetched.
    """
    from unidiffuser.tensors import WeightsError

    try:
        yield
    except FileExistsError as error:
        raise Misuse(str(error)) from None
    except (WeightsError, OSError) as error:
        raise StageError(" ".join(str(error).split())) from error
    except ValueError as error:
        raise Misuse(str(error)) from error


@contextmanager
def opened(checkpoint: str, store: Store, named: Named, heads: int | None = None) -> Iterator[Path]:
    """A local folder for `UniDiffuser.load`, gone afterwards unless the checkpoint is such a folder itself.

    Args:
        checkpoint: a folder with a whole set in any layout, or an export or training dataset: its fingerprint, the first
            characters of that, STAGE/FINGERPRINT, or the path of its folder.

    Raises:
        Misuse: it is none of these, or an encoder of a training checkpoint must be named.
        OSError, WeightsError, ValueError: see `said_in_a_line`, which is for them.
    """
    from unidiffuser.layouts import export_folder, set_layout

    if set_layout(checkpoint) is not None:
        with export_folder(checkpoint, named.or_published, heads) as folder:
            yield folder
        return
    dataset = dataset_of(checkpoint, store)
    with tempfile.TemporaryDirectory(prefix="unidiffuser-") as scratch:
        folder = Path(scratch, "export")
        if dataset.manifest.stage == "export":
            yield _named_by(dataset, dataset.fetch(folder))
        else:
            yield assemble(training_job(dataset, named), folder)


def _named_by(export: Dataset, folder: Path) -> Path:
    """Let the provenance in an export's folder name the export, which does not know its fingerprint while it is made."""
    from unidiffuser.provenance import CARD, PROVENANCE, write_provenance
    from unidiffuser.tensors import read_settings

    manifest, file = export.manifest, folder / PROVENANCE
    told = {
        "node": manifest.node,
        "stage": manifest.stage,
        "fingerprint": manifest.fingerprint,
        "commit": manifest.code.get("git"),
        "made_from": {name: reference.fingerprint for name, reference in manifest.inputs.items()},
    }
    if file.is_file():  # exports of older versions have none
        told = read_settings(file)
    for name in (PROVENANCE, CARD):
        (folder / name).unlink(missing_ok=True)  # a link into the store
    write_provenance(folder, told | {"export": manifest.fingerprint})
    return folder


@contextmanager
def for_library(checkpoint: str, store: str | None, encoders: Encoders | None) -> Iterator[Path]:
    """`opened` for `unidiffuser.checkpoints`, which finds this function by its entry point.

    Raises:
        FileNotFoundError: there is no such checkpoint, or an encoder of it must be named.
    """
    place = Store(store or os.environ.get("UNIDIFFUSER_STORE") or "runs")
    try:
        with opened(checkpoint, place, Named(**asdict(encoders)) if encoders else Named()) as folder:
            yield folder
    except Misuse as error:
        raise FileNotFoundError(str(error)) from None


def convert(source: str, target: Path, to: Any, store: Store, named: Named, heads: int | None = None) -> int | None:
    """Write a checkpoint, or a lone U-ViT in any layout, as `target`; a training dataset becomes a whole set.

    Returns:
        With which --heads official files are to be converted back, if it takes that.

    Raises:
        Misuse: see `opened`; or there is something at `target`, or `heads` are given that the checkpoint tells itself.
        StageError: see `said_in_a_line`.
    """
    from unidiffuser import layouts

    if to not in layouts.LAYOUTS:
        raise Misuse(f"--to {to}: expected {', '.join(layouts.LAYOUTS)}")
    quiet_libraries()
    path = Path(source)
    with said_in_a_line():
        if path.exists() and not (path / "manifest.json").is_file():
            untold = layouts.convert(path, target, to, heads, named.or_published)
        else:
            with opened(source, store, named) as folder:
                untold = layouts.convert(folder, target, to, heads)
    return untold


def dataset_of(checkpoint: str, store: Store) -> Dataset:
    """The export or training dataset that a person means.

    Raises:
        Misuse: there is none, or it is of another stage.
    """
    path = Path(checkpoint)
    if (path / "manifest.json").is_file():
        store = Store(str(path.resolve().parent.parent))
    elif path.exists():
        raise Misuse(
            f"{checkpoint}: no whole checkpoint; expected an export folder, a UniDiffuserPipeline of diffusers, a folder with "
            "uvit_v1.pth, autoencoder_kl.pth and caption_decoder.pth, or an export or train dataset"
        )
    try:
        dataset = by_prefix(store, checkpoint)
    except StoreError as error:
        raise Misuse(f"{error} (CHECKPOINT is a folder or a dataset)") from None
    if dataset.manifest.stage not in ("export", "train"):
        raise Misuse(f"{checkpoint}: a dataset of {dataset.manifest.node}; a checkpoint is one of export or train")
    return dataset


def training_job(checkpoint: Dataset, named: Named) -> Job:
    """What `assemble` needs: the codec and the encoders of the latents that the checkpoint was trained on.

    Manifests hold digests of encoders, not their names: tried are the named ones, the embedded and the published.

    Raises:
        Misuse: the codec is gone, or no encoder that was tried has the digest.
    """
    store, node = checkpoint.store, checkpoint.manifest.node
    data = next(reference for name, reference in checkpoint.manifest.inputs.items() if name.startswith("data."))
    encode = find(store, data.stage, data.fingerprint)
    if encode is not None and encode.manifest.stage in MADE_STAGES:
        raise Misuse(f"{node} was trained on {encode.manifest.node}, which has no text codec: `unidiffuser evaluate` draws it")
    reference = encode.manifest.inputs["codec"] if encode else None
    codec = find(store, reference.stage, reference.fingerprint) if reference else None
    if encode is None or codec is None:
        raise Misuse(f"{node} {checkpoint.manifest.fingerprint}: its text codec is no longer in the store; use an export of it")
    config = ExportConfig.model_validate({part: _encoder(part, encode, node, named) for part in ("vae", "clip", "text")})
    return Job(
        store=store, stage="export", node=node, config=config, inputs={"checkpoint": checkpoint, "codec": codec}, sources={},
        weights={}, recipe=_recipe_of(checkpoint),
    )  # fmt: skip


def _recipe_of(dataset: Dataset) -> str | None:
    """A recipe whose node gave this dataset last."""
    store, reference = dataset.store, dataset.manifest.reference()
    for recipe in store.list("nodes"):
        found = pointed(store, recipe, dataset.manifest.node) if recipe != "announced" else None
        if found is not None and found.manifest.reference() == reference:
            return recipe
    return None


def _encoder(part: Any, encode: Dataset, node: str, named: Named) -> str:
    wanted = encode.manifest.sources[part]
    asked = getattr(named, part)
    kind = cast(Literal["vae", "clip"], "vae" if part == "vae" else "clip")
    for reference in [asked] if asked else ["embedded", getattr(Encoders(), part)]:
        try:
            if weights_digest(reference, kind) == wanted:
                return reference
        except FileNotFoundError as error:
            raise Misuse(f"--{part} {error}") from None
    tried = f"--{part} {asked} is not it" if asked else "it is neither the embedded nor the published one"
    raise Misuse(f"{node}: name the encoder `{part}` that it was trained with ({tried}) with --{part}, or use an export")
