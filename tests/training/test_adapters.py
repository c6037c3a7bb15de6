"""LoRA: only adapters are trained, they come back bit-identically, and merged they compute what peft computes unmerged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from tests.stages.train.published import published
from tests.training.plain import loss_of
from tests.training.synthetic import KeepIn, config, history, losses, poison, write_shards
from training.begin import ALL
from training.checkpoint import CheckpointError, read_state
from training.job import TrainingError, TrainJob
from training.loader import Loader
from training.loop import run
from unidiffuser.weights import load_native, save_native

CPU = torch.device("cpu")
LORA = {"rank": 2, "alpha": 3, "targets": ("attn.qkv", "mlp.fc2", "skip_linear")}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    return write_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("base")
    save_native(folder, published())
    return str(folder)


@pytest.fixture(scope="module")
def adapted(alone: None, shards: tuple[str, ...], base: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 6 steps with checkpoints after 3 and 6."""
    folder = tmp_path_factory.mktemp("adapted")
    run(TrainJob(config(lora=LORA), shards, str(folder / "work"), KeepIn(str(folder)), weights=base), CPU)
    return folder


def test_merged_equals_unmerged_and_nothing_else_has_changed(adapted: Path, base: str, shards: tuple[str, ...]) -> None:
    before, after = load_native(base), load_native(adapted / "6")
    changed = {name for name, tensor in before.state_dict().items() if not torch.equal(tensor, after.state_dict()[name])}
    assert changed == {
        f"{block}.{layer}.weight"
        for block in ("in_blocks.0", "mid_block", "out_blocks.0")
        for layer in LORA["targets"]
        if layer != "skip_linear" or block == "out_blocks.0"
    }
    unmerged = PeftModel.from_pretrained(load_native(base), str(adapted / "6")).eval()
    batch = Loader(config(), shards).batch(0)
    with torch.no_grad():
        ours, theirs, start = (model(batch.noise, batch.timesteps) for model in (after, unmerged, before))
    for part in ours:
        torch.testing.assert_close(ours[part], theirs[part], rtol=0, atol=1e-6)
        assert not torch.allclose(ours[part], start[part], atol=1e-4)
    # The moving average is merged likewise, of what is beside it.
    delta = {name: tensor.double() for name, tensor in load_file(adapted / "6" / "adapter_ema.safetensors").items()}
    name = "base_model.model.mid_block.attn.qkv"
    product = 3 / 2 * delta[f"{name}.lora_B.weight"] @ delta[f"{name}.lora_A.weight"]
    moved = load_file(adapted / "6" / "ema.safetensors")["mid_block.attn.qkv.weight"] - before.mid_block.attn.qkv.weight
    torch.testing.assert_close(moved.double(), product, rtol=0, atol=1e-7)


def test_its_first_loss_is_that_of_the_weights_and_it_goes_on_bit_identically(
    adapted: Path, base: str, shards: tuple[str, ...], tmp_path: Path
) -> None:
    plain = TrainJob(config(steps=0), shards, str(tmp_path / "work"), KeepIn(str(tmp_path / "plain")), weights=base)
    run(plain, CPU)
    assert losses(adapted / "6")[0] == losses(tmp_path / "plain" / "0")[0]
    again = TrainJob(
        config(lora=LORA), shards, str(tmp_path / "work"), KeepIn(str(tmp_path)), weights=base, resume=str(adapted / "3")
    )
    run(again, CPU)
    assert history(tmp_path / "6") == history(adapted / "6")
    files = sorted(path.name for path in (adapted / "6").iterdir() if path.name != "history.jsonl")
    assert {
        "adapter_config.json",
        "adapter_model.safetensors",
        "adapter_ema.safetensors",
        "share-00000-of-00001.safetensors",
    } < set(files)
    for name in files:
        assert (tmp_path / "6" / name).read_bytes() == (adapted / "6" / name).read_bytes(), name
    moments = load_file(adapted / "6" / "exp_avg.safetensors")
    assert all("lora_" in name for name in moments) and len(moments) == 2 * 7


