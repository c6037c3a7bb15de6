"""download, from a web that misbehaves: every row ends with the status that its page deserves, and the shard completes."""

from __future__ import annotations

import hashlib
import io
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from infra.store import Store
from stages.download.network import Guard, dial
from stages.download.stage import Download, DownloadConfig
from stages.filter.stage import Filter
from stages.runner.contract import StageError
from tests.stages.hostile_files import FILES, JPEG
from tests.stages.hostile_tls import TLS, TLS_STATUS, tls_web
from tests.stages.hostile_web import HOST, PAGES, STATUS, Handler, hostile_web
from tests.stages.pages import name_of, samples_of, selector, table_of

# Apart from each other by seconds, and short of the three that a server sleeps: other tests may keep the machine busy.
FAST = {
    "timeout": 2.0, "deadline": 8.0, "retries": 1, "max_bytes": 2_000_000, "min_image_size": 64, "host_connections": 64,
}  # fmt: skip


@pytest.fixture(scope="module")
def web():
    with hostile_web() as place:
        yield place


@pytest.fixture(scope="module")
def hosts(web, tmp_path_factory):
    """What leads to the hostile web, whose authority is trusted as long."""
    folder = tmp_path_factory.mktemp("tls")
    with tls_web(folder) as secure, pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSL_CERT_FILE", str(folder / "authority.pem"))
        yield {HOST: web, "xn--bcher-kva.example": web, **dict.fromkeys(TLS, secure)}


@pytest.fixture
def select(tmp_path, make):
    return selector(tmp_path, make)


def test_every_misbehaviour_gets_its_status_and_nothing_beyond_loopback_is_dialled(
    store, hosts, select, make, in_process, monkeypatch
):
    dialled = set()

    def resolve(host, port, wait):
        # Numbers are read as the system reads them; the only name that `hosts` does not know does not exist.
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)

    def listening(family, address, wait):
        dialled.add(f"{address[0]}:{address[1]}")
        return dial(family, address, wait)

    monkeypatch.setattr("stages.download.network.Guard", partial(Guard, resolve=resolve, dial=listening))
    wanted = STATUS | TLS_STATUS
    start = time.monotonic()
    dataset = make(Download, store, {"rows": select(store, list(wanted))}, hosts=hosts, **FAST)
    assert time.monotonic() - start < 60
    assert dialled == set(hosts.values()), "what is forbidden is refused before a connection is tried"
    table = table_of(dataset)
    found = dict(zip(table["url"].to_pylist(), table["status"].to_pylist(), strict=True))
    assert found == wanted and len(wanted) > 150
    stats, counts = dataset.manifest.stats, Counter(wanted.values())
    assert stats.rows_in == len(wanted) and stats.rows_out == counts.pop("success")
    assert stats.dropped == counts
    came = {sample.meta["url"] for sample in samples_of(dataset)}
    assert came == {url for url, status in wanted.items() if status == "success"}


def test_a_handshake_that_stalls_ends_with_the_deadline(store, hosts, select, make, in_process):
    rows = select(store, ["https://stalls.example/", "jpeg"])
    dataset = make(Download, store, {"rows": rows}, hosts=hosts, timeout=30, deadline=1)
    assert dataset.manifest.stats.dropped == {"deadline": 1}, "and not when the server closes the connection"


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
        elif name.startswith("turned"):
            # Where EXIF's table puts the bright left edge of the file: 1 and 4 left, 2 and 3 right, 5 and 6 top, 7 and 8 bottom.
            bright = {"14": red[:, 5], "23": red[:, -5], "56": red[5], "78": red[-5]}
            (side,) = (side for side in bright if name[-1] in side)
            assert all((edge.mean() > 200) == (of == side) for of, edge in bright.items()), name
            assert (image.height > image.width) == (name[-1] in "5678")
        else:
            assert red[:, 5].mean() - red[:, -5].mean() > 100, name


def test_further_captions_travel_with_the_rows(store, web, select, make, in_process):
    names = ["jpeg", "png", "status-404"]
    given = {"alt": ["an alt", None, "x"], "re caption": ["a long one", "another", "x"]}
    rows = select(store, names, columns=given, captions=["alt", "re caption"])
    assert {"caption.alt", "caption.re caption"} <= set(rows.manifest.columns)
    downloaded = make(Download, store, {"rows": rows}, hosts={HOST: web}, **FAST)
    kept = make(Filter, store, {"rows": downloaded}, min_side=None, duplicate_tolerance=None, clip_scores=False)
    for dataset in (downloaded, kept):
        samples = {name_of(one.meta["url"]): one for one in samples_of(dataset)}
        found = {name: (one.caption, *(one.meta[f"caption.{further}"] for further in given)) for name, one in samples.items()}
        assert found == {"jpeg": ("caption of jpeg", "an alt", "a long one"), "png": ("caption of png", None, "another")}
        assert {"caption.alt", "caption.re caption"} <= set(dataset.manifest.columns)
    with pytest.raises(
        StageError, match="columns found: .*; columns needed: lost; name them in `columns` or leave the condition or"
    ):
        select(store, names, columns=given, captions=["lost"])


