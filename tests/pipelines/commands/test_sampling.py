"""`unidiffuser sample` and `convert`: what they write and say, from every kind of checkpoint, and what misuse is told."""

from __future__ import annotations

import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from typer.main import get_command

from infra.dataset import point
from infra.store import Store
from pipelines.command import app
from pipelines.commands import sampling
from pipelines.commands.checkpoints import Named
from tests.pipelines.commands.test_plain import run_main
from tests.stages.committed import dataset_of
from tests.unidiffuser.test_generation import export, noise_image  # noqa: F401
from unidiffuser.layouts import set_layout
from unidiffuser.references import weights_digest
from unidiffuser.sampling import default_sampler
from unidiffuser.solver import SAMPLERS
from unidiffuser.weights import load_native

PROMPT = "a small panda"


def test_the_help_names_every_sampler() -> None:
    options = {option.name: option for option in get_command(app).commands["sample"].params}  # type: ignore[attr-defined]
    named = re.split(r", | or ", options["sampler"].help.split(". ")[0])
    assert set(named) == set(SAMPLERS) and named[:2] == [default_sampler("t2i"), default_sampler("interpolate")]


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs a command in this process; returns its exit code, stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = run_main(monkeypatch, *(str(argument) for argument in arguments))
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"), dtype=int)


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text(encoding="utf-8").splitlines()]


FEW = ("--steps", 3, "--beams", 1)


def test_pictures_come_with_their_settings_and_nothing_is_overwritten(export, tmp_path, say):  # noqa: F811
    out = tmp_path / "out"
    arguments = ("sample", export, "--task", "t2i2t", "--prompt", PROMPT, "--prompt", "ein großer Löwe", "--count", 2, *FEW)
    code, printed, _ = say(*arguments, "--seed", 7, "--guidance", 2, "--out", out)
    assert code == 0
    rows = rows_of(out)
    assert [row["file"] for row in rows] == [f"{n:05d}.png" for n in range(4)]
    assert [row["prompt"] for row in rows] == [PROMPT] * 2 + ["ein großer Löwe"] * 2
    assert [row["seed"] for row in rows] == [7, 8, 9, 10]
    for row in rows:
        text = Image.open(out / row["file"]).text
        assert (text["prompt"], text["caption"], text["task"]) == (row["prompt"], row["caption"], "t2i2t")
        assert (text["seed"], text["steps"], text["guidance"], text["sampler"]) == (str(row["seed"]), "3", "2.0", "dpm++2m-sde")
        assert row["file"] in printed
    say(*arguments, "--seed", 7, "--guidance", 2, "--batch", 1, "--out", out)
    again = rows_of(out)
    assert again[:4] == rows and [row["file"] for row in again[4:]] == [f"{n:05d}.png" for n in range(4, 8)]
    for one, other in zip(rows, again[4:], strict=True):
        assert np.abs(pixels(out / one["file"]) - pixels(out / other["file"])).max() <= 1
    assert np.abs(pixels(out / "00000.png") - pixels(out / "00001.png")).max() > 1


def test_captions_need_no_folder_and_json_is_for_scripts(export, tmp_path, say):  # noqa: F811
    noise_image(0).save(tmp_path / "one.png")
    noise_image(1).save(tmp_path / "two.jpg")
    images = ("--image", tmp_path / "one.png", "--image", tmp_path / "two.jpg")
    code, printed, _ = say("sample", export, "--task", "i2t", *images, *FEW, "--json")
    rows = [json.loads(line) for line in printed.splitlines()]
    assert code == 0 and [row["source"] for row in rows] == [str(tmp_path / "one.png"), str(tmp_path / "two.jpg")]
    assert all(isinstance(row["caption"], str) and row["file"] is None for row in rows)
    code, printed, _ = say("sample", export, "--task", "interpolate", *images, *FEW, "--count", 3, "--out", tmp_path / "way")
    assert code == 0 and [row["sampler"] for row in rows_of(tmp_path / "way")] == 3 * ["dpm++2m"]
    assert all(row["file"] in printed for row in rows_of(tmp_path / "way"))


