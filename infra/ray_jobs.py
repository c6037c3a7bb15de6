"""Ray's Jobs API over plain HTTP, so that the process that submits and follows jobs never pays for importing Ray."""

from __future__ import annotations

import http.client
import json
import math
import os
import platform
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from infra.loopback import open_url, warn_of_clear_text
from infra.processes import NoAnswer, ServerError
from infra.ray_log import FollowedLog

TERMINAL = frozenset({"SUCCEEDED", "FAILED", "STOPPED"})
# How Ray calls it when what watched over a job is gone.
LOST = frozenset({"JOB_SUPERVISOR_ACTOR_DIED", "JOB_SUPERVISOR_ACTOR_START_FAILURE", "JOB_SUPERVISOR_ACTOR_UNKNOWN_FAILURE"})
# How long a question is asked again while a busy head, or a proxy before it, gives no answer, and how often, in seconds.
PATIENCE = 60.0
PAUSE = 1.0
# How long an answer may take, in seconds; one without which a job is followed all the same; one that decides whether a run
# begins; and one without which that is decided otherwise.
TIMEOUT = 60.0
SHORT_TIMEOUT = 10.0
FIRST_TIMEOUT = 8.0
LOOK_TIMEOUT = 2.0
# As many nodes as Ray lists at most; it tells of a hundred otherwise.
MOST_NODES = 10_000
# Set by whoever lets jobs go to a cluster that takes them from everybody who reaches it.
OPEN = "UNIDIFFUSER_OPEN_RAY"


class Refused(ServerError):
    """Ray answers, and does not let us in."""


def user_token() -> str | None:
    """The token that Ray's own client would send: RAY_AUTH_TOKEN, the file RAY_AUTH_TOKEN_PATH, or ~/.ray/auth_token."""
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return token
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", Path.home() / ".ray" / "auth_token"))
    return path.read_text().strip() if path.is_file() else None


