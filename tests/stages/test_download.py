"""download, from a web that misbehaves: every row ends with the status that its page deserves, and the shard completes."""

from __future__ import annotations

import hashlib
import io
import time
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pydantic import ValidationError

from infra.store import Store
from stages.download import Download, DownloadConfig
from stages.fetch import FetchError, Limits, WebOpener, is_public
from stages.select import Select
from stages.tar import read_samples
from tests.stages.hostile_web import FILES, HOST, JPEG, STATUS, Handler, hostile_web

FAST = {"timeout": 1.0, "deadline": 3.0, "retries": 1, "max_bytes": 2_000_000, "min_image_size": 64}


@pytest.fixture(scope="module")
def web():
    with hostile_web() as place:
        yield place


@pytest.fixture
def select(tmp_path, make):
    """(store, page names) -> select dataset of these pages."""

    def select(store, names, file="pages", shard_rows=1000):
        table = {
            "URL": [f"http://{HOST}/{name}" if "://" not in name else name for name in names],
            "TEXT": [f"caption of {name}" for name in names],
            "WIDTH": [1] * len(names),
            "similarity": [0.3] * len(names),
        }
        pq.write_table(pa.table(table), tmp_path / f"{file}.parquet")
        return make(Select, store, metadata=[str(tmp_path / "pages*.parquet")], shard_rows=shard_rows)

    return select


def samples_of(dataset):
    found = []
    for entry in dataset.files:
        if entry.name.endswith(".tar"):
            with dataset.open(entry) as file:
                found.append(list(read_samples(file)))
            assert len(found[-1]) == entry.rows
    return [sample for shard in found for sample in shard]


def table_of(dataset):
    return pa.concat_tables([pq.read_table(dataset.url(entry)) for entry in dataset.files if entry.name.endswith(".parquet")])


def test_every_misbehaviour_gets_its_status(store, web, select, make, in_process):
    rows = select(store, list(STATUS))
    start = time.monotonic()
    dataset = make(Download, store, {"rows": rows}, hosts={HOST: web}, **FAST)
    assert time.monotonic() - start < 30
    table = table_of(dataset)
    names = [url.removeprefix(f"http://{HOST}/") for url in table["url"].to_pylist()]
    found = dict(zip(names, table["status"].to_pylist(), strict=True))
    assert found == STATUS
    stats = dataset.manifest.stats
    wanted = Counter(STATUS.values())
    assert stats.rows_in == len(STATUS) and stats.rows_out == wanted.pop("success")
    assert stats.dropped == wanted
    came = {sample.meta["url"].removeprefix(f"http://{HOST}/") for sample in samples_of(dataset)}
    assert came == {name for name, status in STATUS.items() if status == "success"}


def test_pixels_are_those_of_the_page(store, web, select, make, in_process):
    names = [name for name, (_, status) in FILES.items() if status == "success"]
    dataset = make(Download, store, {"rows": select(store, names)}, hosts={HOST: web}, image_size=200)
    for sample in samples_of(dataset):
        name = sample.meta["url"].rsplit("/", 1)[-1]
        image = Image.open(io.BytesIO(sample.image))
        assert image.size == (sample.meta["width"], sample.meta["height"])
        assert min(image.size) == 200 and sample.extension == "jpg" and image.format == "JPEG"
        assert sample.meta["sha256"] == hashlib.sha256(FILES[name][0]).hexdigest()
        assert sample.caption == f"caption of {name}" and sample.meta["similarity"] == pytest.approx(0.3)
        red = np.asarray(image.convert("RGB"))[..., 0].astype(float)
        if name == "transparent":
            assert red.min() == 255
        elif name == "turned":
            # Orientation 6: the left edge of the stored picture is the top one.
            assert image.height > image.width and red[5].mean() > 200 and red[-5].mean() < 50
        else:
            assert red[:, 5].mean() - red[:, -5].mean() > 100, name


