"""Jobs on a real Ray: quiet ones, ones whose log cannot be read, and one that two commands submit at once."""

from __future__ import annotations

import shlex
import shutil
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

import infra.code
from infra import ray_jobs, ray_log
from infra.code import ROOMS, code_digest, package
from infra.dataset import find
from infra.processes import ServerError, recorded
from infra.ray_jobs import RayJobs
from infra.store import Store
from pipelines.flows.deployed import Unwatched
from pipelines.flows.jobs import ATTACHED, SUBMITTED, make_as_job, submit_or_attach
from pipelines.flows.run import Run, plan_run
from pipelines.servers.servers import Servers
from stages.runner.recipe import load_recipe
from tests.pipelines.conftest import Kept, write_recipe

NODE = "good-select"
# Above what a request of its own costs, so that the bytes tell whether the log was read twice.
LINES = [f"line {number}: é and 🙂" for number in range(20_000)]


class Relay:
    """Passes on what clients of Ray say; counts the connections and the bytes that come back by what was asked for."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.connections: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.cut_after: float | None = None
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self.listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, socket.create_connection(("127.0.0.1", self.port)) as server:
            with suppress(OSError):
                request = client.recv(65536)
                kind = request.split(b" ")[1].decode().rsplit("/", 1)[-1]
                self.connections[kind] += 1
                server.sendall(request)
                threading.Thread(target=self._pass_on, args=(client, server), daemon=True).start()
                if kind == "tail" and self.cut_after is not None:
                    server.settimeout(self.cut_after)
                while data := server.recv(65536):
                    self.bytes[kind] += len(data)
                    client.sendall(data)
            # Closing alone does not end what another thread is reading from.
            with suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)

    @staticmethod
    def _pass_on(client: socket.socket, server: socket.socket) -> None:
        with suppress(OSError):
            while data := client.recv(65536):
                server.sendall(data)
            server.shutdown(socket.SHUT_WR)


@pytest.fixture(scope="module")
def jobs(kept: Kept) -> RayJobs:
    ray = recorded("ray", kept.store / ".state")
    assert ray is not None
    return RayJobs(ray.address, ray.token)


@pytest.fixture
def relayed(jobs: RayJobs) -> Iterator[tuple[RayJobs, Relay]]:
    relay = Relay(int(jobs.address.rsplit(":", 1)[1]))
    through = RayJobs(relay.address)
    through.headers = jobs.headers
    yield through, relay
    relay.listener.close()


def python(text: str) -> str:
    return shlex.join([sys.executable, "-c", text])


def test_a_quiet_job_takes_one_connection_and_its_log_is_read_once(
    relayed: tuple[RayJobs, Relay], monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs, relay = relayed
    # Shorter than the silence in the middle; longer than Ray takes to end a log, some 2 seconds.
    monkeypatch.setattr(ray_log, "SILENCE", 3.0)
    say = "print(*[f'line {{n}}: é and 🙂' for n in range({}, {})], sep=chr(10), flush=True)"
    jobs.submit("quiet-1", python(f"import time; {say.format(0, 10_000)}; time.sleep(5); {say.format(10_000, 20_000)}"))
    lines = [line for line in jobs.follow("quiet-1") if line is not None]
    # Ray has words of its own to say before and after.
    assert [line for line in lines if str(line).startswith("line ")] == LINES and jobs.status("quiet-1") == "SUCCEEDED"
    size = len("\n".join(map(str, lines)).encode())
    print(f"{dict(relay.connections)}, bytes {dict(relay.bytes)}, log {size}, ratio {relay.bytes.total() / size:.3f}")
    assert relay.connections["tail"] == 1
    assert relay.bytes.total() <= 1.1 * size


def test_a_log_that_ray_cannot_read_does_not_fail_its_job(jobs: RayJobs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_jobs, "PATIENCE", 0.0)
    jobs.submit("binary-1", python("import sys; sys.stdout.buffer.write(bytes([255, 10]))"))
    said = [line for line in jobs.follow("binary-1") if line is not None]
    assert [str(line) for line in said if isinstance(line, ServerError)] == [str(said[-1])]
    assert "the log of the job binary-1 cannot be read: Ray at" in str(said[-1]) and "UnicodeDecodeError" in str(said[-1])
    assert jobs.status("binary-1") == "SUCCEEDED"


def test_code_that_is_sent_is_what_a_job_and_its_workers_import(jobs: RayJobs, tmp_path: Path) -> None:
    for room in ROOMS:
        (tmp_path / room).mkdir()
        (tmp_path / room / "__init__.py").touch()
    shutil.copy(infra.code.__file__, tmp_path / "infra")
    (tmp_path / "stages" / "said.py").write_text("WORD = 'of the command'\n")
    folder = jobs.upload(*package(tmp_path))
    assert jobs.upload(*package(tmp_path)) == folder, "what the cluster has already is not sent again"
    script = (
        "import ray; ray.init(log_to_driver=False)\n"
        "def say():\n import infra.code, stages.said; return stages.said.WORD, infra.code.code_digest()\n"
        "print(say(), ray.get(ray.remote(num_cpus=0)(say).remote()))"
    )
    jobs.submit("sent-1", python(script), {"PYTHONUNBUFFERED": "1"}, None, folder)
    said = [line for line in jobs.follow("sent-1") if line is not None]
    assert f"{('of the command', code_digest(tmp_path))} " * 2 in f"{said[-1]} ", said
    assert code_digest(tmp_path) != code_digest()


def test_of_two_commands_at_one_ray_the_slower_one_attaches(jobs: RayJobs, tmp_path: Path) -> None:
    # Other rows than the Ray of `kept` has selected before.
    recipe = load_recipe(write_recipe(tmp_path), ["subsets.good.select.min_width=300"])
    store = Store(str(tmp_path / "store"))
    planned, both, said = plan_run(recipe, store), threading.Barrier(2), Counter[str]()

    class AtOnce(RayJobs):
        """Submits when the other one does too."""

        def submit(self, *arguments: object) -> None:
            both.wait(30)
            super().submit(*arguments)  # type: ignore[arg-type]

    ray = AtOnce(jobs.address)
    ray.headers = jobs.headers

    def run(number: int) -> list[str]:
        servers, attached = Servers(tmp_path / str(number)), list[str]()
        servers.ray = lambda: ray  # type: ignore[method-assign]
        run = Run(recipe, store, planned, [NODE], servers, Unwatched())
        make_as_job(run, planned[NODE], lambda level, text: said.update([text]), lambda fields: None, attached.append)
        return attached

    with ThreadPoolExecutor(2) as commands:
        attached = sorted(commands.map(run, range(2)))
    job = f"{NODE}-{planned[NODE].fingerprint}-1"
    assert attached == [[], [job]] and said[SUBMITTED.format(job)] == said[ATTACHED.format(job)] == 1
    assert [name for name in jobs.statuses() if planned[NODE].fingerprint in name] == [job]
    assert find(store, "select", planned[NODE].fingerprint) is not None


def test_memory_of_the_machines_that_work_is_told(jobs: RayJobs) -> None:
    machines, gpus = jobs.memory()
    # Or what a container may have of it.
    assert len(machines) == 1 and 2**28 < machines[0] <= psutil.virtual_memory().total
    assert all(gpu > 2**30 for gpu in gpus)


@pytest.mark.parametrize("debug", [False, True])
def test_debug_reaches_the_job(tmp_path: Path, debug: bool) -> None:
    recipe, store = load_recipe(write_recipe(tmp_path)), Store(str(tmp_path / "store"))
    run = Run(recipe, store, plan_run(recipe, store), [NODE], Servers(tmp_path), Unwatched(), debug=debug)
    commands: list[str] = []

    class Ray(RayJobs):
        def statuses(self) -> dict[str, str]:
            return {}

        def submit(self, job: str, entrypoint: str, *_: object) -> None:
            commands.append(entrypoint)

    submit_or_attach(Ray("http://127.0.0.1:9"), run, run.planned[NODE], lambda *_: None, lambda _: None)
    assert [("--debug" in shlex.split(command)) for command in commands] == [debug]


def test_a_refusal_of_a_submission_says_why(jobs: RayJobs) -> None:
    with pytest.raises(ServerError, match=r"POST /api/jobs/: ValueError: Job with submission_id again-1 already exists"):
        for _ in range(2):
            jobs.submit("again-1", "true")


@pytest.mark.slow
def test_a_real_log_whose_connections_always_break_is_read_120_times(
    relayed: tuple[RayJobs, Relay], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs, relay = relayed
    monkeypatch.setattr(ray_log, "LONGEST_PAUSE", 0.05)
    enough, start = tmp_path / "enough", time.monotonic()
    talk = f"import os, time\nn = 0\nwhile not os.path.exists({str(enough)!r}):\n"
    talk += " print('line', n, flush=True)\n n += 1\n time.sleep(0.05)\n"
    relay.cut_after = 0.05
    jobs.submit("broken-1", python(talk + "time.sleep(3)\nprint('end', n)"))
    lines: list[str] = []
    for said in jobs.follow("broken-1", tick=0.05):
        assert not isinstance(said, ServerError), said
        lines += [said] if said else []
        if relay.connections["logs"] >= 240 and not enough.exists():
            # Each time its size was asked for first.
            enough.touch()
            print(f"120 times in {time.monotonic() - start:.1f} s")
    print(dict(relay.connections), dict(relay.bytes))
    first = lines.index("line 0")
    assert lines[first:] == [*(f"line {n}" for n in range(len(lines) - first - 1)), f"end {len(lines) - first - 1}"]
    assert jobs.status("broken-1") == "SUCCEEDED" and relay.connections["tail"] == ray_log.CONNECTIONS