@pytest.mark.parametrize("task, count, batch", [("joint", 2, 2), ("i2t2i", 1, 2), ("gibbs", 1, 1), ("interpolate", 5, 2)])
def test_progress_moves_with_every_call_of_the_network(export, task, count, batch, tmp_path, say, monkeypatch):  # noqa: F811
    monkeypatch.setattr(sampling, "PLAIN_EVERY", 0.0)
    inputs = {"i2t2i": 1, "interpolate": 2}.get(task, 0)
    for number in range(inputs):
        noise_image(number).save(tmp_path / f"{number}.png")
    images = [word for number in range(inputs) for word in ("--image", tmp_path / f"{number}.png")]
    code, printed, said = say(
        "sample",
        export,
        "--task",
        task,
        *images,
        *FEW,
        "--rounds",
        2,
        "--count",
        count,
        "--batch",
        batch,
        "--out",
        tmp_path / "out",
    )
    assert code == 0, said
    shares = [int(share) for share in re.findall(r"(\d+)% drawn", printed + said)]
    assert shares[-2:] == [100, 100] and shares[:-1] == sorted(set(shares))


def test_settings_reach_the_sampler(export, tmp_path, say):  # noqa: F811
    def draw(name: str, *more: object) -> np.ndarray:
        base = ("sample", export, "--task", "t2i", "--prompt", PROMPT, "--steps", 6, "--guidance", 4, "--out", tmp_path / name)
        code, _, complaint = say(*base, *more)
        assert code == 0, complaint
        return pixels(tmp_path / name / "00000.png")

    plain = draw("plain")
    assert np.array_equal(draw("again"), plain)
    for more in (("--condition-t", 900), ("--sampler", "unipc"), ("--guidance-interval", 300, 600), ("--guidance", 0)):
        assert not np.array_equal(draw(f"with {more}", *more), plain), more
    assert draw("larger", "--size", 48).shape == (48, 48, 3)


