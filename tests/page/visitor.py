"""A visitor of the page who speaks its protocol: joins the queue, and hears how it goes."""

import json
import uuid
from collections.abc import Iterator
from http.client import HTTPConnection, HTTPResponse
from typing import Any

NEW = ["New images", 4, 0, [], "dpm++", 5, 0, 1, None, 0.6, "the lower half", 5]


class Visitor:
    """One browser window of the page at a port of 127.0.0.1."""

    def __init__(self, port: int, **headers: str):
        self.port, self.headers, self.name = port, headers, uuid.uuid4().hex
        config = json.loads(self.ask("GET", "/config")[1])
        self.drawing = next(d["id"] for d in config["dependencies"] if len(d["inputs"]) == len(NEW))

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, bytes]:
        """Return the status and the body of an answer."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=120)
        sent = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        told = {"content-type": "application/json"} | self.headers | headers
        connection.request(method, path, sent, told)
        answer = connection.getresponse()
        found = answer.status, answer.read()
        connection.close()
        return found

    def join(self, data: Any, **changed: Any) -> tuple[int, bytes]:
        """Ask for images."""
        body = {"data": data, "fn_index": self.drawing, "session_hash": self.name}
        return self.ask("POST", "/gradio_api/queue/join", body | changed)

    def open(self, path: str) -> HTTPConnection:
        """Return a connection whose answer does not end."""
        connection = HTTPConnection("127.0.0.1", self.port)
        connection.request("GET", path)
        return connection

    def listen(self) -> "Listener":
        return Listener(self.port, self.name)

    def draw(self, data: Any = NEW, **changed: Any) -> list[dict]:
        """Return all that is heard of one request, from the queue to its end."""
        status, body = self.join(data, **changed)
        assert status == 200, (status, body)
        return list(self.listen())


class Listener:
    """Yields the messages of a request; `close` leaves as a closed window does."""

    def __init__(self, port: int, name: str):
        self.connection = HTTPConnection("127.0.0.1", port, timeout=120)
        self.connection.request("GET", f"/gradio_api/queue/data?session_hash={name}")
        self.answer: HTTPResponse = self.connection.getresponse()

    def __iter__(self) -> Iterator[dict]:
        while line := self.answer.readline():
            if line.startswith(b"data:"):
                message = json.loads(line[5:])
                yield message
                if message["msg"] in ("process_completed", "close_stream"):
                    return

    def close(self) -> None:
        self.answer.close()
        self.connection.close()
