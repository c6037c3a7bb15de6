#!/usr/bin/env bash
# ray 2.60.0 (ray[default])
# Behaviour: two answers of one Ray head name a machine's custom resources differently. /nodes?view=summary, which the dashboard is
#   drawn from, turns every key into camel case, and the names of resources are keys there: `gpu_machine` is called `gpuMachine`,
#   `a100_80g` is called `a10080G`, and two resources whose names differ in an underscore and a capital become one. /api/v0/nodes,
#   beside it, spells them as they were given.
# Why it matters: recipes ask for a kind of machine by the name of its resource. Who compares it with /nodes refuses a machine that
#   is there, and who copies it from /nodes into a recipe waits for one that never comes.
# Seen: /nodes: a10080G, gpuMachine, tpu-machine; /api/v0/nodes: a100_80g, gpuMachine, gpu_machine, tpu-machine.
set -euo pipefail
folder=$(mktemp -d)
export RAY_USAGE_STATS_ENABLED=0 RAY_TMPDIR=$folder RAY_AUTH_MODE=token RAY_AUTH_TOKEN=finding
trap '"$folder/venv/bin/ray" stop --force >/dev/null 2>&1 || true; rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check 'ray[default]==2.60.0'
port() { python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }
DASHBOARD=$(port)
"$folder/venv/bin/ray" start --head --node-ip-address=127.0.0.1 --port="$(port)" --dashboard-port="$DASHBOARD" --num-cpus=1 \
    --resources='{"gpu_machine": 1, "gpuMachine": 2, "a100_80g": 4, "tpu-machine": 8}' >"$folder/log" 2>&1 || { tail "$folder/log"; exit 1; }
DASHBOARD=$DASHBOARD python3 - <<'PYTHON'
import json
import os
import sys
import time
import urllib.request


def answer(path):
    headers = {"Authorization": f"Bearer {os.environ['RAY_AUTH_TOKEN']}"}
    request = urllib.request.Request(f"http://127.0.0.1:{os.environ['DASHBOARD']}{path}", headers=headers)
    with urllib.request.urlopen(request) as response:
        return json.load(response)["data"]


def own(names):
    return sorted(name for name in names if "machine" in name.lower() or name.startswith("a100"))


for _ in range(60):
    nodes = answer("/nodes?view=summary")["summary"]
    if nodes and nodes[0].get("raylet", {}).get("resourcesTotal"):
        break
    time.sleep(1)
dashboard = own(nodes[0]["raylet"]["resourcesTotal"])
state = own(answer("/api/v0/nodes?detail=1")["result"]["result"][0]["resources_total"])
print(f"/nodes: {', '.join(dashboard)}; /api/v0/nodes: {', '.join(state)}")
same = dashboard == ["a10080G", "gpuMachine", "tpu-machine"] and state == ["a100_80g", "gpuMachine", "gpu_machine", "tpu-machine"]
print("as described" if same else "CHANGED")
sys.exit(not same)
PYTHON