def test_a_prompt_that_is_cut_says_what_is_left(export, tmp_path, say):  # noqa: F811
    long = " ".join(["a small panda on the left of a pink background"] * 4)
    command = ("sample", export, "--task", "t2i", *FEW, "--out", tmp_path)
    code, printed, _ = say(*command, "--prompt", long, "--prompt", "")
    assert code == 0 and "the prompt has more than the 16 tokens that the model reads; cut after: 'a small panda" in printed
    code, printed, _ = say(*command, "--prompt", "")
    assert code == 0 and "cut after" not in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--task", "t2v"), "no task named 't2v'; there are t2i"),
        (("--task", "t2i", "--out", "x"), "t2i takes prompts, and no images"),
        (("--task", "i2t"), "i2t takes images, and no prompts"),
        (("--task", "i2t", "--image", "none.png"), "--image none.png: no such file"),
        (("--task", "i2t", "--image", __file__), "test_sampling.py: not a picture that can be read"),
        (("--task", "t2i", "--prompt", "x"), "t2i draws pictures: say where they go with --out DIR"),
        (("--task", "t2i", "--prompt", "x", "--out", "x", "--sampler", "euler"), "no sampler named 'euler'; there are dpm"),
        (("--task", "t2i", "--prompt", "x", "--out", "x", "--condition-t", 1001), "condition_t must be in 0 .. 1000, not 1001"),
        (("--task", "t", "--condition-t", 5), "condition_t goes with t2i and i2t, not with t"),
        (("--task", "t", "--guidance-interval", 700, 300), "two timesteps in 0 .. 1000, the lower one first"),
        (("--task", "t", "--device", "abacus"), "--device abacus: not usable here"),
        (("--task", "t", "--dtype", "fp8"), "--dtype fp8: expected fp32, bf16, fp16"),
        (("--task", "i", "--out", "x", "--size", 50), "size 50: this model needs a multiple of 8 pixels"),
        (("--task", "i", "--out", "x", "--size", 8192), "'--size': Input should be less than or equal to 4096"),
        (("--task", "t", "--seed", -1), "'--seed': Input should be greater than or equal to 0"),
        (("--task", "t", "--seed", 2**63 - 1, "--count", 2), f"a seed must be in 0 .. {2**63 - 1}, not {2**63}"),
        (("--task", "t", "--guidance", "nan"), "'--guidance': Input should be"),
        (("--task", "t", "--guidance", "inf"), "'--guidance': Input should be less than or equal to 100"),
        (("--task", "t", "--count", 10**9), "'--count': Input should be less than or equal to 1000000"),
        (("--task", "t", "--stepss", 5), "No such option: --stepss"),
        ((), "Missing option '--task'"),
    ],
)
def test_misuse_is_one_line(export, arguments, message, tmp_path, monkeypatch, say):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    code, printed, complaint = say("sample", export, *arguments)
    assert code == 2 and printed == ""
    assert complaint.startswith("error: ") and message in complaint and complaint.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_loaded(export, tmp_path, say, monkeypatch):  # noqa: F811
    monkeypatch.setattr("unidiffuser.generation.UniDiffuser.load", lambda *_: pytest.fail("loaded"))
    (tmp_path / "file").touch()
    for out, message in (
        (tmp_path / "file", f"--out {tmp_path}/file: there is a file of that name; name a folder"),
        (tmp_path / "file" / "new" / "out", f"--out {tmp_path}/file/new/out: {tmp_path}/file is a file; name a folder"),
        (Path("/proc/out"), "--out /proc/out: /proc cannot be written ("),
    ):
        code, _, complaint = say("sample", export, "--task", "i", "--out", out)
        assert code == 2 and complaint.startswith(f"error: {message}") and complaint.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("full", [MemoryError(), torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")])
def test_memory_that_is_not_enough_names_what_to_lower(export, tmp_path, say, monkeypatch, full):  # noqa: F811
    def fail(*_, **__):
        raise full

    which = "memory" if isinstance(full, MemoryError) else "the GPU's memory"
    monkeypatch.setattr("unidiffuser.generation.sample", fail)
    code, _, complaint = say("sample", export, "--task", "i", "--size", 64, "--out", tmp_path / "out")
    assert (code, complaint) == (1, f"error: {which} is not enough to draw; lower --batch (now 16) or --size (now 64)\n")
    monkeypatch.setattr("unidiffuser.generation.load_native", fail)
    code, _, complaint = say("sample", export, "--task", "t")
    assert (code, complaint) == (1, f"error: {which} is not enough to load the model; take --dtype bf16, or another --device\n")
    assert not (tmp_path / "out").exists()


def test_what_is_no_checkpoint_is_named(export, tmp_path, say):  # noqa: F811
    store = ("--store", tmp_path / "store")
    (tmp_path / "empty").mkdir()
    for checkpoint, message in (
        (tmp_path / "empty", "no whole checkpoint; expected an export folder"),
        ("0123abcd", "there is no store; --store or UNIDIFFUSER_STORE names another (CHECKPOINT is a folder or a dataset)"),
    ):
        code, _, complaint = say("sample", checkpoint, "--task", "t", *store)
        assert code == 2 and message in complaint and complaint.count("\n") == 1
    assert not (tmp_path / "store").exists()
    broken = shutil.copytree(export, tmp_path / "broken")
    whole = (broken / "uvit" / "model.safetensors").read_bytes()
    (broken / "uvit" / "model.safetensors").write_bytes(whole[:-10])
    code, _, complaint = say("sample", broken, "--task", "t")
    assert code == 1 and "model.safetensors: not a readable safetensors file" in complaint and complaint.count("\n") == 1


@pytest.fixture
def store(export, tmp_path) -> Store:  # noqa: F811
    """A store with an export, and a training checkpoint of the same weights, its latents and its codec."""
    store = Store(str(tmp_path / "store"))
    dataset_of(store, "export", export, {})
    codec = dataset_of(store, "text-codec", export / "text_codec", {})
    digests = {"vae": weights_digest(str(export / "vae"), "vae")}
    digests |= {part: weights_digest("embedded", "clip") for part in ("clip", "text")}
    (tmp_path / "nothing").mkdir()
    encode = dataset_of(store, "encode", tmp_path / "nothing", {"codec": codec.manifest.reference()}, digests)
    (tmp_path / "train").mkdir()
    shutil.copy(export / "uvit" / "config.json", tmp_path / "train")
    shutil.copy(export / "uvit" / "model.safetensors", tmp_path / "train" / "ema.safetensors")
    train = dataset_of(store, "train", tmp_path / "train", {"data.little": encode.manifest.reference()})
    point(store, "mine", "x-train", train.manifest.reference())
    return store


def test_an_export_folder_its_dataset_and_its_training_checkpoint_draw_the_same(export, store, tmp_path, say):  # noqa: F811
    draws = {
        "folder": (export,),
        "prefix": ("6578706f", "--store", store.root),
        "path": (store.url("export/6578706f72746578706f7274"),),
        "train": ("train/74726169", "--store", store.root, "--vae", export / "vae"),
    }
    pictures = {}
    for name, (checkpoint, *more) in draws.items():
        code, _, complaint = say("sample", checkpoint, *more, "--task", "joint", *FEW, "--out", tmp_path / name)
        assert code == 0, complaint
        pictures[name] = pixels(tmp_path / name / "00000.png")
    for name, picture in pictures.items():
        assert np.array_equal(picture, pictures["folder"]), name


def test_a_training_checkpoint_whose_encoder_is_not_known_asks_for_it(store, say):
    code, _, complaint = say("sample", "74726169", "--store", store.root, "--task", "t")
    assert code == 2 and "x-train: name the encoder `vae`" in complaint and "with --vae, or use an export" in complaint
    code, _, complaint = say("sample", "74726169", "--store", store.root, "--task", "t", "--vae", "embedded")
    assert code == 2 and "--vae embedded is not it" in complaint
    code, _, complaint = say("sample", "656e636f", "--store", store.root, "--task", "t")
    assert code == 2 and "a dataset of x-encode; a checkpoint is one of export or train" in complaint


def test_convert_writes_every_layout_and_sample_reads_it(export, store, tmp_path, say):  # noqa: F811
    beside = ("--vae", export / "vae", "--clip", "embedded", "--text", "embedded", "--gpt2", "embedded")
    assert say("convert", "6578706f", tmp_path / "official", "--to", "official", "--store", store.root)[0] == 0
    assert set_layout(tmp_path / "official") == "official"
    code, _, complaint = say("convert", tmp_path / "official", tmp_path / "native", "--to", "native", "--heads", 2, *beside)
    assert code == 0, complaint
    assert load_native(tmp_path / "native" / "uvit").config.heads == 2
    assert say("convert", tmp_path / "native", tmp_path / "pipeline", "--to", "diffusers")[0] == 0
    captions = []
    for checkpoint in (export, tmp_path / "native", tmp_path / "pipeline"):
        code, printed, complaint = say("sample", checkpoint, "--task", "t", *FEW, "--count", 2, "--json")
        assert code == 0, complaint
        captions.append([json.loads(line)["caption"] for line in printed.splitlines()])
    assert captions[0] == captions[1] == captions[2]
    code, _, _ = say("convert", export / "uvit", tmp_path / "lone", "--to", "diffusers")
    assert code == 0 and (tmp_path / "lone" / "unet" / "config.json").is_file()


def test_convert_says_what_is_wrong(export, tmp_path, say):  # noqa: F811
    for arguments, code, message in (
        ((export, tmp_path, "--to", "onnx"), 2, "--to onnx: expected native, official, diffusers"),
        ((export, export, "--to", "diffusers"), 2, "exists: choose another name, or remove it"),
        ((tmp_path, tmp_path / "x", "--to", "native"), 1, "no U-ViT found; expected a .pth file"),
        ((export / "uvit", tmp_path / "x", "--to", "official"), 1, "give a name that ends in .pth"),
        ((export / "uvit", tmp_path / "x", "--to", "native", "--text", "ViT"), 2, "clip 'ViT': expected MODEL/WEIGHTS"),
        ((export / "uvit", tmp_path / "x", "--to", "native", "--text", "No-1/openai"), 1, "open_clip knows no model No-1"),
        ((export / "uvit", tmp_path / "x", "--to", "native", "--text", "/no/where"), 1, "/no/where: expected a folder with"),
    ):
        found, _, complaint = say("convert", *arguments)
        assert found == code and message in complaint and complaint.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_heads_that_official_files_do_not_tell_are_said_and_asked_for(export, tmp_path, say):  # noqa: F811
    beside = ("--vae", export / "vae", "--clip", "embedded", "--text", "embedded", "--gpt2", "embedded")
    official = tmp_path / "official"
    code, printed, _ = say("convert", export, official, "--to", "official")
    assert code == 0 and f"attention heads: give --heads 2 to convert {official} back\n" in printed
    code, printed, complaint = say("sample", official, "--task", "t", *FEW, *beside)
    assert code == 1 and printed == "" and complaint.count("\n") == 1
    assert "width of 32 is no multiple of 64" in complaint and "`unidiffuser convert SRC DST --to native --heads N`" in complaint
    assert say("convert", official, tmp_path / "native", "--to", "native", "--heads", 2, *beside)[0] == 0
    code, printed, _ = say("convert", tmp_path / "native", tmp_path / "pipeline", "--to", "diffusers")
    assert code == 0 and "--heads" not in printed


def test_convert_refuses_heads_and_halves_in_a_line(export, store, tmp_path, say):  # noqa: F811
    assert say("convert", export, tmp_path / "half", "--to", "official")[0] == 0
    (tmp_path / "half" / "caption_decoder.pth").unlink()
    before = sorted(tmp_path.iterdir())
    for source, more, expected, message in (
        (export, ("--heads", 2), 2, "--heads 2 is for official files, which do not tell it; this checkpoint does: leave it out"),
        ("6578706f", ("--heads", 2, "--store", store.root), 2, "--heads 2 is for official files"),
        (tmp_path / "half", ("--heads", 2), 1, "half a set, it lacks caption_decoder.pth; for the U-ViT alone name"),
    ):
        code, printed, complaint = say("convert", source, tmp_path / "x", "--to", "native", *more)
        assert code == expected and message in complaint and complaint.count("\n") == 1 and printed == ""
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("clip_text/open_clip_model.safetensors", None),
        ("clip_image/open_clip_config.json", "{}"),
        ("clip_image/open_clip_config.json", "{"),
        ("text_codec/codec.json", '{"text_width": 128}'),
        ("text_codec/gpt2/model.safetensors", None),
    ],
)
def test_a_damaged_file_of_a_checkpoint_is_named_in_a_line(export, file, text, tmp_path, say):  # noqa: F811
    damaged = Path(shutil.copytree(export, tmp_path / "damaged")) / file
    damaged.write_bytes(damaged.read_bytes()[:-10] if text is None else text.encode())
    code, printed, complaint = say("sample", tmp_path / "damaged", "--task", "t", *FEW)
    assert code == 1 and printed == ""
    assert complaint.startswith(f"error: {damaged}: ") and complaint.count("\n") == 1


