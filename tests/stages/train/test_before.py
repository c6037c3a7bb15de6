"""What could not be trained is refused while nothing is made yet, with the numbers and the fields."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from infra.store import Store
from stages.runner.graph import plan
from stages.runner.recipe import RecipeError, parse_recipe
from tests.stages.train.published import clip_of
from unidiffuser.clip_settings import clip_settings


class Planning:
    """Plans a recipe of trainings on two subsets of the same pictures, of which nothing is made; (train, **encodes)."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.store = folder, Store(str(folder / "store"))
        (folder / "a.png").write_bytes(b"")
        (folder / "a.txt").write_text("a picture")

    def __call__(self, train: dict[str, Any], **encodes: dict[str, Any]) -> Any:
        first, *others = {"mine": {"size": 256}, **encodes}.items()
        images = {"images": [str(self.folder / "*.png")]}
        subsets = {first[0]: {"folder": images, "filter": {"clip_scores": False}, "encode": first[1]}}
        subsets |= {name: {"from": f"{first[0]}-filter", "encode": encode} for name, encode in others}
        document = {"name": "r", "subsets": subsets, "text-codec": {"captions": "mine"}, "train": train}
        return plan(parse_recipe(document, self.folder), self.store)

    def refused(self, train: dict[str, Any], **encodes: dict[str, Any]) -> str:
        """The line that it is refused with."""
        with pytest.raises(RecipeError) as error:
            self(train, **encodes)
        return str(error.value)


@pytest.fixture
def planning(tmp_path: Path) -> Planning:
    return Planning(tmp_path)


