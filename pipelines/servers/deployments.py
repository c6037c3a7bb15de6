"""`unidiffuser deploy`: a recipe on a Prefect server, as a deployment of the end-to-end flow and one of every node."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import DeploymentCreate, DeploymentScheduleCreate, WorkPoolCreate
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterTags
from prefect.client.schemas.objects import ConcurrencyLimitStrategy, ConcurrencyOptions
from prefect.client.schemas.responses import DeploymentResponse
from prefect.exceptions import ObjectNotFound

import infra
from infra.loopback import is_loopback
from infra.prefect_server import HEARTBEAT_SECONDS
from infra.queries import with_query
from infra.ray_jobs import OPEN
from infra.store import Store
from pipelines.flows.deployed import deployed_recipe
from pipelines.flows.forms import node_form, recipe_form
from pipelines.flows.run import snapshot
from pipelines.flows.slots import LIMIT
from pipelines.servers import automations
from pipelines.servers.notifications import blocks_of
from pipelines.servers.owners import Owner, may_take, refusal
from pipelines.servers.schedules import prefect_schedules, renewed
from stages.runner.deployment import Pool
from stages.runner.recipe import Recipe, RecipeError

POOLS = Path(infra.__file__).parent / "work_pools"
# Flow and name of the function that is the flow, as an import path: the package is installed wherever a worker runs.
ENTRYPOINTS = {"recipe": "pipelines.flows.flow.recipe_run", "node": "pipelines.flows.flow.node_run"}


@dataclass
class Deployed:
    """What `deploy` did: ids of the deployments by name, the end-to-end one first, and names of those that it removed; and the
    recipe's schedules as they are on the server now, which start nothing while somebody has the deployment `paused`. `gpus` is
    the number of slots that the server has where that is another one than the recipe's."""

    recipe: str
    deployments: dict[str, UUID] = field(default_factory=dict)
    removed: list[str] = field(default_factory=list)
    schedules: list[DeploymentScheduleCreate] = field(default_factory=list)
    paused: bool = False
    gpus: int | None = None


def deploy(recipe: Recipe, store: Store, replace: bool = False) -> Deployed:
    """Register a recipe, or renew what is registered; deployments of nodes that it no longer has are removed.

    What the recipe does not say, or says as it did before, stays as somebody has set it on the server: what is paused or switched
    off, limits, queues, schedules and tags that were added.

    Args:
        replace: take the name over from another recipe file or store; its schedules, triggers and settings go.

    Raises:
        RecipeError: a schedule, a block, the work pool or the store is not as it must be, which names the field; or the name is
            another's.
    """
    _check_store(recipe.deploy.pool, store)
    check_addresses(recipe)
    schedules = prefect_schedules(recipe)
    done, owner = Deployed(recipe.name), Owner.of(recipe, store)
    names = {node.name: f"{recipe.name}-{node.name}" for node in recipe.nodes.values()}
    with get_client(sync_client=True) as client:
        there = [_found(client, f"recipe/{recipe.name}"), *(_found(client, f"node/{name}") for name in names.values())]
        foreign = [found for found in there if found is not None and not may_take(found, owner)]
        if foreign and not replace:
            raise RecipeError(_refusal(client, recipe, foreign))
        whole, *nodes = (None if found in foreign else found for found in there)
        blocks = blocks_of(client, recipe)
        ensure_pool(client, recipe.deploy.pool)
        before = deployed_recipe(whole.parameters) if whole is not None else None
        done.gpus = _set_gpus(client, recipe.deploy.gpus, before.deploy.gpus if before else None)
        if whole is not None:
            schedules = renewed(schedules, whole.schedules, before.deploy.schedules if before else ())
        done.paused = there[0] is not None and there[0].paused
        copy = snapshot(recipe, store)
        done.deployments[recipe.name] = _register_whole(client, recipe, store, copy, whole, before, schedules, owner.labels())
        done.schedules = schedules[: len(recipe.deploy.schedules)]
        flow = client.create_flow_from_name("node")
        for node, found in zip(recipe.nodes.values(), nodes, strict=True):
            done.deployments[names[node.name]] = _register(
                client,
                owner.labels(),
                flow_id=flow,
                name=names[node.name],
                description=f"The node {node.name} of the recipe {recipe.name}, from what the nodes before it have committed.",
                entrypoint=ENTRYPOINTS["node"],
                parameters={"recipe": copy, "store": store.root, "node": node.name},
                parameter_openapi_schema=node_form(recipe, node),
                schedules=renewed([], found.schedules, ()) if found else [],
                **_common(recipe, copy, found, before, node.stage),
            )
        done.removed = _remove_others(client, recipe, set(done.deployments.values()))
        automations.install(client)
        automations.install_triggers(client, recipe, done.deployments[recipe.name], blocks)
    return done


