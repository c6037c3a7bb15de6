#!/usr/bin/env bash
# s3fs 2026.9.0 (fsspec 2026.9.0, aiobotocore 3.10.0), pyarrow 26.0.1, against moto 5.2.5 on loopback
# Behaviour: a Parquet file opened through fs.open reads ahead 50 MB whenever a reader asks for a byte range. Reading the small
#   column of one row group (about 6 kB) of a file of 67 MB fetches 52 MB. With cache_type="none" it fetches 72 kB.
# Why it matters: shards of latents have a small key column beside 16 kB a row. Counting rows, looking up keys and reading single
#   row groups on an object store then cost hundreds of times their bytes, on every worker.
# Seen: default 52,500,557 bytes fetched; cache_type="none" 71,757.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check s3fs==2026.9.0 fsspec==2026.9.0 aiobotocore==3.10.0 \
    'moto[s3]==5.2.5' flask==3.1.3 flask-cors pyarrow==26.0.1 numpy==2.4.6
export AWS_ACCESS_KEY_ID=any AWS_SECRET_ACCESS_KEY=any AWS_DEFAULT_REGION=us-east-1
"$folder/venv/bin/python" - 2>"$folder/log" <<'PYTHON' || { tail -n 3 "$folder/log"; exit 1; }
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import s3fs
from moto.server import ThreadedMotoServer

server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
server.start()
store = s3fs.S3FileSystem(endpoint_url=f"http://127.0.0.1:{server.get_host_and_port()[1]}")
store.mkdir("bucket")
moments = pa.FixedSizeBinaryArray.from_buffers(pa.binary(16384), 4096, [None, pa.py_buffer(np.random.default_rng(0).bytes(2**26))])
with store.open("bucket/latents.parquet", "wb") as file:
    table = pa.table({"key": [f"{n:020}" for n in range(4096)], "moments": moments})
    pq.write_table(table, file, row_group_size=256, compression="none", use_dictionary=False)

fetched, fetch = [], s3fs.core.S3File._fetch_range
s3fs.core.S3File._fetch_range = lambda self, start, end: fetched.append(end - start) or fetch(self, start, end)
bytes_of = {}
for label, options in {"default": {}, 'cache_type="none"': {"cache_type": "none"}}.items():
    fetched.clear()
    with store.open("bucket/latents.parquet", "rb", **options) as file:
        keys = pq.ParquetFile(file, pre_buffer=bool(options)).read_row_group(1, columns=["key"])
    bytes_of[label] = sum(fetched)
    print(f"{label}: {keys.nbytes:,} bytes wanted, {bytes_of[label]:,} fetched")
server.stop()
same = bytes_of["default"] > 50_000_000 and bytes_of['cache_type="none"'] < 200_000
print("as described" if same else "CHANGED")
sys.exit(not same)
PYTHON
