"""The server: this machine alone, no tracebacks, no more than it can hold."""

import asyncio
import socket
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
        except asyncio.CancelledError:
            raise
        except BaseException as error:  # a group of errors is not always an Exception
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise
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


def serve(page: "Page", port: int) -> None:
    """Serve a page at 127.0.0.1 until Ctrl-C.

    Raises:
        OSError: the port is taken.
    """
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((NAMES[0], port))
        except OSError as error:
            raise OSError(
                f"--port {port} is taken; another page may be there, try {port + 1}"
            ) from error
        app = page.mounted_by(
            FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
            server_name=NAMES[0],
            server_port=port,
        )
        config = uvicorn.Config(Guard(app), log_level="error", timeout_graceful_shutdown=1)
        uvicorn.Server(config).run(sockets=[listener])
