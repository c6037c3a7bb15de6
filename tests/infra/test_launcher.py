"""infra/ray/aws.yaml by the checks of Ray's own launcher, which asks no cloud anything."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    """As the launcher completes and takes it."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    told = yaml.safe_load((ROOT / "infra" / "ray" / "aws.yaml").read_text(encoding="utf-8"))
    whole = prepare_config(told)
    validate_config(whole)
    return whole


def test_the_launcher_takes_it_and_has_a_head_without_work_and_two_kinds_of_machines_from_none(config: dict[str, Any]) -> None:
    types = config["available_node_types"]
    assert config["head_node_type"] == "head" and types["head"]["resources"] == {"CPU": 0}
    assert {name: told["min_workers"] for name, told in types.items()} == {"head": 0, "cpu": 0, "gpu": 0}
    assert config["max_workers"] >= types["cpu"]["max_workers"] + types["gpu"]["max_workers"]
    assert types["cpu"]["resources"]["cpu-machine"] == types["gpu"]["resources"]["gpu-machine"] == 1
    assert types["gpu"]["max_workers"] * types["gpu"]["resources"]["GPU"] == 88


def test_every_machine_asks_for_the_token_and_the_head_shows_its_jobs_to_itself_alone(config: dict[str, Any]) -> None:
    from ray.scripts.scripts import start

    known = {option for parameter in start.params for option in parameter.opts}
    starts = [config[f"{kind}_start_ray_commands"][-1] for kind in ("head", "worker")]
    for command in starts:
        words = shlex.split(command)
        assert words[0] == "RAY_AUTH_MODE=token" and words[words.index("ray") + 1] == "start"
        assert {word.partition("=")[0] for word in words if word.startswith("--")} <= known
    assert "--dashboard-host=127.0.0.1" in starts[0] and "--num-cpus=0" in starts[0]
    assert "/home/unidiffuser/.ray/auth_token" in config["file_mounts"]


def test_disks_are_encrypted_identities_are_the_clouds_and_nothing_installs_packages(config: dict[str, Any]) -> None:
    for name, told in config["available_node_types"].items():
        node = told["node_config"]
        assert node["IamInstanceProfile"]["Name"].startswith("unidiffuser"), name
        assert node["MetadataOptions"]["HttpTokens"] == "required"
        assert all(disk["Ebs"]["Encrypted"] for disk in node["BlockDeviceMappings"])
    assert not [line for lines in (config["setup_commands"], config["head_setup_commands"]) for line in lines]
