"""What the loader makes of the rows: selection, latents, noise, validation, errors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests.training.synthetic import CLIP, MOMENTS, SCALE, TEXT, config, write_shards
from tests.training.test_order import _gather
from training.heldout import held_out
from training.latents import ShardError
from training.loader import Loader


def _rows(shards: tuple[str, ...]) -> dict[str, dict]:
    return {row["key"]: row for shard in shards for row in pq.read_table(shard).to_pylist()}


def test_values_are_those_of_the_shard(tmp_path: Path) -> None:
    shards = write_shards(tmp_path, logvar=-30.0)  # a standard deviation of 3e-7: the latent is the mean
    loader, rows = Loader(config(), shards), _rows(shards)
    batch, keys = loader.batch(3), loader.keys(3)
    for i, key in enumerate(keys):
        moments = np.frombuffer(rows[key]["moments"], np.float16).reshape(MOMENTS).astype(np.float32)
        torch.testing.assert_close(batch.clean["latent"][i], torch.tensor(moments[:2] * SCALE), rtol=0, atol=1e-6)
        for part, shape in (("clip", CLIP), ("text", TEXT)):
            exact = np.frombuffer(rows[key][part], np.float16).reshape(shape).astype(np.float32)
            assert torch.equal(batch.clean[part][i], torch.tensor(exact))


def test_latents_are_drawn_anew_each_epoch_with_the_given_variance(tmp_path: Path) -> None:
    shards = write_shards(tmp_path, files=1, rows=8, group=8, logvar=2 * np.log(3.0))
    run = config(validation={"fraction": 0.0})
    loader, rows = Loader(run, shards), _rows(shards)
    draws = []
    for step in range(200):  # a batch of 8 is an epoch
        batch = loader.batch(step)
        for key, latent in zip(loader.keys(step), batch.clean["latent"], strict=True):
            mean = np.frombuffer(rows[key]["moments"], np.float16).reshape(MOMENTS)[:2].astype(np.float32)
            draws.append(latent.numpy() / SCALE - mean)
    assert np.mean(draws) == pytest.approx(0.0, abs=0.05)
    assert np.std(draws) == pytest.approx(3.0, rel=0.01)


def test_timesteps_and_noise_have_their_distributions(tmp_path: Path) -> None:
    loader = Loader(config(global_batch=64), write_shards(tmp_path))
    batches = [loader.batch(step) for step in range(60)]
    image, text = (torch.cat([batch.timesteps[name] for batch in batches]).double() for name in ("image", "text"))
    for t in (image, text):
        assert 1 <= t.min() < 10 and 991 < t.max() <= 1000
        assert t.mean() == pytest.approx(500.5, abs=20)
    assert abs(float(torch.corrcoef(torch.stack([image, text]))[0, 1])) < 0.06
    noise = torch.cat([batch.noise["text"].flatten() for batch in batches])
    assert noise.mean() == pytest.approx(0, abs=0.02) and noise.std() == pytest.approx(1, abs=0.02)


def test_samples_do_not_depend_on_the_workers(tmp_path: Path) -> None:
    shards = write_shards(tmp_path)
    alone = Loader(config(), shards).batch(13)
    gang = [Loader(config(), shards, rank, 4, _gather(config(), shards, 4)).batch(13) for rank in range(4)]
    for kind in ("clean", "noise", "timesteps"):
        for name, tensor in getattr(alone, kind).items():
            assert torch.equal(torch.cat([getattr(batch, kind)[name] for batch in gang]), tensor)


def test_prefetched_batches_are_the_same_and_errors_come_through(tmp_path: Path) -> None:
    shards = write_shards(tmp_path)
    loader = Loader(config(), shards)
    for step, batch in enumerate(loader.batches(4, 9), start=4):
        assert torch.equal(batch.noise["latent"], loader.batch(step).noise["latent"])
    fresh = Loader(config(), shards)
    Path(shards[1]).write_bytes(b"PAR1 no more")
    fresh.reader._footers.clear()
    with pytest.raises(ShardError, match="00001.parquet: cannot be read as Parquet"):
        for _ in fresh.batches(0, 10):
            pass


def test_a_flipped_bit_is_an_error_and_never_another_number(tmp_path: Path) -> None:
    shards = write_shards(tmp_path)
    damaged = _rows(shards)["00010019"]["moments"]
    data = bytearray(Path(shards[1]).read_bytes())
    # The highest bit of an exponent: a moment of 0.6 becomes one of 40,000.
    data[data.index(damaged) + 1] ^= 0x40
    Path(shards[1]).write_bytes(data)
    line = f"^{shards[1]}: row group 2 cannot be read: .*CRC.*; `unidiffuser verify DATASET` names what is damaged$"
    with pytest.raises(ShardError, match=line):
        for _ in Loader(config(), shards).batches(0, 20):
            pass


def test_where_and_the_hash_decide_which_rows_train(tmp_path: Path) -> None:
    shards = write_shards(tmp_path)
    run = config(data={"where": ["AESTHETIC >= 4", "aesthetic != 6"]})
    loader = Loader(run, shards)
    good = {key for key, row in _rows(shards).items() if row["aesthetic"] in (4, 5, 7, 8)}
    held = {key for key in good if held_out(key, 0.2)}
    seen = set(sum((loader.keys(step) for step in range(-(-loader.rows // 8))), []))
    assert held and seen == good - held
    assert loader.index.held.sum() == len(held)
    other = Loader(config(seed=99, data={"where": ["aesthetic >= 4"]}), shards)
    assert not held & set(sum((other.keys(step) for step in range(20)), []))


def test_about_the_given_fraction_is_held_out() -> None:
    share = sum(held_out(f"{number:09d}", 0.05) for number in range(20000)) / 20000
    assert share == pytest.approx(0.05, abs=0.006)
    assert not any(held_out(str(number), 0.0) for number in range(1000))


def test_validation_is_fixed_and_shared_out(tmp_path: Path) -> None:
    shards = write_shards(tmp_path)
    whole = Loader(config(), shards).validation()
    again = Loader(config(), shards).validation()
    assert whole is not None and again is not None and len(whole) == 11
    assert torch.equal(whole.noise["clip"], again.noise["clip"])
    parts = [Loader(config(), shards, rank, 2, _gather(config(), shards, 2)).validation() for rank in range(2)]
    assert torch.equal(torch.cat([part.clean["latent"] for part in parts if part]), whole.clean["latent"])
    assert len(set(whole.timesteps["image"].tolist())) == 8  # evenly spread, each level in turn
    assert Loader(config(validation={"fraction": 0.0}), shards).validation() is None


def test_errors_name_file_and_field(tmp_path: Path) -> None:
    shards = write_shards(tmp_path)
    with pytest.raises(ShardError, match="data.where names beauty, numeric columns are aesthetic"):
        Loader(config(data={"where": ["beauty > 1"]}), shards)
    with pytest.raises(ValueError, match="no row is left"):
        Loader(config(data={"where": ["aesthetic > 100"]}), shards)
    with pytest.raises(ShardError, match="no latent shard"):
        Loader(config(), [])
    table = pq.read_table(shards[0])
    pq.write_table(table.drop_columns(["clip"]), tmp_path / "noclip.parquet")
    with pytest.raises(ShardError, match="noclip.parquet: no column clip"):
        Loader(config(), [str(tmp_path / "noclip.parquet")])
    pq.write_table(table.replace_schema_metadata({}), tmp_path / "bare.parquet")
    with pytest.raises(ShardError, match="bare.parquet: the schema metadata lacks moments"):
        Loader(config(), [str(tmp_path / "bare.parquet")])
    (larger,) = write_shards(tmp_path / "larger", files=1, side=8)
    with pytest.raises(ShardError, match="larger/00000.parquet: rows are"):
        Loader(config(), [*shards, larger])


def test_where_takes_laions_names_and_the_precision_of_the_column(tmp_path: Path) -> None:
    (shard,) = write_shards(tmp_path, files=1)
    table = pq.read_table(shard)
    scores = pa.array([0.7 if row % 2 else None for row in range(40)], pa.float32())
    widths = pa.array([256 + row for row in range(40)], pa.int32())
    pq.write_table(table.set_column(5, "aesthetic", scores).append_column("width", widths), shard)
    where = ["AESTHETIC_SCORE >= 0.7", "WIDTH not in [257, 259]"]
    run = config(data={"where": where}, validation={"fraction": 0.0})
    assert sorted(Loader(run, (shard,)).keys(0) + Loader(run, (shard,)).keys(1))[:3] == ["00000005", "00000007", "00000009"]
    with pytest.raises(ValueError, match="latent shards have numbers to compare"):
        config(data={"where": ['caption == "7"']})
