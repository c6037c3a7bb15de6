"""A web server on loopback that behaves as badly as the real one: every path says what it does."""

from __future__ import annotations

import contextlib
import gzip
import io
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
from PIL import Image

HOST = "images.example"


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def picture(width: int = 320, height: int = 240, seed: int = 0) -> Image.Image:
    """Bright on the left, dark on the right, so that a turned picture can be told."""
    across = np.linspace(255, 0, width)[None, :].repeat(height, 0)
    return Image.fromarray(np.stack([across, across * 0.5, np.full_like(across, seed % 255)], -1).astype(np.uint8))


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def deep(width: int = 320) -> Image.Image:
    return Image.fromarray(np.linspace(65535, 0, width)[None, :].repeat(240, 0).astype(np.uint16))


JPEG = encoded(picture(), "JPEG")
# Name -> (body, status that download gives it).
FILES: dict[str, tuple[bytes, str]] = {
    "jpeg": (JPEG, "success"),
    "png": (encoded(picture(), "PNG"), "success"),
    "webp": (encoded(picture(), "WEBP"), "success"),
    "gif": (encoded(picture(), "GIF"), "success"),
    "tiff": (encoded(picture(), "TIFF"), "success"),
    "bmp": (encoded(picture(), "BMP"), "success"),
    "gray": (encoded(picture().convert("L"), "JPEG"), "success"),
    "cmyk": (encoded(picture().convert("CMYK"), "JPEG"), "success"),
    "palette": (encoded(picture().convert("P"), "PNG"), "success"),
    "deep": (encoded(deep(), "PNG"), "success"),
    "transparent": (encoded(Image.new("RGBA", (320, 240), (255, 0, 0, 0)), "PNG"), "success"),
    "turned": (encoded(picture(), "JPEG", exif=exif(6)), "success"),
    "animated": (encoded(picture(), "GIF", save_all=True, append_images=[picture(seed=9)]), "success"),
    "large": (encoded(picture(1600, 1200), "JPEG"), "success"),
    "small": (encoded(picture(40, 30), "JPEG"), "too_small"),
    "bomb": (encoded(Image.new("1", (12_000, 12_000)), "PNG"), "too_many_pixels"),
    "heavy": (JPEG + bytes(3_000_000), "too_large"),
    "empty": (b"", "empty"),
    "html": (b"<!DOCTYPE html><html><body>gone</body></html>", "not_an_image"),
    "svg": (b'<svg xmlns="http://www.w3.org/2000/svg" width="320" height="240"/>', "not_an_image"),
    "noise": (bytes(range(256)) * 40, "not_an_image"),
    "gzip": (gzip.compress(JPEG), "not_an_image"),
    "half-jpeg": (JPEG[: len(JPEG) // 2], "truncated"),
    "half-png": (encoded(picture(), "PNG")[:-200], "truncated"),
    "half-webp": (encoded(picture(), "WEBP")[:-200], "truncated"),
    "head-of-jpeg": (JPEG[:20], "truncated"),
}
# Name -> (headers, status): a good image, marked.
MARKED: dict[str, tuple[list[str], str]] = {
    "noai": (["noai"], "disallowed"),
    "noimageai": (["NoImageAI, max-snippet:5"], "disallowed"),
    "noindex": (["all", "noindex"], "disallowed"),
    "after-value": (["unavailable_after: 25 Jun 2030 15:00:00 PST, noai"], "disallowed"),
    "other-robot": (["otherbot: noai"], "success"),
    "follow": (["nofollow"], "success"),
}
# Name -> status: what the handler does by name.
ACTS: dict[str, str] = {
    **{f"status-{code}": f"http_{code}" for code in (204, 400, 401, 403, 404, 410, 429, 451, 500, 503)},
    "redirect": "success",
    "redirect-relative": "success",
    "redirect-loop": "too_many_redirects",
    "redirect-to-metadata": "forbidden_address",
    "redirect-to-loopback": "forbidden_address",
    "redirect-to-file": "bad_url",
    "redirect-to-nowhere": "dns",
    "not-modified": "http_304",
    "stalls": "timeout",
    "never-answers": "timeout",
    "drips-body": "deadline",
    "drips-headers": "deadline",
    "endless": "too_large",
    "resets": "connection",
    "hangs-up": "connection",
    "short": "truncated",
    "nonsense": "bad_response",
    "chunked": "success",
    "second-try": "success",
    "no-length": "success",
    "caf\u00e9 \u732b": "success",
    "query?a=1&b=\u00fc c": "success",
    "long" + "g" * 3000: "success",
}
STATUS = {**{n: s for n, (_, s) in FILES.items()}, **{n: s for n, (_, s) in MARKED.items()}, **ACTS}


class Handler(BaseHTTPRequestHandler):
    asked: Counter[str] = Counter()

    def log_message(self, *_: object) -> None:
        pass

    def reply(self, status: int, body: bytes = b"", headers: list[tuple[str, str]] | None = None) -> None:
        self.send_response(status)
        for name, value in headers or []:
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        name = self.path.strip("/")
        self.asked[name] += 1
        with contextlib.suppress(OSError):
            if name in FILES:
                self.reply(200, FILES[name][0])
            elif name in MARKED:
                self.reply(200, JPEG, [("X-Robots-Tag", value) for value in MARKED[name][0]])
            elif name.startswith("status-"):
                self.reply(int(name[7:]), b"" if name == "status-204" else b"sorry")
            else:
                self.act(name)

    def act(self, name: str) -> None:
        targets = {
            "redirect": f"http://{HOST}/jpeg", "redirect-relative": "/png", "redirect-loop": "/redirect-loop",
            "redirect-to-metadata": "http://169.254.169.254/latest/meta-data", "redirect-to-loopback": "http://127.0.0.1:9/",
            "redirect-to-file": "file:///etc/passwd", "redirect-to-nowhere": "http://no-such-host.invalid/",
        }  # fmt: skip
        if name in targets:
            self.reply(302, b"", [("Location", targets[name])])
        elif name == "not-modified":
            self.reply(304)
        elif name == "stalls":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n" + JPEG[:100])
            time.sleep(3)
        elif name == "never-answers":
            time.sleep(3)
        elif name == "drips-body":
            self.drip(b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n")
        elif name == "drips-headers":
            self.drip(b"HTTP/1.1 200 OK\r\nX-Slow: ")
        elif name == "endless":
            self.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
            while True:
                self.wfile.write(bytes(100_000))
        elif name == "resets":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        elif name == "hangs-up":
            self.close_connection = True
        elif name == "short":
            self.wfile.write(f"HTTP/1.1 200 OK\r\nContent-Length: {len(JPEG)}\r\n\r\n".encode() + JPEG[:900])
        elif name == "nonsense":
            self.wfile.write(b"I am no web server\r\n\r\n")
        elif name == "chunked":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            self.wfile.write(f"{len(JPEG):x}\r\n".encode() + JPEG + b"\r\n0\r\n\r\n")
        elif name == "second-try" and self.asked[name] % 2:
            self.reply(503)
        elif name == "no-length":
            self.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n" + JPEG)
        else:
            self.reply(200, JPEG)

    def drip(self, head: bytes) -> None:
        self.wfile.write(head)
        while True:
            self.wfile.write(b"x")
            time.sleep(0.1)


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128


@contextlib.contextmanager
def hostile_web() -> Iterator[str]:
    """Serves until the block ends; gives ``host:port``."""
    Handler.asked.clear()
    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
