"""infra/slurm without Slurm: its commands are small programs of this machine, which note what they are given and run it."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

FOLDER = Path(__file__).parent.parent.parent / "infra" / "slurm"
# What stands for every program: it notes its name, what of its environment matters and its arguments, and acts by its name.
PROGRAM = r"""#!/bin/bash
name=${0##*/}
line=$(printf '%s\037' "$name" "$RAY_ADDRESS" "$RAY_AUTH_MODE" "$RAY_AUTH_TOKEN" "$@")
echo "$line" >> NOTES
case "$name" in
srun)
    # Other nodes have disks of their own.
    [[ $* == *--exclude* ]] && set -- "${@//\/scratch/\/others}"
    while [[ $1 == -* ]]; do shift; done
    exec "$@" ;;
scontrol) [[ $1 == show ]] && printf 'one\ntwo\nthree\n' ;;
hostname) echo 127.0.0.1 10.0.0.7 ;;
ray) [[ ! $DEAD ]] && exec sleep 60; exit 1 ;;
unidiffuser)
    until (($(grep -c ^ray NOTES) >= 2)); do sleep 0.02; done
    [[ $LONG ]] || exit "${CODE:-0}"
    trap 'sleep 0.1; echo checkpoint >> NOTES; exit 130' TERM
    touch NOTES.running
    while :; do sleep 0.02; done ;;