def test_bytes_that_need_no_change_are_kept(store, web, select, make, in_process):
    dataset = make(Download, store, {"rows": select(store, ["jpeg", "png"])}, hosts={HOST: web})
    stored = {sample.meta["url"].rsplit("/", 1)[-1]: sample.image for sample in samples_of(dataset)}
    assert stored["jpeg"] == JPEG and stored["png"] != FILES["png"][0]


def test_the_same_web_gives_the_same_files(tmp_path, web, select, make, in_process, digests):
    names = [name for name in STATUS if not name.startswith(("drips", "stalls", "never", "status-5", "second"))]
    datasets = []
    for number in range(2):
        store = Store(str(tmp_path / f"store-{number}"))
        # Operational fields differ: they must not show in the files.
        datasets.append(make(Download, store, {"rows": select(store, names)}, hosts={HOST: web}, threads=1 + 31 * number, **FAST))
    assert digests(datasets[0]) == digests(datasets[1])
    assert datasets[0].manifest.fingerprint == datasets[1].manifest.fingerprint


def test_retries_what_can_heal_and_nothing_else(store, web, select, make, in_process):
    Handler.asked.clear()
    names = ["status-404", "status-503", "noai", "html", "second-try", "short"]
    make(Download, store, {"rows": select(store, [*names, "jpeg"])}, hosts={HOST: web}, **FAST)
    assert {name: Handler.asked[name] for name in names} == {
        "status-404": 1, "status-503": 2, "noai": 1, "html": 1, "second-try": 2, "short": 2,
    }  # fmt: skip


def test_appended_metadata_fetches_only_its_own_rows(store, web, select, make, in_process, digests, unit_times):
    before = make(Download, store, {"rows": select(store, ["jpeg", "png", "gif"])}, hosts={HOST: web})
    done = unit_times(store, "download")
    Handler.asked.clear()
    after = make(Download, store, {"rows": select(store, ["webp", "large", "jpeg"], file="pages_2")}, hosts={HOST: web})
    assert Handler.asked == {"webp": 1, "large": 1}
    assert unit_times(store, "download").items() > done.items() and digests(after).items() > digests(before).items()


def test_without_respect_for_noai_and_with_a_name_of_its_own(store, web, select, make, in_process):
    rows = select(store, ["noai", "other-robot", "jpeg"])
    rude = make(Download, store, {"rows": rows}, hosts={HOST: web}, respect_noai=False)
    assert rude.manifest.stats.rows_out == 3
    named = make(Download, store, {"rows": rows}, hosts={HOST: web}, user_agent_token="OtherBot")
    assert named.manifest.stats.dropped == {"disallowed": 2}


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "10.1.2.3", "192.168.0.1", "169.254.169.254", "0.0.0.0", "::1", "fe80::1%eth0", "fd00::1", "::ffff:10.0.0.1",
     "::ffff:169.254.169.254", "2002:7f00:1::", "100.64.0.1", "224.0.0.1"],
)  # fmt: skip
def test_addresses_that_are_not_the_web_are_never_dialled(monkeypatch, address):
    def resolve(host, port, **_):
        return [(0, 0, 0, "", (address, port))]

    def dial(*_):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr("stages.fetch.socket.getaddrinfo", resolve)
    monkeypatch.setattr("stages.fetch._PlainSocket", dial)
    opener = WebOpener(Limits(1, 1, 0, 1000))
    with pytest.raises(FetchError, match="^forbidden_address$"):
        opener._follow("http://rebound.example/a.jpg", {}, time.monotonic() + 1)


def test_public_addresses_are():
    assert is_public("93.184.216.34") and is_public("2606:2800:220:1:248:1893:25c8:1946")


def test_png_quality_is_checked():
    with pytest.raises(ValidationError, match="expected 0 to 9"):
        DownloadConfig(encode_format="png")


def test_full_disk_is_an_error_and_not_a_dead_link(store, web, select, make, in_process, monkeypatch):
    def full(self, *_):
        raise OSError(28, "No space left on device")

    rows = select(store, ["jpeg", "png"])
    monkeypatch.setattr("stages.engine.ShardSink.spool", full)
    with pytest.raises(OSError, match="No space left"):
        make(Download, store, {"rows": rows}, hosts={HOST: web})
