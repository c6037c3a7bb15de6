"""A web server on loopback that behaves as badly as the real one: every path says what it does."""

from __future__ import annotations

import contextlib
import gzip
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from tests.stages.hostile_files import FILES, JPEG

HOST = "images.example"

# Name -> (headers, body, status).
HEADED: dict[str, tuple[list[tuple[str, str]], bytes, str]] = {
    "jpeg-called-text": ([("Content-Type", "text/html; charset=utf-8")], JPEG, "success"),
    "html-called-jpeg.jpg": ([("Content-Type", "image/jpeg")], FILES["html"][0], "not_an_image"),
    "packed": ([("Content-Encoding", "gzip")], gzip.compress(JPEG), "success"),
    "not-packed": ([("Content-Encoding", "gzip")], JPEG, "success"),
    "packed-twice": ([("Content-Encoding", "gzip")], gzip.compress(JPEG[:500]) + gzip.compress(JPEG[500:]), "success"),
    "packed-and-padded": ([("Content-Encoding", "gzip")], gzip.compress(JPEG) + bytes(512), "success"),
    "packed-twice-cut": (
        [("Content-Encoding", "gzip")],
        gzip.compress(JPEG[:500]) + gzip.compress(JPEG[500:])[:-30],
        "truncated",
    ),
    "packed-cut": ([("Content-Encoding", "gzip")], gzip.compress(JPEG)[:-30], "truncated"),
    "packed-bomb": ([("Content-Encoding", "gzip")], gzip.compress(bytes(300_000_000), 1), "too_large"),
}
# Name -> (values of X-Robots-Tag, status): a good image, marked.
MARKED: dict[str, tuple[list[str], str]] = {
    "noai": (["noai"], "disallowed"),
    "noimageai": (["NoImageAI, max-snippet:5"], "disallowed"),
    "noindex": (["all", "noindex"], "disallowed"),
    "noimageindex": ([" noarchive ,noimageindex"], "disallowed"),
    "capitals": (["NOAI"], "disallowed"),
    "none": (["none"], "disallowed"),
    "every-robot": (["*: noai"], "disallowed"),
    "every-robot-after-another": (["otherbot: nofollow, *: noai"], "disallowed"),
    "after-value": (["unavailable_after: 25 Jun 2030 15:00:00 PST, noai"], "disallowed"),
    "after-date": (["unavailable_after: Wed, 25 Jun 2030 15:00:00 GMT, noai"], "disallowed"),
    "after-old-date": (["unavailable_after: Wednesday, 25-Jun-30 15:00:00 GMT, noai"], "disallowed"),
    "after-another-robot": (["otherbot: nofollow", "noai"], "disallowed"),
    "with-a-value": (["noai: true"], "disallowed"),
    "to-a-robot-without-name": ([": noai"], "disallowed"),
    "other-robot": (["otherbot: noai"], "success"),
    "other-robot-two": (["otherbot: nofollow, noai"], "success"),
    "other-robot-and-date": (["otherbot: unavailable_after: Wednesday, 25-Jun-30 15:00:00 GMT, noai"], "success"),
    "no-preview": (["max-image-preview: none"], "success"),
    "follow": (["nofollow"], "success"),
    "unreadable": ([";;, :, ::,"], "success"),
}
# Name -> (values of X-Robots-Tag, status): a good image that is not marked, behind a redirect that is.
MARKED_MOVES: dict[str, tuple[list[str], str]] = {
    "moved-noai": (["noai"], "disallowed"),
    "moved-other-robot": (["otherbot: noai"], "success"),
}
# Name -> (Location, status).
MOVED: dict[str, tuple[str, str]] = {
    "redirect": (f"http://{HOST}/jpeg", "success"),
    "redirect-relative": ("/png", "success"),
    "redirect-without-scheme": (f"//{HOST}/png", "success"),
    "redirect-utf8": ("/caf\u00e9".encode().decode("latin-1"), "success"),
    "redirect-loop": ("/redirect-loop", "too_many_redirects"),
    "redirect-nowhere": ("", "http_302"),
    "redirect-to-file": ("file:///etc/passwd", "bad_url"),
    "redirect-to-ftp": (f"ftp://{HOST}/jpeg", "bad_url"),
    "redirect-to-data": ("data:image/png;base64,iVBORw0KGgo=", "bad_url"),
    "redirect-to-itself": ("http://", "too_many_redirects"),
    "redirect-to-no-host": ("http://no-such-host.invalid/", "dns"),
    "redirect-to-metadata": ("http://169.254.169.254/latest/meta-data", "forbidden_address"),
    "redirect-to-loopback": ("http://127.0.0.1:9/", "forbidden_address"),
    "redirect-to-private": ("http://10.0.0.1/", "forbidden_address"),
    "redirect-to-decimal": ("http://2130706433/", "forbidden_address"),
    "redirect-to-octal": ("http://0177.0.0.1/", "forbidden_address"),
    "redirect-to-hexadecimal": ("http://0x7f.1/", "forbidden_address"),
    "redirect-to-zero": ("http://0/", "forbidden_address"),
    "redirect-to-mapped": ("http://[::ffff:169.254.169.254]/", "forbidden_address"),
    "redirect-to-translated": ("http://[64:ff9b::a9fe:a9fe]/", "forbidden_address"),
    "redirect-to-userinfo": (f"http://{HOST}@127.0.0.1/", "forbidden_address"),
}
# Name -> status: what the handler does by name.
ACTS: dict[str, str] = {
    **{f"status-{code}": f"http_{code}" for code in (204, 206, 301, 304, 400, 401, 402, 403, 404, 408, 410, 418, 429, 451)},
    **{f"status-{code}": f"http_{code}" for code in (500, 502, 503, 504, 599)},
    **{f"redirect-{code}": "success" for code in (301, 303, 307, 308)},
    "hops-10": "success",
    "hops-11": "too_many_redirects",
    "stalls": "timeout",
    "never-answers": "timeout",
    "drips-body": "deadline",
    "drips-headers": "deadline",
    "continues-forever": "deadline",
    "endless": "too_large",
    "endless-chunks": "too_large",
    "claims-too-much": "too_large",
    "claims-too-little": "truncated",
    "claims-words": "success",
    "claims-less-than-nothing": "success",
    "resets": "connection",
    "resets-late": "connection",
    "hangs-up": "connection",
    "short": "truncated",
    "chunks-cut": "truncated",
    "chunks-broken": "truncated",
    "nonsense": "bad_response",
    "many-headers": "bad_response",
    "long-header": "bad_response",
    "chunked": "success",
    "second-try": "success",
    "no-length": "success",
    "transformed-203": "success",
    "all-of-it-206": "success",
    "all-of-it-206-cut": "truncated",
    "first-part-206": "http_206",
    "last-part-206": "http_206",
    "part-of-unknown-206": "http_206",
    "slow": "success",
    "caf\u00e9 \u732b": "success",
    "query?a=1&b=\u00fc c": "success",
    "fragment#part": "success",
    "already%20quoted": "success",
    "..%2f..%2fetc%2fpasswd": "success",
    "long" + "g" * 3000: "success",
}
# URL -> status: what is wrong is in the address itself.
URLS: dict[str, str] = {
    "HTTP://IMAGES.EXAMPLE/shouted": "success",
    f"http://someone:secret@{HOST}/userinfo": "success",
    "http://b\u00fccher.example/idn": "success",
    "http://no-such-host.invalid/": "dns",
    f"https://{HOST}/plain-http-behind-https": "tls",
    f"http://{HOST}:99999/": "bad_url",
    f"http://{'a' * 70}.example/": "bad_url",
    "http://[::1/": "bad_url",
    "http://127.0.0.1/": "forbidden_address",
    "http://2130706433/": "forbidden_address",
    "http://0177.0.0.1/": "forbidden_address",
    "http://0x7f000001/": "forbidden_address",
    "http://127.1/": "forbidden_address",
    "http://\u2460\u2461\u2466.0.0.1/": "forbidden_address",
    "http://0.0.0.0/": "forbidden_address",
    "http://169.254.169.254/latest/meta-data": "forbidden_address",
    "http://[::1]/": "forbidden_address",
    "http://[fe80::1]/": "forbidden_address",
    "http://[::ffff:127.0.0.1]/": "forbidden_address",
    "http://[64:ff9b::7f00:1]/": "forbidden_address",
}
PAGES = {
    **{name: status for name, (_, status) in FILES.items()},
    **{name: status for name, (*_, status) in HEADED.items()},
    **{name: status for name, (_, status) in MARKED.items()},
    **{name: status for name, (_, status) in MARKED_MOVES.items()},
    **{name: status for name, (_, status) in MOVED.items()},
    **ACTS,
}
# Every URL of the hostile web, and the status that download gives its row.
STATUS = {**{f"http://{HOST}/{name}": status for name, status in PAGES.items()}, **URLS}