@pytest.mark.parametrize(
    ("task", "given"),
    [
        ("joint", {}),
        ("t2i", {"prompts": [PROMPT] * 3, "batch": 2}),
        ("i2t2i", {"images": 1}),
        ("gibbs", {"count": 2}),
        ("gibbs", {"prompts": [PROMPT]}),
        ("gibbs", {"images": 1}),
        ("interpolate", {"images": 2, "count": 3, "batch": 1}),
        ("interpolate", {"images": 2, "count": 5, "batch": 2}),
    ],
)
def test_the_bar_is_full_when_all_is_drawn_and_not_before(export, tmp_path, monkeypatch, task, given):  # noqa: F811
    bars = []

    class Watched(sampling._Bar):
        def chunk_done(self) -> None:
            bars.append((self, self.calls, self.bars.tasks[0].percentage))
            super().chunk_done()

    monkeypatch.setattr(sampling, "_Bar", Watched)
    pictures = [tmp_path / f"{number}.png" for number in range(given.pop("images", 0))]
    for number, path in enumerate(pictures):
        noise_image(number).save(path)
    settings = sampling.Settings(steps=2, beams=1, rounds=2)
    request = sampling.Request(str(export), task, images=pictures, settings=settings, **given)
    sampling.run(request, Store(str(tmp_path)), Named(), tmp_path / "out", Console(file=io.StringIO()))
    chunks = len(request.chunks)
    for done, (bar, calls, percentage) in enumerate(bars, start=1):
        assert calls == bar.expected
        assert percentage == pytest.approx(100 * done / chunks)
    assert len(bars) == chunks and bars[-1][0].bars.tasks[0].percentage == 100