esac
exit 0
"""


@dataclass(frozen=True)
class Note:
    """What a program was started with."""

    name: str
    ray_address: str = ""
    auth_mode: str = ""
    token: str = ""
    arguments: tuple[str, ...] = ()


class Slurm:
    """A folder of programs, the notes that they take, and what Slurm sets for a job of three nodes."""

    def __init__(self, folder: Path):
        self.notes, self.scratch, programs = folder / "notes", folder / "scratch", folder / "bin"
        self.scratch.mkdir()
        (folder / "others").mkdir()
        programs.mkdir()
        for name in ("srun", "scontrol", "hostname", "ray", "unidiffuser", "python"):
            (programs / name).write_text(PROGRAM.replace("NOTES", str(self.notes)))
            (programs / name).chmod(0o755)
        self.environment = {
            "PATH": f"{programs}:/usr/bin:/bin",
            "TMPDIR": str(self.scratch),
            "UNIDIFFUSER_STORE": "s3://bucket/runs",
            "SLURM_JOB_ID": str(os.getpid()),
            "SLURM_JOB_NODELIST": "one,two,three",
            "SLURM_CPUS_ON_NODE": "16",
            "SLURM_ARRAY_JOB_ID": "7",
            "SLURM_ARRAY_TASK_ID": "3",
        }

    def start(self, script: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", str(FOLDER / script), *arguments], env=self.environment | environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip

    def noted(self, *names: str) -> list[Note]:
        lines = self.notes.read_text().splitlines() if self.notes.exists() else []
        told = [line.removesuffix("\037").split("\037") for line in lines]
        return [Note(*words[:4], tuple(words[4:])) if len(words) > 1 else Note(words[0]) for words in told if words[0] in names]


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[Slurm]:
    before = set(psutil.Process().children(recursive=True))
    made = Slurm(tmp_path)
    # The Jobs API of the head that a script waits for.
    with socket.create_server(("127.0.0.1", 20001 + int(made.environment["SLURM_JOB_ID"]) % 5000 * 8)):
        yield made
    left = set(psutil.Process().children(recursive=True)) - before
    for process in left:
        process.kill()
    assert not left, "a script left something running"


def options(arguments: Sequence[str]) -> dict[str, str]:
    return {name: value for name, _, value in (word.partition("=") for word in arguments if word.startswith("--"))}


@pytest.mark.parametrize("script", ["run.sh", "array.sh"])
def test_a_script_is_bash_and_asks_slurm_for_its_job_again(script: str) -> None:
    subprocess.run(["bash", "-n", str(FOLDER / script)], check=True)
    asked = [line.split()[1:] for line in (FOLDER / script).read_text().splitlines() if line.startswith("#SBATCH")]
    words = {word.partition("=")[0] for line in asked for word in line}
    assert {"--requeue", "--signal", "--open-mode"} <= words and os.access(FOLDER / script, os.X_OK)


def test_a_run_has_a_head_on_the_first_node_workers_on_the_others_and_a_token_of_its_own(slurm: Slurm) -> None:
    for _ in range(2):
        process = slurm.start("run.sh", "mine.yaml")
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
    head, workers = sorted(slurm.noted("srun")[:2], key=lambda note: "--exclude=one" in note.arguments)
    assert options(head.arguments)["--nodelist"] == "one" and options(head.arguments)["--nodes"] == "1"
    assert options(workers.arguments)["--exclude"] == "one" and options(workers.arguments)["--nodes"] == "2"
    started = slurm.noted("ray")[:2]
    (first,), (second,) = ([note for note in started if ("--head" in note.arguments) is is_head] for is_head in (True, False))
    told = options(first.arguments)
    assert "--block" in first.arguments and told["--num-cpus"] == "16" and told["--dashboard-host"] == "127.0.0.1"
    assert json.loads(told["--resources"]) == {"cpu-machine": 1, "gpu-machine": 1}
    assert options(second.arguments)["--address"] == f"127.0.0.1:{told['--port']}" and "--block" in second.arguments
    run, again = slurm.noted("unidiffuser")
    assert run.arguments == ("run", "mine.yaml")
    assert run.ray_address == f"http://127.0.0.1:{told['--dashboard-port']}"
    tokens = [note.token for note in (first, second, run)]
    assert len(set(tokens)) == 1 and re.fullmatch("[0-9a-f]{32}", tokens[0]) and first.auth_mode == "token"
    assert again.token != tokens[0], "a run begun again has another token"
    ports = {int(told[name]) for name in told if name.endswith("port") and told[name] != "0"}
    assert len(ports) == 4 and all(20000 <= each < 60000 for each in ports)
    assert not list(slurm.scratch.iterdir()), "Ray's folder is gone"


def test_a_failed_run_is_a_failed_job_that_is_not_begun_again(slurm: Slurm) -> None:
    process = slurm.start("run.sh", "mine.yaml", CODE="1")
    process.communicate(timeout=60)
    assert process.returncode == 1 and "requeue" not in [note.arguments[0] for note in slurm.noted("scontrol")]


def test_before_its_time_is_over_a_run_writes_its_checkpoint_and_the_job_is_begun_again(slurm: Slurm) -> None:
    process = slurm.start("run.sh", "mine.yaml", LONG="1")
    wait_for(Path(f"{slurm.notes}.running"), process)
    process.send_signal(signal.SIGTERM)  # to the script alone, as `--signal=B:TERM` has it
    process.communicate(timeout=60)
    saved, again = [note for note in slurm.noted("checkpoint", "scontrol") if "show" not in note.arguments]
    assert saved.name == "checkpoint", "before the job is asked for again"
    assert again.arguments == ("requeue", slurm.environment["SLURM_JOB_ID"])


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)


def test_a_head_that_does_not_come_up_ends_the_job_in_a_line(slurm: Slurm) -> None:
    process = slurm.start("run.sh", "mine.yaml", DEAD="1", SLURM_JOB_ID="4999")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and not slurm.noted("unidiffuser")
    assert errors.splitlines()[-1] == "error: Ray's head has not come up on one; its log is above"


def test_a_task_of_the_array_makes_one_node_after_the_other_on_its_own_machine(slurm: Slurm) -> None:
    process = slurm.start("array.sh", "mine.yaml", "laion-select", "laion-download", RAY_ADDRESS="http://elsewhere:1")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    nodes = ("laion-select", "laion-download")
    assert slurm.noted("python") == [Note("python", arguments=("-m", "stages", "mine.yaml", node)) for node in nodes]


@pytest.mark.parametrize(
    ("script", "arguments", "said"),
    [
        ("run.sh", (), "RECIPE is missing"),
        ("array.sh", ("mine.yaml",), "NODE is missing"),
        ("run.sh", ("mine.yaml",), "UNIDIFFUSER_STORE: set it to the store that every node sees"),
    ],
)
def test_what_is_missing_is_named_before_anything_starts(slurm: Slurm, script: str, arguments: Any, said: str) -> None:
    store = {"UNIDIFFUSER_STORE": ""} if "STORE" in said else {}
    process = slurm.start(script, *arguments, **store)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and said in errors and errors.count("\n") == 1
    assert not slurm.notes.exists()
