"""`unidiffuser deploy`: a recipe on a Prefect server, as a deployment of the end-to-end flow and one of every node."""

from __future__ import annotations

import os
import sys
from copy import deepcopy
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import DeploymentScheduleCreate, WorkPoolCreate
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterTags
from prefect.client.schemas.objects import ConcurrencyLimitStrategy, ConcurrencyOptions
from prefect.client.schemas.schedules import CronSchedule, IntervalSchedule, RRuleSchedule
from prefect.exceptions import ObjectNotFound
from pydantic import ValidationError

from infra.prefect_server import HEARTBEAT_SECONDS
from infra.store import Store
from pipelines.flows.parameters import Choice, node_form, recipe_form
from pipelines.flows.run import snapshot
from pipelines.flows.selection import select_nodes
from pipelines.flows.slots import LIMIT
from pipelines.servers import automations
from stages.runner.deployment import Pool, Schedule
from stages.runner.recipe import Recipe, RecipeError, explain

# Flow and name of the function that is the flow, as an import path: the package is installed wherever a worker runs.
ENTRYPOINTS = {"recipe": "pipelines.flows.flow.recipe_run", "node": "pipelines.flows.flow.node_run"}


@dataclass
class Deployed:
    """What `deploy` did: ids of the deployments by name, the end-to-end one first, and names of those that it removed."""

    recipe: str
    deployments: dict[str, UUID] = field(default_factory=dict)
    removed: list[str] = field(default_factory=list)


def deploy(recipe: Recipe, store: Store, asleep: bool = False) -> Deployed:
    """Register a recipe, or renew what is registered; deployments of nodes that it no longer has are removed.

    Args:
        asleep: register it without its schedules and triggers.

    Raises:
        RecipeError: a schedule, the work pool or the store is not as it must be; names the field.
    """
    _check_store(recipe.deploy.pool, store)
    schedules = [_schedule(recipe, number, schedule) for number, schedule in enumerate(recipe.deploy.schedules)]
    done = Deployed(recipe.name)
    with get_client(sync_client=True) as client:
        ensure_pool(client, recipe.deploy.pool)
        if recipe.deploy.gpus:
            client.upsert_global_concurrency_limit_by_name(LIMIT, recipe.deploy.gpus)
        common = _common(recipe, store)
        whole = client.create_deployment(
            client.create_flow_from_name("recipe"),
            recipe.name,
            description=_description(recipe),
            entrypoint=ENTRYPOINTS["recipe"],
            parameters={**common["parameters"], "jobs": recipe.deploy.jobs},
            parameter_openapi_schema=recipe_form(recipe),
            schedules=[] if asleep else schedules,
            **{name: value for name, value in common.items() if name != "parameters"},
        )
        done.deployments[recipe.name] = whole
        flow = client.create_flow_from_name("node")
        for node in recipe.nodes.values():
            done.deployments[f"{recipe.name}-{node.name}"] = client.create_deployment(
                flow,
                f"{recipe.name}-{node.name}",
                description=f"The node {node.name} of the recipe {recipe.name}, from what the nodes before it have committed.",
                entrypoint=ENTRYPOINTS["node"],
                parameters={**common["parameters"], "node": node.name},
                parameter_openapi_schema=node_form(node),
                **{
                    **{name: value for name, value in common.items() if name != "parameters"},
                    "tags": [*common["tags"], node.stage],
                },
            )
        done.removed = _remove_others(client, recipe, set(done.deployments.values()))
        automations.install(client)
        if not asleep:
            automations.install_triggers(client, recipe, whole)
    return done


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
        kinds = {kind: facts for package in client.read_worker_metadata().values() for kind, facts in package.items()}
        kind, template = pool.type, pool_template(pool.type, kinds[pool.type]["default_base_job_configuration"])
    if kind != pool.type:
        raise RecipeError(f"deploy.pool.type: {pool.type}, but the work pool {pool.name} is of type {kind}; name another pool")
    known = template.get("variables", {}).get("properties", {})
    if unknown := [name for name in pool.variables if name.split(".")[0] not in known]:
        place = f"deploy.pool.variables.{unknown[0]}"
        raise RecipeError(f"{place}: the work pool {pool.name} has no such variable; it has {', '.join(sorted(known))}")
    if found is None:
        client.create_work_pool(WorkPoolCreate(name=pool.name, type=pool.type, base_job_template=template))


