"""`unidiffuser logs`: what the newest job of a node has said, from Ray or from where it is kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from infra.external import state_folder
from infra.processes import ServerError
from infra.ray_jobs import RayJobs
from infra.store import Store, StoreError
from pipelines.commands.checkpoints import Misuse
from pipelines.flows import job_logs
from pipelines.servers.servers import Servers
from stages.runner.recipe import Recipe


def lines_of(recipe: Recipe, node: str, store: Store, follow: bool) -> Iterator[str]:
    """The lines of the log of the newest job of a node; `follow` goes on as they come, until the job has ended.

    Raises:
        RecipeError: there is no such node.
        Misuse: several are meant.
        StoreError: there is no such store, or no job's log in it.
    """
    if len(nodes := recipe.select(node)) > 1:
        raise Misuse(f"{node}: means {', '.join(nodes)}; name one")
    if store.local and not Path(store.root).is_dir():
        raise StoreError(f"{store.root}: no such store; name the one of the run with --store")
    # A cluster that does not answer now may have had the job all the same.
    with suppress(ServerError):
        ray = Servers(state_folder(store)).find_ray()
        if ray is not None and (job := job_logs.newest_job(ray, store, recipe, nodes[0])) is not None:
            yield from _told_by_ray(ray, job, recipe, nodes[0], store, follow)
            return
    if (kept := job_logs.kept(store, recipe.name, nodes[0])) is None:
        raise StoreError(f"{nodes[0]}: no job was at it in {store.root}, so there is no log; `unidiffuser status` says why")
    yield from kept


def _told_by_ray(ray: RayJobs, job: str, recipe: Recipe, node: str, store: Store, follow: bool) -> Iterator[str]:
    if not follow:
        yield from job_logs.readable(ray.log(job, patient=False))
        return
    said = 0
    try:
        for line in ray.follow(job):
            for text in job_logs.readable(line) if isinstance(line, str) else []:
                said += 1
                yield text
    except ServerError:
        # The run is over, and its Ray with it.
        yield from (job_logs.kept(store, recipe.name, node) or [])[said:]
