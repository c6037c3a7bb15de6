"""How pictures and captions go together: the CLIP score of torchmetrics, a count by hand, and which network gives the floor."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torchmetrics.multimodal import CLIPScore

from stages.measuring.matching import ClipScore, Preference, clip_score, preference
from stages.measuring.samples import Asked, Need, Samples

ASKED = Asked(12, True, Samples("t2i", 20, 3.0, "dpm++2m", beams=5))


@pytest.fixture
def embeddings() -> tuple[np.ndarray, np.ndarray]:
    """Of pictures that resemble their captions, each twice as long as the one before it: a cosine knows no length."""
    chance = np.random.default_rng(0)
    texts = chance.normal(size=(12, 5)).astype(np.float32)
    images = ((texts + chance.normal(scale=1.5, size=texts.shape)) * 2.0 ** np.arange(12)[:, None]).astype(np.float32)
    return images, texts


def test_a_clip_score_is_that_of_torchmetrics(embeddings: tuple[np.ndarray, np.ndarray]) -> None:
    images, texts = (torch.from_numpy(values) for values in embeddings)

    class Clip:
        """Pictures and captions are numbers of rows."""

        config = SimpleNamespace()
        get_image_features = staticmethod(lambda pixels: images[pixels.flatten().long()])
        get_text_features = staticmethod(lambda ids, _: texts[ids])
        eval = to = lambda self, *_: self

    def processor(images: Any = None, text: Any = None, **_: Any) -> dict[str, torch.Tensor]:
        if images is not None:
            return {"pixel_values": torch.stack(images)}
        return {"input_ids": torch.tensor([int(each) for each in text]), "attention_mask": torch.ones(len(text), 1)}

    metric = CLIPScore(model_name_or_path=lambda: (Clip(), processor))
    score = float(metric(torch.arange(12).reshape(12, 1, 1, 1), [str(n) for n in range(12)]))
    assert score > 1 and clip_score(*embeddings) == pytest.approx(score, rel=1e-5)
    assert clip_score(-embeddings[1], embeddings[1]) == 0


def test_a_preference_is_what_a_count_by_hand_finds_of_pairs_half_the_list_apart(
    embeddings: tuple[np.ndarray, np.ndarray],
) -> None:
    images, texts = embeddings
    count, half = 12, 6
    images[2 + half] = images[2]

    def preferred(apart: int) -> float:
        def cosine(text: int, image: int) -> float:
            return float(texts[text] @ images[image] / np.linalg.norm(texts[text]) / np.linalg.norm(images[image]))

        pairs = [(cosine(n, n), cosine(n, (n + apart) % count)) for n in range(count)]
        return sum(0.5 if np.isclose(own, other) else own > other for own, other in pairs) / count

    assert preference(images, texts) == pytest.approx(preferred(half))
    assert len({preferred(apart) for apart in (1, half, count - 1)}) > 1, "neighbours would give the same: the test shows nothing"


def test_floor_score_and_ceiling_each_have_their_own_pictures() -> None:
    """Numbers in place of features, one a need."""
    given: dict[Need, np.ndarray] = {}

    def features(need: Need) -> np.ndarray:
        chance = np.random.default_rng(len(given))
        return given.setdefault(need, chance.normal(size=(need.count, 4)))

    job = SimpleNamespace(config=SimpleNamespace(judge=None, clip="x"))
    view: Any = SimpleNamespace(asked=ASKED, job=job, features=features)
    drawn, written = ASKED.samples("t2i"), ASKED.samples("i2t")
    floor = ASKED.samples("t2i", of="untrained")
    assert (drawn.beams, written.beams, floor.of, drawn.of) == (1, 5, "untrained", "checkpoint")
    figures = {figure.name: figure for figure in Preference(untrained=4).result(view, None).figures}  # type: ignore[arg-type]
    pairs = {
        "t2i": (Need(drawn, 12, "clip-image"), Need(None, 12, "clip-text")),
        "i2t": (Need(None, 12, "clip-image"), Need(written, 12, "clip-text")),
        "real": (Need(None, 12, "clip-image"), Need(None, 12, "clip-text")),
        "untrained": (Need(floor, 4, "clip-image"), Need(None, 4, "clip-text")),
    }
    assert {name.removeprefix("preference_") for name in figures} == pairs.keys()
    for name, (image, text) in pairs.items():
        assert figures[f"preference_{name}"].value == pytest.approx(preference(given[image], given[text]), abs=1e-6)
        assert figures[f"preference_{name}"].samples == image.count
    assert set(Preference(untrained=4).needs(ASKED)) == {need for pair in pairs.values() for need in pair}
    # Without real pictures there is the one way.
    lone: Any = SimpleNamespace(asked=Asked(12, False, ASKED.way), job=job, features=features)
    assert [figure.name for figure in ClipScore().result(lone, None).figures] == ["clip_score_t2i"]  # type: ignore[arg-type]
