"""The server: this machine alone, no tracebacks, no more than it can hold."""

import asyncio
import errno
import signal
import socket
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import uvicorn
from fastapi import FastAPI

from page.draw import BYTES

if TYPE_CHECKING:
    from page.board import Page

NAMES = "127.0.0.1", "localhost", "::1"
# what the page may load: itself, whatever its library thinks of
POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; frame-ancestors 'none'; form-action 'self'"
)
AROUND = tuple(f"/gradio_api/{name}/" for name in ("run", "api", "call"))  # the queue


class Refused(Exception):
    """A request that is not answered, with its status and the reason."""


class Guard:
    """An ASGI application around another that lets in what comes from this machine's browser.

    Another site's page cannot ask (Origin), nor a name that points here (Host); a body has at most
    BYTES and a bit; whatever breaks is one line to the visitor and none in the terminal.
    """

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1008})
        began, got = False, 0

        async def bounded() -> dict:
            nonlocal got
            message = await receive()
            got += len(message.get("body", b""))
            if got > BYTES + 2**16:
                raise Refused(413, f"more than {BYTES // 2**20} MiB")
            return message

        async def sealed(message: dict) -> None:
            nonlocal began
            if message["type"] == "http.response.start":
                began = True
                more = {"content-security-policy": POLICY, "x-content-type-options": "nosniff"}
                more |= {"referrer-policy": "no-referrer"}
                message["headers"] = [*message.get("headers", ())]
                message["headers"] += [(k.encode(), v.encode()) for k, v in more.items()]
            await send(message)

        try:
            check(scope)
            await self.app(scope, bounded, sealed)
        except asyncio.CancelledError:  # the server ends, and this stream with it
            return
        except Exception as error:
            if not began:
                status, reason = refusal(error)
                head = {"type": "http.response.start", "status": status}
                await sealed(head | {"headers": [(b"content-type", b"text/plain")]})
                await send({"type": "http.response.body", "body": f"{reason}\n".encode()})


def check(scope: dict) -> None:
    """Raise Refused for a request from elsewhere, or one that says it is too large."""
    headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
    host = headers.get("host", "")
    try:
        if urlsplit(f"http://{host}").hostname not in NAMES:
            raise Refused(403, "this page answers at 127.0.0.1 and localhost alone")
    except ValueError:
        raise Refused(400, "no such host") from None
    if scope["path"].startswith(AROUND):
        raise Refused(403, "join the queue")
    origin = headers.get("origin")
    if origin is not None and origin != f"http://{host}":
        raise Refused(403, "another site's page cannot ask here")
    length = headers.get("content-length", "0")
    if not length.isdecimal() or int(length) > BYTES + 2**16:
        raise Refused(413, f"more than {BYTES // 2**20} MiB")


def refusal(error: BaseException) -> tuple[int, str]:
    """Return the status and the reason of what a request ended in."""
    while inner := getattr(error, "exceptions", None):  # a group of one
        error = inner[0]
    return error.args if isinstance(error, Refused) else (400, "this cannot be read")


def serve(page: "Page", port: int, say: Callable[[str], object]) -> None:
    """Serve a page at 127.0.0.1 until Ctrl-C, or another signal that ends; say where it is.

    Raises:
        ValueError: the port cannot be had.
    """
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((NAMES[0], port))
            listener.listen()
        except OSError as error:
            taken = "it is taken; another page may be there"
            reason = taken if error.errno == errno.EADDRINUSE else error.strerror
            raise ValueError(f"--port {port}: {reason}; try another") from None
        say(f"the page: http://{NAMES[0]}:{port} (Ctrl-C ends it)")
        unseen: dict[str, Any] = dict.fromkeys(("docs_url", "redoc_url", "openapi_url"))
        app = page.mounted_by(
            FastAPI(**unseen), server_name=NAMES[0], server_port=port, app_kwargs=unseen
        )
        # uvicorn ends at SIGTERM, and raises it again then: files go before the process does
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
        if hasattr(signal, "SIGHUP"):
            signal.signal(signal.SIGHUP, lambda *_: signal.raise_signal(signal.SIGTERM))
        config = uvicorn.Config(Guard(app), log_level="critical", timeout_graceful_shutdown=1)
        uvicorn.Server(config).run(sockets=[listener])
