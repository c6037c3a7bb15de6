"""Work pools of every type against Prefect's own templates, schedules against its own classes, and prefect.yaml."""

from __future__ import annotations

import asyncio
import inspect
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock
from uuid import uuid4
from zoneinfo import ZoneInfo

import jsonschema
import kubernetes_validate
import prefect.server.api.collections
import pytest
import yaml
from kubernetes_validate import validate
from prefect import Flow
from prefect._vendor.croniter import croniter
from prefect.cli.deploy._models import PrefectYamlModel
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.objects import FlowRun
from prefect.exceptions import ObjectNotFound
from prefect.settings import temporary_settings
from prefect.utilities.importtools import import_object
from prefect.workers.base import BaseJobConfiguration
from prefect_docker.worker import DockerWorker, DockerWorkerJobConfiguration
from prefect_kubernetes.worker import KubernetesWorker, KubernetesWorkerJobConfiguration

from infra.store import Store
from pipelines.servers import deployments
from pipelines.servers.deployments import ENTRYPOINTS, _job_variables, deploy, ensure_pool
from pipelines.servers.schedules import prefect_schedules
from stages.runner.deployment import Pool
from stages.runner.recipe import Recipe, RecipeError, load_recipe
from tests.pipelines.conftest import Kept, write_metadata

ROOT = Path(__file__).parent.parent.parent.parent
POOLS = [
    Pool(name="here", type="process", variables={"working_dir": "/data"}),
    Pool(name="box", type="docker", variables={"image": "unidiffuser", "volumes": ["/data:/data"], "env": {"A": "1"}}),
    Pool(
        name="big",
        type="kubernetes",
        variables={
            "image": "unidiffuser",
            "namespace": "training",
            "volumes": [{"name": "data", "persistentVolumeClaim": {"claimName": "data"}}],
            "volume_mounts": [{"name": "data", "mountPath": "/data"}],
        },
    ),
]


class Server:
    """The part of Prefect's client that makes work pools; knows the worker types as the installed server does."""

    def __init__(self) -> None:
        self.pools: dict[str, WorkPoolCreate] = {}

    def read_work_pool(self, name: str) -> WorkPoolCreate:
        if name not in self.pools:
            raise ObjectNotFound(Exception(name))
        return self.pools[name]

    def read_worker_metadata(self) -> dict[str, Any]:
        folder = Path(prefect.server.api.collections.__file__).parent / "collections_data" / "views"
        return json.loads((folder / "aggregate-worker-metadata.json").read_text())

    def create_work_pool(self, pool: WorkPoolCreate) -> None:
        self.pools[pool.name] = pool


def recipe(folder: Path, *deploy: str) -> Recipe:
    write_metadata(folder / "metadata" / "part-0.parquet")
    (folder / "tiny.yaml").write_text("name: tiny\nsubsets:\n  good: {select: {metadata: [metadata/*.parquet]}}\n")
    return load_recipe(folder / "tiny.yaml", deploy)


@pytest.mark.parametrize("pool", POOLS, ids=lambda pool: pool.type)
def test_a_pool_takes_the_job_variables_and_hands_on_the_workers_token_without_storing_it(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "s3cret")
    monkeypatch.setenv("RAY_ADDRESS", "http://head:8265")
    server: Any = Server()
    ensure_pool(server, pool)
    ensure_pool(server, pool)
    template, variables = server.pools[pool.name].base_job_template, _job_variables(pool)
    jsonschema.validate(variables, {**template["variables"], "additionalProperties": False})
    assert "s3cret" not in json.dumps([template, variables])
    job = started(pool, template, variables)
    assert job.env["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"] == "30"
    if pool.type == "process":
        assert job.command is not None and job.command.endswith(" -m prefect.engine")
        assert "RAY_AUTH_TOKEN" not in job.env, "the flow's process has the worker's environment"
    else:
        assert job.env["RAY_ADDRESS"] == "http://head:8265"
        assert job.env.get("A") == pool.variables.get("env", {}).get("A")
    if pool.type == "docker":
        assert job.image == "unidiffuser"
        assert job.env["RAY_AUTH_TOKEN"] == "s3cret"
        assert job.container_create_kwargs == {"cap_drop": ["ALL"], "security_opt": ["no-new-privileges"]}


