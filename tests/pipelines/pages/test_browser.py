"""What a person does in the Prefect UI, in a real browser on a real server: start, watch, retry, copy, cancel, follow lineage."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any
from urllib.parse import urljoin

import pytest

from examples.little_web.build import build
from examples.little_web.server import Handler, LittleWeb
from infra.dataset import Dataset, find
from infra.processes import free_port, recorded
from infra.ray_jobs import RayJobs
from infra.store import Store
from stages.runner.graph import plan
from stages.runner.recipe import load_recipe
from tests.pipelines.conftest import CHROMIUM, PATIENCE, ask, picture, sign_in, start, survivors

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")

RECIPE = """
name: pictures
description: Pictures of a little web that are worth keeping.
subsets:
  little:
    select: {metadata: [web/metadata/*.parquet], min_side: 128}
    download: {timeout: 60, retries: 0}
"""


@dataclass
class World:
    """The servers of one store, a recipe on them, and the web that it downloads from, which is down at first."""

    recipe: Path
    store: Store
    address: str
    hosts: str

    def api(self, method: str, path: str, body: Any = None) -> Any:
        return ask(self.store.root, method, path, body)

    def dataset(self, node: str, *overrides: str) -> Dataset | None:
        planned = plan(load_recipe(self.recipe, [self.hosts, *overrides]), self.store)[node]
        return find(self.store, planned.stage, planned.fingerprint)

    def end(self, run: str, attempt: int = 1) -> str:
        """The state in which an attempt at a run ends."""
        deadline = time.monotonic() + 600
        while time.monotonic() < deadline:
            states = self.api("GET", f"flow_run_states/?flow_run_id={run}")
            names = [state["name"] for state in sorted(states, key=lambda state: state["timestamp"])]
            if len(ends := [name for name in names if name in ("Completed", "Failed", "Cancelled", "Crashed")]) >= attempt:
                return ends[attempt - 1]
            time.sleep(0.5)
        raise AssertionError(f"the run does not end: {names}")


@dataclass
class Web:
    """A folder with a recipe and a little web, the port of that web, what brings it up, and what its answers wait for."""

    folder: Path
    port: int
    come_up: Callable[[], object]
    answering: Event


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Web]:
    folder, port, answering = tmp_path_factory.mktemp("browser"), free_port(), Event()
    answering.set()
    build(folder / "web", rows=60, seed=0)
    answer = Handler.do_GET

    def late(handler: Handler) -> None:
        answering.wait(PATIENCE / 1000)
        answer(handler)

    with ExitStack() as served, pytest.MonkeyPatch.context() as patch:
        patch.setattr(Handler, "do_GET", late)
        yield Web(folder, port, lambda: served.enter_context(LittleWeb(folder / "web", port)), answering)


@pytest.fixture(scope="module")
def world(web: Web) -> Iterator[World]:
    folder, port = web.folder, web.port
    recipe, store = folder / "pictures.yaml", folder / "store"
    recipe.write_text(RECIPE)
    hosts = f"subsets.little.download.hosts={{little-web.example: '127.0.0.1:{port}'}}"
    try:
        for command in (["up"], ["deploy", recipe, "--set", hosts]):
            code, printed = start(*command, "--store", store).finish()
            assert code == 0, printed
        server = recorded("prefect", store / ".state")
        assert server is not None
        yield World(recipe, Store(str(store)), server.address, hosts)
    finally:
        start("down", "--store", store).finish()
        for process in survivors(store):
            process.kill()


@pytest.fixture(scope="module")
def page(page: Any, world: World) -> Any:
    sign_in(page, world.store.root)
    goto = page.goto

    def leave_for(address: str) -> None:
        # Who leaves a page of Prefect's while it still asks whether the sign-in holds is signed out: it is shown when it knows.
        page.get_by_role("link", name="Deployments", exact=True).first.wait_for()
        goto(address)

    page.goto = leave_for
    return page


def run_of(page: Any) -> str:
    page.wait_for_url(re.compile("/runs/flow-run/"))
    return page.url.split("/flow-run/")[1].split("?")[0]


def start_by_form(page: Any, world: World, fill: Callable[[], None], deployment: str = "pictures") -> str:
    """Start a deployment through its form, with what `fill` puts there; returns the run, whose page is then open."""
    page.goto(f"{world.address}/v2/deployments")
    page.get_by_role("link", name=deployment, exact=True).click()
    page.get_by_role("button", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Custom run").click()
    return submit(page, fill)


def submit(page: Any, fill: Callable[[], None]) -> str:
    """Fill and send the form that opens; returns the run, whose page is then open."""
    page.get_by_role("button", name="Submit").wait_for()
    page.get_by_role("tab", name=re.compile("^(little|other values)$")).click()
    page.get_by_text("Min Side (Optional)").wait_for()
    fill()
    page.get_by_role("button", name="Submit").click()
    # The notice with the link goes by itself, on a busy machine before it could be clicked.
    page.goto(urljoin(page.url, page.get_by_role("link", name="View run").get_attribute("href")))
    return run_of(page)


def change(page: Any, before: str, after: str) -> None:
    """Change the first number of the form that has this value."""
    next(field for field in page.locator("input[type=number]").all() if field.input_value() == before).fill(after)


def choose(page: Any, entry: str) -> None:
    """An entry of the menu of a run's page."""
    page.get_by_role("button", name="Open menu").click()
    page.get_by_role("menuitem", name=entry).click()


def confirm(page: Any, answer: str) -> None:
    page.get_by_role("button", name=answer, exact=True).click()


def open_page_of(page: Any, download: Dataset) -> Any:
    """From the page of a run to the newest page of the download that it made or reused."""
    page.get_by_role("tab", name="Artifacts").click()
    page.get_by_role("link", name=re.compile(f"download {download.manifest.fingerprint}")).first.click()
    page.wait_for_url(re.compile("/artifacts/(key|artifact)/"))
    main = page.locator("main")
    name, version = main.get_by_text(f"download/{download.manifest.fingerprint}"), main.locator("a[href*='/artifacts/artifact/']")
    name.or_(version).first.wait_for()
    # Prefect 3.8 leads to the history of the node, 3.9 to the version itself.
    if not name.count():
        version.first.click()
    name.first.wait_for()
    return main


@pytest.fixture(scope="module")
def failed(page: Any, world: World) -> str:
    """A run that was started through the form with one field changed, and failed since the web is down."""

    def fill() -> None:
        picture(page, "prefect-form", height=860)
        change(page, "128", "200")

    run = start_by_form(page, world, fill)
    # It fails after minutes. The graph of a run at work moves, which half a core draws, and another page does not.
    page.goto(f"{world.address}/v2/deployments")
    assert world.end(run) == "Failed"
    page.goto(f"{world.address}/v2/runs/flow-run/{run}")
    page.get_by_text("Failed", exact=True).first.wait_for()
    return run


CHANGED = "subsets.little.select.min_side=200"


def test_a_changed_field_of_the_form_changes_that_nodes_dataset_and_a_failure_says_why(
    page: Any, world: World, failed: str
) -> None:
    made = world.dataset("little-select", CHANGED)
    assert made is not None and world.dataset("little-select") is None and world.dataset("little-download", CHANGED) is None
    assert "is set aside" in world.api("GET", f"flow_runs/{failed}")["state"]["message"]
    page.get_by_role("tab", name="Details").click()
    page.get_by_text(re.compile("is set aside.* resolver or proxy that fails")).first.wait_for()
    page.get_by_role("tab", name="Task Runs").click()
    for node in ("little-select", "little-download"):
        page.get_by_role("link", name=node).first.wait_for()


def test_retry_does_only_what_failed(page: Any, world: World, failed: str, web: Web) -> None:
    before = {path: path.stat().st_mtime_ns for path in Path(world.store.root, "select", "units").rglob("unit.json")}
    web.come_up()
    page.goto(f"{world.address}/v2/runs/flow-run/{failed}")
    choose(page, "Retry")
    confirm(page, "Retry")
    assert world.end(failed, attempt=2) == "Completed", world.api("GET", f"flow_runs/{failed}")["state"]
    page.get_by_text("Completed", exact=True).first.wait_for()
    assert world.dataset("little-download", CHANGED) is not None
    assert before == {path: path.stat().st_mtime_ns for path in before}, "what was finished was done again"


def test_a_datasets_page_says_what_it_is_and_leads_to_the_run_that_made_its_input(page: Any, world: World, failed: str) -> None:
    made, source = world.dataset("little-download", CHANGED), world.dataset("little-select", CHANGED)
    assert made is not None and source is not None
    page.goto(f"{world.address}/v2/runs/flow-run/{failed}")
    main = open_page_of(page, made)
    for text in (f"select/{source.manifest.fingerprint}", f"{made.manifest.stats.rows_in}", *made.manifest.stats.dropped):
        main.get_by_text(text).first.wait_for()
    for link in (main.get_by_role("link", name="little-select"), main.locator("svg a")):
        link.first.click()
        page.wait_for_url(re.compile("/artifacts/artifact/"))
        main.get_by_text(f"select/{source.manifest.fingerprint}").first.wait_for()
        assert legible(page, "little-download") >= 12, "what was made of it is on its page"
        page.go_back()
        main.get_by_text(f"download/{made.manifest.fingerprint}").first.wait_for()
    main.get_by_role("link", name="this run").first.click()
    assert run_of(page) == failed


def legible(page: Any, node: str) -> float:
    """The height of a node's name in the graph of a page, in pixels of the screen."""
    text = page.locator("main svg .nodeLabel", has_text=node).first
    script = "e => { const s = e.closest('svg'); return parseFloat(getComputedStyle(e).fontSize) * s.getScreenCTM().a }"
    for _ in range(50):
        text.wait_for()
        # A page that is still being put together replaces its graph: what was found then has no size any more.
        if not math.isnan(height := float(text.evaluate(script))):
            return height
        page.wait_for_timeout(100)
    raise AssertionError(f"{node}: its name in the graph never had a size")


def test_the_runs_page_shows_the_graph_of_its_datasets_legibly_on_a_laptop(page: Any, world: World, failed: str) -> None:
    page.set_viewport_size({"width": 1280, "height": 800})
    page.goto(f"{world.address}/v2/artifacts/key/pictures-lineage")
    page.locator("main a[href*='/artifacts/artifact/']").first.click()
    assert legible(page, "little-download") >= 12
    page.set_viewport_size({"width": 1400, "height": 1000})


def test_the_form_as_it_opens_fits_two_screens_and_a_typed_name_stays(page: Any, world: World, failed: str) -> None:
    page.set_viewport_size({"width": 1280, "height": 800})
    page.goto(f"{world.address}/v2/deployments")
    page.get_by_role("link", name="pictures", exact=True).click()
    page.get_by_role("button", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Custom run").click()
    page.get_by_role("button", name="Submit").wait_for()
    page.get_by_role("tab", name="as in the recipe").wait_for()
    assert page.evaluate("document.documentElement.scrollHeight") <= 1600
    page.set_viewport_size({"width": 1400, "height": 1000})

    def fill() -> None:
        page.locator("main input").first.fill("before the weekend")
        change(page, "128", "200")

    run = submit(page, fill)
    assert world.end(run) == "Completed"
    names = [world.api("GET", f"flow_runs/{run}")["name"] for run in (run, failed)]
    assert names == ["before the weekend", "min_side 200"]


def test_a_nodes_run_feeds_a_copy_of_a_whole_run_with_one_field_changed(page: Any, world: World, failed: str, web: Web) -> None:
    changed = "subsets.little.select.min_side=600"
    # A node alone, started from its own deployment.
    alone = start_by_form(page, world, lambda: change(page, "128", "600"), "pictures-little-select")
    assert world.end(alone) == "Completed", world.api("GET", f"flow_runs/{alone}")["state"]
    source = world.dataset("little-select", changed)
    assert source is not None and world.dataset("little-download", changed) is None
    # The form of the copy has what the run had: 200, which was changed from 128 then.
    web.answering.clear()
    page.goto(f"{world.address}/v2/runs/flow-run/{failed}")
    choose(page, "Copy to new run")
    copy = submit(page, lambda: change(page, "200", "600"))
    # It is watched while it runs: the graph, which is drawn on a canvas, and the list of the same tasks.
    page.get_by_text("Running", exact=True).first.wait_for()
    page.locator("main canvas").first.wait_for()
    page.get_by_role("tab", name="Task Runs").click()
    page.get_by_role("link", name="little-download").first.wait_for()
    assert world.dataset("little-download", changed) is None
    web.answering.set()
    assert world.end(copy) == "Completed", world.api("GET", f"flow_runs/{copy}")["state"]
    page.get_by_text("Completed", exact=True).first.wait_for()
    made = world.dataset("little-download", changed)
    assert made is not None and made.manifest.inputs["rows"].fingerprint == source.manifest.fingerprint
    # From the dataset of the copy to the run that made its input, which is the node's.
    open_page_of(page, made).get_by_role("link", name="this run").last.click()
    assert run_of(page) == alone


def test_cancel_stops_the_ray_job(page: Any, world: World, failed: str, web: Web) -> None:
    # A job that waits for the web, so that it does not end before the cancel comes; for rows that no run has had yet.
    web.answering.clear()
    run = start_by_form(page, world, lambda: change(page, "128", "640"))
    planned = plan(load_recipe(world.recipe, [world.hosts, "subsets.little.select.min_side=640"]), world.store)["little-download"]
    ray = recorded("ray", Path(world.store.root, ".state"))
    assert ray is not None
    jobs, job = RayJobs(ray.address, ray.token), f"little-download-{planned.fingerprint}-1"
    deadline = time.monotonic() + 120
    while jobs.statuses().get(job) != "RUNNING":
        assert time.monotonic() < deadline, "the job never ran"
        time.sleep(0.2)
    choose(page, "Cancel")
    confirm(page, "Cancel Flow Run")
    assert world.end(run) == "Cancelled"
    page.get_by_text("Cancelled", exact=True).first.wait_for()
    assert jobs.statuses()[job] == "STOPPED"
    web.answering.set()