class Handler(BaseHTTPRequestHandler):
    asked: Counter[str] = Counter()
    # Hosts that take every request and answer none.
    silent: set[str] = set()

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
        if self.headers["Host"] in self.silent:
            time.sleep(3)
            return
        with contextlib.suppress(OSError):
            if name in FILES:
                self.reply(200, FILES[name][0])
            elif name in HEADED:
                self.reply(200, HEADED[name][1], HEADED[name][0])
            elif name in MARKED:
                self.reply(200, JPEG, [("X-Robots-Tag", value) for value in MARKED[name][0]])
            elif name in MARKED_MOVES:
                self.reply(302, b"", [("Location", "/jpeg"), *(("X-Robots-Tag", value) for value in MARKED_MOVES[name][0])])
            elif name in MOVED:
                self.reply(302, b"", [("Location", MOVED[name][0])])
            elif name.startswith("redirect-"):
                self.reply(int(name[9:]), b"", [("Location", "/jpeg")])
            elif name.startswith("hops-"):
                hops = int(name[5:])
                self.reply(302, b"", [("Location", f"/hops-{hops - 1}" if hops > 1 else "/jpeg")])
            elif name.startswith("status-"):
                self.reply(int(name[7:10]), b"" if name in ("status-204", "status-304") else b"sorry")
            elif name.startswith("asks-to-wait-"):
                first = self.asked[name] == 1
                self.reply(429 if first else 200, b"" if first else JPEG, [("Retry-After", name[13:])] if first else [])
            else:
                self.act(name)

    def act(self, name: str) -> None:
        ok = b"HTTP/1.1 200 OK\r\n"
        size = f"Content-Length: {len(JPEG)}\r\n\r\n".encode()
        part, total = b"HTTP/1.1 206 Partial Content\r\nContent-Range: bytes ", len(JPEG)
        whole = {
            "transformed-203": b"HTTP/1.1 203 Non-Authoritative Information\r\n" + size + JPEG,
            "all-of-it-206": part + f"0-{total - 1}/{total}\r\n".encode() + size + JPEG,
            "all-of-it-206-cut": part + f"0-{total - 1}/{total}\r\n\r\n".encode() + JPEG[:900],
            "first-part-206": part + f"0-899/{total}\r\nContent-Length: 900\r\n\r\n".encode() + JPEG[:900],
            "last-part-206": part + f"1-{total - 1}/{total}\r\n\r\n".encode() + JPEG[1:],
            "part-of-unknown-206": part + f"0-{total - 1}/*\r\n".encode() + size + JPEG,
            "short": ok + size + JPEG[:900],
            "claims-too-much": ok + b"Content-Length: 1000000000000\r\n\r\n" + JPEG,
            "claims-too-little": ok + b"Content-Length: 900\r\n\r\n" + JPEG,
            "claims-words": ok + b"Content-Length: plenty\r\n\r\n" + JPEG,
            "claims-less-than-nothing": ok + b"Content-Length: -1\r\n\r\n" + JPEG,
            "no-length": ok + b"\r\n" + JPEG,
            "chunked": ok + b"Transfer-Encoding: chunked\r\n\r\n" + f"{len(JPEG):x}\r\n".encode() + JPEG + b"\r\n0\r\n\r\n",
            "chunks-cut": ok + b"Transfer-Encoding: chunked\r\n\r\n" + f"{len(JPEG):x}\r\n".encode() + JPEG[:900],
            "chunks-broken": ok + b"Transfer-Encoding: chunked\r\n\r\nzebra\r\n" + JPEG,
            "nonsense": b"I am no web server\r\n\r\n",
            "many-headers": ok + b"".join(b"X-%d: x\r\n" % number for number in range(200)) + size + JPEG,
            "long-header": ok + b"X-Long: " + b"x" * 70_000 + b"\r\n" + size + JPEG,
        }
        if name in whole:
            self.wfile.write(whole[name])
        elif name == "stalls":
            self.wfile.write(ok + size + JPEG[:100])
            time.sleep(3)
        elif name == "never-answers":
            time.sleep(3)
        elif name == "slow":
            time.sleep(0.5)
            self.reply(200, JPEG)
        elif name.startswith("drips-body"):
            self.repeat(ok + size, b"x", 0.1)
        elif name == "drips-headers":
            self.repeat(ok + b"X-Slow: ", b"x", 0.1)
        elif name == "continues-forever":
            self.repeat(b"", b"HTTP/1.1 100 Continue\r\n\r\n", 0.1)
        elif name == "endless":
            self.repeat(ok + b"\r\n", bytes(100_000), 0)
        elif name == "endless-chunks":
            self.repeat(ok + b"Transfer-Encoding: chunked\r\n\r\n", b"10000\r\n" + bytes(0x10000) + b"\r\n", 0)
        elif name in ("resets", "resets-late"):
            if name == "resets-late":
                self.wfile.write(ok + size + JPEG[:900])
                time.sleep(0.2)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        elif name == "hangs-up":
            self.close_connection = True
        elif name == "second-try" and self.asked[name] % 2:
            self.reply(503)
        else:
            self.reply(200, JPEG)

    def repeat(self, head: bytes, piece: bytes, pause: float) -> None:
        self.wfile.write(head)
        while True:
            self.wfile.write(piece)
            time.sleep(pause)


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, *_: object) -> None:
        """Clients that hang up are the rule here."""


@contextlib.contextmanager
def served(server: Server) -> Iterator[str]:
    """Serves until the block ends; gives ``host:port``."""
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        host, port = server.socket.getsockname()
        yield f"{host}:{port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextlib.contextmanager
def hostile_web(address: str = "127.0.0.1") -> Iterator[str]:
    """The pages of `STATUS`; gives ``host:port``."""
    Handler.asked.clear()
    with served(Server((address, 0), Handler)) as place:
        yield place
