"""Where a training begins that is not what it was: no step is lost unawares, and what goes on is what would have been."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from infra.dataset import InputRef
from infra.store import NotThere
from pipelines.commands.preflight import chain_lines, chain_problems
from pipelines.pages.lineage import ancestors
from stages.runner.contract import StageError
from stages.runner.document import parse
from stages.runner.run import phase_states
from stages.train.order import Shard, arrived
from stages.train.stage import Train, TrainStageConfig
from tests.stages.train.published import published
from tests.stages.train.trainings import Trainings, same_tensors
from tests.training.synthetic import write_shards
from training.averaging import EmaConfig
from unidiffuser.weights import save_native

# What changes the result of a training, and whether the order of its rows can go on.
CHANGES: list[tuple[dict[str, Any], bool]] = [
    ({"optimizer": {"lr": 1e-4}}, True),
    ({"optimizer": {"weight_decay": 0.1}}, True),
    ({"optimizer": {"betas": [0.9, 0.99]}}, True),
    ({"gradient_clip": 1.0}, True),
    ({"schedule": {"warmup_steps": 3}}, True),
    ({"schedule": {"warmup_steps": 2, "decay": "cosine", "decay_steps": 40}}, True),
    ({"objective": {"min_snr_gamma": 5.0}}, True),
    ({"objective": {"part_weights": {"latent": 1.0, "clip": 1.0, "text": 1.0}}}, True),
    ({"ema": {"decay": 0.5}}, True),
    ({"ema": {"warmup": False}}, True),
    ({"precision": "bf16"}, True),
    ({"validation": {"fraction": 0.4, "every": 100, "samples": 4}}, False),
    ({"data": {"where": ["aesthetic >= 1"]}}, False),
    ({"data": {"shuffle_window": 2}}, False),
    ({"data": {"lanes": 1}}, False),
    ({"data": {"weights": {"x": 1}}}, False),
    ({"optimizer": {"decay": "matrices"}}, True),
    ({"optimizer": {"kind": "muon"}}, True),
    ({"noise": {"beta_start": 0.005, "beta_end": 0.02}}, True),
    ({"timesteps": "sobol"}, True),
    ({"schedule": {"warmup_steps": 2, "decay": "plateau", "look_every": 3}}, True),
    ({"seed": 1}, False),
    ({"global_batch": 4}, False),
]


def told(error: Any) -> dict[str, Any]:
    """The YAML that a refusal names, as it would be written into the recipe."""
    return parse(str(error.value).split("`")[1])


def refusal(training: Trainings, **changes: Any) -> Any:
    with pytest.raises(StageError) as error:
        training(**changes)
    return error


def goes_on(training: Trainings, changes: dict[str, Any], keeps_order: bool) -> None:
    training(steps=5)
    error = refusal(training, steps=8, **changes)
    assert str(error.value).startswith("train-256: would begin at step 0; 5 steps are there (")
    assert f"{next(iter(changes))}" in str(error.value) and " -> " in str(error.value)
    fork = told(error)
    assert ("order" in fork["from"]["keep"]) == keeps_order
    assert ("optimizer" in fork["from"]["keep"]) == (changes != {"optimizer": {"kind": "muon"}})
    forked = training(steps=8, **changes, **fork)
    assert training.began == [0, 5], "a step was lost"
    assert set(parse(training.advice.strip("`"))["from"]["keep"]) >= set(fork["from"]["keep"])
    began = forked.manifest.summary["began"]
    assert (began["node"], began["step"], began["chain"]) == ("train-256", 5, training.chain(steps=5).key)
    assert any(line.startswith(next(iter(changes))) for line in began["changed"])
    assert forked.manifest.config["from"] == {"step": "newest", "keep": fork["from"]["keep"]}


def test_a_changed_run_is_refused_and_goes_on_with_what_the_refusal_says(training: Trainings) -> None:
    goes_on(training, *CHANGES[0])


@pytest.mark.trainer
@pytest.mark.parametrize(("changes", "keeps_order"), CHANGES[1:], ids=lambda value: str(value))
def test_no_change_loses_a_step(training: Trainings, changes: dict[str, Any], keeps_order: bool) -> None:
    goes_on(training, changes, keeps_order)


class LaterEma(EmaConfig):
    floor: float = 0.1


class Later(TrainStageConfig):
    """The configuration of a later version, which knows a field more."""

    ema: LaterEma = LaterEma()


def test_a_field_that_a_later_version_adds_is_no_change_until_it_is_set(
    training: Trainings, monkeypatch: pytest.MonkeyPatch
) -> None:
    training(steps=5, ema={"decay": 0.5})
    monkeypatch.setattr("tests.stages.train.trainings.TrainStageConfig", Later)
    training(steps=8, ema={"decay": 0.5})
    assert training.began == [0, 5]
    assert "(ema.floor: None -> 0.2)" in str(refusal(training, steps=9, ema={"decay": 0.5, "floor": 0.2}).value)


def test_a_fork_is_pinned_where_it_began_and_the_next_change_goes_on_from_it(training: Trainings) -> None:
    fork = {"from": {"run": "train-256", "step": "newest", "keep": ["weights", "optimizer", "ema", "schedule", "order"]}}
    with pytest.raises(StageError, match="from: no step of it is there; leave `from` out"):
        training(steps=8, **fork)
    training(steps=5)
    slow = training(steps=8, optimizer={"lr": 1e-4}, **fork)
    training(steps=6)
    # The older chain has grown meanwhile; the fork stays what it is, and goes on from its own.
    training(steps=9, optimizer={"lr": 1e-4}, **fork)
    training(steps=12, optimizer={"lr": 1e-5}, **fork)
    assert training.began == [0, 5, 5, 8, 9]
    assert slow.manifest.summary["began"]["step"] == 5
    (state,) = phase_states(training.planned(steps=20, optimizer={"lr": 1e-4}, **fork), training.store, Train)
    assert (state.done, state.total) == (9, 20)
    assert ancestors(training.store, slow).label.endswith(", from step 5 of train-256)")
    # Another recipe of the same words has a line of its own.
    training.recipe = "another"
    training(steps=3, seed=1)
    training(steps=6, optimizer={"lr": 1e-4}, **(fork | {"from": {**fork["from"], "keep": ["weights", "schedule"]}}))
    assert training.began[-2:] == [0, 3]


def test_a_certain_step_and_a_step_that_is_not_there(training: Trainings) -> None:
    keep = ["weights", "optimizer", "ema", "schedule", "order"]
    training(steps=11)

    def fork(step: Any, **more: Any) -> dict[str, Any]:
        return {"from": {"run": "train-256", "step": step, "keep": keep}, **more}

    forked = training(steps=12, optimizer={"lr": 1e-4}, **fork(5))
    assert training.began == [0, 5] and forked.manifest.summary["began"]["step"] == 5
    with pytest.raises(StageError, match="train-256: from: no step 7 of it is there; the newest is 12"):
        training(steps=12, optimizer={"lr": 1e-5}, **fork(7))
    with pytest.raises(StageError, match="steps 10 are not beyond step 10 of train-256, at which it begins; raise steps"):
        training(steps=10, optimizer={"lr": 1e-5}, **fork(10))


def test_what_is_forked_unchanged_from_a_dataset_or_its_folder_is_the_same_to_the_last_bit(training: Trainings) -> None:
    keep = ["weights", "optimizer", "ema", "schedule", "order"]
    whole = training(steps=11)
    fingerprint = training.planned(steps=11).fingerprint

    def fork(run: str, step: Any = "newest") -> dict[str, Any]:
        return {"from": {"run": run, "step": step, "keep": keep}}

    training.recipe = "elsewhere"
    again = training(steps=11, **fork(fingerprint[:12], 5))
    assert training.began == [0, 5] and same_tensors(whole, again)
    for name in ("trainer.json", "order.json", "config.json"):
        assert whole.file(name).sha256 == again.file(name).sha256
    assert again.manifest.inputs["init"].fingerprint == fingerprint
    training.recipe = "no-such-step"
    with pytest.raises(StageError, match="from: step 7 of .* is not there; those that are: 5, 10, 11"):
        training(steps=12, **fork(fingerprint, 7))
    with pytest.raises(NotThere, match="no dataset in .* has this fingerprint"):
        training(steps=12, **fork("f" * 24))
    folder = str(folder_of(training, 10, steps=11))
    training.recipe = "outside"
    assert same_tensors(whole, training(steps=11, **fork(folder))) and training.began == [0, 5, 10]
    training.recipe = "other-step"
    with pytest.raises(StageError, match=f"from: {folder} is a checkpoint of step 10, not 3"):
        training(steps=12, **fork(folder, 3))
    training.recipe = "other-order"
    with pytest.raises(StageError, match="from: the order cannot go on: seed: 0 -> 1; leave order out of keep"):
        training(steps=12, seed=1, **fork(folder))


def folder_of(training: Trainings, step: int, **changes: Any) -> Path:
    """The folder of a checkpoint of this training."""
    record = training.chain(**changes).record(step)
    assert record is not None
    return Path(training.store.url(record.file("trainer.json").path).removeprefix("file://")).parent


def planned_refusal(training: Trainings, folder: Path, keep: list[str], **changes: Any) -> str:
    """Why the plan of another recipe refuses to begin from a folder; nothing begins."""
    recipe, training.recipe = training.recipe, "outside"
    plan = {"train-256": training.planned(steps=8, **{"from": {"run": str(folder), "keep": keep}}, **changes)}
    (problem,) = chain_problems(training.store, plan, ["train-256"])
    training.recipe = recipe
    return str(problem)


def test_a_folder_of_another_model_or_optimizer_is_refused_by_the_plan(training: Trainings, tmp_path: Path) -> None:
    training(steps=5)
    folder, made = folder_of(training, 5, steps=5), training.inputs
    # Also while the data is not made yet.
    training.inputs = {"data.x": InputRef(stage="encode", fingerprint="0" * 24)}
    for size, change in (("width", "16 -> 32"), ("depth", "2 -> 4"), ("heads", "2 -> 4"), ("patch", "2 -> 1")):
        model = {"width": 16, "depth": 2, "heads": 2, size: int(change.split()[-1])}
        told = f"a model of another {size} cannot go on from it (model.{size}: {change}): write the same, or leave `from` out"
        assert planned_refusal(training, folder, ["weights"], model=model) == f"train-256: from: {told}"
    muon = {"optimizer": {"kind": "muon"}}
    assert planned_refusal(training, folder, ["weights", "optimizer"], **muon) == (
        "train-256: from: what an optimizer keeps is of no use to another (optimizer.kind: 'adamw' -> 'muon'); "
        "leave it out of keep"
    )
    training.inputs, training.recipe = made, "muon"
    training(steps=5, **muon)
    muons = folder_of(training, 5, steps=5, **muon)
    assert "(optimizer.kind: 'muon' -> 'adamw')" in planned_refusal(training, muons, ["weights", "optimizer"])
    for text, why in (('{"step": 5', " is damaged ("), ('{"step": 5}', ": its JSON files tell no optimizer;")):
        damaged = shutil.copytree(folder, tmp_path / "damaged", dirs_exist_ok=True)
        (damaged / "trainer.json").write_text(text)
        line = planned_refusal(training, damaged, ["weights"])
        assert line.startswith("train-256: from: ") and why in line and line.endswith("of a checkpoint that a training wrote")


def test_new_shards_come_behind_the_old_ones_whatever_their_place_in_the_recipe() -> None:
    told = [("new1", "a"), ("two", "b"), ("twice", "c"), ("one", "d"), ("twice", "e"), ("twice", "f"), ("new2", "g")]
    now = [Shard(digest, address, "x") for digest, address in told]
    assert arrived(now, []) == now
    before = ["one", "twice", "two", "twice"]
    assert [shard[:2] for shard in arrived(now, before)] == [
        ("one", "d"), ("twice", "c"), ("two", "b"), ("twice", "e"), ("new1", "a"), ("twice", "f"), ("new2", "g"),
    ]  # fmt: skip


def test_a_mixture_goes_on_when_a_subset_grows_and_not_when_its_share_changes(training: Trainings, tmp_path: Path) -> None:
    (few,) = training.inputs.values()
    training.grow(tmp_path / "two", 2, "8" * 24)
    (other,) = training.inputs.values()
    shares: dict[str, Any] = {"data": {"weights": {"x": 3, "y": 1}}}
    training.inputs = {"data.x": few, "data.y": other}
    training(steps=5, **shares)
    training.grow(tmp_path / "more", 3)
    (more,) = training.inputs.values()
    training.inputs = {"data.x": few, "data.y": more}
    grown = training(steps=9, **shares)
    assert training.began == [0, 5] and grown.manifest.summary["began"]["changed"] == ["data: 4 -> 5 shards"]
    told = json.loads(grown.open(grown.file("order.json")).read())
    assert [name.split("/")[0] for name in told["shards"]] == ["x", "x", "y", "y", "y"] and told["data.weights"] == {
        "x": 3,
        "y": 1,
    }
    error = refusal(training, steps=12, data={"weights": {"x": 1, "y": 1}})
    assert "data.weights.x: 3 -> 1" in str(error.value) and "order" not in parse(str(error.value).split("`")[1])["from"]["keep"]


def test_growing_data_goes_on_by_itself(training: Trainings, tmp_path: Path) -> None:
    training(steps=5)
    training.grow(tmp_path / "more", 4)
    grown = training(steps=9)
    began = grown.manifest.summary["began"]
    assert training.began == [0, 5] and began["changed"] == ["data: 2 -> 4 shards"] and began["grown"]
    (trainer,) = (json.loads(grown.open(entry).read()) for entry in grown.files if entry.name == "trainer.json")
    assert trainer["growth"] == [[0, 2], [40, 4]]
    (order,) = (json.loads(grown.open(entry).read()) for entry in grown.files if entry.name == "order.json")
    old = [entry.sha256[:24] for entry in training.data.files]
    assert order["shards"][:2] == old and len(set(order["shards"])) == 4
    # Grown again when all steps are done: it says what is missing, and with it goes on each time.
    training.grow(tmp_path / "most", 5, "8" * 24)
    error = refusal(training, steps=9)
    assert "its data has grown, and step 9 of 9 is done; raise steps to go on, or set growth_steps" in str(error.value)
    assert training(steps=9, growth_steps=2).manifest.summary["step"] == 11 and training.began == [0, 5, 9]
    # Fewer shards than before are another matter.
    training.grow(tmp_path / "few", 1, "7" * 24)
    error = refusal(training, steps=20)
    assert "would begin at step 0; 11 steps are there (input data.x is another dataset)" in str(error.value)
    assert told(error)["from"]["keep"] == ["weights", "optimizer", "ema", "schedule"]


def test_a_plan_says_where_it_would_begin_before_anything_begins(training: Trainings) -> None:
    def said(**changes: Any) -> tuple[list[str], list[str]]:
        plan = {"train-256": training.planned(steps=8, **changes)}
        problems = chain_problems(training.store, plan, ["train-256"])
        return chain_lines(training.store, plan, ["train-256"]), [str(problem) for problem in problems]

    assert said() == (["train-256: begins at step 0"], [])
    training(steps=5)
    assert said() == (["train-256: goes on at step 5 of a run that reached 5"], [])
    lines, (problem,) = said(gradient_clip=1.0)
    assert lines == [] and problem == (
        "train-256: would begin at step 0; 5 steps are there (gradient_clip: 0.0 -> 1.0): fork with `from: {run: train-256, "
        "step: newest, keep: [weights, optimizer, ema, schedule, order]}`, or begin anew with --force train-256"
    )
    lines, _ = said(gradient_clip=1.0, **{"from": {"run": "train-256", "keep": ["weights"]}})
    assert lines == ["train-256: begins at step 0 from step 5 of train-256 with its weights (gradient_clip: 0.0 -> 1.0)"]
    # Data that is not made yet may be what was there and more.
    training.inputs = {"data.x": InputRef(stage="encode", fingerprint="0" * 24)}
    assert said() == (["train-256: where it begins is known once its input data.x is made"], [])
    assert said(gradient_clip=1.0)[1][0].startswith("train-256: would begin at step 0; 5 steps are there (gradient_clip")


def test_a_forced_run_begins_anew_and_a_longer_one_goes_on_with_it(training: Trainings) -> None:
    training(steps=5)
    training.generation = 1
    training(steps=6, optimizer={"lr": 1e-4})
    # Another length is planned without the generation that `force` began.
    training.generation = 0
    with pytest.raises(StageError, match="steps 4 are not beyond step 6 of train-256, at which it begins; raise steps"):
        training(steps=4, optimizer={"lr": 1e-4})
    training(steps=8, optimizer={"lr": 1e-4})
    assert training.began == [0, 0, 6]


def test_a_model_of_another_size_cannot_go_on(training: Trainings) -> None:
    training(steps=5)
    error = refusal(training, steps=8, model={"width": 16, "depth": 4, "heads": 2})
    assert "a model of another depth cannot go on from them: begin anew with --force train-256" in str(error.value)
    of_it, model = {"from": {"run": "train-256"}}, {"width": 32, "depth": 2, "heads": 2}
    wider = "a model of another width cannot go on from it (model.width: 16 -> 32): write the same, or leave `from` out"
    assert str(refusal(training, steps=8, model=model, **of_it).value) == f"train-256: from: {wider}"
    (state,) = phase_states(training.planned(steps=8, seed=3), training.store, Train)
    assert (state.done, state.total, state.keys) == (0, 8, frozenset())


def test_adapters_of_another_rank_or_other_layers_cannot_go_on_and_merged_they_can(training: Trainings, tmp_path: Path) -> None:
    save_native(tmp_path / "base", published())
    base = {"weights": str(tmp_path / "base"), "validation": {"fraction": 0.2, "every": 100, "samples": 4}}
    lora = {"rank": 2, "alpha": 2, "targets": ["attn.qkv", "mlp.fc2"]}
    training(steps=5, lora=lora, **base)
    merged = "export it, which merges the adapters, and name the export in `weights`"
    itself: dict[str, Any] = {"from": {"run": "train-256", "keep": ["weights"]}}
    folder = folder_of(training, 5, steps=5, lora=lora, **base)
    for changes, what, change in (
        ({"rank": 4}, "adapters of another rank", "lora.rank: 2 -> 4"),
        ({"alpha": 4}, "adapters of another alpha", "lora.alpha: 2 -> 4"),
        ({"targets": ["attn.qkv"]}, "adapters of other layers", "lora.targets: attn.qkv, mlp.fc2 -> attn.qkv"),
    ):
        line = str(refusal(training, steps=8, lora={**lora, **changes}, **base).value)
        assert line.endswith(f"; {what} cannot go on from them: {merged}, or begin anew with --force train-256")
        line = str(refusal(training, steps=8, lora={**lora, **changes}, **base, **itself).value)
        assert line == f"train-256: from: {what} cannot go on from it ({change}): {merged}"
        line = planned_refusal(training, folder, ["weights"], lora={**lora, **changes}, **base)
        assert line == f"train-256: from: {what} cannot go on from it ({change}): {merged}"
    # The order in which the layers are written is no matter.
    assert "fork with `from" in str(refusal(training, steps=8, lora={**lora, "targets": lora["targets"][::-1]}, **base).value)
    error = refusal(training, steps=8, **base)
    assert told(error)["from"]["keep"] == ["weights", "ema", "schedule", "order"]
    with pytest.raises(StageError, match=r"of no use to another \(lora: a mapping -> None\); leave it out of keep"):
        training(steps=8, **base, **{"from": {"run": "train-256", "keep": ["weights", "optimizer"]}})
    training(steps=8, **base, **told(error))
    assert training.began == [0, 5]
    line = str(refusal(training, steps=9, lora=lora, **base, **itself).value)
    assert line.endswith(
        "a training of adapters cannot go on from it (lora: None -> a mapping): export it, and name the export in `weights`"
    )


def test_data_of_another_encoder_cannot_go_on(training: Trainings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training(steps=5)
    with monkeypatch.context() as other:
        other.setattr("tests.training.synthetic.CLIP", (12,))
        training.grow(tmp_path / "other", 2)
    why = "its clip has 6 numbers, the data's 12: encode with the CLIP of pictures that it was trained with"
    assert str(refusal(training, steps=8).value) == (
        "train-256: would begin at step 0; 5 steps are there (input data.x is another dataset); their model is of other data: "
        f"{why}, or begin anew with --force train-256"
    )
    assert str(refusal(training, steps=8, **{"from": {"run": "train-256"}}).value) == f"train-256: from: {why}"
    # Pictures of another size are no other model.
    with monkeypatch.context() as other:
        other.setattr("tests.stages.train.trainings.write_shards", partial(write_shards, side=8))
        training.grow(tmp_path / "larger", 2, "8" * 24)
    training(steps=8, **told(refusal(training, steps=8)))
    assert training.began == [0, 5]
