"""How a node's job ends: what its failure is called, which attempt it is, and that a stopped one has ended; without servers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from infra.code import SEND, code_digest
from infra.processes import ServerError
from infra.store import Store
from pipelines.flows import jobs
from pipelines.flows.jobs import NodeFailed, NodeStopped, make_as_job, submit_or_attach
from pipelines.flows.run import Run
from stages.runner.recipe import Recipe
from tests.pipelines.flows.test_deployed import NODE, Ray, a_run


class SlowToStop(Ray):
    """Its jobs end when they have been asked for a few times since they were told to stop; `asked` counts."""

    def __init__(self, ends_at: int, **owners: str | None) -> None:
        super().__init__(**owners)
        self.ends_at, self.asked = ends_at, 0

    def stop(self, job: str) -> None:
        self.jobs[job] = "STOPPING"

    def status(self, job: str) -> str:
        self.asked += 1
        if self.asked >= self.ends_at and self.jobs[job] == "STOPPING":
            super().stop(job)
        return super().status(job)


def test_a_job_is_stopped_when_it_has_ended_or_takes_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(jobs, "STOP_SECONDS", 5.0)
    ray = SlowToStop(4, a_f_1=None)
    jobs.stop_job(ray, "a-f-1")  # type: ignore[arg-type]
    assert (ray.jobs, ray.asked) == ({"a-f-1": "STOPPED"}, 4), "its last checkpoint is whole"
    monkeypatch.setattr(jobs, "STOP_SECONDS", 0.0)
    never = SlowToStop(1000, a_f_1=None)
    jobs.stop_job(never, "a-f-1")  # type: ignore[arg-type]
    assert (never.jobs, never.asked) == ({"a-f-1": "STOPPING"}, 1)


class Failing(Ray):
    """Its jobs fail when they have said their lines; `verdict` is what Ray says of that."""

    def __init__(self, lines: Sequence[str], verdict: str = "") -> None:
        super().__init__(lines)
        self.verdict = verdict

    def follow(self, job: str) -> Iterator[str]:
        yield from self.lines
        self.jobs[job] = "FAILED"

    def explanation(self, job: str) -> str:
        return self.verdict


def make(run: Run, said: list[str], told: list[dict[str, Any]]) -> None:
    make_as_job(run, run.planned[NODE], lambda level, text: said.append(text), told.append, lambda job: None)


@pytest.mark.parametrize(
    ("lines", "verdict", "message"),
    [
        (["INFO works", "error: a-filter: no row is left", "goodbye"], "exit code 1", "a-filter: no row is left"),
        (["error: first", "error: second"], "", "second"),
        (["INFO works", "WARNING nearly full", ""], "exit code 137", "the job {job} died: nearly full"),
        ([], "\nthe driver died\nand more", "the job {job} died: the driver died"),
        ([], " ", "the job {job} died: it said nothing"),
    ],
)
def test_a_failure_is_called_by_the_jobs_last_error_or_by_its_last_words_or_by_what_ray_says(
    recipe: Recipe,
    store: Store,
    lines: list[str],
    verdict: str,
    message: str,
) -> None:
    run = a_run(recipe, store, Failing(lines, verdict))
    with pytest.raises(NodeFailed) as raised:
        make(run, [], [])
    assert str(raised.value) == message.format(job=run.job_ids[NODE])


def test_a_cluster_is_told_which_code_it_is_to_have_and_gets_it_where_that_is_asked_for(
    recipe: Recipe, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[str] = []

    class Uploads(Ray):
        def upload(self, name: str, data: bytes) -> str:
            sent.append(name)
            return f"gcs://{name}"

    monkeypatch.setattr(jobs, "package", lambda: ("code.zip", b""))
    monkeypatch.setattr(jobs, "git_commit", lambda: "0123456789ab")
    for embedded, asked, folder in ((False, "1", "gcs://code.zip"), (False, "", None), (True, "1", None)):
        monkeypatch.setenv(SEND, asked)
        ray = Uploads()
        run = a_run(recipe, store, ray)
        run.servers.embedded_ray = embedded
        make(run, [], [])
        ((command, environment, given),) = ray.submitted
        assert command.split()[command.split().index("--code") + 1] == code_digest() and given == folder
        assert (environment.get("UNIDIFFUSER_COMMIT") == "0123456789ab") is bool(asked)
    assert sent == ["code.zip"], "a Ray of this machine has its code"


@pytest.mark.parametrize("known", [True, False], ids=["a head that remembers it", "a head that knows of no job"])
@pytest.mark.parametrize(("losses", "jobs_had"), [(1, 2), (2, 3), (3, None)])
def test_a_node_goes_on_by_another_job_when_the_cluster_has_lost_the_one_it_had(
    recipe: Recipe, store: Store, known: bool, losses: int, jobs_had: int | None
) -> None:
    class Losing(Ray):
        followed = 0

        def follow(self, job: str) -> Iterator[str]:
            self.followed += 1
            if self.followed > losses:
                yield from super().follow(job)
            elif known:
                self.jobs[job] = "FAILED"
            else:
                del self.jobs[job]
                raise ServerError(f"Job {job} does not exist")

        def lost(self, job: str) -> bool:
            return self.jobs.get(job) != "SUCCEEDED"

        def explanation(self, job: str) -> str:
            return "its supervisor died"

    ray = Losing()
    run, said = a_run(recipe, store, ray), list[str]()
    if jobs_had is None:
        with pytest.raises(NodeFailed, match="its supervisor died" if known else "does not exist"):
            make(run, said, [])
    else:
        make(run, said, [])
        assert ray.followed == jobs_had
    assert sum(line.startswith("the cluster has lost the job ") for line in said) == min(losses, 2)


def test_a_line_of_progress_that_was_cut_is_passed_over(recipe: Recipe, store: Store) -> None:
    said: list[str] = []
    told: list[dict[str, Any]] = []
    run = a_run(recipe, store, Ray(['@progress {"done": 1}', '@progress {"do', "INFO goes on", '@progress {"done": 2}']))
    make(run, said, told)
    assert told == [{"done": 1}, {"done": 2}] and said[1:] == ["goes on"]


def test_a_run_that_is_to_stop_stops_its_job_and_waits_for_it(recipe: Recipe, store: Store) -> None:
    class Stopping(SlowToStop):
        def follow(self, job: str) -> Iterator[str]:
            yield "INFO works"
            run.stopping.set()
            yield "INFO is not heard any more"

    ray = Stopping(2)
    run, said = a_run(recipe, store, ray), list[str]()
    with pytest.raises(NodeStopped):
        make(run, said, [])
    assert ray.jobs == {run.job_ids[NODE]: "STOPPED"} and said[1:] == ["works"]


@pytest.mark.parametrize(
    ("before", "attempt", "attached"),
    [
        ({}, 1, False),
        ({1: "FAILED", 9: "STOPPED", 10: "SUCCEEDED"}, 11, False),
        ({1: "FAILED", 2: "RUNNING"}, 2, True),
        ({1: "FAILED", 2: "PENDING"}, 2, True),
    ],
)
def test_a_job_that_is_not_at_its_end_is_taken_up_and_after_one_that_is_comes_the_next_attempt(
    recipe: Recipe,
    store: Store,
    before: dict[int, str],
    attempt: int,
    attached: bool,
) -> None:
    ray = Ray()
    run, found = a_run(recipe, store, ray), list[str]()
    prefix = f"{NODE}-{run.planned[NODE].fingerprint}-"
    ray.jobs = {f"{prefix}{number}": status for number, status in before.items()} | {f"other-{prefix}50": "RUNNING"}
    job = submit_or_attach(ray, run, run.planned[NODE], lambda *_: None, found.append)  # type: ignore[arg-type]
    assert job == f"{prefix}{attempt}" and found == ([job] if attached else [])
    assert len(ray.jobs) == len(before) + 1 + (not attached)


def test_a_submission_that_ray_refuses_fails_the_node(recipe: Recipe, store: Store) -> None:
    class Refusing(Ray):
        def submit(self, *_: Any) -> None:
            raise ServerError("Ray has no room")

    with pytest.raises(NodeFailed, match="^Ray has no room$"):
        make(a_run(recipe, store, Refusing()), [], [])
