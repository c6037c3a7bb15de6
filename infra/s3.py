"""What a store asks of S3 itself, where fsspec's file system would ask for more."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import os
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import fsspec
from fsspec.asyn import sync

# By name, so that s3fs is imported where it is used.
for _protocol in ("s3", "s3a"):
    fsspec.register_implementation(_protocol, "infra.s3_again.S3FileSystem", clobber=True, errtxt="Install s3fs to access S3")

# Bytes of a part of a file that is sent in parts; there may be 10,000 of them.
PART = 2**25
# Parts that are on their way at once.
TOGETHER = 4


def listed(fs: Any, folder: str) -> Iterator[tuple[str, int, datetime]]:
    """Path, bytes and time of writing of every object below a folder, in the order of their names; a request a thousand."""
    bucket, key, _ = fs.split_path(folder)
    more: dict[str, str] = {}
    while True:
        page = fs.call_s3("list_objects_v2", Bucket=bucket, Prefix=f"{key}/" if key else "", **more)
        for found in page.get("Contents", ()):
            yield f"{bucket}/{found['Key']}", found["Size"], found["LastModified"]
        if not page.get("IsTruncated"):
            return
        more = {"ContinuationToken": page["NextContinuationToken"]}


def put(fs: Any, source: str | Path, path: str, sha256: str) -> bool:
    """Send a local file with its digest, so that S3 takes nothing that arrives otherwise.

    Args:
        sha256: of the file, in hexadecimal.

    Returns:
        Whether the server says that it has compared the digest; those that only speak S3's protocol may have not.

    Raises:
        OSError: it was refused, or the file is no longer the one of this digest.
    """
    sent = _in_parts if os.path.getsize(source) > PART else _whole
    return bool(sync(fs.loop, sent, fs, source, path, sha256))


async def _whole(fs: Any, source: str | Path, path: str, sha256: str) -> bool:
    bucket, key, _ = fs.split_path(path)
    told = base64.b64encode(bytes.fromhex(sha256)).decode()
    body = await asyncio.to_thread(Path(source).read_bytes)
    checksum = {"ChecksumAlgorithm": "SHA256", "ChecksumSHA256": told}
    answer = await fs._call_s3("put_object", Bucket=bucket, Key=key, Body=body, **checksum)
    return answer.get("ChecksumSHA256") == told


async def _in_parts(fs: Any, source: str | Path, path: str, sha256: str) -> bool:
    bucket, key, _ = fs.split_path(path)
    place = {"Bucket": bucket, "Key": key}
    upload = await fs._call_s3("create_multipart_upload", ChecksumAlgorithm="SHA256", **place)
    place["UploadId"] = upload["UploadId"]

    async def send(number: int, body: bytes) -> dict[str, Any]:
        told = base64.b64encode(hashlib.sha256(body).digest()).decode()
        checksum = {"ChecksumAlgorithm": "SHA256", "ChecksumSHA256": told}
        answer = await fs._call_s3("upload_part", PartNumber=number, Body=body, **checksum, **place)
        compared = {"ChecksumSHA256": told} if answer.get("ChecksumSHA256") == told else {}
        return {"PartNumber": number, "ETag": answer["ETag"], **compared}

    whole, parts = hashlib.sha256(), list[dict[str, Any]]()
    try:
        with open(source, "rb") as file:
            while some := [body for _ in range(TOGETHER) if (body := file.read(PART))]:
                for body in some:
                    whole.update(body)
                parts += await asyncio.gather(*(send(len(parts) + n, body) for n, body in enumerate(some, 1)))
        if whole.hexdigest() != sha256:
            raise OSError(f"{source}: changed while it was sent")
        await fs._call_s3("complete_multipart_upload", MultipartUpload={"Parts": parts}, **place)
    except BaseException:
        await fs._call_s3("abort_multipart_upload", **place)
        raise
    return all("ChecksumSHA256" in part for part in parts)
