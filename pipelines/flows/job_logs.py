"""The logs of a node's jobs: Ray has them while it is there, and the store keeps them when it has gone."""

from __future__ import annotations

import re
import shlex

from infra.ray_jobs import RayJobs
from infra.store import Store
from stages.runner.recipe import Recipe

PROGRESS = "@progress "
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
# What Ray puts before a worker's line.
WORKER = re.compile(r"^\([^)]*pid=[^)]*\)\s*")


def keep(ray: RayJobs, store: Store, recipe: str, job: str) -> None:
    """Write the log of a job that has ended into the store.

    Raises:
        ServerError: Ray does not tell it.
    """
    store.write(f"{_folder(recipe)}/{job}.log", "".join(f"{line}\n" for line in readable(ray.log(job, patient=False))).encode())


def kept(store: Store, recipe: str, node: str) -> list[str] | None:
    """The lines of the newest log of a node that the store has."""
    files = [name for name in store.list(_folder(recipe)) if _is_of(node, name.removesuffix(".log"))]
    if not files:
        return None
    newest = max((f"{_folder(recipe)}/{name}" for name in files), key=store.modified)
    return store.read(newest).decode().splitlines()


def newest_job(ray: RayJobs, store: Store, recipe: Recipe, node: str) -> str | None:
    """The job of a node that Ray got last, by this recipe and for this store: others have nodes of this name too.

    Raises:
        ServerError: Ray does not answer.
    """

    return ray.newest(lambda job, command: _is_of(node, job) and is_of_recipe(command, recipe.name, store))


def is_of_recipe(command: str, recipe: str, store: Store) -> bool:
    """Whether a job's command works at a recipe of this name in this store."""
    words, copy = shlex.split(command), re.compile(rf".*/recipes/{re.escape(recipe)}-[0-9a-f]+\.json")
    return store.root in words and any(copy.fullmatch(word) for word in words)


def readable(text: str) -> list[str]:
    """A log's lines as a person reads them: without progress, colours and the names of processes."""
    lines = (plain(line) for line in text.splitlines())
    return [line for line in lines if line and not line.startswith(PROGRESS)]


def plain(line: str) -> str:
    return WORKER.sub("", COLOUR.sub("", line).rstrip())


def _folder(recipe: str) -> str:
    return f".state/logs/{recipe}"


def _is_of(node: str, job: str) -> bool:
    """Whether a job, ``NODE-FINGERPRINT-ATTEMPT``, is of a node."""
    return re.fullmatch(rf"{re.escape(node)}-[0-9a-f]+-\d+", job) is not None
