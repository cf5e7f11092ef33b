"""Who may reach the page, and which requests are answered.

Gradio serves more than the page needs (uploads, a proxy, files). This module lets only small requests through that the
page itself makes. The host check is ours: Starlette's `TrustedHostMiddleware` compares names from a list, which can't
hold every loopback address (127.0.0.0/8, ::1 in any spelling).
"""

import os
from ipaddress import ip_address
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qalign.errors import UserError

AUTH_VARIABLE = "QALIGN_AUTH"
MAX_BODY_BYTES = 256 * 1024
REFUSED = (  # parts of Gradio that the page doesn't need: its calls go through the queue alone
    *("/upload", "/proxy=", "/component_server", "/stream/", "/custom_component", "/deep_link", "/run-history"),
    *("/gradio_api/run/", "/gradio_api/api/", "/gradio_api/call/", "/dev/reload", "file=http"),
)
POLICY = (  # nothing in an answer can load anything from elsewhere; Gradio's page needs 'unsafe-inline', 'unsafe-eval'
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; form-action 'self'; "
    "base-uri 'self'; object-src 'none'; frame-ancestors 'self'"
)
HEADERS = [
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
]


def is_loopback(host: str) -> bool:
    """Whether a host name or address can be reached from this computer only."""
    if host == "localhost":
        return True
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def credentials(host: str, auth: str | None, *, share: bool) -> tuple[str, str] | None:
    """User name and password that the page asks for; None if it listens on loopback without a password. If `auth`
    (`USER:PASSWORD`) is None, the environment variable `QALIGN_AUTH` is used; `share`: whether there is a public link.

    Raises:
        UserError: other computers could reach the page without a password, or the text isn't `USER:PASSWORD`.
    """
    auth = auth or os.environ.get(AUTH_VARIABLE)
    if not auth:
        if share or not is_loopback(host):
            reason = "--share puts the page on the internet" if share else f"--host {host} lets other computers in"
            raise UserError(f"{reason}: give --auth USER:PASSWORD, or set {AUTH_VARIABLE}")
        return None
    user, _, password = auth.partition(":")
    if not (user and password):
        raise UserError("--auth: expected USER:PASSWORD, with neither empty")
    return user, password


class LocalOnlyMiddleware:
    """ASGI middleware that refuses every request but the page's own. With `any_host`, for a page that asks for a
    password, it answers to any host name, else to loopback names only."""

    def __init__(self, app: ASGIApp, *, any_host: bool):
        self.app, self.any_host = app, any_host

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        bytes_left = MAX_BODY_BYTES

        async def limited_receive() -> Message:
            nonlocal bytes_left
            message = await receive()
            bytes_left -= len(message.get("body", b""))
            # A body can come without a content-length: if it is too large, the client is disconnected.
            return message if bytes_left >= 0 else {"type": "http.disconnect"}

        async def send_with_headers(message: Message) -> None:
            if message["type"].endswith("http.response.start"):
                message = {**message, "headers": [*message.get("headers", []), *HEADERS]}
            await send(message)

        app = self._refusal(scope["path"], Headers(scope=scope)) or self.app
        await app(scope, limited_receive, send_with_headers)

    def _refusal(self, path: str, headers: Headers) -> PlainTextResponse | None:
        """The answer to a request that the page doesn't make itself."""
        try:
            host = urlsplit("//" + headers.get("host", "")).hostname or ""
        except ValueError:
            host = ""
        if not self.any_host and not is_loopback(host):  # DNS rebinding: another site's name may resolve to this host
            return PlainTextResponse("this page answers to localhost only", 403)
        origin, own = headers.get("origin"), (headers.get("host"), headers.get("x-forwarded-host"))
        if origin is not None and origin.partition("://")[2] not in own:
            return PlainTextResponse("another site may not use this page", 403)
        if any(part in path.lower() for part in REFUSED):
            return PlainTextResponse("this page does not offer that", 404)
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > MAX_BODY_BYTES:
            return PlainTextResponse(f"a request may have at most {MAX_BODY_BYTES} bytes", 413)
        return None
