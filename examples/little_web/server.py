"""Serves a little web, on loopback unless it is told otherwise, and misbehaves as the first directory of a path says.

pictures/, small/, copy/  a picture                     page/       HTML under the name of a picture
moved/                    a redirect to the picture     dead/       404
slow/                     a picture after two seconds   broken/     500
truncated/                half of a picture             noai/       a picture with X-Robots-Tag: noai
"""

from __future__ import annotations

import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType

SLOW_SECONDS = 2.0
TYPES = {".png": "image/png", ".jpg": "image/jpeg", ".webp": "image/webp"}


class Handler(BaseHTTPRequestHandler):
    """Answers GET by path alone."""

    pages: Path
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        kind, _, name = self.path.split("?")[0].lstrip("/").partition("/")
        if kind == "broken":
            return self._answer(500, b"broken\n", {"Content-Type": "text/plain"})
        if kind == "moved":
            return self._answer(302, b"", {"Location": f"/to/{name}"})
        file = self.pages / ("moved" if kind == "to" else kind) / Path(name).name
        if not name or kind == "dead" or not file.is_file():
            return self._answer(404, b"not found\n", {"Content-Type": "text/plain"})
        body, headers = file.read_bytes(), {"Content-Type": TYPES.get(file.suffix, "application/octet-stream")}
        if kind == "slow":
            time.sleep(SLOW_SECONDS)
        elif kind == "truncated":
            body = body[: len(body) // 2]
        elif kind == "noai":
            headers["X-Robots-Tag"] = "noai, noimageai"
        elif kind == "page":
            headers["Content-Type"] = "text/html"
        self._answer(200, body, headers)

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        try:
            self.wfile.write(body)
        except ConnectionError:
            pass  # the reader has given up, as readers of a slow web do

    def log_message(self, format: str, *args: object) -> None:
        """Silent: a thousand lines of access log would hide what the pipeline says."""


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # img2dataset opens many connections at once


class LittleWeb:
    """A little web, served from a thread while the `with` block runs.

    Example:
        >>> with LittleWeb(build("web", rows=100)) as web:
        ...     print(web.address)
        127.0.0.1:40123

    Attributes:
        address: "127.0.0.1:PORT".
    """

    def __init__(self, folder: str | Path, port: int = 0, host: str = "127.0.0.1") -> None:
        """Bind the port (0 takes a free one) of `host`. Raises FileNotFoundError for a folder that `build` did not make."""
        pages = Path(folder) / "pages"
        if not pages.is_dir():
            raise FileNotFoundError(f"{folder}: no pages/ in it; make one with `python -m examples.little_web {folder}`")
        handler = type("PagesHandler", (Handler,), {"pages": pages})
        self._server = Server((host, port), handler)
        self._thread = threading.Thread(target=self._server.serve_forever, name="little-web", daemon=True)
        self.address = f"{host}:{self._server.server_address[1]}"

    def __enter__(self) -> LittleWeb:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
