"""What `up` prints for other shells and for systemd, and the port that its server keeps; nothing is started here."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from configparser import ConfigParser
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from infra import prefect_server
from infra.prefect_server import credential, start_prefect, usual_port
from infra.processes import Server, ServerError, free_port, record
from pipelines.servers.machine import command_for, say_address
from pipelines.servers.servers import Servers
from pipelines.servers.shells import exports, systemd_unit


@contextmanager
def taken(port: int) -> Iterator[None]:
    with socket.create_server(("127.0.0.1", port)):
        yield


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Ports of servers that were begun, and that end at once."""
    ports: list[int] = []

    def begin(name: str, command: list[str], *_: object, **details: str) -> Server:
        ports.append(int(command[-1]))
        return Server(name=name, pid=1, created=0.0, address=details["address"])

    monkeypatch.setattr(prefect_server, "spawn", begin)
    return ports


def test_the_port_stays_the_same_and_another_program_on_it_takes_it_for_that_time_only(tmp_path: Path, begun: list[int]) -> None:
    start_prefect(tmp_path)
    first = begun[0]
    start_prefect(tmp_path)
    with taken(first):
        start_prefect(tmp_path)
    start_prefect(tmp_path)
    assert begun == [first, first, begun[2], first] and begun[2] != first == usual_port(tmp_path)
    wanted = free_port()
    with taken(wanted), pytest.raises(ServerError, match=f"port {wanted} is taken by another program; .* another --port"):
        start_prefect(tmp_path, wanted)
    assert usual_port(tmp_path) == first and len(begun) == 4
    start_prefect(tmp_path, wanted)
    start_prefect(tmp_path)
    assert begun[4:] == [wanted, wanted]


def a_server(state: Path, name: str, address: str, token: str) -> None:
    """The record of a server; its process is that of the tests."""
    created = psutil.Process().create_time()
    record(Server(name=name, pid=os.getpid(), created=created, address=address, token=token), state)


def test_a_port_is_refused_where_the_server_is_up_already_or_is_not_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begun: list[int]
) -> None:
    a_server(tmp_path, "prefect", "http://127.0.0.1:4300", credential(tmp_path))
    monkeypatch.setattr(prefect_server, "answers", lambda _: True)
    assert start_prefect(tmp_path, 4300).address == "http://127.0.0.1:4300"
    with pytest.raises(ServerError, match="is up at http://127.0.0.1:4300; `unidiffuser down` first, or leave out --port"):
        start_prefect(tmp_path, 4301)
    monkeypatch.setenv("PREFECT_API_URL", "http://prefect.example/api")
    with pytest.raises(ServerError, match="--port is for .* PREFECT_API_URL=http://prefect.example/api names another"):
        Servers(tmp_path).begin_prefect(4300)
    assert begun == []


def test_the_address_is_said_with_how_to_sign_in_and_why_it_is_another_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    state = tmp_path / "my runs" / ".state"
    a_server(state, "prefect", "http://127.0.0.1:4300", credential(state))
    (state / "prefect" / "port").write_text("4300")
    say_address(state, "http://127.0.0.1:4300", Console())
    lines = ["Prefect UI: http://127.0.0.1:4300", f"To sign the browser in: unidiffuser ui --store '{tmp_path}/my runs'"]
    assert capsys.readouterr().out.splitlines() == lines
    (state / "prefect" / "port").write_text("4200")
    say_address(state, "http://127.0.0.1:4300", Console())
    assert "usual port 4200 is taken by another program" in capsys.readouterr().out
    monkeypatch.setenv("UNIDIFFUSER_STORE", str(tmp_path / "my runs"))
    assert command_for("up", state) == "unidiffuser up"


def test_other_shells_read_the_secrets_from_files_of_their_owner(tmp_path: Path) -> None:
    state = tmp_path / "my runs" / ".state"
    token = credential(state)
    a_server(state, "prefect", "http://127.0.0.1:4300", token)
    a_server(state, "ray", "http://127.0.0.1:8265", "of-ray")
    lines = exports(state, "http://127.0.0.1:4300")
    assert token not in "".join(lines) and "of-ray" not in "".join(lines)
    asked = 'echo "$PREFECT_API_URL $PREFECT_API_AUTH_STRING $RAY_ADDRESS $RAY_AUTH_MODE $(cat "$RAY_AUTH_TOKEN_PATH")"'
    said = subprocess.run(["sh", "-c", "\n".join([*lines, asked])], capture_output=True, text=True, check=True).stdout
    assert said.split() == ["http://127.0.0.1:4300/api", token, "http://127.0.0.1:8265", "token", "of-ray"]
    assert (state / "ray.token").stat().st_mode & 0o077 == 0


def test_the_unit_runs_up_and_down_with_this_store(tmp_path: Path) -> None:
    unit = tmp_path / "unidiffuser.service"
    unit.write_text(systemd_unit("/data/100% my $runs", "local", 4300))
    parsed = ConfigParser(interpolation=None, delimiters=("=",))
    parsed.optionxform = str  # type: ignore[assignment,method-assign]
    parsed.read(unit)
    service = parsed["Service"]
    command = str(Path(sys.executable).with_name("unidiffuser"))
    assert service["ExecStart"] == f'{command} up --store "/data/100%% my $$runs" --pool local --port 4300'
    assert service["ExecStop"] == f'{command} down --store "/data/100%% my $$runs"'
    assert service["Type"] == "oneshot" and service["RemainAfterExit"] == "yes"
    assert parsed["Install"]["WantedBy"] == "default.target"
    if analyze := shutil.which("systemd-analyze"):
        environment = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)}
        done = subprocess.run([analyze, "verify", "--user", unit], env=environment, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, "")
