"""Which requests reach the page, and which are refused before Gradio sees them."""

import asyncio

import pytest

from qalign.errors import UserError
from qalign.page.security import MAX_BODY_BYTES, LocalOnlyMiddleware, credentials

HERE = {"host": "127.0.0.1:7860"}


@pytest.fixture(autouse=True)
def no_variable(monkeypatch):
    monkeypatch.delenv("QALIGN_AUTH", raising=False)


def request(headers: dict, path: str = "/config", body: bytes = b"", *, any_host: bool = False) -> tuple[int, bytes]:
    """(status, body that the page got)."""
    got, sent = bytearray(), []

    async def page(scope, receive, send):
        while (message := await receive())["type"] == "http.request":
            got.extend(message["body"])
            if not message["more_body"]:
                break
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    pieces = [body[start : start + 65536] for start in range(0, len(body), 65536)] or [b""]
    messages = iter({"type": "http.request", "body": p, "more_body": p is not pieces[-1]} for p in pieces)

    async def receive():
        return next(messages, {"type": "http.disconnect"})

    async def send(message):
        sent.append(message)

    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "path": path, "method": "POST", "headers": raw}
    asyncio.run(LocalOnlyMiddleware(page, any_host=any_host)(scope, receive, send))
    names = dict(sent[0]["headers"])
    for rule in (b"default-src 'self'", b"frame-ancestors 'self'"):
        assert rule in names[b"content-security-policy"]
    assert (names[b"x-content-type-options"], names[b"referrer-policy"]) == (b"nosniff", b"no-referrer")
    return sent[0]["status"], bytes(got)


@pytest.mark.parametrize(
    "host", ["127.0.0.1:7860", "localhost:7860", "LOCALHOST", "127.8.8.8", "[::1]:7860", "[0:0:0:0:0:0:0:1]"]
)
def test_the_pages_own_requests_pass_under_every_loopback_name(host):
    assert request({"host": host}, body=b"abc") == (200, b"abc")
    assert request({"host": host, "origin": f"http://{host}"})[0] == 200


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "http://127.0.0.1:9999", "http://localhost:7860", ""]
)
def test_another_site_may_not_use_it(origin):
    assert request({**HERE, "origin": origin})[0] == 403


@pytest.mark.parametrize("host", ["evil.example", "evil.example:7860", "", "127.0.0.1.evil.example", "0.0.0.0", "[::"])
def test_another_name_that_resolves_to_this_computer_is_refused_without_a_password(host):
    assert request({"host": host})[0] == 403
    assert request({"host": host}, any_host=True)[0] == 200


def test_behind_a_tunnel_its_public_name_counts():
    headers = {"host": "10.0.0.1", "x-forwarded-host": "x.gradio.live", "origin": "https://x.gradio.live"}
    assert request(headers, any_host=True)[0] == 200


@pytest.mark.parametrize(
    "path",
    ["/gradio_api/upload", "/gradio_api/proxy=http://10.0.0.1/", "/gradio_api/component_server", "/gradio_api/run/send",
     "/gradio_api/file=https://example.org/", "/file=HTTP://10.0.0.1/"],
)  # fmt: skip
def test_what_the_page_does_not_need_is_not_there(path):
    assert request(HERE, path)[0] == 404


def test_a_request_is_small():
    assert request({**HERE, "content-length": str(2**20)})[0] == 413
    assert request({**HERE, "content-length": "-1"})[0] == 413
    assert request(HERE, body=b"x" * MAX_BODY_BYTES)[1] == b"x" * MAX_BODY_BYTES
    assert len(request(HERE, body=b"x" * 2**20)[1]) <= MAX_BODY_BYTES  # without a length: disconnected


def test_others_are_let_in_only_with_a_password(monkeypatch):
    for host in ("127.0.0.1", "localhost", "::1", "[::1]", "127.8.8.8"):
        assert credentials(host, None, share=False) is None
    wide = ("0.0.0.0", "192.168.1.2", "::", "example.org", "localhost.example.org", "")
    for host, share, found in (*((host, False, f"--host {host}") for host in wide), ("127.0.0.1", True, "--share")):
        with pytest.raises(UserError, match=f"{found}.*give --auth USER:PASSWORD"):
            credentials(host, None, share=share)
        assert credentials(host, "me:a:b", share=share) == ("me", "a:b")
    for half in ("me", "me:", ":secret", ":"):
        with pytest.raises(UserError, match="USER:PASSWORD"):
            credentials("127.0.0.1", half, share=False)
    monkeypatch.setenv("QALIGN_AUTH", "you:secret")
    assert credentials("0.0.0.0", None, share=True) == ("you", "secret")
