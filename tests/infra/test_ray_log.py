"""A job's log is followed through silences, breaks and a lack of connections, against a stand-in for Ray's dashboard."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from aiohttp import web

from infra import ray_jobs, ray_log
from infra.processes import ServerError
from infra.ray_jobs import RayJobs

LINES = [f'line {number}: é, "quoted", \t and 🙂' for number in range(2000)]
LOG = "\n".join([*LINES, "the last one, without an end"])


class Dashboard:
    """Answers as Ray's dashboard does, of one job.

    All goes to the part that knows over a pool of `limit` connections. A log that nobody listens to any more keeps its connection
    until the job ends.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.log, self.status, self.error = "", "RUNNING", ""
        self.heads = [(500, "ALIVE")]
        self.breaks = 0  # how many of the next connections are cut after a moment
        self.closes_at = 10**9  # the character after which a connection ends in good order
        self.broken: set[str] = set()  # what is answered with 500: status, logs, tail
        self.connections, self.sent, self.whole = 0, 0, 0

    async def start(self) -> None:
        self.pool = asyncio.Semaphore(self.limit)
        app = web.Application()
        app.add_routes(
            [
                web.get("/api/jobs/one", self.tell_status),
                web.get("/api/jobs/", self.tell_jobs),
                web.get("/nodes", self.tell_nodes),
                web.get("/api/jobs/one/logs", self.tell_all),
                web.get("/api/jobs/one/logs/tail", self.tail),
            ]
        )
        self.runner = web.AppRunner(app, access_log=None, shutdown_timeout=1)
        await self.runner.setup()
        await web.TCPSite(self.runner, "127.0.0.1", 0).start()
        self.address = f"http://127.0.0.1:{self.runner.addresses[0][1]}"

    async def tell_status(self, request: web.Request) -> web.Response:
        async with self.pool:
            return web.json_response(self.job(), status=500 if "status" in self.broken else 200)

    def job(self) -> dict[str, Any]:
        return {"submission_id": "one", "status": self.status, "error_type": self.error, "start_time": 1_000}

    async def tell_jobs(self, request: web.Request) -> web.Response:
        return web.json_response([self.job()])

    async def tell_nodes(self, request: web.Request) -> web.Response:
        heads = [{"isHeadNode": True, "startTimeMs": str(since), "state": state} for since, state in self.heads]
        worker = {"isHeadNode": False, "startTimeMs": "9000", "state": "ALIVE"}
        return web.json_response({"data": {"summary": [{"raylet": node} for node in [*heads, worker]]}})

    async def tell_all(self, request: web.Request) -> web.Response:
        if "logs" in self.broken:
            return web.Response(status=500, text="Traceback\nUnicodeDecodeError: invalid start byte\n.")
        async with self.pool:
            if request.method == "GET":
                self.whole += 1
                self.sent += len(self.log)
            return web.json_response({"logs": self.log})

    async def tail(self, request: web.Request) -> web.StreamResponse:
        if "tail" in self.broken:
            return web.Response(status=500)
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        self.connections += 1
        if self.breaks:
            self.breaks -= 1
            assert request.transport is not None
            asyncio.get_running_loop().call_later(0.01, request.transport.abort)
        async with self.pool:
            try:
                await self.say(socket, compressed="Sec-WebSocket-Extensions" in request.headers)
            except ConnectionError:
                while self.status == "RUNNING":
                    await asyncio.sleep(0.005)
        return socket

    async def say(self, socket: web.WebSocketResponse, compressed: bool) -> None:
        position = 0
        while self.status == "RUNNING" or position < len(self.log):
            if chunk := self.log[position : position + 20_000]:
                position += len(chunk)
                if position > self.closes_at:
                    return
                self.sent += len(chunk)
                await socket.send_str(chunk)
                if compressed:
                    return
            else:
                await asyncio.sleep(0.005)