def stage(data: list[str] | None = None, model: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    sizes = {"width": 16, "depth": 2, "heads": 2, **(model or {})}
    return {"data": data or ["mine"], "steps": 4, "global_batch": 8, "model": sizes, **fields}


def test_latents_of_two_sizes_are_refused_in_one_training_and_not_in_two(planning: Planning) -> None:
    large = {"large": {"size": 512}}
    assert planning.refused({"all": stage(["mine", "large"])}, **large) == (
        "train-all: data: mine is encoded at 256 px (subsets.mine.encode.size) and large at 512 px (subsets.large.encode.size), "
        "and a training reads one size: encode both at one, or train one after the other, the second with `from`"
    )
    planned = planning({"small": stage(), "large": stage(["large"], **{"from": "small"})}, **large)
    assert planned["train-large"].state == "miss"
    planning({"all": stage(["mine", "again"])}, again={"size": 256, "precision": "fp32"})


def test_latents_of_two_encoders_are_refused_in_one_training(planning: Planning, tmp_path: Path) -> None:
    other = {"other": {"size": 256, "clip": clip_of(tmp_path / "other", numbers=7)}}
    assert planning.refused({"all": stage(["mine", "other"])}, **other) == (
        f"train-all: data: mine is encoded with embedded (subsets.mine.encode.clip) and other with {tmp_path}/other "
        "(subsets.other.encode.clip), and a training reads latents of one clip: encode both with the same"
    )


def test_a_training_goes_on_with_another_encoder_only_if_it_makes_the_same_shapes(planning: Planning, tmp_path: Path) -> None:
    def chain(numbers: int) -> Any:
        other = {"other": {"size": 256, "clip": clip_of(tmp_path / str(numbers), numbers=numbers)}}
        return {"first": stage(), "then": stage(["other"], **{"from": "first"})}, other

    own = clip_settings("embedded")["embed_dim"]
    trainings, other = chain(own + 1)
    assert planning.refused(trainings, **other) == (
        f"train-then: from: its clip has {own} numbers, the data's {own + 1}: encode with the CLIP of pictures that it was "
        "trained with"
    )
    trainings, other = chain(own)
    assert planning(trainings, **other)["train-then"].state == "miss"


def test_a_patch_that_does_not_divide_the_latents_is_refused(planning: Planning, tmp_path: Path) -> None:
    assert planning.refused({"a": stage(model={"patch": 3})}) == (
        "train-a: model.patch 3 does not divide the 4 x 4 latents of mine (subsets.mine.encode.size 256, vae embedded); set it "
        "to one of 1, 2, 4"
    )
    own = tmp_path / "vae"
    own.mkdir()
    (own / "config.json").write_text(json.dumps({"block_out_channels": [8, 8, 8]}))
    planning({"a": stage(model={"patch": 3})}, mine={"size": 36, "vae": str(own)})
    assert "divide the 66 x 66 latents" in planning.refused({"a": stage(model={"patch": 4})}, mine={"size": 264, "vae": str(own)})
    # What the published model's name means is known, and what another means is not before its files are there.
    public = {"size": 264, "vae": "stabilityai/sd-vae-ft-mse"}
    assert "divide the 33 x 33 latents of mine" in planning.refused({"a": stage()}, mine=public)
    planning({"a": stage()}, mine={"size": 264, "vae": f"some/other@{'0' * 40}"})


def test_a_size_that_an_autoencoder_would_cut_is_refused(planning: Planning, tmp_path: Path) -> None:
    for size in (32, 260):
        assert planning.refused({"a": stage()}, mine={"size": size}) == (
            f"mine-encode: size {size}: vae embedded needs a multiple of 64 pixels"
        )
    public = {"size": 260, "vae": "stabilityai/sd-vae-ft-mse"}
    assert planning.refused({"a": stage()}, mine=public).endswith("sd-vae-ft-mse needs a multiple of 8 pixels")
    own = tmp_path / "vae"
    own.mkdir()
    (own / "config.json").write_text("{")
    damaged = planning.refused({"a": stage()}, mine={"vae": str(own)})
    assert damaged.startswith(f"mine-encode: vae: {own}/config.json cannot be read: Expecting property name")


def test_the_latents_of_a_world_have_a_size_too(tmp_path: Path) -> None:
    train = stage(["shapes"], {"patch": 3})
    document = {"name": "r", "subsets": {"shapes": {"world": {"rows": 64}}}, "train": {"a": train}}
    with pytest.raises(RecipeError, match="model.patch 3 does not divide the 8 x 8 latents of shapes; set it to one of 1, 2, 4"):
        plan(parse_recipe(document, tmp_path), Store(str(tmp_path / "store")))


def test_a_training_is_refused_before_the_one_that_it_begins_from_where_that_does_not_fit(
    planning: Planning,
) -> None:
    def line(origin: dict[str, Any] | None = None, **fields: Any) -> str:
        trainings = {"first": stage(), "next": stage(**{"from": {"run": "first", **(origin or {})}, **fields})}
        return planning.refused(trainings)

    wider = "a model of another width cannot go on from it (model.width: 16 -> 32): write the same, or leave `from` out"
    assert line(model={"width": 32}) == f"train-next: from: {wider}"
    assert "another patch cannot go on from it (model.patch: 2 -> 1)" in line(model={"patch": 1})
    muon: dict[str, Any] = {"optimizer": {"kind": "muon"}}
    another = "what an optimizer keeps is of no use to another (optimizer.kind: 'adamw' -> 'muon'); leave it out of keep"
    assert line({"keep": ["weights", "optimizer"]}, **muon) == f"train-next: from: {another}"
    assert line({"keep": ["weights", "order"]}, global_batch=4) == (
        "train-next: from: the order cannot go on: global_batch: 8 -> 4; leave order out of keep"
    )
    for origin, changes in ({}, muon), ({}, {"global_batch": 4}), ({"keep": ["weights", "optimizer", "order"]}, {"seed": 0}):
        planning({"first": stage(), "next": stage(**{"from": {"run": "first", **origin}, **changes})})


def test_a_trace_of_steps_that_do_not_come_is_refused(planning: Planning) -> None:
    assert planning.refused({"a": stage(profile={"from": 5})}) == (
        "train.a: profile.from is 5, and the last step is 4: lower it, or nothing is traced"
    )
    planning({"a": stage(profile={"from": 4})})
    planning({"a": stage(profile={"from": 5}, growth_steps=1)})


def test_weights_that_a_training_is_to_begin_from_are_said_to_have_a_field_of_their_own(
    planning: Planning, tmp_path: Path
) -> None:
    field = "weights alone, in any layout, are named in `weights` in place of `from`"
    (tmp_path / "x").mkdir()
    (file := tmp_path / "x" / "uvit_v1.pth").write_bytes(b"tensors")
    of_file, of_folder = (planning.refused({"a": stage(**{"from": str(place)})}) for place in (file, file.parent))
    assert of_file == f"train.a: {file}: a file of weights, and no folder of a checkpoint; {field}"
    assert of_folder.endswith(f"x has no config.json; name the folder of a checkpoint that a training wrote; {field}")
    assert "x.pth/*: no such file" in planning.refused({"a": stage(**{"from": str(tmp_path / "x.pth")})})
