"""infra/kubernetes without a cluster: schemas, what Ray's autoscaler makes of it, Prefect's settings, and who reaches whom."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from kubernetes_validate import validate

ROOT = Path(__file__).parent.parent.parent
FOLDER = ROOT / "infra" / "kubernetes"
SCHEMA = yaml.safe_load(Path(__file__).with_name("kuberay.yaml").read_text(encoding="utf-8"))
OURS = "unidiffuser:COMMIT"

Manifest = dict[str, Any]


@cache
def manifests() -> list[Manifest]:
    files = sorted(FOLDER.glob("*.yaml"))
    return [one for file in files for one in yaml.safe_load_all(file.read_text(encoding="utf-8"))]


def the(kind: str, name: str) -> Manifest:
    (found,) = [one for one in manifests() if (one["kind"], one["metadata"]["name"]) == (kind, name)]
    return found


def clusters() -> list[Manifest]:
    return [the("RayCluster", "ray")["spec"], the("RayJob", "run")["spec"]["rayClusterSpec"]]


def pods() -> Iterator[tuple[str, Manifest]]:
    """Every pod that a manifest is the template of, by a name."""
    for one in manifests():
        if one["kind"] in ("Deployment", "StatefulSet"):
            yield one["metadata"]["name"], one["spec"]["template"]
    for cluster in clusters():
        yield "head", cluster["headGroupSpec"]["template"]
        for group in cluster["workerGroupSpecs"]:
            yield group["groupName"], group["template"]


def as_pod(template: Manifest) -> Manifest:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "x", **template.get("metadata", {})},
        "spec": template["spec"],
    }


def kuberay(one: Manifest) -> None:
    jsonschema.Draft202012Validator({"$ref": f"#/$defs/{one['kind']}", **SCHEMA}).validate(one)


def test_kubernetes_and_kuberay_take_every_manifest() -> None:
    newest = kubernetes_validate.latest_version()
    kinds = set()
    for one in manifests():
        kinds.add(one["kind"])
        if one["apiVersion"] == "ray.io/v1":
            kuberay(one)
        else:
            validate(one, newest, strict=True)
        assert one["kind"] == "Namespace" or one["metadata"]["namespace"] == "unidiffuser"
    assert {"RayCluster", "RayJob", "NetworkPolicy", "Deployment", "StatefulSet", "Role"} <= kinds
    assert "Secret" not in kinds, "no secret lies in a file"
    for _, template in pods():
        validate(as_pod(template), newest, strict=True)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("spec", "enableAutoscaling"), True),
        (("spec", "authOptions", "mode"), "basic"),
        (("spec", "workerGroupSpecs", 0, "minReplicas"), None),
        (("spec", "headGroupSpec", "rayStartParams", "num-cpus"), 0),
        (("spec", "gcsFaultToleranceOptions", "redisPassword"), {"value": "told"}),
    ],
)
def test_the_schema_refuses_what_kuberay_would(place: tuple[Any, ...], value: Any) -> None:
    cluster = copy.deepcopy(the("RayCluster", "ray"))
    inner: Any = cluster
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    if value is None:
        del inner[place[-1]]
    with pytest.raises(jsonschema.ValidationError):
        kuberay(cluster)


def test_every_container_is_nobodys_and_only_known_images_run() -> None:
    for name, template in pods():
        spec = template["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True and spec["securityContext"]["runAsUser"] > 0, name
        talks = name in ("head", "prefect-worker")
        assert spec.get("automountServiceAccountToken", True) is talks, f"{name}: only these two ask Kubernetes for anything"
        for container in spec["containers"]:
            assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
            assert container["image"] == OURS or re.fullmatch(r"\w+:\d+\.[\d.]+", container["image"]), "no tag that moves"
            assert "memory" in container["resources"]["limits"]
            for entry in container.get("env", ()):
                assert not (re.search("PASSWORD|TOKEN|AUTH_STRING$", entry["name"]) and "value" in entry), entry["name"]


def test_a_run_of_its_own_has_the_same_machines_as_the_standing_cluster() -> None:
    standing, own = map(copy.deepcopy, clusters())
    del standing["gcsFaultToleranceOptions"]
    head = own["headGroupSpec"]["template"]["spec"]
    (container,) = head["containers"]
    container["env"] = [entry for entry in container["env"] if not entry["name"].startswith("PREFECT_")]
    for listed in (container["volumeMounts"], head["volumes"]):
        listed[:] = [entry for entry in listed if entry["name"] != "recipe"]
    assert standing == own
    assert standing["rayVersion"] == version("ray")


@pytest.mark.parametrize("kind", [0, 1], ids=["RayCluster", "RayJob"])
def test_rays_autoscaler_sees_a_head_without_cpus_and_two_kinds_of_machines_from_none(kind: int) -> None:
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
    from ray.autoscaler._private.util import validate_config

    config = _derive_autoscaling_config_from_ray_cr(
        {"metadata": {"name": "ray", "namespace": "unidiffuser"}, "spec": clusters()[kind]}
    )
    validate_config(config)
    types = config["available_node_types"]
    assert types["headgroup"]["resources"]["CPU"] == 0
    assert {name: told["min_workers"] for name, told in types.items() if name != "headgroup"} == {"cpu": 0, "gpu": 0}
    assert types["cpu"]["resources"] | {"memory": 0} == {"CPU": 15, "cpu-machine": 1, "memory": 0}
    assert types["gpu"]["resources"] | {"memory": 0} == {"CPU": 90, "GPU": 8, "gpu-machine": 1, "memory": 0}
    assert types["gpu"]["max_workers"] * 8 == 88


def environment(deployment: str) -> dict[str, str]:
    (container,) = the("Deployment", deployment)["spec"]["template"]["spec"]["containers"]
    return {entry["name"]: entry.get("value", f"secret-of-{entry['name']}") for entry in container["env"]}


def test_prefect_takes_the_servers_settings_and_finds_its_database(monkeypatch: pytest.MonkeyPatch) -> None:
    from prefect.settings.models.root import Settings
    from prefect_kubernetes.settings import KubernetesSettings

    told = environment("prefect-server")
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    server = Settings().server
    url = server.database.connection_url
    assert url is not None
    assert url.get_secret_value() == (
        "postgresql+asyncpg://prefect:secret-of-PREFECT_SERVER_DATABASE_PASSWORD@postgres:5432/prefect"
    )
    assert server.api.csrf_protection_enabled and server.api.auth_string is not None and not server.analytics_enabled
    assert server.concurrency.lease_storage.endswith(".filesystem")
    for name, value in environment("prefect-worker").items():
        monkeypatch.setenv(name, value)
    settings = KubernetesSettings()
    assert (settings.worker.api_auth_string_secret_name, settings.worker.api_auth_string_secret_key) == ("prefect", "auth_string")
    assert settings.observer.namespaces == {"unidiffuser"} and settings.cluster_uid == "unidiffuser"


def test_the_worker_makes_the_pool_from_the_template_that_the_image_has() -> None:
    (container,) = the("Deployment", "prefect-worker")["spec"]["template"]["spec"]["containers"]
    (path,) = [word.partition("=")[2] for word in container["args"] if word.startswith("--base-job-template=")]
    packages, _, inside = path.partition("/site-packages/")
    assert json.loads((ROOT / inside).read_text()) and packages == "/usr/local/lib/python3.11"
    assert "FROM python:3.11." in (ROOT / "infra" / "Dockerfile").read_text()


# --- who reaches whom, by the rules of NetworkPolicy ---

PREFECT_RUN = {"app.kubernetes.io/name": "unidiffuser-run"}
LABELS: dict[str, dict[str, str]] = {
    "head": {"ray.io/is-ray-node": "yes", "ray.io/node-type": "head"},
    "worker": {"ray.io/is-ray-node": "yes", "ray.io/node-type": "worker"},
    "cleanup": {"ray.io/node-type": "redis-cleanup"},
    "submitter": {"ray.io/originated-from-crd": "RayJob"},
    "run": PREFECT_RUN,
    **{name: {"app.kubernetes.io/name": name} for name in ("redis", "postgres", "prefect-server", "prefect-worker", "stranger")},
}


def selects(selector: Manifest, labels: dict[str, str]) -> bool:
    for expression in selector.get("matchExpressions", ()):
        inside = labels.get(expression["key"]) in expression["values"]
        if inside is not (expression["operator"] == "In"):
            return False
    return all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())


def allows(direction: str, of: str, other: str, port: int) -> bool:
    """Whether any rule lets a pod send to (or receive from) another pod of the namespace."""
    for policy in (one["spec"] for one in manifests() if one["kind"] == "NetworkPolicy"):
        if direction.capitalize() not in policy["policyTypes"] or not selects(policy["podSelector"], LABELS[of]):
            continue
        for rule in policy.get(direction, ()):
            peers = [peer for peer in rule["to" if direction == "egress" else "from"] if "namespaceSelector" not in peer]
            ports = {told["port"] for told in rule.get("ports", ())}
            if any("podSelector" in peer and selects(peer["podSelector"], LABELS[other]) for peer in peers):
                if not ports or port in ports:
                    return True
    return False


def reaches(source: str, target: str, port: int) -> bool:
    return allows("egress", source, target, port) and allows("ingress", target, source, port)


def test_pods_reach_what_they_need_and_nothing_else() -> None:
    wanted = {
        *((a, b, 10000) for a in ("head", "worker") for b in ("head", "worker")),
        *((a, "head", 8265) for a in ("head", "worker", "run", "submitter")),
        *((a, b, port) for a in ("head", "worker") for b in ("head", "worker") for port in (6379, 8265, 4200, 5432)),
        *((a, "redis", 6379) for a in ("head", "cleanup")),
        *((a, "prefect-server", 4200) for a in ("head", "run", "prefect-worker")),
        ("prefect-server", "postgres", 5432),
    }
    found = {(a, b, port) for a in LABELS for b in LABELS for port in (10000, 6379, 8265, 4200, 5432) if reaches(a, b, port)}
    assert found == wanted


def test_what_the_policies_name_are_labels_that_pods_have() -> None:
    names = {"redis", "postgres", "prefect-server", "prefect-worker"}
    assert {name: template["metadata"]["labels"] for name, template in pods() if name in names} == {
        name: LABELS[name] for name in names
    }
    pool = json.loads((ROOT / "infra" / "work_pools" / "kubernetes.json").read_text())
    template = pool["job_configuration"]["job_manifest"]["spec"]["template"]
    assert template["metadata"]["labels"] == PREFECT_RUN