@pytest.fixture
def dashboard(monkeypatch: pytest.MonkeyPatch) -> Iterator[Dashboard]:
    monkeypatch.setattr(ray_jobs, "PAUSE", 0.01)
    stand, loop = Dashboard(limit=5), asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    asyncio.run_coroutine_threadsafe(stand.start(), loop).result(10)
    yield stand
    stand.status = "SUCCEEDED"
    asyncio.run_coroutine_threadsafe(stand.runner.cleanup(), loop).result(10)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)
    loop.close()


class Listener:
    """What `follow` has said, apart: the lines, and what could not be read."""

    def __init__(self, dashboard: Dashboard, tick: float = 0.01) -> None:
        self.lines: list[str] = []
        self.errors: list[str] = []
        self.following = RayJobs(dashboard.address).follow("one", tick=tick)

    def until(self, line: str | None = None, seconds: float | None = None, errors: int | None = None) -> None:
        """Listen until a line was said, for some seconds, until so much went wrong, or to the end."""
        deadline = time.monotonic() + (seconds or 60)
        for said in self.following:
            if isinstance(said, ServerError):
                self.errors.append(str(said))
            elif said is not None:
                self.lines.append(said)
            if (line and said == line) or (seconds and time.monotonic() > deadline) or len(self.errors) == errors:
                return
            assert time.monotonic() < deadline, "nothing comes any more"


def test_a_silence_takes_one_connection_and_no_byte_twice(dashboard: Dashboard, monkeypatch: pytest.MonkeyPatch) -> None:
    # Twenty looks at the status.
    monkeypatch.setattr(ray_log, "SILENCE", 0.05)
    listener = Listener(dashboard)
    dashboard.log = LOG[:30_000]
    listener.until(seconds=1)
    assert listener.lines == LOG[:30_000].split("\n")[:-1]
    dashboard.log, dashboard.status = LOG, "SUCCEEDED"
    listener.until()
    assert "\n".join(listener.lines) == LOG and not listener.errors
    assert (dashboard.connections, dashboard.whole, dashboard.sent) == (1, 0, len(LOG))


def test_a_break_in_a_silence_is_one_connection_until_the_log_grows(dashboard: Dashboard) -> None:
    dashboard.log, dashboard.breaks = LOG[:30_000], 1
    listener = Listener(dashboard)
    listener.until(seconds=1)
    assert (dashboard.connections, dashboard.whole, len(listener.lines)) == (1, 0, LOG[:30_000].count("\n"))
    dashboard.log = LOG[:40_000]
    listener.until(LOG[:40_000].split("\n")[-2])
    assert dashboard.connections == 2
    dashboard.log, dashboard.status = LOG, "SUCCEEDED"
    listener.until()
    assert "\n".join(listener.lines) == LOG and not listener.errors and dashboard.whole == 0


def test_a_log_whose_connections_always_break_is_read_120_times_without_taking_more_of_them(
    dashboard: Dashboard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_log, "LONGEST_PAUSE", 0.01)
    dashboard.breaks = 10**9
    listener = Listener(dashboard, tick=0.002)
    for line in LINES[:120]:
        dashboard.log += line + "\n"
        listener.until(line)
    dashboard.log, dashboard.status = LOG, "SUCCEEDED"
    listener.until()
    assert "\n".join(listener.lines) == LOG and not listener.errors
    assert dashboard.connections == ray_log.CONNECTIONS and dashboard.whole > 50


