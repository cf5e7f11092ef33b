"""Who may reach the page, and which requests are answered. `Guard` stands outermost: nothing runs before it.

Three kinds of strangers are kept out. Another web site, open in the same browser: its requests carry its own `Origin`,
`Sec-Fetch-Site` or `Referer`, or they reach this computer under the site's own name (DNS rebinding). A crafted request:
Gradio serves more than the page needs (uploads, a proxy, any URL), so only the routes in `ROUTES` exist. And whoever
guesses passwords: each wrong one makes the next wait longer.
"""

import asyncio
import json
import os
import re
import socket
import sys
import time
from collections import OrderedDict
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qalign.errors import UserError, one_line
from qalign.page.worker import Listeners

AUTH_VARIABLE = "QALIGN_AUTH"
MAX_BODY_BYTES = 256 * 1024
LOGIN, LOGOUT, JOIN, DATA = "/login", "/logout", "/gradio_api/queue/join", "/gradio_api/queue/data"
ROUTES = (  # (methods, paths) that the page itself uses; `{temp}` is the folder of the page's own files
    (("GET", "HEAD"), r"/|/config|/theme\.css|/favicon\.ico|/robots\.txt|/manifest\.json|/logout"),
    (("GET", "HEAD"), r"/(assets|static|svelte)/[\w./@+-]+"),
    (("GET",), r"/gradio_api/(queue/data|heartbeat/[\w-]+)"),
    (("GET", "HEAD"), r"/gradio_api/file={temp}/votes\.jsonl"),
    (("POST",), r"/login|/gradio_api/(queue/join|cancel|reset)"),
)
HOST = re.compile(r"(?P<name>\[[0-9a-f:.]+\]|[0-9a-z._-]+)(:(?P<port>[0-9]{1,5}))?")  # no user name, no odd characters
POLICY = (  # nothing in an answer can load anything from elsewhere; Gradio's page needs 'unsafe-inline', 'unsafe-eval'
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; form-action 'self'; "
    "base-uri 'self'; object-src 'none'; frame-ancestors 'self'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",  # so that the page's own requests can be told from another site's
    "cross-origin-opener-policy": "same-origin",  # a site that opens the page gets no hold of its window
    "cross-origin-resource-policy": "same-origin",
}
FORWARDED = ("forwarded", "x-forwarded-", "x-real-ip", "x-original-", "x-rewrite-", "x-gradio-server")


def is_loopback(host: str) -> bool:
    """Whether a host name or address means this computer: localhost, 127.0.0.0/8 or ::1. An IPv4 address that is
    written as IPv6 (`::ffff:127.0.0.1`) doesn't count, though newer versions of Python call it loopback."""
    if host == "localhost":
        return True
    try:
        address = ip_address(host.removeprefix("[").removesuffix("]"))
    except ValueError:
        return False
    return address == IPv6Address("::1") or (isinstance(address, IPv4Address) and address.is_loopback)


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


@dataclass(frozen=True)
class Served:
    """Where the page can be reached: see `served_at`."""

    names: frozenset[str] = frozenset()  # host names of the page, beside those of loopback
    any_address: bool = False  # also every IP address: a number can't be made to lead elsewhere, as a name can
    public: str = ""  # host name of the share tunnel, if there is one

    def origin(self, scope: Scope, headers: Headers) -> str | None:
        """The origin (`http://127.0.0.1:7860`) under which the page serves this request; None if the host in it is not
        one of the page's. The port is the browser's, which `ssh -L` may have changed."""
        if self._tunnelled(scope, headers):
            return f"https://{self.public}"
        hosts = headers.getlist("host")
        host = HOST.fullmatch(hosts[0].lower()) if len(hosts) == 1 else None
        if host is None or not self._is_ours(host["name"]):
            return None
        return f"http://{host['name']}" + ("" if host["port"] in (None, "80") else f":{int(host['port'])}")

    def address(self, scope: Scope, headers: Headers) -> str:
        """The visitor's address: an IPv4 address or an IPv6 network of 64 bits, which one household has."""
        word = (scope.get("client") or ("",))[0]
        if self._tunnelled(scope, headers):  # the tunnel appends the address that it saw; those before may be made up
            word = headers.get("x-forwarded-for", "").rpartition(",")[2].strip()
        try:
            address = ip_address(word)
        except ValueError:
            return "unknown"
        address = getattr(address, "ipv4_mapped", None) or address
        return str(ip_network((address, 64), strict=False) if isinstance(address, IPv6Address) else address)

    def _tunnelled(self, scope: Scope, headers: Headers) -> bool:
        """Whether a request came through the share tunnel, whose end on this computer sends it from loopback. Only then
        are forwarded headers believed: anybody else may send any."""
        if not self.public or not is_loopback((scope.get("client") or ("",))[0]):
            return False
        return self.public in (headers.get("host"), headers.get("x-forwarded-host", "").partition(",")[0].strip())

    def _is_ours(self, name: str) -> bool:
        if is_loopback(name) or name in self.names:
            return True
        try:
            return self.any_address and getattr(ip_address(name.strip("[]")), "ipv4_mapped", None) is None
        except ValueError:
            return False


