#!/usr/bin/env bash
# prefect-kubernetes 0.8.0, prefect 3.8.8, kubernetes-validate 1.37.0 (its schemas of Kubernetes 1.34)
# Behaviour: `parallelism` and `completions` are fields of a Kubernetes Job. Prefect's own template of a work pool has them in the
#   spec of the pod inside it, where Kubernetes' schema knows no such fields, so it is invalid where validation is strict. Without
#   the two a template is refused. In the job's spec, where they belong, they satisfy the worker: it looks at a JSON patch from the
#   template to what it wants, and a patch calls a value that stands elsewhere moved, not missing.
# Why it matters: a team that holds its manifests to `kubectl --validate=strict`, kubeconform or an admission controller cannot deploy
#   the default template, and one that drops the two fields gets runs that crash before their pod is made.
# Seen: as it is "Additional properties are not allowed ('completions', 'parallelism' were unexpected)"; left out "Job is missing
#   required attributes at the following paths: /spec/template/spec/completions, /spec/template/spec/parallelism".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check prefect-kubernetes==0.8.0 prefect==3.8.8 kubernetes-validate==1.37.0
PREFECT_HOME="$folder/prefect" "$folder/venv/bin/python" - <<'PYTHON'
import copy
import sys

import kubernetes_validate
from prefect_kubernetes.worker import KubernetesWorker, KubernetesWorkerJobConfiguration

manifest = copy.deepcopy(KubernetesWorker.get_default_base_job_template()["job_configuration"]["job_manifest"])
# What is filled in when a run starts.
manifest["metadata"] = {"name": "run", "namespace": "default", "labels": {}, "annotations": {}}
manifest["spec"] |= {"backoffLimit": 0, "ttlSecondsAfterFinished": 60}
pod = manifest["spec"]["template"]["spec"]
pod["serviceAccountName"] = "default"
pod["containers"] = [{"name": "prefect-job", "image": "image", "imagePullPolicy": "Always", "env": [], "args": []}]


def strict(document):
    try:
        kubernetes_validate.validate(document, "1.34", strict=True)
    except kubernetes_validate.ValidationError as error:
        return error.message
    return "valid"


def taken(document):
    try:
        KubernetesWorkerJobConfiguration(job_manifest=copy.deepcopy(document), namespace="default", name="run")
    except ValueError as error:
        return next(line for line in str(error).splitlines() if "Job is missing" in line).strip().partition(" [")[0]
    return "taken"


left_out = copy.deepcopy(manifest)
counts = {name: left_out["spec"]["template"]["spec"].pop(name) for name in ("parallelism", "completions")}
belonging = copy.deepcopy(left_out)
belonging["spec"].update(counts)
cases = {"as it is": manifest, "left out": left_out, "where they belong": belonging}
found = {name: (strict(case), taken(case)) for name, case in cases.items()}
for name, (schema, worker) in found.items():
    print(f"{name}: schema: {schema}; worker: {worker}")
same = [(schema == "valid", worker == "taken") for schema, worker in found.values()] == [(False, True), (True, False), (True, True)]
print("as described" if same else "CHANGED")
sys.exit(not same)
PYTHON
