"""Sends made-up requests through the page's guard, without a server."""

import asyncio
import json
from pathlib import Path

from starlette.datastructures import Headers

from qalign.page.security import HEADERS, Guard, served_at
from qalign.page.worker import Listeners

HOST = "127.0.0.1:7860"
OWN = f"http://{HOST}"
JSON = {"content-type": "application/json"}
TEMP = Path("/tmp/qalign-page-x")
CALL = {"data": [None, "base", True, 0.5, "Why?"], "fn_index": 3, "session_hash": "abc", "event_data": None}


class Answered:
    """What came back, and what the page got, if anything."""

    def __init__(self):
        self.status, self.headers, self.scope, self.body = 0, {}, None, b""


def make_guard(page, served=None, listeners=None) -> Guard:
    return Guard(page, served or served_at("127.0.0.1"), TEMP, listeners or Listeners())


def request(path="/config", method="GET", body=b"", *, served=None, client="127.0.0.1", query=b"", page=None,
            guard=None, answers=(), **headers) -> Answered:  # fmt: skip
    """Sends a request through the guard; `_` in a header's name stands for `-`, and a list repeats the header."""
    found = Answered()

    async def plain(scope, receive, send):
        found.scope = scope
        while (message := await receive())["type"] == "http.request":
            found.body += message["body"]
            if not message["more_body"]:
                break
        await send({"type": "http.response.start", "status": 200, "headers": list(answers)})
        await send({"type": "http.response.body", "body": b""})

    pieces = [body[start : start + 65536] for start in range(0, len(body), 65536)] or [b""]
    messages = iter({"type": "http.request", "body": p, "more_body": p is not pieces[-1]} for p in pieces)

    async def receive():
        return next(messages, {"type": "http.disconnect"})

    async def send(message):
        if message["type"] == "http.response.start":
            found.status, found.headers = message["status"], Headers(raw=message["headers"])

    named = {"host": HOST, **{name.replace("_", "-"): value for name, value in headers.items()}}
    raw = [
        (name.encode(), one.encode())
        for name, value in named.items() if value is not None
        for one in (value if isinstance(value, list) else [value])
    ]  # fmt: skip
    scope = {"type": "http", "path": path, "method": method, "headers": raw, "query_string": query, "scheme": "http"}
    used = guard or make_guard(plain, served)
    used.app = page or plain
    asyncio.run(used({**scope, "client": (client, 5000)}, receive, send))
    for name, value in HEADERS.items():
        assert found.headers[name] == value
    assert not [name for name in found.headers if name.startswith("access-control-")]
    return found


def post(path="/gradio_api/queue/join", call=CALL, **more) -> Answered:
    return request(path, "POST", json.dumps(call).encode() if isinstance(call, dict) else call, **{**JSON, **more})