def started(pool: Pool, template: dict[str, Any], variables: dict[str, Any]) -> Any:
    """The job that a worker of the pool makes of a run; it has nothing to ask Prefect's server for."""
    kinds: dict[str, type[BaseJobConfiguration]] = {
        "process": BaseJobConfiguration, "docker": DockerWorkerJobConfiguration, "kubernetes": KubernetesWorkerJobConfiguration
    }  # fmt: skip
    return asyncio.run(kinds[pool.type].from_template_and_values(template, variables, client=AsyncMock()))


def test_a_run_on_kubernetes_is_a_job_that_kubernetes_takes_and_its_tokens_are_kubernetes_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Forwarded to the machine that deploys, which is another place for a pod.
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    pool = POOLS[2]
    template = json.loads((deployments.POOLS / "kubernetes.json").read_text())
    job = started(pool, template, _job_variables(pool))
    job.prepare_for_flow_run(FlowRun(flow_id=uuid4(), name="a run"))
    pod = job.job_manifest["spec"]["template"]["spec"]
    validate(job.job_manifest, kubernetes_validate.latest_version(), strict=True)
    assert pod["volumes"] == pool.variables["volumes"]
    (container,) = pod["containers"]
    assert container["volumeMounts"] == pool.variables["volume_mounts"]
    assert container["image"] == "unidiffuser" and job.job_manifest["metadata"]["namespace"] == "training"
    told = {entry["name"]: entry for entry in container["env"]}
    assert told["RAY_ADDRESS"]["value"] == "http://ray-head-svc:8265"
    assert told["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"]["name"] == "ray-token" and "value" not in told["RAY_AUTH_TOKEN"]
    assert pod["securityContext"]["runAsNonRoot"] and pod["automountServiceAccountToken"] is False
    assert job.job_manifest["spec"]["template"]["metadata"]["labels"]["app.kubernetes.io/name"] == "unidiffuser-run"


@pytest.mark.parametrize("worker", [KubernetesWorker, DockerWorker])
def test_a_template_has_all_that_prefects_own_has_but_the_privileges(worker: Any) -> None:
    own, ours = worker.get_default_base_job_template(), json.loads((deployments.POOLS / f"{worker.type}.json").read_text())
    for part in (own["job_configuration"], own["variables"]["properties"]):
        part.pop("privileged", None)
    assert set(own["job_configuration"]) == set(ours["job_configuration"])
    assert set(own["variables"]["properties"]) <= set(ours["variables"]["properties"])
    for name in set(ours["variables"]["properties"]) - {"env"}:
        assert f'"{{{{ {name} }}}}"' in json.dumps(ours["job_configuration"]), f"{name} goes nowhere"


def test_a_real_server_takes_the_pools_and_deployments_on_them(kept: Kept) -> None:
    with temporary_settings(kept.settings()), get_client(sync_client=True) as client:
        flow = client.create_flow_from_name("node")
        for pool in POOLS:
            ensure_pool(client, pool)
            ensure_pool(client, pool)
            made = client.create_deployment(flow, pool.name, work_pool_name=pool.name, job_variables=_job_variables(pool))
            assert client.read_work_pool(pool.name).type == pool.type
            client.delete_deployment(made)
            client.request("DELETE", f"/work_pools/{pool.name}")


def test_a_pool_of_another_type_and_a_variable_that_it_lacks_are_named() -> None:
    server: Any = Server()
    ensure_pool(server, POOLS[0])
    with pytest.raises(RecipeError, match=r"^deploy\.pool\.type: docker, but the work pool here is of type process"):
        ensure_pool(server, Pool(name="here", type="docker"))
    with pytest.raises(RecipeError, match=r"^deploy\.pool\.variables\.imgae: the work pool box has no such variable; it has "):
        ensure_pool(server, Pool(name="box", type="docker", variables={"imgae": "unidiffuser"}))
    assert list(server.pools) == ["here"], "a pool was made for a recipe that is refused"


