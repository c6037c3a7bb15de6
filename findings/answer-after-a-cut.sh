#!/usr/bin/env bash
# ray 2.60.0; needs root, unshare and iproute2, and eight minutes
# Behaviour: an actor on another node works for 5 s, and the network between them is cut for 35 s meanwhile. Ray takes the node to
#   be alive all the time, and the method has returned; yet whoever waits for it hears of that after five minutes, and then not by
#   the answer, but by ActorUnavailableError. The worker's end gives the connection up when what it sent has met no answer for 20 s,
#   which the caller's end cannot hear; that has nothing to send, and pings every 300 s. With RAY_grpc_keepalive_timeout_ms=120000 in
#   the worker's environment the answer comes when the cut is over.
# Why it matters: stages hand units to actors on other nodes. After a switch has restarted, each unit that ended meanwhile is awaited
#   for five minutes more, and done again, while its machine idles.
# Seen: as it comes ActorUnavailableError after 301 s; with the variable answered after 38 s.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check ray==2.60.0
cat >"$folder/cut.py" <<'PYTHON'
import subprocess
import sys
import time

import ray

ray.init(address="10.77.0.1:6379", _node_ip_address="10.77.0.1", log_to_driver=False)


@ray.remote(num_cpus=1)
class Worker:
    def work(self, seconds):
        time.sleep(seconds)


def link(state):
    subprocess.run(["ip", "link", "set", "outer", state], check=True)


seen = {}
for label, variables in {"as it comes": {}, "with the variable": {"RAY_grpc_keepalive_timeout_ms": "120000"}}.items():
    worker = Worker.options(runtime_env={"env_vars": variables}).remote()
    ray.get(worker.work.remote(0))
    start, call = time.monotonic(), worker.work.remote(5)
    time.sleep(2)
    link("down")
    time.sleep(35)
    link("up")
    try:
        ray.get(call)
        what = "answered"
    except ray.exceptions.RayError as error:
        what = type(error).__name__
    seen[label] = what, time.monotonic() - start
    alive = sum(node["Alive"] for node in ray.nodes())
    print(f"{label}: {what} after {seen[label][1]:.0f} s, {alive} of 2 nodes alive", flush=True)
    ray.kill(worker)
same = seen["as it comes"][0] == "ActorUnavailableError" and seen["as it comes"][1] > 200
same = same and seen["with the variable"][0] == "answered" and seen["with the variable"][1] < 90
print("as described" if same else "CHANGED")
sys.exit(not same)
PYTHON
# Networks of its own, in which nothing but these two nodes is.
unshare --net --mount --pid --fork --kill-child --mount-proc bash -euo pipefail -s "$folder" <<'NODES'
export PATH="$1/venv/bin:$PATH" RAY_USAGE_STATS_ENABLED=0 RAY_AUTH_MODE=token RAY_AUTH_TOKEN=00000000000000000000000000000000
mount -t tmpfs tmpfs /run
ip link set lo up
ip link add wires type bridge
ip link set wires up
ip address add 10.77.0.1/24 dev wires
ip netns add node
ip link add outer type veth peer name inner netns node
ip link set outer master wires up
ip -n node link set lo up
ip -n node link set inner up
ip -n node address add 10.77.0.2/24 dev inner
ray start --head --node-ip-address=10.77.0.1 --port=6379 --num-cpus=0 --include-dashboard=false --temp-dir="$1/ray" \
    --object-store-memory=100000000 >"$1/log" 2>&1 || { tail -n 5 "$1/log"; exit 1; }
ip netns exec node ray start --address=10.77.0.1:6379 --node-ip-address=10.77.0.2 --num-cpus=1 \
    --object-store-memory=100000000 >>"$1/log" 2>&1 || { tail -n 5 "$1/log"; exit 1; }
python "$1/cut.py" 2>>"$1/log" || { tail -n 5 "$1/log"; exit 1; }
NODES
