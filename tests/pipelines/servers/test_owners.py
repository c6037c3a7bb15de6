"""Two people on one server and one store: neither's `deploy` or `undeploy` takes what is the other's unless it is said so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from infra.processes import ServerError
from infra.store import NotThere, Store
from pipelines.commands.conduct import Wish, run_recipe
from pipelines.flows.deployed import Unwatched
from pipelines.flows.parameters import Choice
from pipelines.flows.run import Run
from pipelines.servers import owners, withdrawal
from pipelines.servers.deployments import deploy, register_trial
from pipelines.servers.follow import start_run
from pipelines.servers.servers import Servers
from pipelines.servers.withdrawal import undeploy
from stages.runner.recipe import Recipe, RecipeError, load_recipe
from tests.pipelines.servers.test_deploy_again import api  # noqa: F401

DEPLOY = "{schedules: [{cron: '0 2 * * *', timezone: Europe/Berlin}], after: [{recipe: other, node: b-select}], gpus: 2}"
CONFIGS = Path(__file__).parents[3] / "configs"
Api = Callable[..., Any]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


def recipe(tmp_path: Path, person: str, section: str = "{}", subset: str = "a") -> Recipe:
    """The recipe `mine` of somebody."""
    folder = tmp_path / person
    folder.mkdir(exist_ok=True)
    (folder / "a.parquet").touch()
    (folder / "mine.yaml").write_text(
        f"name: mine\nsubsets: {{{subset}: {{select: {{metadata: [a.parquet]}}}}}}\ndeploy: {section}\n"
    )
    return load_recipe(folder / "mine.yaml")


def names(api: Api) -> set[str]:  # noqa: F811
    return {deployment["name"] for deployment in api("POST", "deployments/filter", {})}


def triggers(api: Api) -> set[str]:  # noqa: F811
    return {one["name"] for one in api("POST", "automations/filter", {}) if " after " in one["name"]}


def test_a_name_is_not_taken_over_unless_it_is_said_so(api: Api, tmp_path: Path, store: Store) -> None:  # noqa: F811
    anna, ben = recipe(tmp_path, "anna", DEPLOY), recipe(tmp_path, "ben", subset="b")
    deploy(anna, store)
    deploy(anna, store)
    before = api("GET", "deployments/name/recipe/mine")
    for theirs, place in ((ben, store), (anna, Store(str(tmp_path / "another")))):
        with pytest.raises(RecipeError) as refused:
            deploy(theirs, place)
        said = str(refused.value)
        assert "\n" not in said and said.startswith(
            f"mine: a deployment of this name is of {anna.file} with the store {store.root}"
        )
        assert "cron 0 2 * * * (Europe/Berlin), mine after other b-select; " in said and said.endswith("with --replace")
    assert api("GET", "deployments/name/recipe/mine") == before and triggers(api) == {"mine after other b-select"}

    done = deploy(ben, store, replace=True)
    now = api("GET", "deployments/name/recipe/mine")
    assert now["id"] == before["id"], "its runs have lost their deployment"
    assert not now["schedules"] and not triggers(api) and done.removed == ["mine-a-select"]
    deploy(ben, store)
    with pytest.raises(RecipeError, match=f"is of {ben.file}"):
        deploy(anna, store)


def test_a_node_s_name_may_be_another_recipe_s(api: Api, tmp_path: Path, store: Store) -> None:  # noqa: F811
    deploy(recipe(tmp_path, "anna", subset="a-b"), store)
    other = recipe(tmp_path, "ben", subset="b")
    other = load_recipe(other.file, ["name=mine-a"])
    with pytest.raises(RecipeError, match=r"^mine-a: a deployment of this name is of .*anna"):
        deploy(other, store)
    assert names(api) == {"mine", "mine-a-b-select"}


def test_runs_from_the_terminal_share_one_deployment_which_deploy_takes_over(
    api: Api,  # noqa: F811
    tmp_path: Path,
    store: Store,
) -> None:
    anna, ben = recipe(tmp_path, "anna", DEPLOY), recipe(tmp_path, "ben")
    trial = register_trial(anna, store)
    assert names(api) == {"mine"} and not triggers(api)
    assert not api("GET", "deployments/name/recipe/mine")["schedules"]
    deploy(ben, store)
    assert api("GET", "deployments/name/recipe/mine")["id"] == str(trial) and names(api) == {"mine", "mine-a-select"}
    with pytest.raises(RecipeError, match=f"is of {ben.file}"):
        deploy(anna, store)
    undeploy(ben, store)
    # One that somebody has given a schedule is no trial any more.
    trial = register_trial(anna, store)
    api("POST", f"deployments/{trial}/schedules", [{"schedule": {"interval": 3600}, "active": True}])
    with pytest.raises(RecipeError, match=r"would go: every 1:00:00 \(UTC\); "):
        deploy(ben, store)


def test_a_run_of_another_recipe_of_this_name_says_whose_it_runs_beside(api: Api, tmp_path: Path, store: Store) -> None:  # noqa: F811
    anna, ben = recipe(tmp_path, "anna"), recipe(tmp_path, "ben")
    deploy(anna, store)
    heard: list[str] = []

    def begin(recipe: Recipe) -> str:
        run = Run(recipe, store, {}, [], Servers(tmp_path), Unwatched())
        run.view.said = lambda node, level, text: heard.append(text)  # type: ignore[method-assign]
        return str(api("GET", f"flow_runs/{start_run(run, Choice.model_validate({}), [])}")["deployment_id"])

    # What `retry-failed` reads is a copy in the store, and nobody's file.
    whole = api("GET", "deployments/name/recipe/mine")["id"]
    assert [begin(anna), begin(replace(anna, file=""))] == [whole] * 2 and not heard
    assert begin(ben) == whole and names(api) == {"mine", "mine-a-select"}
    assert len(heard) == 1 and heard[0].startswith(f"runs beside those of another recipe of this name, {anna.file} with ")


def test_undeploy_removes_what_deploy_has_made_and_nothing_else(api: Api, tmp_path: Path, store: Store) -> None:  # noqa: F811
    anna, ben = recipe(tmp_path, "anna", DEPLOY), recipe(tmp_path, "ben")
    deploy(anna, store)
    shared = {one["name"] for one in api("POST", "automations/filter", {})} - triggers(api)
    whole = api("GET", "deployments/name/recipe/mine")
    copied = {name: whole[name] for name in ("flow_id", "tags", "parameters", "entrypoint")}
    api("POST", "deployments/", {"name": "copy-of-mine", **copied})
    with pytest.raises(RecipeError, match=rf"^mine: .* is of {anna.file} .*would go: cron 0 2 .*; .* or --others$"):
        undeploy(ben, store)
    with pytest.raises(RecipeError, match="--others"):
        undeploy("mine", Store(str(tmp_path / "another")))
    assert names(api) == {"mine", "mine-a-select", "copy-of-mine"} and triggers(api)

    done = undeploy(anna, store)
    assert (done.deployments, done.triggers, done.gpus) == (["mine", "mine-a-select"], ["mine after other b-select"], False)
    assert names(api) == {"copy-of-mine"} and not triggers(api)
    assert {one["name"] for one in api("POST", "automations/filter", {})} == shared
    assert not [limit for limit in api("POST", "v2/concurrency_limits/filter", {}) if "deployment" in limit["name"]]
    with pytest.raises(NotThere, match=r"^mnie: no recipe file, and no recipe is deployed .*; nearest is copy-of-mine"):
        undeploy("mnie", store)


def test_the_limit_of_gpu_slots_goes_with_the_last_recipe_that_wants_it(
    api: Api,  # noqa: F811
    tmp_path: Path,
    store: Store,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    anna = recipe(tmp_path, "anna", "{gpus: 2}")
    other = load_recipe(anna.file, ["name=other", "deploy.gpus=3"])
    assert deploy(anna, store).gpus is None
    assert deploy(other, store).gpus == 2, "the number is the server's, not each recipe's"
    assert not undeploy("other", store).gpus and not names(api) - {"mine", "mine-a-select"}
    deploy(other, store)
    assert not undeploy(anna, store).gpus and api("GET", "v2/concurrency_limits/gpu")["limit"] == 2
    deploy(anna, store)
    undeploy(other, store)
    with monkeypatch.context() as patch:
        patch.setattr(withdrawal, "whoami", lambda: "carl on elsewhere")
        with pytest.raises(RecipeError, match="--others"):
            undeploy("mine", store)
    assert undeploy("mine", store).gpus
    assert not [limit for limit in api("POST", "v2/concurrency_limits/filter", {}) if limit["name"] == "gpu"]


def test_a_recipe_with_a_run_that_has_not_ended_is_not_undeployed(api: Api, tmp_path: Path, store: Store) -> None:  # noqa: F811
    anna = recipe(tmp_path, "anna")
    whole = deploy(anna, store).deployments["mine"]
    run = api("POST", f"deployments/{whole}/create_flow_run", {"state": {"type": "PENDING"}})["id"]
    with pytest.raises(ServerError, match=rf"^mine: its run .* \({run}\) has not ended"):
        undeploy(anna, store)
    assert names(api) == {"mine", "mine-a-select"}
    api("POST", f"flow_runs/{run}/set_state", {"state": {"type": "CANCELLED"}, "force": True})
    assert undeploy(anna, store, others=True).deployments == ["mine", "mine-a-select"]


def test_what_nobody_wrote_down_is_nobody_s_to_take(api: Api, tmp_path: Path, store: Store) -> None:  # noqa: F811
    flow = api("POST", "flows/", {"name": "recipe"})["id"]
    api("POST", "deployments/", {"name": "mine", "flow_id": flow, "tags": ["recipe:mine"]})
    anna = recipe(tmp_path, "anna")
    for taking in (lambda: deploy(anna, store), lambda: undeploy(anna, store)):
        with pytest.raises(RecipeError, match=r"^mine: a deployment .* is of somebody else \(nobody wrote down whose\)"):
            taking()
    deploy(anna, store, replace=True)
    assert owners.Owner.of(anna, store).labels().items() <= api("GET", "deployments/name/recipe/mine")["labels"].items()


@pytest.mark.parametrize("template", ["urls.yaml", "folder.yaml"])
def test_a_template_must_be_given_a_name(template: str, tmp_path: Path, store: Store) -> None:
    from rich.console import Console

    from pipelines.commands.deployment import deploy_recipe

    loaded = load_recipe(CONFIGS / template)
    for start in (
        lambda: run_recipe(loaded, store, Wish(), Console()),
        lambda: deploy_recipe(loaded, store, tmp_path, Console()),
    ):
        with pytest.raises(RecipeError, match=r"^name: change-me is the template's; give the recipe a name of its own, such as "):
            start()
    assert not Path(store.root).exists()
    load_recipe(CONFIGS / template, ["name=my-pictures"]).check_named()