def test_a_rollback_takes_the_adapters_back_and_goes_on_past_the_places(alone: None, base: str, tmp_path: Path) -> None:
    """As plain torch trains them on all batches but the bad one."""
    shards = write_shards(tmp_path / "shards")
    fields: dict[str, Any] = {
        "lora": LORA, "damage": {"steps_in_a_row": 0}, "checkpoint_every": 2, "schedule": {"warmup_steps": 0}, "steps": 7
    }  # fmt: skip
    loader = Loader(config(**fields), shards)
    poison(shards, loader.keys(4)[3])

    def trained(steps: int, name: str) -> Path:
        on = TrainJob(
            config(**fields | {"steps": steps}), shards, str(tmp_path / "work"), KeepIn(str(tmp_path / name)), weights=base
        )
        run(on, CPU)
        return tmp_path / name / str(steps)

    model = PeftModel.from_pretrained(load_native(base), str(trained(0, "start")), is_trainable=True)
    adapters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(adapters, lr=5e-3, betas=(0.9, 0.9), weight_decay=0.03)
    for batch in (0, 1, 2, 3, 5, 6, 7):
        optimizer.zero_grad()
        loss_of(model, loader.batch(batch)).backward()
        torch.nn.utils.clip_grad_norm_(adapters, 0.5)
        optimizer.step()
    found = trained(7, "back")
    assert read_state(found).damage.rollbacks == 1
    saved = load_file(found / "adapter_model.safetensors")
    expected = {name.replace(".default.", "."): weight for name, weight in model.named_parameters() if weight.requires_grad}
    assert saved.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(saved[name], weight.detach(), rtol=0, atol=5e-5)


@pytest.mark.parametrize("zero_stage", [0, 3])
def test_zero_stages_agree(adapted: Path, base: str, shards: tuple[str, ...], tmp_path: Path, zero_stage: int) -> None:
    settings = config(lora=LORA, zero_stage=zero_stage, micro_batch=4)
    run(TrainJob(settings, shards, str(tmp_path / "work"), KeepIn(str(tmp_path)), weights=base), CPU)
    assert losses(tmp_path / "6") == pytest.approx(losses(adapted / "6"), abs=1e-5)
    ours, theirs = (load_file(folder / "6" / "adapter_model.safetensors") for folder in (tmp_path, adapted))
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-5)


def test_adapters_need_weights_and_layers_that_are_there(alone: None, shards: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="lora trains adapters on given weights: name them in `weights`"):
        run(TrainJob(config(lora=LORA), shards, str(tmp_path), KeepIn(str(tmp_path))), CPU)
    with pytest.raises(ValueError, match="Input should be 'attn.qkv', "):
        config(lora={"targets": ("attn.query",)})


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"lora": LORA | {"rank": 4}}, "lora.rank: its adapters have 2, this run's 4; export it, which merges"),
        ({"lora": LORA | {"targets": ("attn.qkv",)}}, "lora.targets: only it has adapters on in_blocks.0.mlp.fc2; export it"),
        (
            {"lora": LORA | {"targets": (*LORA["targets"], "attn.proj")}},
            "lora.targets: only this run has adapters on in_blocks.0.attn.proj; export it",
        ),
        ({}, "its optimizer kept what its adapters need, and nothing of position; leave optimizer out of keep"),
    ],
)
def test_adapters_that_do_not_fit_are_a_line_and_none_is_left_out_unsaid(
    adapted: Path, base: str, shards: tuple[str, ...], tmp_path: Path, changes: dict[str, Any], line: str
) -> None:
    job = TrainJob(
        config(steps=8, **changes), shards, str(tmp_path / "work"), KeepIn(str(tmp_path)), weights=base,
        init_from=str(adapted / "6"), keep=ALL,
    )  # fmt: skip
    with pytest.raises(CheckpointError, match=f"^{adapted}/6: {line}"):
        run(job, CPU)


def test_adapters_cannot_begin_from_a_checkpoint_without_them(
    adapted: Path, base: str, shards: tuple[str, ...], tmp_path: Path
) -> None:
    run(TrainJob(config(steps=0), shards, str(tmp_path / "work"), KeepIn(str(tmp_path)), weights=base), CPU)
    plain = str(tmp_path / "0")
    job = TrainJob(config(lora=LORA), shards, str(tmp_path / "work"), KeepIn(str(tmp_path / "a")), weights=base, init_from=plain)
    with pytest.raises(CheckpointError, match="its training had no lora; name it in `weights` for adapters to begin on it"):
        run(job, CPU)