def pool_template(kind: str, default: dict[str, Any]) -> dict[str, Any]:
    """Prefect's own template of jobs on such a pool, with what a container needs to reach the data and a cluster that asks for a
    token: volumes, which Prefect's template for Kubernetes lacks, and RAY_AUTH_TOKEN as the worker's environment has it.

    Prefect's server keeps the name of the token and no token: the worker fills it in when it starts a run.
    """
    template = deepcopy(default)
    variables = template["variables"]["properties"]
    if kind != "process":
        variables["env"]["default"] = {"RAY_AUTH_TOKEN": "{{ $RAY_AUTH_TOKEN }}"}
    if kind == "kubernetes":
        pod = template["job_configuration"]["job_manifest"]["spec"]["template"]["spec"]
        pod["volumes"], pod["containers"][0]["volumeMounts"] = "{{ volumes }}", "{{ volume_mounts }}"
        for name in ("volumes", "volume_mounts"):
            words = "As in the manifest of a pod."
            variables[name] = {"title": name, "description": words, "type": "array", "items": {"type": "object"}}
    return template


def _check_store(pool: Pool, store: Store) -> None:
    """A folder of this machine is the same in a container only where it is mounted there, which nobody here can check."""
    if store.local and pool.type != "process" and not pool.variables.get("volumes"):
        mounts = "volumes and volume_mounts" if pool.type == "kubernetes" else "volumes"
        raise RecipeError(
            f"deploy.pool.type: a {pool.type} container cannot see the folder {store.root}; point --store at an fsspec URL "
            f"such as s3://BUCKET/runs, or mount the folder at the same path with deploy.pool.variables.{mounts}"
        )


def recipe_tag(recipe: str) -> str:
    return f"recipe:{recipe}"


def _common(recipe: Recipe, store: Store) -> dict[str, Any]:
    """What all deployments of a recipe have in common."""
    pool = recipe.deploy.pool
    copy = snapshot(recipe, store)
    return {
        "parameters": {"recipe": copy, "store": store.root},
        "enforce_parameter_schema": True,
        "version": copy.rsplit("-", 1)[-1].removesuffix(".json"),
        "work_pool_name": pool.name,
        "job_variables": _job_variables(pool),
        "tags": [recipe_tag(recipe.name), *recipe.deploy.tags, *([automations.RETRY_TAG] if recipe.deploy.crash_retries else [])],
        # One at a time: two runs of a recipe would wait for each other's units anyway, or do the work of one twice.
        "concurrency_limit": 1,
        "concurrency_options": ConcurrencyOptions(collision_strategy=ConcurrencyLimitStrategy.ENQUEUE),
    }


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
    for name in ("RAY_ADDRESS", "UNIDIFFUSER_STATE"):
        if value := os.environ.get(name):
            environment[name] = value
    return {**pool.variables, "env": {**environment, **pool.variables.get("env", {})}}


def _description(recipe: Recipe) -> str:
    lines = "\n".join(
        f"- {name}" + (f" (from {', '.join(dict.fromkeys(node.inputs.values()))})" if node.inputs else "")
        for name, node in recipe.nodes.items()
    )
    return f"{recipe.description}\n\nNodes:\n\n{lines}".strip()


def _schedule(recipe: Recipe, number: int, schedule: Schedule) -> DeploymentScheduleCreate:
    place = f"deploy.schedules.{number}"
    select_nodes(recipe, schedule.only, schedule.start, schedule.until)
    try:
        when: Any
        if schedule.cron is not None:
            when = CronSchedule(cron=schedule.cron, timezone=schedule.timezone)
        elif schedule.interval is not None:
            when = IntervalSchedule(interval=timedelta(seconds=schedule.interval), timezone=schedule.timezone)
        else:
            when = RRuleSchedule(rrule=schedule.rrule, timezone=schedule.timezone)
    except (ValidationError, ValueError) as error:
        raise RecipeError(explain(error, place) if isinstance(error, ValidationError) else f"{place}: {error}") from None
    chosen = Choice(only=list(schedule.only), start=schedule.start, until=schedule.until).model_dump(
        by_alias=True, exclude_defaults=True
    )
    return DeploymentScheduleCreate(
        schedule=when, active=schedule.active, slug=f"schedule-{number}", parameters={"nodes": chosen} if chosen else {}
    )


def _remove_others(client: SyncPrefectClient, recipe: Recipe, wanted: set[UUID]) -> list[str]:
    tagged = DeploymentFilter(tags=DeploymentFilterTags(all_=[recipe_tag(recipe.name)]))
    removed = []
    for found in client.read_deployments(deployment_filter=tagged):
        if found.id not in wanted:
            client.delete_deployment(found.id)
            removed.append(found.name)
    return removed
