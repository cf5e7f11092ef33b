"""What stands between the network and the page: who may reach it, and what a request may be.

Gradio serves more than the page needs (uploads, a proxy, files). The guard answers only what the page itself asks for,
from the page itself, in small requests. Imports no web framework: it is a plain ASGI middleware.
"""

import os
from collections.abc import Callable
from ipaddress import ip_address
from urllib.parse import urlsplit

from qalign.errors import UserError

AUTH_VARIABLE = "QALIGN_AUTH"
MAX_BODY_BYTES = 256 * 1024
REFUSED = (  # of Gradio's, none of which the page needs; calls go through its queue alone
    *("/upload", "/proxy=", "/component_server", "/stream/", "/custom_component", "/deep_link", "/run-history"),
    *("/gradio_api/run/", "/gradio_api/api/", "/gradio_api/call/", "/dev/reload", "file=http"),
)
POLICY = "; ".join((
    "default-src 'self'",
    "script-src 'self' 'unsafe-inline' 'unsafe-eval'",  # Gradio's page has both
    "style-src 'self' 'unsafe-inline'",
    "img-src 'self' data: blob:",
    "font-src 'self' data:",
    "worker-src 'self' blob:",
    "form-action 'self'",
    "base-uri 'self'",
    "object-src 'none'",
    "frame-ancestors 'self'",
))  # fmt: skip
HEADERS = [
    (b"content-security-policy", POLICY.encode()),  # nothing that an answer says can call out
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
]


def is_loopback(host: str) -> bool:
    """Whether only this computer can reach a host name or address."""
    if host == "localhost":
        return True
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def credentials(host: str, auth: str | None, *, share: bool) -> tuple[str, str] | None:
    """User and password that the page asks for; None on loopback without.

    Args:
        auth: `USER:PASSWORD`, if given; else `QALIGN_AUTH` counts.

    Raises:
        UserError: others could reach the page and nobody would be asked, or the text is no pair.
    """
    told = auth or os.environ.get(AUTH_VARIABLE)
    if not told:
        if share or not is_loopback(host):
            what = "--share puts the page on the internet" if share else f"--host {host} lets other computers in"
            raise UserError(f"{what}: give --auth USER:PASSWORD, or set {AUTH_VARIABLE}")
        return None
    user, colon, password = told.partition(":")
    if not (colon and user and password):
        raise UserError("--auth: expected USER:PASSWORD, with neither empty")
    return user, password


class LocalOnlyMiddleware:
    """ASGI middleware around the page.

    Args:
        app: what it guards.
        open_to_others: whether a password is asked for, so that hosts other than loopback may be asked for the page.
    """

    def __init__(self, app: Callable, *, open_to_others: bool):
        self.app, self.open_to_others = app, open_to_others

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        if refusal := self._refusal(scope, headers):
            await _answer(send, *refusal)
            return
        left = MAX_BODY_BYTES

        async def counted() -> dict:
            nonlocal left
            message = await receive()
            left -= len(message.get("body", b""))
            # A body without a length of its own: whoever sends too much is hung up on.
            return message if left >= 0 else {"type": "http.disconnect"}

        async def with_headers(message: dict) -> None:
            if message["type"] == "http.response.start":
                message = message | {"headers": [*message.get("headers", []), *HEADERS]}
            await send(message)

        await self.app(scope, counted, with_headers)

    def _refusal(self, scope: dict, headers: dict[str, str]) -> tuple[int, str] | None:
        """(status, why), if the request is none of the page's own."""
        host = _name_of("//" + headers.get("host", ""))
        if not self.open_to_others and not is_loopback(host):
            return 403, "this page answers to localhost only"  # another site's name may lead here (DNS rebinding)
        origin, ours = headers.get("origin"), {headers.get("host"), headers.get("x-forwarded-host")}
        if origin is not None and origin.partition("://")[2] not in ours:
            return 403, "another site may not use this page"
        if any(word in scope["path"].lower() for word in REFUSED):
            return 404, "not here"
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > MAX_BODY_BYTES:
            return 413, f"a request may have {MAX_BODY_BYTES} bytes"
        return None


def _name_of(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


async def _answer(send: Callable, status: int, words: str) -> None:
    body = words.encode()
    headers = [(b"content-type", b"text/plain"), (b"content-length", str(len(body)).encode()), *HEADERS]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
