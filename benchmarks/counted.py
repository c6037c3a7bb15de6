"""An S3 server in this process that counts what is fetched from it."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import boto3
from moto.core.base_backend import BackendDict
from moto.moto_server.werkzeug_app import DomainDispatcherApplication
from moto.server import ThreadedMotoServer
from s3fs import S3FileSystem

BUCKET = "data"
KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}


@dataclass
class Counted:
    """What was asked of the server since `forget`: requests, bytes of its answers, and the paths of what was fetched.

    While `busy` says so it answers 503, and does nothing.
    """

    requests: int = 0
    bytes: int = 0
    paths: list[str] = field(default_factory=list)
    busy: Callable[[], bool] = lambda: False

    def forget(self) -> None:
        self.requests, self.bytes, self.paths = 0, 0, []


@contextmanager
def counted_s3(address: str = "127.0.0.1") -> Iterator[Counted]:
    """A server with an empty bucket `data`, which this process's S3 file systems use while here."""
    counted, answer = Counted(), DomainDispatcherApplication.__call__
    # A line a request takes longer than the request.
    logging.getLogger("werkzeug").setLevel(logging.ERROR)

    def counting(self: Any, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        def starts(status: str, headers: list[tuple[str, str]], *more: Any) -> Any:
            length = dict((name.lower(), value) for name, value in headers).get("content-length", "0")
            counted.requests += 1
            if environ["REQUEST_METHOD"] == "GET":
                counted.bytes += int(length)
                counted.paths.append(environ["PATH_INFO"])
            return start_response(status, headers, *more)

        if counted.busy():
            start_response("503 Service Unavailable", [("Content-Length", "0")])
            return []
        found: Iterable[bytes] = answer(self, environ, starts)
        return found

    # What an earlier server of this process held is not here.
    BackendDict.reset()
    with patch.object(DomainDispatcherApplication, "__call__", counting):
        server = ThreadedMotoServer(ip_address=address, port=0, verbose=False)
        server.start()
        host, port = server.get_host_and_port()
        with patch.dict(os.environ, {**KEYS, "AWS_ENDPOINT_URL": f"http://{host}:{port}"}):
            # fsspec keeps a file system for a process, and with it the endpoint that it began with.
            S3FileSystem.clear_instance_cache()
            boto3.client("s3").create_bucket(Bucket=BUCKET)
            yield counted
        server.stop()
        S3FileSystem.clear_instance_cache()