def served_at(host: str, public: str = "") -> Served:
    """Where a page that listens on `host` can be reached. On loopback it answers to loopback names only, so that no
    other site's name may lead to it. Elsewhere it answers to IP addresses, `host` and this computer's own names.
    `public`: URL of the share tunnel."""
    tunnel = urlsplit(public).hostname or ""
    if is_loopback(host):
        return Served(public=tunnel)
    own = socket.gethostname().lower()
    return Served(frozenset({host.lower(), own, f"{own}.local", socket.getfqdn().lower()}), True, tunnel)


class LoginDelay:
    """Makes guessing slow: each wrong password of an address doubles the wait before its next try is looked at. At most
    one try of an address waits, and the addresses seen longest ago are forgotten."""

    FIRST_SECONDS, LONGEST_SECONDS, MAX_ADDRESSES = 0.5, 30.0, 4096

    def __init__(self) -> None:
        self._wrong: OrderedDict[str, tuple[int, float]] = OrderedDict()  # number of wrong tries, time of the last
        self._trying: set[str] = set()

    async def begin(self, address: str) -> bool:
        """Waits until the address may try again; False if another try of it is waiting already."""
        if address in self._trying:
            return False
        self._trying.add(address)
        number, last = self._wrong.get(address, (0, 0.0))
        wait = min(self.FIRST_SECONDS * 2 ** min(number - 1, 20), self.LONGEST_SECONDS) if number else 0.0
        try:
            await asyncio.sleep(max(0.0, last + wait - time.monotonic()))
        except asyncio.CancelledError:
            self._trying.discard(address)
            raise
        return True

    def end(self, address: str, *, wrong: bool) -> None:
        """The try of an address is over."""
        self._trying.discard(address)
        number, _ = self._wrong.pop(address, (0, 0.0))
        if wrong:
            self._wrong[address] = number + 1, time.monotonic()
        while len(self._wrong) > self.MAX_ADDRESSES:
            self._wrong.popitem(last=False)


class Guard:
    """ASGI application around the page's: refuses every request but those of the page itself, believes no forwarded
    header, slows down guesses at the password, and notes which visitors listen for answers."""

    def __init__(self, app: ASGIApp, served: Served, temp: Path, listeners: Listeners):
        self.app, self.served, self.listeners, self.delay = app, served, listeners, LoginDelay()
        self._routes = [(methods, re.compile(path.replace("{temp}", re.escape(str(temp))))) for methods, path in ROUTES]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            headers, sender = Headers(scope=scope), _Sender(send)
            if refusal := self._refusal(scope, headers):
                await refusal(scope, receive, sender)
            else:
                try:
                    await self._pass_on(self._cleaned(scope, headers), _limited(receive), sender)
                except Exception as error:  # of Gradio, about a made-up request: anybody could fill the terminal
                    what = f"{scope['method']} {scope['path']}: {type(error).__name__}: {error}"
                    print(one_line(f"the page could not answer {what}"), file=sys.stderr)
                    if not sender.status:
                        await PlainTextResponse("the page could not answer", 500)(scope, receive, sender)
        else:  # the page uses no websocket
            await send({"type": "websocket.close", "code": 1008})

    def _refusal(self, scope: Scope, headers: Headers) -> Response | None:
        """The answer to a request that the page doesn't make itself."""
        path, method = scope["path"], scope["method"]
        own = self.served.origin(scope, headers)
        if own is None:  # DNS rebinding: the name of another site may lead to this computer
            whom = "this computer's own names" if self.served.any_address else "localhost"
            return PlainTextResponse(f"this page answers to {whom} only; --host NAME adds one", 403)
        if not _same_site(scope, headers, own):
            return PlainTextResponse("another site may not use this page", 403)
        allowed = {name for methods, route in self._routes if route.fullmatch(path) for name in methods}
        if not allowed or "/.." in path or "//" in path:
            return PlainTextResponse("this page does not offer that", 404)
        if method not in allowed:
            return PlainTextResponse("this page does not offer that", 405, {"allow": ", ".join(sorted(allowed))})
        length = headers.get("content-length", "0")
        if not (length.isascii() and length.isdecimal()) or int(length[:20]) > MAX_BODY_BYTES:
            return PlainTextResponse(f"a request may have at most {MAX_BODY_BYTES} bytes", 413)
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if method == "POST" and path != LOGIN and kind != "application/json":  # what a form of another site can't send
            return PlainTextResponse("expected application/json", 415)
        return None

    def _cleaned(self, scope: Scope, headers: Headers) -> Scope:
        """The request as Gradio may see it: under the page's own origin, without forwarded headers."""
        origin = urlsplit(self.served.origin(scope, headers) or "")
        raw = [(name, value) for name, value in headers.raw if not name.decode("latin-1").startswith(FORWARDED)]
        raw = [(name, origin.netloc.encode() if name == b"host" else value) for name, value in raw]
        client = (self.served.address(scope, headers), 0)
        return {**scope, "scheme": origin.scheme, "headers": raw, "client": client}

    async def _pass_on(self, scope: Scope, receive: Receive, send: "_Sender") -> None:
        path, address = scope["path"], scope["client"][0]
        if path == DATA and self.listeners.full(address):
            await PlainTextResponse("too many pages are open", 429)(scope, receive, send)
        elif path == DATA:
            session = parse_qs(scope["query_string"].decode("latin-1")).get("session_hash", [""])[0]
            with self.listeners.listening(session, address):
                await self.app(scope, receive, send)
        elif path == JOIN:
            body = await _read(receive)
            if body is None or not _is_call(body):
                await PlainTextResponse("the page sends no such call", 400)(scope, receive, send)
            else:
                await self.app(scope, _replayed(body, receive), send)
        elif path == LOGIN and not await self.delay.begin(address):
            refusal = PlainTextResponse("another try waits already", 429, {"retry-after": "30"})
            await refusal(scope, receive, send)
        elif path == LOGIN:
            try:
                await self.app(scope, receive, send)
            finally:
                self.delay.end(address, wrong=send.status != 200)
        else:
            await self.app(scope, receive, send)


