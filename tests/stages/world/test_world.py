"""world: pairs that belong together, in their exact proportions at each pair of timesteps; and what evaluate finds of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from examples.shapes import __main__ as keeping
from examples.shapes.autoencoder import Autoencoder
from examples.shapes.codec import decode_captions
from examples.shapes.pictures import read_picture
from examples.shapes.world import SCENES, joint, read_caption
from infra.dataset import Dataset, point
from infra.store import Store
from stages.evaluate.stage import Evaluate
from stages.world import stage as world
from tests.stages.little_world import config
from training.loader import Loader
from training.timesteps import timesteps_at


def table_of(dataset: Dataset) -> pa.Table:
    paths = [dataset.url(entry) for entry in dataset.files if entry.name.endswith(".parquet")]
    return pa.concat_tables([pq.read_table(path) for path in paths])


def test_the_pairs_are_those_of_the_trainer_and_belong_together(made: Dataset, tmp_path: Path) -> None:
    assert [entry.name for entry in made.files] == ["codec.safetensors", "00000.parquet", "00001.parquet", "00002.parquet"]
    assert [entry.rows for entry in made.files] == [0, 128, 128, 64] and made.manifest.stats.rows_out == 320
    table = table_of(made)
    captions = table["caption"].to_pylist()
    assert None not in [read_caption(text) for text in captions]
    loader = Loader(config(), [made.url(entry) for entry in made.files[1:]])
    # Every place of the training reads its row, also of the second epoch, whatever is asked first.
    for step in (3, 0, 6):
        batch = loader.batch(step)
        rows = np.arange(64 * step, 64 * step + 64) % 320
        assert set(batch.clean) == {"latent", "text"} and batch.clean["latent"].shape == (64, 8, 8, 8)
        assert decode_captions(batch.clean["text"]) == [captions[row] for row in rows]
        moments = np.stack([np.frombuffer(table["moments"][int(row)].as_py(), np.float16) for row in rows]).reshape(64, 16, 8, 8)
        assert np.abs(batch.clean["latent"].numpy() - moments[:, :8].astype(np.float32)).max() < 1e-5


def test_a_picture_shows_what_its_caption_says(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a codec that loses nothing: pixels as channels."""

    class Pixels(Autoencoder):
        def encode(self, pictures: np.ndarray) -> torch.Tensor:
            return torch.nn.functional.pixel_unshuffle(torch.from_numpy(pictures).permute(0, 3, 1, 2).float(), 8)

    renderer = world.Renderer(type("Job", (), {"config": world.WorldConfig(seed=3)}))  # type: ignore[arg-type]
    renderer.codec = Pixels()
    table = renderer.pairs(128, 192)
    flat = np.stack([np.frombuffer(value, np.float16) for value in table["moments"].to_pylist()]).reshape(64, 384, 8, 8)[:, :192]
    pictures = torch.nn.functional.pixel_shuffle(torch.from_numpy(flat.astype(np.float32)), 8).byte().permute(0, 2, 3, 1).numpy()
    shown = [read_picture(picture) for picture in pictures]
    assert None not in shown and shown == [read_caption(text) for text in table["caption"].to_pylist()]
    assert renderer.pairs(128, 192).equals(table) and not renderer.pairs(192, 256)["moments"].equals(table["moments"])


@pytest.mark.parametrize(("draws", "spread"), [("sobol", (0.0, 0.2)), ("random", (0.8, 1.2))])
def test_every_stretch_has_its_share_of_each_scene_at_each_pair_of_timesteps(draws: str, spread: tuple[float, float]) -> None:
    """Over a stretch that begins anywhere, in any epoch: what decides scene and phrasing, and both timesteps. The numbers of
    points in each of 4^4 equal boxes vary by the square root of their mean where they are independent."""
    renderer = world.Renderer(type("Job", (), {"config": world.WorldConfig(seed=3, draws=draws)}))  # type: ignore[arg-type]
    rows = np.concatenate([renderer.points(first, first + 1024) for first in range(0, 2**16, 1024)])
    for start in (6400, 2**16 * 3 + 640):
        places = np.arange(start, start + 2**15)
        points = np.concatenate([(timesteps_at("sobol", 7, places, 2, 1000) - 1) / 1000, rows[places % 2**16]], 1)
        boxes = np.histogramdd(points, bins=4, range=[(0, 1)] * 4)[0]
        assert spread[0] <= boxes.std() / boxes.mean() ** 0.5 < spread[1]