@pytest.mark.parametrize("kind", ["docker", "kubernetes"])
def test_a_container_that_cannot_see_the_store_is_refused_before_anything_is_registered(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reached(**_: Any) -> None:
        raise LookupError

    monkeypatch.setattr(deployments, "get_client", reached)
    store = Store(str(tmp_path / "store"))
    with pytest.raises(RecipeError) as refused:
        deploy(recipe(tmp_path, f"deploy.pool={{name: box, type: {kind}}}"), store)
    said = str(refused.value)
    assert said.startswith(f"deploy.pool.type: a {kind} container cannot see the folder {store.root}; ") and "\n" not in said
    assert "s3://" in said and "deploy.pool.variables.volumes" in said
    mounted = recipe(tmp_path, f"deploy.pool={{name: box, type: {kind}, variables: {{volumes: ['/data:/data']}}}}")
    for allowed, place in ((mounted, store), (recipe(tmp_path, f"deploy.pool.type={kind}"), Store("memory://bucket/runs"))):
        with pytest.raises(LookupError):
            deploy(allowed, place)


GOOD = [
    "0 2 * * *",
    "*/10 8-18/2 1,15 jan-mar mon-fri",
    "0 0 L * ?",
    "0 6 * * 5#2",
    "0 6 * * L5",
    "59 23 31 12 7",
    "0 0 * DEC SUN",
]
BAD = [
    "0 2 * *",
    "60 * * * *",
    "* 24 * * *",
    "0 0 0 * *",
    "0 0 * 13 *",
    "0 0 * * 8",
    "0 0 * * monday",
    "*/0 * * * *",
    "1- * * * *",
]


@pytest.mark.parametrize("cron", GOOD)
def test_a_cron_that_prefect_takes_is_taken(cron: str, tmp_path: Path) -> None:
    assert croniter.is_valid(cron)
    (made,) = prefect_schedules(recipe(tmp_path, f"deploy.schedules=[{{cron: '{cron}', timezone: Europe/Berlin}}]"))
    assert (made.schedule.cron, made.schedule.timezone) == (cron, "Europe/Berlin")  # type: ignore[union-attr]


@pytest.mark.parametrize("cron", BAD)
def test_a_cron_that_prefect_refuses_is_refused_when_the_recipe_is_read(cron: str, tmp_path: Path) -> None:
    assert not croniter.is_valid(cron) or len(cron.split()) != 5
    with pytest.raises(RecipeError, match=r"^deploy\.schedules\.0\.cron: .*expected") as refused:
        recipe(tmp_path, f"deploy.schedules=[{{cron: '{cron}'}}]")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("rrule", ["FREQ=OFTEN", "every saturday", "FREQ=WEEKLY;BYDAY=XX", "BYHOUR=6", ""])
def test_a_wrong_rrule_is_refused_when_the_recipe_is_read(rrule: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"^deploy\.schedules\.0\.rrule: no rule of RFC 5545 .*expected one such as"):
        recipe(tmp_path, f"deploy.schedules=[{{rrule: '{rrule}'}}]")


def test_an_rrule_comes_when_it_says_on_the_clock_of_its_time_zone(tmp_path: Path) -> None:
    rule = "{rrule: FREQ=WEEKLY;BYDAY=SA;BYHOUR=6;BYMINUTE=0, timezone: Europe/Berlin}"
    (scheduled,) = prefect_schedules(recipe(tmp_path, f"deploy.schedules=[{rule}]"))
    made: Any = scheduled.schedule
    berlin = ZoneInfo("Europe/Berlin")
    # Summer ends on 25 October 2026.
    moments = made.to_rrule().xafter(datetime(2026, 10, 20, tzinfo=UTC).astimezone(berlin), count=2)
    found = [moment.astimezone(berlin).strftime("%a %d %H:%M %z") for moment in moments]
    assert found == ["Sat 24 06:00 +0200", "Sat 31 06:00 +0100"]


def test_prefect_takes_prefect_yaml_and_its_entrypoints_are_the_flows() -> None:
    document = yaml.safe_load((ROOT / "prefect.yaml").read_text())
    checked = PrefectYamlModel.model_validate(document)
    assert {deployment.entrypoint for deployment in checked.deployments} == set(ENTRYPOINTS.values())
    recipe = load_recipe(ROOT / "configs" / "demo.yaml")
    for deployment in checked.deployments:
        flow = import_object(str(deployment.entrypoint))
        parameters: dict[str, Any] = deployment.parameters or {}
        assert isinstance(flow, Flow) and (ROOT / parameters["recipe"]).samefile(ROOT / "configs" / "demo.yaml")
        inspect.signature(flow.fn).bind(**parameters)
        assert parameters.get("node", "train-256") in recipe.nodes