class RayJobs:
    """Submits, follows and stops the jobs of one cluster.

    Example:
        >>> jobs = RayJobs("http://127.0.0.1:8265", token)          # doctest: +SKIP
        >>> jobs.submit("hello-1", "echo hello")                    # doctest: +SKIP
        >>> [line for line in jobs.follow("hello-1") if line]       # doctest: +SKIP
        ['hello']
    """

    def __init__(self, address: str, token: str | None = None):
        self.address = address.rstrip("/")
        self.headers = {"Authorization": f"Bearer {token}"} if token else {}

    def ready(self) -> bool:
        """Whether the Jobs API answers and a node is there that could take a job."""
        try:
            self._call("GET", "/api/version")
            nodes = self._call("GET", "/nodes?view=summary")
        except ServerError:
            return False
        return bool(nodes["data"]["summary"])

    def check(self) -> None:
        """Whether jobs can be given to the cluster: it lets in nobody without a token, takes ours, and has our Ray and Python.

        Raises:
            ServerError: it is none of these, or does not answer.
        """
        if not self._asks_for_a_token() and not os.environ.get(OPEN):
            raise ServerError(
                f"Ray at {self.address} asks for no token, so whoever reaches it runs code there; start it with "
                f"RAY_AUTH_MODE=token, or set {OPEN}=1 if its network is closed to others"
            )
        theirs = str(self._call("GET", "/api/version", timeout=FIRST_TIMEOUT)["ray_version"])
        self._compare("Ray", theirs, version("ray"))
        told = self._call("GET", "/api/v0/cluster_metadata", timeout=FIRST_TIMEOUT).get("data", {})
        self._compare("Python", str(told["pythonVersion"]), platform.python_version())
        if self.headers:
            warn_of_clear_text(self.address, "Ray's token")

    def _asks_for_a_token(self) -> bool:
        try:
            return bool(self._call("GET", "/api/authentication_mode", timeout=FIRST_TIMEOUT)["authentication_mode"] != "disabled")
        except Refused:
            # Something before it asks for more.
            return True

    def _compare(self, what: str, theirs: str, ours: str) -> None:
        if theirs.split(".")[:2] != ours.split(".")[:2]:
            fix = "install on the cluster what requirements.lock names" if what == "Ray" else "use the same on both"
            raise ServerError(f"{what} at {self.address} is {theirs}, here it is {ours}; {fix}")

    def memory(self) -> tuple[list[int], list[int]]:
        """Bytes of memory of every machine that does work, and of every GPU.

        Raises:
            ServerError: Ray does not answer, or no machine is there.
        """
        until, alive = time.monotonic() + SHORT_TIMEOUT, list[dict[str, Any]]()
        # A machine tells of its memory some seconds after it has come, and later where it is busy.
        while not alive and time.monotonic() < until:
            nodes = self._call("GET", "/nodes?view=summary", timeout=SHORT_TIMEOUT)["data"]["summary"]
            alive = [node for node in nodes if node.get("mem") and node.get("raylet", {}).get("state") == "ALIVE"]
            if not alive:
                time.sleep(0.5)
        # A head that takes no work has no CPUs.
        working = [node for node in alive if node["raylet"].get("resourcesTotal", {"CPU": 1}).get("CPU")] or alive
        if not working:
            raise ServerError(f"Ray at {self.address} has no machine yet")
        gpus = [gpu["memoryTotal"] * 2**20 for node in working for gpu in node.get("gpus") or [] if gpu.get("memoryTotal")]
        return [int(node["mem"][0]) for node in working], gpus

    def works_on(self, hosts: Collection[str]) -> bool:
        """Whether these machines, by their names, are all that does work: no other is there, nor would one have to come.

        Raises:
            ServerError: Ray does not answer.
        """
        alive = self._alive(LOOK_TIMEOUT)
        # A head that takes no work has no CPUs.
        works = any(node["raylet"].get("resourcesTotal", {"CPU": 1}).get("CPU") for node in alive)
        return works and all(node.get("hostname") in hosts for node in alive)

    def resources(self) -> dict[str, float]:
        """What all machines that are there now have in all, by the names that they were started with.

        Raises:
            ServerError: Ray does not answer.
        """
        # In what /nodes answers, a resource such as gpu_machine is called gpuMachine.
        listed = self._call("GET", f"/api/v0/nodes?limit={MOST_NODES}", timeout=FIRST_TIMEOUT)["data"]["result"]["result"]
        found: Counter[str] = Counter()
        for node in listed:
            found.update(node["resources_total"] if node["state"] == "ALIVE" else {})
        return dict(found)

    def processors(self) -> tuple[int, int]:
        """CPUs and GPUs of all machines that are there now.

        Raises:
            ServerError: Ray does not answer.
        """
        have = self.resources()
        return int(have.get("CPU", 0)), int(have.get("GPU", 0))

    def _alive(self, timeout: float) -> list[dict[str, Any]]:
        nodes = self._call("GET", "/nodes?view=summary", timeout=timeout)["data"]["summary"]
        return [node for node in nodes if node.get("raylet", {}).get("state") == "ALIVE"]

    def statuses(self) -> dict[str, str]:
        """Submission id -> status of every job that the cluster knows."""
        return {job["submission_id"]: job["status"] for job in self._ask("GET", "/api/jobs/") if job.get("submission_id")}

    def running(self, before: float = math.inf) -> dict[str, dict[str, str]]:
        """The jobs that have not ended and were submitted before a moment, in seconds since 1970: id -> metadata."""
        jobs = [job for job in self._ask("GET", "/api/jobs/") if job.get("submission_id") and job["status"] not in TERMINAL]
        return {job["submission_id"]: job.get("metadata") or {} for job in jobs if (job.get("start_time") or 0) / 1000 < before}

    def commands(self) -> dict[str, str]:
        """The jobs that have not ended: id -> command.

        Raises:
            ServerError: Ray does not answer.
        """
        jobs = [job for job in self._call("GET", "/api/jobs/", timeout=SHORT_TIMEOUT) if job["status"] not in TERMINAL]
        return {job["submission_id"]: job["entrypoint"] for job in jobs if job.get("submission_id")}

    def newest(self, wanted: Callable[[str, str], bool]) -> str | None:
        """The job that was submitted last of those whose (id, command) are wanted.

        Raises:
            ServerError: Ray does not answer.
        """
        found = [job for job in self._call("GET", "/api/jobs/", timeout=SHORT_TIMEOUT) if job.get("submission_id")]
        fitting = [job for job in found if wanted(job["submission_id"], job["entrypoint"])]
        return max(fitting, key=lambda job: job.get("start_time") or 0)["submission_id"] if fitting else None

    def status(self, job: str) -> str:
        return str(self._ask("GET", f"/api/jobs/{job}")["status"])

    def ended(self, job: str) -> bool:
        """Whether a job has ended, or will never begin."""
        found = self._ask("GET", f"/api/jobs/{job}")
        return found["status"] in TERMINAL or self._never_begins(found)

    def lost(self, job: str) -> bool:
        """Whether Ray has lost a job, and did not see it end: its head was, and another is in that one's place."""
        jobs = {each["submission_id"]: each for each in self._ask("GET", "/api/jobs/") if each.get("submission_id")}
        return job not in jobs or jobs[job].get("error_type") in LOST or self._never_begins(jobs[job])

    def _never_begins(self, job: dict[str, Any]) -> bool:
        """Whether a job was to begin on a head that is no more, which Ray itself says a quarter of an hour later."""
        if job["status"] != "PENDING":
            return False
        nodes = [node["raylet"] for node in self._ask("GET", "/nodes?view=summary")["data"]["summary"] if node.get("raylet")]
        heads = [node for node in nodes if node.get("isHeadNode") and node.get("state") == "ALIVE"]
        return any(int(head["startTimeMs"]) > job["start_time"] for head in heads)

    def explanation(self, job: str) -> str:
        """What Ray itself has to say about how a job ended."""
        return str(self._ask("GET", f"/api/jobs/{job}").get("message") or "")

    def upload(self, name: str, package: bytes) -> str:
        """Leave a ZIP with the cluster, unless it has one of this name; returns its address for `submit`.

        Raises:
            ServerError: Ray does not answer or refuses.
        """
        path = f"/api/packages/gcs/{name}"
        try:
            with self._open("GET", path):
                pass
        except ServerError:
            with self._open("PUT", path, package):
                pass
        return f"gcs://{name}"

    def submit(
        self,
        job: str,
        entrypoint: str,
        environment: dict[str, str] | None = None,
        metadata: dict[str, str] | None = None,
        folder: str | None = None,
    ) -> None:
        """Submit a job under an id of our own. This is asked once: the job may be there although no answer came.

        Args:
            folder: address of a ZIP that is the job's and its workers' working folder, from which they import first.

        Raises:
            ServerError: Ray does not answer or refuses; the message holds its reason.
        """
        body: dict[str, Any] = {"submission_id": job, "entrypoint": entrypoint, "metadata": metadata or {}}
        if environment:
            body["runtime_env"] = {"env_vars": environment, **({"working_dir": folder} if folder else {})}
        self._call("POST", "/api/jobs/", body)

    def stop(self, job: str) -> None:
        self._ask("POST", f"/api/jobs/{job}/stop")

    def follow(self, job: str, tick: float = 0.5) -> Iterator[str | ServerError | None]:
        """The job's log line by line from its start, each line once, until the job has ended.

        Yields None at least every `tick` seconds while nothing is said, so that the caller can look around, and a ServerError
        when the log cannot be read: once, until it goes on again. Meanwhile the status is all that is followed. Where that has no
        answer either, this is said, and another head waited for.

        Raises:
            ServerError: none comes, or it knows of no such job.
        """
        return FollowedLog(self, job, tick).follow()

    def log(self, job: str, patient: bool) -> str:
        """All that a job has said so far."""
        path = f"/api/jobs/{job}/logs"
        reply = self._ask("GET", path) if patient else self._call("GET", path, timeout=SHORT_TIMEOUT)
        return str(reply.get("logs") or "")

    def log_size(self, job: str) -> int:
        """How many bytes the answer with all that a job has said so far would have; 0 where that is not said."""
        with self._open("HEAD", f"/api/jobs/{job}/logs", timeout=SHORT_TIMEOUT) as reply:
            return int(reply.headers["Content-Length"] or 0)

    def _ask(self, method: str, path: str) -> Any:
        """As `_call`, for what may be asked twice: a hiccup must not fail a run of days."""
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                return self._call(method, path)
            except NoAnswer:
                if time.monotonic() > deadline:
                    raise
            time.sleep(PAUSE)

    def _call(self, method: str, path: str, body: Any = None, timeout: float = TIMEOUT) -> Any:
        with self._open(method, path, body, timeout) as reply:
            return json.loads(reply.read() or b"null")

    @contextmanager
    def _open(self, method: str, path: str, body: Any = None, timeout: float = TIMEOUT) -> Iterator[Any]:
        """The reply, still to be read; what goes wrong meanwhile is one line."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode() if body is not None else None
        headers = {**self.headers, "Content-Type": "application/json"}
        request = urllib.request.Request(self.address + path, data=data, headers=headers, method=method)
        try:
            with open_url(request, timeout=timeout) as reply:
                yield reply
        except urllib.error.HTTPError as error:
            if error.code in (401, 403):
                what = "refuses the token" if self.headers else "asks for a token, and there is none here"
                raise Refused(f"Ray at {self.address} {what}; set RAY_AUTH_TOKEN to the cluster's") from None
            # Ray ends a traceback that it passes on with a line of its own, which holds a full stop.
            text = error.read().decode(errors="replace").rstrip("\n .").splitlines()
            kind = NoAnswer if error.code >= 500 else ServerError
            raise kind(f"Ray at {self.address}: {method} {path}: {text[-1] if text else error.reason}") from None
        except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            what = f"no Ray Jobs API answers at {self.address} ({reason})"
            if os.environ.get("RAY_ADDRESS"):
                raise NoAnswer(f"{what}; start the cluster, or unset RAY_ADDRESS") from None
            # The embedded one never comes back to its port.
            kind = ServerError if isinstance(reason, ConnectionRefusedError) else NoAnswer
            raise kind(f"{what}; the same command again starts Ray anew") from None
