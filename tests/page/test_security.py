"""Which requests reach the page, and which are refused before Gradio sees them."""

import asyncio
import json
import subprocess
import sys
from contextlib import ExitStack

import pytest
from starlette.datastructures import Headers

from qalign.page import security
from qalign.page.security import MAX_BODY_BYTES, served_at
from qalign.page.worker import MAX_CONNECTIONS, Listeners
from tests.page.guarded import CALL, HOST, JSON, OWN, TEMP, make_guard, post, request

NAVIGATE = {"sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}


@pytest.mark.parametrize(
    "host", ["127.0.0.1:7860", "localhost:7860", "LOCALHOST", "127.8.8.8", "[::1]:7860", "[0:0:0:0:0:0:0:1]"]
)
def test_the_pages_own_requests_pass_under_every_loopback_name(host):
    own = f"http://{host.lower()}"
    assert request(host=host).status == 200
    assert post(host=host, origin=own, sec_fetch_site="same-origin", referer=f"{own}/").status == 200
    assert request(host=host, referer=f"{own}/?a=b", sec_fetch_site="same-origin").status == 200


@pytest.mark.parametrize(
    "origin",
    ["http://evil.example", "null", "http://127.0.0.1:9999", "http://localhost:7860", "", "https://127.0.0.1:7860",
     "http://127.0.0.1", "http://127.0.0.1:7860/", "http://me@127.0.0.1:7860", "http://127.0.0.1.:7860",
     "file://", "chrome-extension://abc", "http://127.0.0.1:78600", [OWN, "http://evil.example"], [OWN, "null"]],
    ids=str,
)  # fmt: skip
def test_another_site_may_not_use_it(origin):
    assert request("/", origin=origin).status == 403
    assert request(origin=origin, x_forwarded_host="evil.example").status == 403
    assert post(origin=origin).status == 403


@pytest.mark.parametrize("site", ["cross-site", "same-site", "", "other"])
def test_a_browser_that_names_another_site_is_refused_unless_somebody_follows_a_link_to_the_page(site):
    for path in ("/config", "/", "/gradio_api/queue/data", "/logout", "/assets/a.js"):
        assert request(path, sec_fetch_site=site).status == 403
    assert post(sec_fetch_site=site).status == 403
    assert request("/", sec_fetch_site=site, **NAVIGATE).status == 200
    assert request("/", sec_fetch_site=site, **NAVIGATE, query=b"deep_link=a").status == 403
    assert request("/logout", sec_fetch_site=site, **NAVIGATE).status == 403
    for dest in ("iframe", "embed", "object", "empty"):
        assert request("/", sec_fetch_site=site, **{**NAVIGATE, "sec-fetch-dest": dest}).status == 403
    assert request("/", "POST", sec_fetch_site=site, **NAVIGATE).status == 403


@pytest.mark.parametrize(
    ("referer", "status"),
    [(f"{OWN}/", 200), (OWN, 200), ("http://127.0.0.1:9999/", 403), ("http://127.0.0.1:78601/", 403), ("x", 403)],
)
def test_over_http_on_another_computer_the_referer_tells(referer, status):
    assert request("/gradio_api/queue/data", referer=referer).status == status
    assert request("/", referer=referer).status == 200


def test_only_the_page_itself_logs_out():
    assert request("/logout").status == 403  # `<img referrerpolicy=no-referrer>` in an old browser
    for own in ({"sec_fetch_site": "same-origin"}, {"sec_fetch_site": "none"}, {"referer": f"{OWN}/"}, {"origin": OWN}):
        assert request("/logout", **own).status == 200


HOSTS = ["evil.example", "evil.example:7860", "", "127.0.0.1.evil.example", "0.0.0.0", "[::", "localhost.",
         "127.0.0.1.", "[::ffff:7f00:1]:7860", "[::ffff:127.0.0.1]", "me@127.0.0.1:7860", "127.0.0.1:x",
         "127.0.0.1:7860,evil.example", "a.localhost", "127.1", "2130706433", "0x7f.1", "127.0.0.1 ", "localhost/",
         "[::1%25lo]", None, ["127.0.0.1:7860", "evil.example"]]  # fmt: skip


@pytest.mark.parametrize("host", HOSTS, ids=str)
@pytest.mark.parametrize(
    "more", [{}, {"x_forwarded_host": HOST, "x_forwarded_proto": "https", "forwarded": f"host={HOST}"}]
)
def test_another_name_that_leads_to_this_computer_is_refused_with_and_without_a_password(host, more):
    assert request(host=host, **more).status == 403
    assert post(host=host, origin=f"http://{host}", sec_fetch_site="same-origin", **more).status == 403


def test_a_page_for_other_computers_answers_to_addresses_and_its_own_names(monkeypatch):
    monkeypatch.setattr(security.socket, "gethostname", lambda: "Gpu")
    monkeypatch.setattr(security.socket, "getfqdn", lambda: "gpu.home.example")
    wide = served_at("0.0.0.0")
    for host in ("192.168.1.2:7860", "gpu:7860", "gpu.local", "gpu.home.example", "[fd00::1]:7860", "localhost"):
        assert request(host=host, served=wide).status == 200
    for host in ("evil.example", "gpu.evil.example", "[::ffff:7f00:1]"):
        assert request(host=host, served=wide).status == 403
    assert request(host="box.example", served=served_at("box.example")).status == 200
    assert request(host="192.168.1.2", origin="http://192.168.1.3", served=wide).status == 403


def test_forwarded_headers_are_believed_behind_the_share_tunnel_only():
    shared = served_at("127.0.0.1", "https://x.gradio.live")
    through = {"host": "10.0.0.1", "x_forwarded_host": "x.gradio.live", "x_forwarded_for": "1.1.1.1, 2.2.2.2"}
    for headers in (through, {**through, "host": "x.gradio.live", "x_forwarded_host": None}):
        passed = post(served=shared, origin="https://x.gradio.live", **headers)
        assert passed.status == 200
        seen = Headers(scope=passed.scope)
        assert (passed.scope["scheme"], seen["host"], passed.scope["client"][0]) == (
            "https",
            "x.gradio.live",
            "2.2.2.2",
        )
        for origin in ("http://x.gradio.live", "https://y.gradio.live", "https://10.0.0.1", "http://127.0.0.1:7860"):
            assert post(served=shared, origin=origin, **headers).status == 403
    assert request(served=shared, client="192.168.1.9", **through).status == 403  # not from the tunnel
    assert request(served=shared, **{**through, "x_forwarded_host": "y.gradio.live"}).status == 403
    assert request(**through).status == 403  # there is no tunnel
    assert request(served=shared).status == 200  # its owner, at this computer


def test_gradio_sees_no_forwarded_header():
    passed = request(x_forwarded_host="evil.example", x_forwarded_proto="https", x_forwarded_for="1.2.3.4",
                     forwarded="host=evil", x_gradio_server="http://evil.example", cookie="a=b")  # fmt: skip
    assert passed.scope["client"][0] == "127.0.0.1"
    assert {name.decode() for name, _ in passed.scope["headers"]} == {"host", "cookie"}


def test_an_answer_lets_no_other_site_in():
    cookies = [b"a=1; HttpOnly; SameSite=none; Secure", b"b=2; samesite=Strict", b"c=3"]
    headers = [(b"access-control-allow-origin", b"*"), (b"Access-Control-Allow-Credentials", b"true")]
    answered = request(answers=[*headers, *((b"set-cookie", cookie) for cookie in cookies)])
    assert answered.headers.getlist("set-cookie") == [
        "a=1; HttpOnly; Secure; SameSite=Lax", "b=2; SameSite=Lax", "c=3; SameSite=Lax"
    ]  # fmt: skip
    preflight = {"access_control_request_method": "POST", "access_control_request_headers": "x-forwarded-host"}
    for origin in (OWN, "http://evil.example"):
        assert request(method="OPTIONS", origin=origin, **preflight).status in (403, 405)


FILE = f"/gradio_api/file={TEMP}"
NOT_THERE = [
    *("/gradio_api/upload", "/gradio_api/proxy=http://10.0.0.1/", "/gradio_api/component_server", "/gradio_api/info"),
    *("/gradio_api/run/send", "/gradio_api/api/send", "/gradio_api/call/send", "/gradio_api/call/v2/send", "/docs"),
    *("/gradio_api/file=https://example.org/", "/file=HTTP://10.0.0.1/", "/gradio_api/file= http://10.0.0.1/"),
    *("/gradio_api/file=\thttp://10.0.0.1", "/gradio_api/file=%20http://10.0.0.1", "/gradio_api/file/http://10.0.0.1/"),
    *("/gradio_api/file=file:///etc/passwd", "/gradio_api/file=//10.0.0.1/a", "/gradio_api//file=http://10.0.0.1/"),
    *("/GRADIO_API/file=http://10.0.0.1/", "/gradio_api/file=hTTps:/10.0.0.1", "//gradio_api/queue/join", "/config/"),
    *(
        "/gradio_api/file=/etc/passwd",
        f"{FILE}/../a/b",
        f"{FILE}/a/../b",
        f"{FILE}/a/..",
        f"{FILE}-2/a/b",
        FILE,
        f"{FILE}/a",
        f"{FILE}/a/votes.jsonl",
    ),
    *("/assets/../config", "/assets//etc/passwd", "/assets/.../../x", "/assets/a\0b", "/dev/reload", "/monitoring"),
    *("/gradio_api/token", "/gradio_api/user", "/gradio_api/app_id", "/gradio_api/login_check", "/openapi.json"),
    *("/gradio_api/vibe-edit", "/gradio_api/process_recording", "/gradio_api/profiling/traces", "/gradio_api/runs"),
    *("/gradio_api/stream/a", "/gradio_api/mcp/sse", "/gradio_api/deep_link", "/gradio_api/dev/reload", "/pwa_icon/5"),
    *("/gradio_api/heartbeat/a/b", "/gradio_api/custom_component/a/client/b/c.js", "/gradio_api/run-history/buckets"),
]


@pytest.mark.parametrize("path", NOT_THERE)
@pytest.mark.parametrize("method", ["GET", "POST", "HEAD"])
def test_what_the_page_does_not_need_is_not_there(path, method):
    assert request(path, method, **JSON).status == 404


ROUTES = """
import gradio, json
from fastapi import FastAPI
app = gradio.mount_gradio_app(FastAPI(openapi_url=None), gradio.Blocks(), path="/")
print(json.dumps([path for mount in app.routes for path in mount.app.openapi()["paths"]]))
"""


@pytest.mark.slow
def test_every_other_route_of_the_installed_gradio_is_closed():
    """The list of Gradio's routes is read from Gradio: an upgrade that adds one opens nothing."""
    told = subprocess.run([sys.executable, "-c", ROUTES], capture_output=True, text=True, check=True)
    plain = json.loads(told.stdout)
    assert "/gradio_api/upload" in plain
    assert len(plain) > 60
    opened = {path for path in plain if request(path, "POST", **JSON, origin=OWN).status != 404}
    assert opened == {
        *("/", "/config", "/theme.css", "/favicon.ico", "/robots.txt", "/manifest.json", "/login", "/logout"),
        *(f"/gradio_api/{name}" for name in ("queue/data", "queue/join", "cancel", "reset")),
    }


def test_a_route_has_its_methods_only():
    assert request(f"{FILE}/votes.jsonl").status == 200
    for method in ("PUT", "DELETE", "PATCH", "TRACE", "CONNECT", "OPTIONS", "get", "POST"):
        assert request("/config", method).status == 405
    assert request("/gradio_api/queue/join").status == 405
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=a", None):
        assert post(content_type=kind).status == 415  # what a form of another site can send


@pytest.mark.parametrize(
    "call",
    [
        *({**CALL, "data": ["base", value]} for value in (["a"], {"path": "/etc/passwd"}, [], {})),
        {**CALL, "data": [{"path": "http://10.0.0.1/", "meta": {"_type": "gradio.FileData"}}]},
        {**CALL, "data": ["\ud800"]},
        {**CALL, "data": {"a": 1}}, {**CALL, "data": None}, {**CALL, "session_hash": ["a"]}, b"[]", b"{", b"",
        b'{"data": ' + b"[" * 50000 + b"]" * 50000 + b"}", b'{"data": [' + b"9" * 5000 + b"]}", b"\xff",
    ],
    ids=lambda call: str(call)[:60],
)  # fmt: skip
def test_a_call_has_plain_values_only(call):
    """Gradio fetches a URL that stands in a value in the form of a file."""
    answered = post(call=call)
    assert (answered.status, answered.body) == (400, b"")
    assert json.loads(post().body) == CALL


def test_a_request_is_small():
    assert request(content_length=str(2**20)).status == 413
    for length in ("-1", "a", "١", "9" * 400):
        assert request(content_length=length).status == 413
    assert request("/login", "POST", b"x" * MAX_BODY_BYTES).body == b"x" * MAX_BODY_BYTES
    assert len(request("/login", "POST", b"x" * 2**20).body) <= MAX_BODY_BYTES  # without a length: disconnected
    assert post(call=b" " * 2**20).status == 400


def test_what_gradio_cannot_answer_is_one_line_in_the_terminal(capsys):
    async def page(scope, receive, send):
        raise KeyError("no \x1b[31m" + "x" * 9999)

    answered = request("/gradio_api/queue/data", query=b"session_hash=a", page=page)
    assert (answered.status, answered.scope) == (500, None)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("the page could not answer GET /gradio_api/queue/data: KeyError: ")
    assert line.isprintable()
    assert len(line) <= 300


def test_websockets_are_closed():
    sent = []

    async def run():
        async def send(message):
            sent.append(message)

        await make_guard(None)(
            {"type": "websocket", "path": "/", "headers": [], "client": ("127.0.0.1", 1)}, None, send
        )

    asyncio.run(run())
    assert [message["type"] for message in sent] == ["websocket.close"]


def test_the_listeners_of_a_visitor_are_known_while_answers_arrive():
    listeners, seen = Listeners(), []

    async def page(scope, receive, send):
        seen.append(listeners.address("abc"))
        await send({"type": "http.response.start", "status": 200, "headers": []})

    guard = make_guard(page, listeners=listeners)
    data = {"path": "/gradio_api/queue/data", "query": b"session_hash=abc", "guard": guard, "page": page}
    assert request(**data).status == 200
    assert seen == ["127.0.0.1"]
    assert listeners.address("abc") is None
    with ExitStack() as stack:
        for number in range(MAX_CONNECTIONS):
            stack.enter_context(listeners.listening(str(number), "127.0.0.1"))
        assert request(**data).status == 429
        assert request(**data, client="192.168.1.2").status == 200


def test_a_household_of_ipv6_is_one_address():
    served = served_at("::")
    found = [served.address({"client": (word, 1)}, Headers()) for word in ("fd00::1", "fd00::2", "::ffff:1.2.3.4", "x")]
    assert found == ["fd00::/64", "fd00::/64", "1.2.3.4", "unknown"]