def register_trial(recipe: Recipe, store: Store) -> UUID:
    """A deployment of the whole recipe alone, for runs from the terminal: no schedules, no triggers, nothing of the nodes.

    All runs of a recipe that nobody has deployed share it, and `deploy` takes it over.

    Raises:
        RecipeError: the work pool or the store is not as it must be.
    """
    _check_store(recipe.deploy.pool, store)
    with get_client(sync_client=True) as client:
        ensure_pool(client, recipe.deploy.pool)
        _set_gpus(client, recipe.deploy.gpus, None)
        labels = Owner.of(recipe, store).labels(trial=True)
        made = _register_whole(client, recipe, store, snapshot(recipe, store), None, None, [], labels)
        automations.install(client)
    return made


def _register_whole(
    client: SyncPrefectClient,
    recipe: Recipe,
    store: Store,
    copy: str,
    found: DeploymentResponse | None,
    before: Recipe | None,
    schedules: list[DeploymentScheduleCreate],
    labels: Mapping[str, Any],
) -> UUID:
    return _register(
        client,
        labels,
        flow_id=client.create_flow_from_name("recipe"),
        name=recipe.name,
        description=_description(recipe),
        entrypoint=ENTRYPOINTS["recipe"],
        parameters={"recipe": copy, "store": store.root, "jobs": recipe.deploy.jobs},
        parameter_openapi_schema=recipe_form(recipe),
        schedules=schedules,
        **_common(recipe, copy, found, before),
    )


def _register(client: SyncPrefectClient, labels: Mapping[str, Any], **fields: Any) -> UUID:
    """Make or renew a deployment. Prefect's own `create_deployment` takes no labels."""
    wanted = DeploymentCreate(**fields, labels=dict(labels))
    body = wanted.model_dump(mode="json", include=wanted.model_fields_set)
    return UUID(client.request("POST", "/deployments/", json=body).json()["id"])


def _refusal(client: SyncPrefectClient, recipe: Recipe, foreign: Sequence[DeploymentResponse]) -> str:
    triggers = [name for found in foreign for name in automations.trigger_names(client, found)]
    return refusal(recipe.name, foreign, triggers, "give the recipe a name of its own, or take this one over with --replace")


def _found(client: SyncPrefectClient, name: str) -> DeploymentResponse | None:
    """The deployment of this name, if the server has it already."""
    try:
        return client.read_deployment_by_name(name)
    except ObjectNotFound:
        return None


def _set_gpus(client: SyncPrefectClient, gpus: int | None, before: int | None) -> int | None:
    """Make the limit, or change it as the recipe has changed; another number is somebody's decision, and returned."""
    if gpus is None:
        return None
    try:
        there = client.read_global_concurrency_limit_by_name(LIMIT).limit
    except ObjectNotFound:
        there = None
    if there is None or before not in (None, gpus):
        client.upsert_global_concurrency_limit_by_name(LIMIT, gpus)
        return None
    return there if there != gpus else None


def ensure_pool(client: SyncPrefectClient, pool: Pool) -> None:
    """Make the work pool if it is not there.

    Raises:
        RecipeError: it is there, and of another type; or it has no variable of a name that the recipe gives.
    """
    try:
        found = client.read_work_pool(pool.name)
        kind, template = found.type, found.base_job_template
    except ObjectNotFound:
        found = None
        kind, template = pool.type, pool_template(client, pool.type)
    if kind != pool.type:
        raise RecipeError(f"deploy.pool.type: {pool.type}, but the work pool {pool.name} is of type {kind}; name another pool")
    known = template.get("variables", {}).get("properties", {})
    if unknown := [name for name in pool.variables if name.split(".")[0] not in known]:
        place = f"deploy.pool.variables.{unknown[0]}"
        raise RecipeError(f"{place}: the work pool {pool.name} has no such variable; it has {', '.join(sorted(known))}")
    if found is None:
        client.create_work_pool(WorkPoolCreate(name=pool.name, type=pool.type, base_job_template=template))


def pool_template(client: SyncPrefectClient, kind: str) -> dict[str, Any]:
    """The template of jobs on such a pool: of infra/work_pools for containers, which reach the data and a cluster that asks for a
    token, else Prefect's own.

    Prefect's server keeps the name of the token and no token: the worker, or Kubernetes, fills it in when a run starts.
    """
    if (file := POOLS / f"{kind}.json").exists():
        return json.loads(file.read_text(encoding="utf-8"))
    kinds = {kind: facts for package in client.read_worker_metadata().values() for kind, facts in package.items()}
    return kinds[kind]["default_base_job_configuration"]


