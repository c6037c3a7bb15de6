"""A training starts from published weights in any layout, here or on a store, exactly; and says what would make others fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from diffusers.pipelines.deprecated.unidiffuser.modeling_uvit import UniDiffuserModel
from safetensors.torch import load_file

from infra.dataset import Dataset, Stats, commit
from infra.listing import OutsideError
from infra.store import Store
from stages.runner.contract import StageError
from stages.runner.graph import plan
from stages.runner.recipe import RecipeError, parse_recipe
from stages.train.stage import Train, TrainStageConfig
from tests.stages.committed import dataset_of
from tests.stages.train.published import LAYOUTS, clip_of, published, write
from tests.training.synthetic import write_shards
from training.loader import Loader
from training.loop import run
from training.shares import merge
from unidiffuser.convert import from_official, to_official
from unidiffuser.schedule import NoiseSchedule
from unidiffuser.uvit import UViT
from unidiffuser.weights import load_native

Training = Callable[..., Path]


@pytest.fixture
def training(
    tmp_path: Path, store: Store, make: Callable[..., Dataset], alone: None, monkeypatch: pytest.MonkeyPatch
) -> Training:
    """(weights, **config) -> the folder of the checkpoint that a training of 0 steps from these weights leaves."""
    write_shards(tmp_path / "latents")
    data = dataset_of(store, "encode", tmp_path / "latents", {})
    data.manifest.stats = Stats(rows_in=80, rows_out=80)
    data = commit(store, data.manifest)
    clip = clip_of(tmp_path / "clip")

    def in_process(plan: Any, on_row: Callable[[Any], None]) -> Any:
        return run(plan(), torch.device("cpu"), on_row=on_row)

    monkeypatch.setattr("training.launch.train", in_process)

    def train(weights: Path | str, **changes: Any) -> Path:
        fields = {"clip": clip, "text": clip, "weights": str(weights), **settings(), **changes}
        made = make(Train, store, {"data.x": data}, **fields)
        folder = tmp_path / f"checkpoint-{made.manifest.fingerprint}"
        if not folder.exists():
            made.fetch(folder)
            for kind in ("model", "ema"):
                merge(folder, kind, folder / f"{kind}.safetensors")
        return folder

    return train


def settings(token: bool = False) -> dict[str, Any]:
    model = {"width": 16, "depth": 2, "heads": 2, "data_type_token": token}
    return {
        "steps": 0, "global_batch": 8, "precision": "fp32", "log_every": 1, "checkpoint_every": 5, "model": model,
        "schedule": {"warmup_steps": 2}, "validation": {"fraction": 0.2, "every": 100, "samples": 16},
        "data": {"data_type": "aesthetic >= 5" if token else None},
    }  # fmt: skip


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert set(a) == set(b)
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


@pytest.mark.parametrize("token", [False, True], ids=["v0", "v1"])
def test_no_step_gives_the_weights_back_to_the_last_bit_in_every_layout(training: Training, tmp_path: Path, token: bool) -> None:
    model = published(token)
    for layout in LAYOUTS:
        checkpoint = training(write(model, tmp_path / "published", layout), **settings(token))
        for kind in ("model", "ema"):
            assert_same(load_file(checkpoint / f"{kind}.safetensors"), dict(model.state_dict()))
    trained = load_native(checkpoint)
    official = to_official(trained.state_dict(), trained.config)
    assert_same(official, torch.load(tmp_path / "published" / ("uvit_v1.pth" if token else "uvit_v0.pth")))
    config, _ = from_official(official, heads=2, text_tokens=3)
    assert config == model.config


@pytest.mark.parametrize("token", [False, True], ids=["v0", "v1"])
def test_the_first_validation_loss_is_that_of_diffusers_network(training: Training, tmp_path: Path, token: bool) -> None:
    model = published(token)
    checkpoint = training(write(model, tmp_path / "published", "uvit.pth"), **settings(token))
    told = json.loads((checkpoint / "history.jsonl").read_text().splitlines()[0])

    peer = UniDiffuserModel.from_pretrained(write(model, tmp_path / "peer", "diffusers") / "unet").eval()
    config = TrainStageConfig.model_validate(settings(token))
    batch = Loader(config, [str(path) for path in sorted((tmp_path / "latents").iterdir())]).validation()
    assert batch is not None and (set(batch.data_type.tolist()) == {0, 1}) == token
    alpha_bar, noised = NoiseSchedule().alpha_bar, {}
    for part, modality in (("latent", "image"), ("clip", "image"), ("text", "text")):
        signal = alpha_bar[batch.timesteps[modality]].view(-1, *[1] * (batch.clean[part].dim() - 1))
        noised[part] = signal.sqrt() * batch.clean[part] + (1 - signal).sqrt() * batch.noise[part]

    @torch.no_grad()
    def loss(types: torch.Tensor | None) -> float:
        latent, clip, text = peer(
            noised["latent"], noised["clip"][:, None], noised["text"], batch.timesteps["image"], batch.timesteps["text"], types
        )  # fmt: skip
        predicted, weights = {"latent": latent, "clip": clip[:, 0], "text": text}, {"latent": 0.75, "clip": 0.02, "text": 0.23}
        return sum(weight * (predicted[part] - batch.noise[part]).square().mean().item() for part, weight in weights.items())

    assert (told["kind"], told["step"]) == ("validation", 0)
    assert told["loss"] == pytest.approx(loss(batch.data_type if token else None), abs=1e-5)
    if token:
        assert told["loss"] != pytest.approx(loss(torch.zeros_like(batch.data_type)), abs=1e-4)


def test_half_precision_is_trained_on_in_fp32_and_other_images_move_the_table_or_pass_through_it(
    training: Training, tmp_path: Path
) -> None:
    model = published(side=8).half()
    place = write(model, tmp_path / "published", "uvit.pth")
    whole = {name: tensor.float() for name, tensor in model.state_dict().items()}
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in whole.values())
    resized = load_file(training(place) / "model.safetensors")
    assert resized["position"].shape[1] == whole["position"].shape[1] - 12  # 4 x 4 patches became 2 x 2
    del resized["position"]
    assert_same(resized, {name: tensor for name, tensor in whole.items() if name != "position"})

    kept = {**settings()["model"], "position_side": 8}
    checkpoint = training(place, model=kept)
    assert_same(load_file(checkpoint / "model.safetensors"), whole)
    # Not the bf16 copies that are computed with.
    exact = training(place, model=kept, precision="bf16")
    assert_same(load_file(exact / "model.safetensors"), whole)
    moved = load_file(training(place, model=kept, steps=2, checkpoint_every=1) / "model.safetensors")
    assert moved["position"].shape == whole["position"].shape and not torch.equal(moved["position"], whole["position"])


def test_weights_on_a_store_count_by_their_content(training: Training, tmp_path: Path, store: Store) -> None:
    model, memory = published(), fsspec.filesystem("memory")
    for layout in ("uvit.pth", "diffusers"):
        memory.put(str(write(model, tmp_path / "published", layout)), f"/weights/{layout}", recursive=True)
        checkpoint = training(f"memory://weights/{layout}")
        assert_same(load_file(checkpoint / "model.safetensors"), dict(model.state_dict()))

    place, other = (write(published(), tmp_path / name, "uvit.pth") for name in ("here", "there"))
    assert training(place) == training(other), "where they lie is no matter"
    model.norm.weight.data += 1
    changed = training(write(model, tmp_path / "there", "uvit.pth"))
    assert torch.equal(load_file(changed / "model.safetensors")["norm.weight"], model.norm.weight)
    # A training that has begun goes on from its own checkpoint.
    state = load_file(training(place, steps=1, checkpoint_every=1) / "model.safetensors")
    assert not torch.equal(state["norm.weight"], published().norm.weight)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"width": 32, "depth": 4}, r"set model.width: 32 \(now 16\); set model.depth: 4 \(now 2\)$"),
        ({"data_type_token": True}, r"set model.data_type_token: true \(now false\); data.data_type goes with that$"),
        ({"mlp_ratio": 2}, "its MLPs are 2 times as wide as its tokens, and only 4 times can be trained$"),
    ],
)
def test_weights_of_another_network_are_refused_with_what_would_make_them_fit(
    training: Training, tmp_path: Path, changes: dict[str, Any], line: str
) -> None:
    for layout in ("uvit.pth", "native"):
        place = write(published(**changes), tmp_path / "other", layout)
        with pytest.raises(StageError, match=f"^{place}.*: weights of another model: {line}"):
            training(place)


def test_heads_patches_and_a_token_that_is_not_there_are_said_too(training: Training, tmp_path: Path) -> None:
    place = write(published(heads=4), tmp_path / "heads", "diffusers")
    with pytest.raises(StageError, match=r"weights of another model: set model.heads: 4 \(now 2\)$"):
        training(place)
    with pytest.raises(StageError, match=r"set model.patch: 2 \(now 1\)$"):
        training(place, model={"width": 16, "depth": 2, "heads": 4, "patch": 1})
    place = write(published(), tmp_path / "v0", "uvit.pth")
    with pytest.raises(StageError, match=r"set model.data_type_token: false \(now true\); leave out data.data_type$"):
        training(place, **settings(token=True))


def test_what_is_no_unidiffuser_is_refused_in_a_line(training: Training, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.pth").write_text("no tensors")
    torch.save({"a": torch.zeros(2)}, tmp_path / "other.pth")
    torch.save({"a": torch.zeros(2), "b": 1}, tmp_path / "mixed.pth")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{")
    for name, error, line in (
        ("nothing.pth", OutsideError, "no such file"),
        ("empty", OutsideError, "empty: no U-ViT there; expected a file of tensors"),
        ("text.pth", StageError, "text.pth: not a readable file of plain tensors"),
        ("other.pth", StageError, "other.pth: not a published U-ViT: patch_embed.proj.weight, .* missing"),
        ("mixed.pth", StageError, "mixed.pth: not a readable file of plain tensors"),
        ("cut.safetensors", StageError, "cut.safetensors: not a readable file of plain tensors"),
    ):
        with pytest.raises(error, match=line):
            training(tmp_path / name)
    broken: UViT = published()
    broken.norm.weight.data[0] = float("nan")
    place = write(broken, tmp_path / "broken", "uvit.pth")
    with pytest.raises(StageError, match=f"{place}: 1 tensors are not finite, norm.weight first; take other weights"):
        training(place)


def recipe(folder: Path, **train: Any) -> dict[str, Any]:
    clip = str(folder / "clip") if (folder / "clip").exists() else clip_of(folder / "clip")
    (folder / "vae").mkdir(exist_ok=True)
    (folder / "vae" / "config.json").write_text(json.dumps({"latent_channels": 2}))
    return {
        "name": "tune",
        "encoders": {"vae": str(folder / "vae"), "clip": clip, "text": clip},
        "subsets": {"mine": {"folder": {"images": [str(folder / "*.png")]}, "filter": {"clip_scores": False}, "encode": {}}},
        "text-codec": {"captions": "mine", "latent_width": 5},
        "train": {"tune": {**settings(), "data": ["mine"], **train}},
    }


def test_a_recipe_whose_encoders_make_other_data_is_refused_before_anything_runs(tmp_path: Path, store: Store) -> None:
    place = write(published(), tmp_path / "published", "native")
    (tmp_path / "a.png").write_bytes(b"")
    (tmp_path / "a.txt").write_text("a picture")
    document = recipe(tmp_path, weights=str(place))

    def planned(document: dict[str, Any]) -> Any:
        return plan(parse_recipe(document, tmp_path), store)

    assert planned(document)["train-tune"].state == "miss"
    moved = json.loads(json.dumps(document).replace(json.dumps(str(place)), json.dumps("published/native")))
    assert planned(moved)["train-tune"].fingerprint == planned(document)["train-tune"].fingerprint
    other = clip_of(tmp_path / "other", numbers=7)
    (tmp_path / "vae" / "config.json").write_text(json.dumps({"latent_channels": 4}))
    for changes, line in (
        (
            {"text-codec": {"captions": "mine", "latent_width": 6}},
            "its text has 3 x 5 numbers, the data's 3 x 6: encode with the",
        ),
        (
            {"encoders": {**document["encoders"], "clip": other}},
            "its clip has 6 numbers, the data's 7: encode with the CLIP of pic",
        ),
        ({}, "its latent has 2 channels, the data's 4: encode with the autoencoder that it was trained with"),
    ):
        with pytest.raises(RecipeError, match=f"^train-tune: {place}/model.safetensors: weights of another model: {line}"):
            planned({**document, **changes})
    both = {"first": {**settings(), "data": ["mine"]}, "tune": {**document["train"]["tune"], "from": "first"}}
    with pytest.raises(RecipeError, match="train.tune.weights: it starts from train-first already; leave out one of the two"):
        planned({**document, "train": both})
    with pytest.raises(RecipeError, match="train.tune.weights: .*gone.pth: no such file"):
        planned(recipe(tmp_path, weights="gone.pth"))
