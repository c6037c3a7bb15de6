"""The checkpoint that an evaluation is of: a training or an export of the store, or a folder from outside."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from infra.external import fetch_outside
from infra.scratch import scratch_folder
from stages.drawing.assembly import assemble
from stages.runner.contract import Job, StageError, digest_of

OUTSIDE = "checkpoint"


@dataclass(frozen=True)
class Identity:
    """What a report says of a checkpoint; `fingerprint` decides what is drawn."""

    fingerprint: str
    node: str
    step: int | None


def files_of(folder: str | None) -> dict[str, list[str]]:
    """The list of files that a folder from outside is, for `Stage.lists`."""
    return {} if folder is None else {OUTSIDE: [f"{folder.rstrip('/')}/**/*"]}


def identity(job: Job) -> Identity:
    if OUTSIDE in job.lists:
        name = PurePosixPath(job.config.checkpoint.rstrip("/")).name
        return Identity(digest_of(sorted(job.lists[OUTSIDE].values())), name, None)
    manifest = job.inputs["checkpoint"].manifest
    return Identity(manifest.fingerprint, manifest.node, manifest.summary.get("step"))


@contextmanager
def model_folder(job: Job) -> Iterator[Path]:
    """A local folder for `UniDiffuser.load`, gone afterwards.

    Raises:
        StageError: a folder from outside has changed or gone.
    """
    with scratch_folder() as scratch:
        if OUTSIDE in job.lists:
            try:
                yield fetch_outside(job.lists[OUTSIDE], job.config.checkpoint, job.store, scratch)
            except OSError as error:
                raise StageError(f"checkpoint: {error}") from None
        elif "codec" in job.inputs:
            yield assemble(job, scratch / "model")
        else:
            yield job.inputs["checkpoint"].fetch(scratch / "export")
