"""The process of the embedded Prefect server: Prefect's own app, behind a door for its machine's browser and clients alone.

Prefect asks for the credential. The door keeps out what a page of another origin could reach with a browser that stands inside:
requests under a foreign host name (DNS rebinding), requests of foreign pages, websockets included, and frames around the UI.
Nor may the UI's own pages ask another server.
"""

from __future__ import annotations

import gc
import sys
from typing import Any
from urllib.parse import urlsplit

import uvicorn
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import HTMLResponse, PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocketClose

from infra.prefect_server import SIGN_IN

HOSTS = ["127.0.0.1", "localhost"]
# How long a connection without requests stays open, as `prefect server start` has it.
KEEP_ALIVE_SECONDS = 5

# Nobody's frame, and no word to others: Prefect's UI tells the service of its usage statistics that it was opened, even where
# these are switched off.
POLICY = "frame-ancestors 'none'; connect-src 'self'"

# What SIGN_IN answers. Prefect's UI looks for the credential under this name; a wrong one must not replace a right one.
_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>unidiffuser</title><p>Signing in ...</p>
<script>
const pair = btoa(location.hash.slice(1));
history.replaceState(null, "", location.pathname);
fetch("/api/admin/version", {headers: {Authorization: `Basic ${pair}`}}).then(reply => {
  if (!reply.ok) throw reply;
  localStorage.setItem("prefect-password", pair);
  location.replace("/v2");
}).catch(() => {
  document.querySelector("p").textContent = "This link does not fit the server: run `unidiffuser ui` again.";
});
</script></html>
"""


class Door:
    """Passes on to Prefect's app what comes under its own host names, and from its own pages or from no page at all."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        origin = headers.get("origin")
        answer: ASGIApp = self.app
        if origin is not None and urlsplit(origin).netloc != headers.get("host"):
            refusal = PlainTextResponse("a page of another origin may not ask this server", status_code=403)
            answer = WebSocketClose() if scope["type"] == "websocket" else refusal
        elif scope["path"] == SIGN_IN:
            answer = HTMLResponse(_PAGE, headers={"Cache-Control": "no-store"})

        async def unframed(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["Content-Security-Policy"] = POLICY
            await send(message)

        await answer(scope, receive, unframed)


def main(host: str, port: int) -> None:
    """What `prefect server start` does, without the second that its command line takes to import."""
    # Looking for garbage while 3,000 modules are loaded takes a fifth of the start, and finds none.
    gc.disable()
    from prefect.server.api.server import create_app
    from prefect.server.database.configurations import AioSqliteConfiguration as SQLite

    # A transaction of SQLite that reads first and then writes fails at once when another one has written in between, and the
    # server answers 503. Prefect's own client asks again; its UI says "Unknown error". One that asks to write at once waits.
    begin = SQLite.begin_transaction

    def begin_to_write(self: Any, session: Any, with_for_update: bool = False) -> Any:
        return begin(self, session, with_for_update=True)

    SQLite.begin_transaction = begin_to_write  # type: ignore[method-assign]
    # Around the app that listens, and not around the one that the server's own parts call without a network.
    app = TrustedHostMiddleware(Door(create_app(final=True)), HOSTS)
    gc.freeze()
    gc.enable()
    uvicorn.run(app, host=host, port=port, timeout_keep_alive=KEEP_ALIVE_SECONDS, log_level="warning")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