def _check_store(pool: Pool, store: Store) -> None:
    """A folder of this machine is the same in a container only where it is mounted there, which nobody here can check."""
    if store.local and pool.type != "process" and not pool.variables.get("volumes"):
        mounts = "volumes and volume_mounts" if pool.type == "kubernetes" else "volumes"
        raise RecipeError(
            f"deploy.pool.type: a {pool.type} container cannot see the folder {store.root}; point --store at an fsspec URL "
            f"such as s3://BUCKET/runs, or mount the folder at the same path with deploy.pool.variables.{mounts}"
        )


def check_addresses(recipe: Recipe) -> None:
    """What a server keeps of a recipe has no queries and no passwords, and so would not open what needs them.

    Raises:
        RecipeError: an address has a query or a password.
    """
    for node in recipe.nodes.values():
        for part, value in node.config:
            for name in value if isinstance(value, list | tuple) else [value]:
                if isinstance(name, str) and with_query(name) != name:
                    raise RecipeError(
                        f"{node.place}.{part}: {name} has a query or a password, which no server keeps; fetch the file "
                        "and name that, or run the recipe where no `unidiffuser up` keeps the servers"
                    )


def recipe_tag(recipe: str) -> str:
    return f"recipe:{recipe}"


def _common(recipe: Recipe, copy: str, found: DeploymentResponse | None, before: Recipe | None, *stage: str) -> dict[str, Any]:
    """What all deployments of a recipe have in common, with what somebody has changed of the one that was found."""
    pool = recipe.deploy.pool
    tags, variables = [*_tags(recipe), *stage], _job_variables(pool)
    # One at a time: two runs of a recipe would wait for each other's units anyway, or do the work of one twice.
    limit: int | None = 1
    options = ConcurrencyOptions(collision_strategy=ConcurrencyLimitStrategy.ENQUEUE)
    queue = None
    if found is not None:
        limit = found.global_concurrency_limit.limit if found.global_concurrency_limit else None
        options = found.concurrency_options or options
        queue = found.work_queue_name if found.work_pool_name == pool.name else None
    if found is not None and before is not None:
        tags += [tag for tag in found.tags if tag not in (*tags, *_tags(before))]
        said = _job_variables(before.deploy.pool)
        variables = {**{name: value for name, value in found.job_variables.items() if name not in said}, **variables}
    return {
        "enforce_parameter_schema": True,
        "version": copy.rsplit("-", 1)[-1].removesuffix(".json"),
        "work_pool_name": pool.name,
        "work_queue_name": queue,
        "job_variables": variables,
        "tags": tags,
        "concurrency_limit": limit,
        "concurrency_options": options,
    }


def _tags(recipe: Recipe) -> list[str]:
    return [recipe_tag(recipe.name), *recipe.deploy.tags, *([automations.RETRY_TAG] if recipe.deploy.crash_retries else [])]


def _job_variables(pool: Pool) -> dict[str, Any]:
    """The pool's own variables, and what the flow's process needs."""
    environment = {"PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEAT_SECONDS)}
    if pool.type == "process":
        # Without a command of its own, the worker looks for a project to install around every run.
        return {
            "command": f"{sys.executable} -m prefect.engine",
            **pool.variables,
            "env": {**environment, **pool.variables.get("env", {})},
        }
    for name in ("RAY_ADDRESS", OPEN, "UNIDIFFUSER_STATE"):
        # What is forwarded to this machine is somewhere else for a pod.
        if (value := os.environ.get(name)) and not (pool.type == "kubernetes" and is_loopback(value)):
            environment[name] = value
    return {**pool.variables, "env": {**environment, **pool.variables.get("env", {})}}


def _description(recipe: Recipe) -> str:
    lines = "\n".join(
        f"- {name}" + (f" (from {', '.join(dict.fromkeys(node.inputs.values()))})" if node.inputs else "")
        for name, node in recipe.nodes.items()
    )
    return f"{recipe.description}\n\nNodes:\n\n{lines}".strip()


def _remove_others(client: SyncPrefectClient, recipe: Recipe, wanted: set[UUID]) -> list[str]:
    """Remove the deployments of nodes that the recipe has no more; a copy that somebody has made under another name stays."""
    tagged = DeploymentFilter(tags=DeploymentFilterTags(all_=[recipe_tag(recipe.name)]))
    removed = []
    for found in client.read_deployments(deployment_filter=tagged):
        if found.id not in wanted and found.name == f"{recipe.name}-{found.parameters.get('node')}":
            client.delete_deployment(found.id)
            removed.append(found.name)
    return removed
