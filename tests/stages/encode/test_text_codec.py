"""text-codec: what is held out, when training stops and what it keeps, and that the reported BLEU-4 is the kept codec's."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from sacrebleu.metrics import BLEU
from torch import Tensor

from examples.little_web.compose import all_scenes, caption
from infra.dataset import Dataset
from infra.store import Store
from stages.encode.text_codec import TextCodecConfig, TextCodecStage, Trainer, held_out
from tests.stages.committed import dataset_of
from unidiffuser.encoders import ClipEncoder
from unidiffuser.text_decoder import TextCodec

CAPTIONS = sorted({caption(scene, random.Random(0)) for scene in all_scenes()[::10]})


def test_held_out_captions_are_a_fair_tenth_and_hardly_move() -> None:
    held, train = held_out(CAPTIONS * 2, 1000)
    assert sorted(held + train) == CAPTIONS and not set(held) & set(train)
    assert len(held) == len(CAPTIONS) // 10
    assert len(held_out(CAPTIONS, 7)[0]) == 7
    assert held_out(reversed(CAPTIONS), 1000) == (held, train)
    # Not the first of the alphabet: about half of them stand in its first half.
    assert 0.3 < sum(text < CAPTIONS[len(CAPTIONS) // 2] for text in held) / len(held) < 0.7
    for number in range(30):
        now = set(held_out([*CAPTIONS, f"caption {number}"], 1000)[0])
        assert len(set(held) - now) + len(now - set(held) - {f"caption {number}"}) <= 1


class Scripted(Trainer):
    """Validations come out as told; the weights of every validation are kept."""

    def __init__(self, scores: list[float], **config: object) -> None:
        fields = {"steps": len(scores), "validate_every": 1, "batch": 4, "latent_width": 8, "lr": 1e-2, "warmup_steps": 0}
        settings = TextCodecConfig.model_validate({**fields, **config})
        super().__init__(SimpleNamespace(config=settings, node="x-text-codec"))  # type: ignore[arg-type]
        self.scores, self.seen, self.encoded = iter(scores), list[dict[str, Tensor]](), list[list[str]]()
        tokens = self.clip.tokens
        self.clip.tokens = lambda captions: (self.encoded.append(list(captions)), tokens(captions))[1]  # type: ignore[method-assign]

    def bleu(self, captions: list[str], beams: int) -> float:
        self.seen.append({name: value.clone() for name, value in self.codec.gpt2.state_dict().items()})
        return next(self.scores)


@pytest.mark.parametrize(
    ("scores", "stops_at", "best"),
    [
        ([0.1, 0.5, 0.3, 0.4, 0.9, 0.9], 4, 2),  # patience
        ([0.1, 0.5, 0.3, 0.6, 0.5, 0.5], 6, 4),  # a better one in time
        ([0.1, 0.95, 0.2, 0.2, 0.2, 0.2], 2, 2),  # enough
        ([0.1, 0.2, 0.3], 3, 3),  # all steps
    ],
)
def test_training_stops_and_keeps_the_best_weights(scores: list[float], stops_at: int, best: int) -> None:
    trainer = Scripted(scores, patience=2, enough_bleu=0.95)
    history = trainer.train(CAPTIONS[:20], ["a lion"])
    assert [row["bleu4"] for row in history] == scores[:stops_at]
    kept = trainer.codec.gpt2.state_dict()
    same = [all(torch.equal(kept[name], value) for name, value in seen.items()) for seen in trainer.seen]
    assert [number for number, equal in enumerate(same, 1) if equal] == [best]


def test_the_latent_gets_unit_scale_over_captions_from_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.encode.text_codec.STANDARDISED_ON", 40)
    trainer = Scripted([0.1])
    trainer.train(CAPTIONS, ["a lion"])
    chosen = trainer.encoded[-1]
    assert len(set(chosen)) == 40 and set(chosen) <= set(CAPTIONS)
    assert 10 < sum(text < CAPTIONS[len(CAPTIONS) // 2] for text in chosen) < 30
    with torch.no_grad():
        latent = trainer.codec.encode(trainer.clip.tokens(chosen)).flatten(0, 1)
    assert latent.mean(0).abs().max() < 1e-3 and (latent.std(0) - 1).abs().max() < 1e-3


@pytest.fixture
def captions(store: Store, tmp_path: Path) -> Dataset:
    """A dataset of CAPTIONS, of which five come twice."""
    (tmp_path / "select").mkdir()
    pq.write_table(pa.table({"caption": [*CAPTIONS, *CAPTIONS[:5]]}), tmp_path / "select" / "rows.parquet")
    return dataset_of(store, "select", tmp_path / "select", {})


def test_the_reported_bleu_is_that_of_the_codec_in_the_dataset(
    captions: Dataset, store: Store, make: Callable[..., Dataset], in_process: None, tmp_path: Path
) -> None:
    small = {"latent_width": 8, "steps": 40, "batch": 16, "lr": 3e-3, "warmup_steps": 5, "validate_every": 20}
    made = make(TextCodecStage, store, {"captions": captions}, **small, validation_captions=12, beams=2)
    summary, stats = made.manifest.summary, made.manifest.stats
    assert stats.dropped == {"duplicate_caption": 5} and stats.rows_out == len(CAPTIONS)
    assert summary["held_out"] == 12 and [row["step"] for row in summary["history"]] == [20, 40]

    held, train = held_out(CAPTIONS, 12)
    codec, clip = TextCodec.load(made.fetch(tmp_path / "codec")), ClipEncoder.load("embedded")

    def bleu(texts: list[str]) -> float:
        decoded = [codec.decode(codec.encode(clip.tokens([text])), beams=2)[0] for text in texts]
        return round(BLEU().corpus_score(decoded, [texts]).score / 100, 4)

    assert summary["bleu4"] == bleu(held) > 0
    assert bleu(train[:12]) != bleu(held)


def test_a_token_of_the_latent_has_the_papers_64_numbers_unless_told_otherwise() -> None:
    assert TextCodecConfig.model_validate({}).latent_width == 64