def test_a_random_world_has_its_probabilities(small: None) -> None:
    renderer = world.Renderer(type("Job", (), {"config": world.WorldConfig(draws="random")}))  # type: ignore[arg-type]
    points = renderer.points(0, 20_000)
    counts = np.bincount(np.searchsorted(joint().ravel().cumsum()[:-1], points[:, 0], side="right"), minlength=len(SCENES))
    deviation = np.sqrt(joint().ravel() * (1 - joint().ravel()) / 20_000)
    assert np.all(np.abs(counts / 20_000 - joint().ravel()) < 5 * deviation)


def test_evaluate_measures_by_the_name_of_the_measure(
    checkpoint: Dataset, made: Dataset, store: Store, make: Callable[..., Dataset], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    inputs = {"checkpoint": checkpoint, "codec": made, "history.x-train": checkpoint}
    sweep = {"kind": "samplers", "features": "scenes", "samplers": ["era", "analytic-dpm"], "steps": [2, 5], "samples": 8}
    hurt = {"kind": "robustness", "features": "scenes", "noise": [0, 1000], "pictures": ["masked"], "captions": ["words-dropped"]}
    measures = [{"kind": "shapes", "samples": 10}, sweep, hurt]
    asked = {"measures": measures, "count": 6, "steps": 2, "batch": 4, "guidance": 1.0}
    evaluated = make(Evaluate, store, inputs, **asked)
    stats = evaluated.manifest.stats
    # Those of shapes; three tasks at four places of the sweep; one way with noise and one with damage of each task with an input.
    assert (stats.rows_in, stats.rows_out) == (2 * 6 + 3 * 10 + 4 * (2 * 6 + 8) + 2 * 6 + 2 * 6,) * 2
    details = json.loads(store.read(evaluated.file("report.json").path))["details"]
    assert [(point["sampler"], point["steps"]) for point in details["samplers"]["points"]] == [
        ("era", 2), ("era", 5), ("analytic-dpm", 2), ("analytic-dpm", 5)
    ]  # fmt: skip
    assert all(point["values"].keys() == {"t2i_accuracy", "i2t_accuracy", "image_tv"} for point in details["samplers"]["points"])
    assert [point.get("damage", point.get("noise")) for point in details["robustness"]["points"]] == [
        0, 1000, "words-dropped", "masked"
    ]  # fmt: skip
    assert "| era | 5 | 0 |" in store.read(evaluated.file("samplers.md").path).decode()
    figures = {figure["name"]: figure["value"] for figure in evaluated.manifest.summary["figures"]}

    point(store, "shapes", "evaluate", evaluated.manifest.reference())
    keeping.main(["--store", store.root, "--out", str(tmp_path / "out")])
    values = json.loads((tmp_path / "out" / "shapes.json").read_text())
    assert f"t2i_accuracy={values['t2i_accuracy']}" in capsys.readouterr().out
    for name in ("t2i_accuracy", "i2t_accuracy", "joint_consistency", "image_marginal_tv", "text_marginal_tv"):
        assert 0 <= values[name] <= 1 and figures[name] == values[name]
    assert values["t2i_accuracy"] == 0 and values["image_marginal_tv"] > 0.3  # it has learned nothing
    codec, pairs = (made.manifest.summary[name] for name in ("codec", "latents"))
    assert values["minutes"] == pytest.approx(3 + codec["minutes"] + pairs["minutes"], abs=0.06)
    assert values["core_minutes"] == pytest.approx(5 + codec["core_minutes"] + pairs["minutes"], abs=0.06)
    assert (values["training"]["steps"], values["training"]["batch"]) == (4, 64)
    page = (tmp_path / "out" / "shapes.md").read_text()
    assert "| text to image, attributes right | 0.0 | at least 0.99 | **no** |" in page and "| at most 28 | yes |" in page
    assert all((tmp_path / "out" / name).stat().st_size > 5000 for name in ("shapes-curve.png", "shapes-samples.png"))


def test_the_report_of_a_store_without_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="has no evaluation of shapes; run `unidiffuser run configs/shapes.yaml` first"):
        keeping.main(["--store", str(tmp_path)])