def test_bytes_that_need_no_change_are_kept(store, web, select, make, in_process):
    dataset = make(Download, store, {"rows": select(store, ["jpeg", "png"])}, hosts={HOST: web})
    stored = {sample.meta["url"].rsplit("/", 1)[-1]: sample.image for sample in samples_of(dataset)}
    assert stored["jpeg"] == JPEG and stored["png"] != FILES["png"][0]


def test_the_same_web_gives_the_same_files(tmp_path, web, select, make, in_process, digests):
    slow = ("drips", "stalls", "never", "status-5", "second", "continues", "slow", "status-429", "status-408")
    names = [name for name in PAGES if not name.startswith(slow)]
    datasets = []
    for number in range(2):
        store = Store(str(tmp_path / f"store-{number}"))
        # Operational fields differ: they must not show in the files.
        settings = {**FAST, "retries": 0, "threads": 1 + 31 * number}
        datasets.append(make(Download, store, {"rows": select(store, names)}, hosts={HOST: web}, **settings))
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


def test_png_quality_is_checked():
    with pytest.raises(ValidationError, match="expected 0 to 9"):
        DownloadConfig(encode_format="png")


def test_full_disk_is_an_error_and_not_a_dead_link(store, web, select, make, in_process, monkeypatch):
    def full(self, *_):
        raise OSError(28, "No space left on device")

    rows = select(store, ["jpeg", "png"])
    monkeypatch.setattr("stages.download.engine.ShardSink.spool", full)
    with pytest.raises(StageError, match="no space is left in"):
        make(Download, store, {"rows": rows}, hosts={HOST: web})


def test_a_machine_that_cannot_start_a_decoder_is_an_error_and_no_broken_picture(
    store, web, select, make, in_process, monkeypatch
):
    def cannot(*_):
        raise OSError(24, "Too many open files")

    rows = select(store, ["jpeg", "png"])
    monkeypatch.setattr("stages.shards.picture.boxed", cannot)
    with pytest.raises(OSError, match="Too many open files"):
        make(Download, store, {"rows": rows}, hosts={HOST: web})


@pytest.fixture
def listed(store, select, in_process):
    """Rows whose metadata lists digests: right by either, wrong by either, none."""
    jpeg, png = FILES["jpeg"][0], FILES["png"][0]
    sha256 = [hashlib.sha256(jpeg).hexdigest().upper(), None, "0" * 64, None, None]
    md5 = [None, hashlib.md5(png).hexdigest(), hashlib.md5(FILES["gif"][0]).hexdigest(), "0" * 32, None]
    return select(store, ["jpeg", "png", "gif", "webp", "bmp"], columns={"sha256": sha256, "md5": md5})


@pytest.mark.parametrize("wish", ["drop", "keep"])
def test_bytes_that_are_not_those_that_the_metadata_lists(store, web, listed, make, in_process, wish):
    dataset = make(Download, store, {"rows": listed}, hosts={HOST: web}, on_hash_mismatch=wish)
    rows = {name_of(row["url"]): row for row in table_of(dataset).to_pylist()}
    assert {name: row["hash_matches"] for name, row in rows.items()} == {
        "jpeg": True, "png": True, "gif": False, "webp": False, "bmp": None,
    }  # fmt: skip
    assert all(row["sha256"] == hashlib.sha256(FILES[name][0]).hexdigest() for name, row in rows.items())
    assert rows["gif"]["listed_sha256"] == "0" * 64 and rows["webp"]["listed_md5"] == "0" * 32
    came = {name_of(sample.meta["url"]) for sample in samples_of(dataset)}
    assert dataset.manifest.summary["hash_mismatch"] == 2 and dataset.manifest.summary["can_heal"] == 0
    if wish == "drop":
        assert dataset.manifest.stats.dropped == {"hash_mismatch": 2} and came == {"jpeg", "png", "bmp"}
        assert rows["gif"]["status"] == "hash_mismatch"
    else:
        assert dataset.manifest.stats.rows_out == 5 and came == set(rows)


def test_a_worker_that_is_killed_leaves_no_folder_for_files_of_a_time(tmp_path: Path) -> None:
    # SIGKILL is how Ray ends a pool's workers.
    work = "import os, signal; import stages.download.downloader; os.kill(os.getpid(), signal.SIGKILL)"
    ended = subprocess.run([sys.executable, "-c", work], env={**os.environ, "TMPDIR": str(tmp_path)}, check=False)
    assert ended.returncode == -signal.SIGKILL and list(tmp_path.iterdir()) == []
