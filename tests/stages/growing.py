"""A stage and room for a training on a Ray cluster that has nothing but a head without CPUs and grows by kinds:
``python -m tests.stages.growing FOLDER``; says which machines came for what, as JSON.

It wants process ids of its own (`ALONE`), since `ray stop` ends every Ray that it sees.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from infra.machine_kinds import kinds_of
from infra.ray_nodes import may_come, missing, total
from infra.store import Store
from stages.runner.run import run_stage
from tests.stages.toy import Squares, planned
from training.config import TrainConfig
from training.launch import _Room

ALONE = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")
KINDS = ("cpu-machine", "gpu-machine")
BRINGS = {"brings/cpu-machine/CPU": 2, "brings/gpu-machine/CPU": 4}


def config(head: str) -> dict[str, Any]:
    """For Ray's own stand-in for a cloud, each of whose machines is a process here."""

    def group(kind: str, cpus: int) -> dict[str, Any]:
        return {"resources": {"CPU": cpus, kind: 1}, "node_config": {}, "min_workers": 0, "max_workers": 2}

    commands = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
    empty = (*(f"{name}_commands" for name in commands), "cluster_synced_files", "rsync_exclude", "rsync_filter")
    return {name: [] for name in empty} | {
        "provider": {
            # By its own name it would ask for a file that Ray's wheel lacks.
            "type": "external", "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "use_node_id_as_ip": True, "disable_node_updaters": True, "disable_launch_config_check": True,
            "launch_multiple": True, "head_node_id": head,
        },
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "cpu": group("cpu-machine", 1), "gpu": group("gpu-machine", 2),
        },
        "cluster_name": "growing", "head_node_type": "ray.head.default", "max_workers": 4, "upscaling_speed": 1.0,
        "idle_timeout_minutes": 5, "auth": {}, "docker": {}, "file_mounts": {}, "file_mounts_sync_continuously": False,
    }  # fmt: skip


def start(folder: Path) -> None:
    from ray.cluster_utils import FAKE_HEAD_NODE_ID

    (folder / "config.json").write_text(json.dumps(config(FAKE_HEAD_NODE_ID)))
    fake = {
        "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_FAKE_CLUSTER": "1", "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
    }  # fmt: skip
    command = ["ray", "start", "--head", "--num-cpus=0", f"--resources={json.dumps(BRINGS)}", "--disable-usage-stats"]
    command += [f"--autoscaling-config={folder}/config.json", f"--temp-dir={folder}/ray", "--include-dashboard=false"]
    subprocess.run(command, env={**os.environ, **fake}, check=True, stdout=subprocess.DEVNULL)


def main(folder: Path) -> None:
    import ray

    start(folder)
    ray.init("auto", log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": os.getcwd()}})
    told: dict[str, Any] = {
        "there": total("CPU"), "may_come": [may_come("CPU", kind) for kind in (*KINDS, None)],
        "kinds": sorted(kinds_of(ray.cluster_resources()) & set(KINDS)), "missing": missing("tpu-machine"),
    }  # fmt: skip
    run_stage(planned(Squares, machines="cpu-machine"), Store(str(folder / "store")), Squares)
    told["for_the_stage"] = [total("CPU", kind) > 0 for kind in KINDS]
    room = _Room(TrainConfig(steps=1, global_batch=4, workers=4, machines="gpu-machine"))
    with room.asked_for():
        told["workers"] = room.at_start(threading.Event())
        told["for_training"] = total("CPU", "gpu-machine")
    print(json.dumps(told))
    ray.shutdown()
    subprocess.run(["ray", "stop", "--force"], check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
