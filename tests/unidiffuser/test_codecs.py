"""The codecs that modalities name: found by that name, and held against what the model declares when it is loaded."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace

import open_clip
import pytest

from tests.unidiffuser.test_generation import export, model  # noqa: F401
from unidiffuser.codecs import CaptionCodec, PromptCut
from unidiffuser.encoders import ClipEncoder
from unidiffuser.generation import UniDiffuser
from unidiffuser.modalities import Modality, Part, paper_modalities, resized
from unidiffuser.tensors import WeightsError
from unidiffuser.text_decoder import TextCodec


def test_a_codec_is_called_like_its_modality_unless_it_is_named():
    assert [modality.codec for modality in paper_modalities()] == ["image", "text"]
    sound = Modality(name="sound", codec="spectrum", parts=(Part(name="waves", shape=(9,)),))
    assert resized([sound], {"waves": (8,)})[0].codec == "spectrum"
    assert Modality.model_validate_json(sound.model_dump_json()) == sound
    told = json.loads(sound.model_dump_json())
    del told["codec"]
    assert Modality.model_validate(told).codec == "sound"
    with pytest.raises(ValueError, match="codec"):
        Modality(name="sound", codec="", parts=sound.parts)


def altered(export: Path, folder: Path, change) -> Path:  # noqa: F811
    shutil.copytree(export, folder)
    settings = json.loads((folder / "uvit/config.json").read_text(encoding="utf-8"))
    change(settings)
    (folder / "uvit/config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def test_a_model_of_unknown_codecs_is_refused(export, tmp_path):  # noqa: F811
    folder = altered(export, tmp_path / "other", lambda settings: settings["modalities"][1].update(codec="morse"))
    with pytest.raises(WeightsError, match="modality text: there is no codec morse, only image, text"):
        UniDiffuser.load(folder)


def test_a_codec_that_makes_other_shapes_is_refused(export, tmp_path):  # noqa: F811
    folder = tmp_path / "narrow"
    shutil.copytree(export, folder)
    shutil.rmtree(folder / "text_codec")
    TextCodec.new("embedded", ClipEncoder.load("embedded").text_width, 6).save(folder / "text_codec")
    with pytest.raises(WeightsError, match=r"modality text: the model has .*\(16, 8\).*, its codec text makes .*\(16, 6\)"):
        UniDiffuser.load(folder)


def test_captions_are_written_with_as_many_beams_as_asked_for(model, monkeypatch):  # noqa: F811
    asked = []
    monkeypatch.setattr(TextCodec, "decode", lambda _, latent, beams: asked.append(beams) or [""] * len(latent))
    model.generate("t", steps=1)
    model.generate("t", steps=1, beams=1)
    assert asked == [5, 1]
    with pytest.raises(ValueError, match="count, batch, beams and rounds must be 1 or more, not 1, 16, 0 and 4"):
        model.generate("t", beams=0)


@pytest.mark.parametrize("length", [16, 77, 84])
def test_a_prompt_is_cut_behind_what_the_encoder_reads(length):
    # Every word is one token; the begin and the end of a text take two more.
    clip = SimpleNamespace(context_length=length, tokenizer=open_clip.SimpleTokenizer(context_length=length))
    codec = CaptionCodec(clip, None, 1)  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.simplefilter("error", PromptCut)
        codec._warn_if_cut(" ".join(["red"] * (length - 2)))
    with pytest.warns(PromptCut, match=f"more than the {length} tokens") as caught:
        codec._warn_if_cut(" ".join(["red"] * (length + 3)))
    assert str(caught[0].message).split("cut after: ")[1].strip("' ") == " ".join(["red"] * (length - 2))