def test_a_log_that_cannot_be_read_is_a_warning_while_the_status_answers(
    dashboard: Dashboard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_jobs, "PATIENCE", 0.05)
    monkeypatch.setattr(ray_log, "LONGEST_PAUSE", 0.05)
    dashboard.log, dashboard.broken = LOG[:1000], {"logs", "tail"}
    listener = Listener(dashboard)
    listener.until(seconds=0.5)
    assert not listener.lines and len(listener.errors) == 1
    assert listener.errors[0].endswith("GET /api/jobs/one/logs: UnicodeDecodeError: invalid start byte")
    dashboard.broken = set()
    listener.until(LOG[:1000].split("\n")[-2])
    # At the end it is gone again: what was heard stays, and the job has ended all the same.
    dashboard.broken = {"logs", "tail"}
    dashboard.log, dashboard.status = LOG[:1000], "SUCCEEDED"
    dashboard.closes_at = 0
    listener.until()
    assert "\n".join(listener.lines) == LOG[:1000]


def test_a_head_that_does_not_answer_is_waited_for_as_another_may_come(
    dashboard: Dashboard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_jobs, "PATIENCE", 0.0)
    monkeypatch.setattr(ray_jobs, "PAUSE", 0.0)
    dashboard.log, dashboard.broken = LOG, {"status", "logs", "tail"}
    listener = Listener(dashboard)
    listener.until(seconds=0.5)
    assert len(listener.errors) == 1 and listener.errors[0].endswith("; waiting for another head")
    dashboard.broken, dashboard.status = set(), "SUCCEEDED"
    listener.until()
    assert "\n".join(listener.lines) == LOG and len(listener.errors) == 1


@pytest.mark.parametrize(
    ("status", "error", "heads", "lost"),
    [
        ("PENDING", "", [(500, "ALIVE")], False),
        ("PENDING", "", [(500, "DEAD"), (2_000, "ALIVE")], True),
        ("RUNNING", "", [(500, "DEAD"), (2_000, "ALIVE")], False),
        ("FAILED", "JOB_SUPERVISOR_ACTOR_DIED", [(500, "ALIVE")], True),
        ("FAILED", "JOB_ENTRYPOINT_COMMAND_ERROR", [(500, "ALIVE")], False),
    ],
)
def test_a_job_is_lost_with_the_head_that_watched_over_it_or_was_to_begin_it(
    dashboard: Dashboard, status: str, error: str, heads: list[tuple[int, str]], lost: bool
) -> None:
    dashboard.status, dashboard.error, dashboard.heads = status, error, heads
    jobs = RayJobs(dashboard.address)
    assert (jobs.lost("one"), jobs.lost("another")) == (lost, True)
    assert jobs.ended("one") == (status == "FAILED" or lost)


def test_only_a_status_without_an_answer_ends_the_following(dashboard: Dashboard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_jobs, "PATIENCE", 0.05)
    monkeypatch.setattr(ray_log, "AWAY", 0.0)
    dashboard.log, dashboard.broken = LOG, {"status", "logs", "tail"}
    with pytest.raises(ServerError, match="GET /api/jobs/one: "):
        Listener(dashboard).until()


@pytest.mark.parametrize("refused", [{"tail"}, set()], ids=["no log by connection", "an early farewell"])
def test_what_the_connection_does_not_bring_is_read_as_a_whole(dashboard: Dashboard, refused: set[str]) -> None:
    dashboard.broken, dashboard.closes_at = refused, 50_000
    listener = Listener(dashboard)
    dashboard.log, dashboard.status = LOG, "SUCCEEDED"
    listener.until()
    assert "\n".join(listener.lines) == LOG and not listener.errors and dashboard.whole == 1


def test_connecting_again_is_given_up_and_the_end_is_read_all_the_same(dashboard: Dashboard) -> None:
    dashboard.log, dashboard.closes_at, dashboard.broken = LOG, 0, {"logs"}
    listener = Listener(dashboard)
    listener.until(seconds=0.5)
    assert dashboard.connections == ray_log.CONNECTIONS
    dashboard.broken, dashboard.status = set(), "SUCCEEDED"
    before = dashboard.connections
    listener.until()
    # The end is seen in the pause, and what is left is read without connecting again.
    assert "\n".join(listener.lines) == LOG and (dashboard.connections, dashboard.whole) == (before, 1)