class _Sender:
    """Sends answers with the page's own headers, and none that lets another site read them or send cookies."""

    def __init__(self, send: Send):
        self._send, self.status = send, 0

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(raw=[*message.get("headers", [])])
            cookies = [re.sub(r"(?i);\s*samesite=\w*", "", cookie) for cookie in headers.getlist("set-cookie")]
            for name in {*headers.keys()}:
                if name.startswith("access-control-") or name == "set-cookie":
                    del headers[name]
            headers.update(HEADERS)
            for cookie in cookies:
                headers.append("set-cookie", f"{cookie}; SameSite=Lax")
            message = {**message, "headers": headers.raw}
        await self._send(message)


def _same_site(scope: Scope, headers: Headers, own: str) -> bool:
    """Whether a request comes from the page itself, from a program, or from somebody who opens the page: a plain link
    on another site may lead to the page, as it changes nothing and the site can't see what is shown."""
    site, origins, referer = headers.get("sec-fetch-site"), headers.getlist("origin"), headers.get("referer")
    if any(origin != own for origin in origins):  # also `null`, another port of this computer, several
        return False
    opens = scope["method"] in ("GET", "HEAD") and scope["path"] == "/" and not scope.get("query_string")
    if site not in (None, "same-origin", "none"):
        return opens and (headers.get("sec-fetch-mode"), headers.get("sec-fetch-dest")) == ("navigate", "document")
    if referer is not None and not f"{referer}/".startswith(f"{own}/"):  # over http, browsers send no Sec-Fetch-Site
        return opens
    if scope["path"] == LOGOUT:  # it changes something, though it is a GET: only from the page, or typed
        return site is not None or referer is not None or bool(origins)
    return True


def _is_call(body: bytes) -> bool:
    """Whether a body is a call as the page makes them: with plain values only. Gradio would fetch a URL that stands in
    a value in the form of a file."""
    try:
        call = json.loads(body)
        json.dumps(call, ensure_ascii=False).encode()  # half a character can't be sent back, not even in an error
    except (ValueError, RecursionError):
        return False
    plain = (str, int, float, bool, type(None))
    return (
        isinstance(call, dict)
        and isinstance(data := call.get("data"), list)
        and all(isinstance(value, plain) for value in data)
        and all(isinstance(value, plain) for name, value in call.items() if name not in ("data", "event_data"))
    )


def _limited(receive: Receive) -> Receive:
    """A body can come without a content-length: if it is too large, the client is disconnected."""
    bytes_left = MAX_BODY_BYTES

    async def limited() -> Message:
        nonlocal bytes_left
        message = await receive()
        bytes_left -= len(message.get("body", b""))
        return message if bytes_left >= 0 else {"type": "http.disconnect"}

    return limited


async def _read(receive: Receive) -> bytes | None:
    """The whole body; None if the client has left or sends too much."""
    body = b""
    while (message := await receive())["type"] == "http.request":
        body += message.get("body", b"")
        if not message.get("more_body"):
            return body
    return None


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Gives a body that was read already."""
    messages = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def replay() -> Message:
        return next(messages, None) or await receive()

    return replay
