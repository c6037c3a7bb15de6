"""The world of shapes: pictures and captions that read back, a joint distribution as declared, scores that can fail."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
import torch

from examples.encoders.progress import cosine_fall
from examples.shapes import autoencoder, measure, training
from examples.shapes.__main__ import main
from examples.shapes.autoencoder import LATENT_DEVIATION, Autoencoder, crowded_pictures
from examples.shapes.codec import LENGTH, WORD_SCALE, WORDS, decode_captions, encode_captions
from examples.shapes.history import History
from examples.shapes.measure import accuracy, distribution, floor, total_variation, variations
from examples.shapes.pictures import PALETTE, PAPER, SIDE, read_picture, render
from examples.shapes.training import batch_at, evenly
from examples.shapes.world import (
    COLOURS,
    PHRASINGS,
    SCENES,
    VALUES,
    Scene,
    all_captions,
    caption,
    draw,
    draw_captions,
    joint,
    read_caption,
)
from training.config import ScheduleConfig
from training.rates import learning_rate

RED_SQUARES = Scene("red", "square", "left", 2)


def blank() -> np.ndarray:
    return np.broadcast_to(PAPER.astype(np.uint8), (SIDE, SIDE, 3)).copy()


def test_every_scene_reads_back_from_jittered_pictures() -> None:
    scenes = [scene for scene in SCENES for _ in range(4)]
    rng = np.random.default_rng(11)
    pictures = np.stack([render(scene, rng) for scene in scenes])
    assert [read_picture(picture) for picture in pictures] == scenes
    assert np.abs(pictures[0].astype(int) - pictures[1]).max() > 50  # the jitter moves things


def test_the_forms_stand_where_the_scene_says_in_its_colour() -> None:
    for scene in SCENES:
        picture = render(scene, np.random.default_rng(3)).astype(float)
        near = np.linalg.norm(picture - PALETTE[scene.colour], axis=2) < 30
        rows, columns = np.nonzero(near)
        x, y = columns.mean() / SIDE, rows.mean() / SIDE
        assert (x < 0.35, x > 0.65, y < 0.35, y > 0.65) == tuple(scene.place == p for p in ("left", "right", "top", "bottom"))
        assert 80 * scene.count < near.sum() < 280 * scene.count


def test_a_picture_that_shows_no_scene_is_unreadable() -> None:
    def with_form(colour: str, form: str, place: str) -> np.ndarray:
        return render(Scene(colour, form, place, 1), np.random.default_rng(0)).astype(int)

    one = with_form("red", "square", "left")
    two_colours = np.minimum(one, with_form("blue", "square", "right"))
    two_forms = np.minimum(one, with_form("red", "circle", "right"))
    three = np.minimum(np.minimum(one, with_form("red", "square", "right")), with_form("red", "square", "top"))
    foreign = blank()
    foreign[24:40, 24:40] = (20, 20, 20)
    smear = blank()
    smear[30:34, 4:60] = PALETTE["red"]
    between = np.roll(with_form("red", "square", "left"), 18, 1)
    noise = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3))
    for picture in (blank(), two_colours, two_forms, three, foreign, smear, between, noise):
        assert read_picture(picture.astype(np.uint8)) is None
    assert read_picture(one.astype(np.uint8)) == Scene("red", "square", "left", 1)


def test_every_caption_reads_back_and_nothing_else_does() -> None:
    captions = list(all_captions())
    assert len({text for text, _ in captions}) == len(SCENES) * len(PHRASINGS) == 288
    assert all(read_caption(text) == scene for text, scene in captions)
    assert decode_captions(encode_captions([text for text, _ in captions])) == [text for text, _ in captions]
    for wrong in (
        "two red square on the left",
        "one red squares on the left",
        "two red squares at the left",
        "two red squares",
        "",
    ):
        assert read_caption(wrong) is None


def test_the_latents_of_captions_are_centred_on_the_world() -> None:
    rng = np.random.default_rng(0)
    latents = encode_captions(draw_captions(draw(rng, 20_000), rng))
    assert latents.mean(0).abs().max() < 5 * WORD_SCALE * 0.5 / 20_000**0.5


def test_padding_inside_a_caption_makes_it_unreadable() -> None:
    latents = encode_captions(["two red squares on the left"])
    assert latents.shape == (1, LENGTH, len(WORDS))
    assert read_caption(decode_captions(latents)[0]) == RED_SQUARES
    latents[0, 1, WORDS.index("red")] -= WORD_SCALE
    latents[0, 1, WORDS.index("")] += WORD_SCALE
    assert decode_captions(latents) == ["two  squares on the left"]
    assert read_caption(decode_captions(latents)[0]) is None


def test_the_joint_distribution_is_what_is_drawn_and_its_attributes_depend_on_each_other() -> None:
    table = joint()
    assert table.shape == tuple(len(values) for values in VALUES.values())
    assert table.sum() == pytest.approx(1) and table.min() > 0
    counts = Counter(draw(np.random.default_rng(5), 20_000))
    drawn = np.array([counts[scene] for scene in SCENES]) / 20_000
    deviation = np.sqrt(table.ravel() * (1 - table.ravel()) / 20_000)
    assert np.all(np.abs(drawn - table.ravel()) < 5 * deviation)
    assert table[0].sum() == pytest.approx(0.40) and table[COLOURS.index("yellow"), 2].sum() == pytest.approx(0.30 * 0.75)
    colour, form = table.sum((1, 2, 3)), table.sum((0, 2, 3))
    assert np.abs(table.sum((2, 3)) - np.outer(colour, form)).sum() / 2 > 0.2


def test_accuracy_counts_attributes_and_gives_the_unreadable_nothing() -> None:
    wanted = [RED_SQUARES] * 4
    got = [RED_SQUARES, RED_SQUARES._replace(colour="blue"), RED_SQUARES._replace(place="top", count=1), None]
    shares = accuracy(wanted, got)
    assert [shares[name] for name in VALUES] == [0.5, 0.75, 0.5, 0.5]
    assert (shares["attributes"], shares["all"], shares["unreadable"]) == (0.5625, 0.25, 0.25)
    assert accuracy([None], [None])["all"] == 0  # two unreadables do not agree


def test_total_variation_of_hand_made_counts() -> None:
    truth = np.array([0.5, 0.3, 0.2])
    assert total_variation(np.array([5, 3, 2]), 0, truth) == pytest.approx(0)
    assert total_variation(np.array([10, 0, 0]), 0, truth) == pytest.approx(0.5)
    assert total_variation(np.array([5, 3, 2]), 10, truth) == pytest.approx(0.5)
    assert total_variation(np.array([0, 0, 0]), 7, truth) == pytest.approx(1)


def test_a_sampler_of_the_truth_scores_the_floor_and_wrong_ones_do_not() -> None:
    rng = np.random.default_rng(6)
    exact = distribution(draw(rng, 4000))
    assert exact["unreadable"] == 0
    for name in ("largest", "pairs", "joint"):
        assert exact[name] == pytest.approx(exact["floor"][name], rel=0.5)

    table = joint()
    marginals = [table.sum(tuple(other for other in range(4) if other != axis)) for axis in range(4)]
    columns = [rng.choice(len(p), 4000, p=p) for p in marginals]
    independent = [
        Scene(*(values[i] for values, i in zip(VALUES.values(), row, strict=True))) for row in zip(*columns, strict=True)
    ]
    found = distribution(independent)
    assert found["largest"] < 0.05 < 0.2 < found["pairs"] < found["joint"]

    blind = accuracy(draw(rng, 4000), draw(rng, 4000))  # ignores what it is given: chance, the sum of squared probabilities
    assert [blind[name] for name in VALUES] == pytest.approx([float((p**2).sum()) for p in marginals], abs=0.03)
    assert distribution([RED_SQUARES] * 50 + [None] * 50)["largest"] > 0.7
    assert floor(100)["joint"] > floor(10_000)["joint"] > 0
    assert variations(table * 1000, 0)["joint"] == pytest.approx(0, abs=1e-9)


class Pixels(Autoencoder):
    """A codec that loses nothing: 8 x 8 pixel patches as channels."""

    def encode(self, pictures: np.ndarray) -> torch.Tensor:
        return torch.nn.functional.pixel_unshuffle(torch.from_numpy(pictures).permute(0, 3, 1, 2).float(), 8)

    def decode(self, latents: torch.Tensor) -> np.ndarray:
        return torch.nn.functional.pixel_shuffle(latents, 8).byte().permute(0, 2, 3, 1).numpy()


def test_a_step_sees_the_same_pairs_whenever_it_is_done_and_they_belong_together() -> None:
    (first, first_t), (again, again_t), (other, other_t) = (batch_at(step, 32, Pixels()) for step in (7, 7, 8))
    assert all(torch.equal(first[name], again[name]) and not torch.equal(first[name], other[name]) for name in first)
    assert all(torch.equal(first_t[name], again_t[name]) and not torch.equal(first_t[name], other_t[name]) for name in first_t)
    scenes = [read_picture(picture) for picture in Pixels().decode(first["latent"])]
    assert None not in scenes and scenes == [read_caption(text) for text in decode_captions(first["words"])]


def test_every_stretch_of_steps_has_its_share_of_each_scene_at_each_pair_of_timesteps() -> None:
    points = np.concatenate([evenly(step, 64) for step in range(100, 612)])
    assert np.array_equal(evenly(611, 64), points[-64:]) and points.min() >= 0 and points.max() < 1
    # Against random points: the numbers in each of 4^4 equal boxes of the cube vary by the square root of their mean.
    boxes = np.histogramdd(points, bins=4, range=[(0, 1)] * 4)[0]
    assert boxes.std() < 0.1 * boxes.mean() ** 0.5
    timesteps = torch.cat([torch.stack(list(batch_at(step, 64, Pixels())[1].values())) for step in range(32)], dim=1)
    assert timesteps.min() == 1 and timesteps.max() == 1000
    assert abs(timesteps.double().mean(1) - 500.5).max() < 1 and abs(torch.corrcoef(timesteps.double())[0, 1]) < 0.01


def test_each_parameter_is_moved_by_one_optimizer_and_the_matrices_of_the_blocks_by_muon(small) -> None:
    model = training.build()
    muon, rest = training.optimizers(model)
    moved = [value for optimizer in (muon, rest) for group in optimizer.param_groups for value in group["params"]]
    assert sorted(map(id, moved)) == sorted(map(id, model.parameters()))
    by_muon = {id(value) for value in muon.param_groups[0]["params"]}
    assert all(id(block.attn.qkv.weight) in by_muon for block in (*model.in_blocks, model.mid_block, *model.out_blocks))
    assert not by_muon & {id(value) for module in (model.inputs, model.outputs) for value in module.parameters()}


def test_the_learning_rate_falls_as_the_trainer_lets_it() -> None:
    schedule = ScheduleConfig(warmup_steps=100, decay="cosine", decay_steps=1000)
    rate = cosine_fall(1000, peak=2.0, warmup=100)
    for step in range(1000):
        assert rate(step) == pytest.approx(learning_rate(step, 2.0, schedule), abs=1e-12)


def test_the_state_of_an_older_version_is_refused(small, tmp_path) -> None:
    training.fit(tmp_path, Autoencoder(), 1)
    state = torch.load(tmp_path / "shapes.pt", weights_only=True)
    torch.save({name: value for name, value in state.items() if name != "optimizers"}, tmp_path / "shapes.pt")
    with pytest.raises(SystemExit, match=r"shapes.pt is of an older version: delete it to train anew"):
        training.fit(tmp_path, Autoencoder(), 2)


def test_the_codec_learns_and_its_latents_are_centred_at_their_scale(tmp_path) -> None:
    def error(codec: Autoencoder) -> float:
        pictures = crowded_pictures(999, 16)
        return float(np.square(codec.decode(codec.encode(pictures)).astype(float) - pictures).mean())

    early, _ = autoencoder.fit(tmp_path / "early", torch.device("cpu"), 1)
    codec, history = autoencoder.fit(tmp_path / "later", torch.device("cpu"), 40)
    assert error(codec) < 0.5 * error(early)
    rng = np.random.default_rng(1)
    latents = codec.encode(np.stack([render(scene, rng) for scene in draw(rng, 500)]))
    assert latents.std().item() == pytest.approx(LATENT_DEVIATION, rel=0.05)
    assert latents.mean(0).square().mean().sqrt() < 0.15 * LATENT_DEVIATION
    assert [row["step"] for row in history.rows] == [25, 40]


def test_captions_are_drawn_in_all_phrasings() -> None:
    drawn = draw_captions([RED_SQUARES] * 60, np.random.default_rng(0))
    assert set(drawn) == {caption(RED_SQUARES, phrasing) for phrasing in range(len(PHRASINGS))}


def test_the_history_goes_on_after_an_interruption_and_counts_the_time_of_steps_done_twice(tmp_path) -> None:
    history = History(tmp_path / "history.jsonl")
    history.before = 5.0, 9.0
    history.add(25, loss=1.0)
    history.add(50, loss=0.9)
    history.add(50, t2i={"attributes": 0.5})
    resumed = History(tmp_path / "history.jsonl")
    assert resumed.minutes >= 5.0 and resumed.core_minutes >= 9.0 and resumed.rows == history.rows
    resumed.add(50, loss=0.8)
    assert [(row["step"], row.get("loss")) for row in resumed.rows] == [(25, 1.0), (50, None), (50, 0.8)]
    resumed.add(40, loss=0.7)
    assert [row["step"] for row in resumed.rows] == [25, 40]


@pytest.fixture
def small(monkeypatch) -> None:
    """A tiny network, and no compiler."""
    monkeypatch.setattr(training, "CONFIG", training.CONFIG.model_copy(update={"width": 16, "depth": 2, "heads": 2}))
    monkeypatch.setattr(training, "BATCH", 4)
    monkeypatch.setattr(training, "CHECK", training.Protocol(conditional=2, steps=2))
    monkeypatch.setattr(measure, "CODEC_PICTURES", 1)
    monkeypatch.setattr(measure, "FLOOR_ROUNDS", 20)
    monkeypatch.setattr(training, "find_compiler", lambda _: None)


def test_the_experiment_runs_end_to_end_and_goes_on_where_it_stopped(small, tmp_path, capsys) -> None:
    arguments = f"--state {tmp_path}/state --out {tmp_path}/out --samples 10 --threads 1 --codec-steps 3 --steps 4"
    main(arguments.split())
    assert "without compilation" in capsys.readouterr().out
    out = tmp_path / "out"
    values = json.loads((out / "shapes.json").read_text())
    for name in ("t2i_accuracy", "i2t_accuracy", "joint_consistency", "image_marginal_tv", "text_marginal_tv"):
        assert 0 <= values[name] <= 1
    assert values["parameters"] == sum(p.numel() for p in training.build().parameters())
    assert values["t2i_accuracy"] == 0 and values["image_marginal_tv"] > 0.3  # it has learned nothing
    page = (out / "shapes.md").read_text()
    assert "| text to image, attributes right | 0.0 | at least 0.9 | **no** |" in page and "| at most 60 | yes |" in page
    assert all((out / name).stat().st_size > 5000 for name in ("shapes-curve.png", "shapes-samples.png"))

    training.fit(tmp_path / "state", Autoencoder(), 5)
    assert "going on from step 4" in capsys.readouterr().out


def test_an_interrupted_run_ends_with_the_weights_of_an_uninterrupted_one(small, tmp_path, monkeypatch) -> None:
    codec = Autoencoder()
    straight, _ = training.fit(tmp_path / "straight", codec, 6)

    def stop(*arguments) -> dict:
        if arguments[0] == 3:
            raise KeyboardInterrupt
        return batch_at(*arguments)

    monkeypatch.setattr("examples.encoders.progress.SAVE_EVERY_SECONDS", 0.0)
    monkeypatch.setattr(training, "batch_at", stop)
    with pytest.raises(KeyboardInterrupt):
        training.fit(tmp_path / "broken", codec, 6)
    monkeypatch.setattr(training, "batch_at", batch_at)
    resumed, history = training.fit(tmp_path / "broken", codec, 6)
    for name, value in straight.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    assert [row["step"] for row in history.rows if "t2i" in row] == [1, 2, 3, 4, 5, 6]
