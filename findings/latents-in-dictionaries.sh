#!/usr/bin/env bash
# pyarrow 26.0.1, numpy 2.4.6
# Behaviour: write_table with its defaults puts 512 different binaries of 16 kB into ONE dictionary page of 8 MB, and only indices
#   into the data pages. The limit for dictionaries (dictionary_pagesize_limit, 1 MB) is looked at once in 1,024 values, and a row
#   group of latents has fewer.
# Why it matters: precomputed latents are such binaries. Nothing repeats, so the dictionary saves nothing; a reader has to take the
#   whole page before it can have the first row, and pays for the indirection. use_dictionary=[names of the small columns] avoids it.
# Seen: a dictionary page of 8,389,629 bytes with the default; none with use_dictionary=False, and the same file size.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check pyarrow==26.0.1 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import io
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

moments = np.random.default_rng(0).standard_normal((512, 8, 32, 32)).astype(np.float16)
table = pa.table({"moments": pa.array([row.tobytes() for row in moments], pa.binary(moments[0].nbytes))})
pages = {}
for dictionary in (True, False):
    file = io.BytesIO()
    pq.write_table(table, file, compression="none", use_dictionary=dictionary)
    column = pq.ParquetFile(file).metadata.row_group(0).column(0)
    start = column.dictionary_page_offset
    pages[dictionary] = 0 if start is None else column.data_page_offset - start
    print(f"use_dictionary={dictionary}: {len(file.getvalue()):,} bytes, dictionary page of {pages[dictionary]:,} bytes")
same = pages[True] > 512 * 16384 and pages[False] == 0
print("as described" if same else "CHANGED")
sys.exit(not same)
PYTHON
