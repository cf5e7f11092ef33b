"""Passwords: when one is asked for, and how slow it is to guess one."""

import asyncio
import time

import pytest

from qalign.errors import UserError
from qalign.page import security
from qalign.page.security import LoginDelay, credentials
from tests.page.guarded import make_guard, request


@pytest.fixture(autouse=True)
def no_variable(monkeypatch):
    monkeypatch.delenv("QALIGN_AUTH", raising=False)


def test_each_wrong_password_doubles_the_wait(monkeypatch):
    waits, now = [], [100.0]
    monkeypatch.setattr(security.time, "monotonic", lambda: now[0])

    async def sleep(seconds):
        waits.append(round(seconds, 3))
        now[0] += seconds

    monkeypatch.setattr(security.asyncio, "sleep", sleep)

    async def wrong(scope, receive, send):
        await send({"type": "http.response.start", "status": 400, "headers": []})

    async def right(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})

    guard = make_guard(wrong)
    login = {"path": "/login", "method": "POST", "guard": guard}
    for _ in range(9):
        assert request(**login, page=wrong).status == 400
    assert waits == [0, 0.5, 1, 2, 4, 8, 16, 30, 30]
    assert request(**login, page=wrong, client="192.168.1.2").status == 400
    assert waits[-1] == 0  # another address
    assert request(**login, page=right).status == 200
    assert request(**login, page=wrong).status == 400
    assert waits[-2:] == [30, 0]  # the right one is forgiven


def test_one_try_of_an_address_waits_and_only_the_latest_addresses_are_remembered():
    delay = LoginDelay()

    async def two() -> tuple[bool, bool]:
        return await delay.begin("a"), await delay.begin("a")

    assert asyncio.run(two()) == (True, False)
    for number in range(delay.MAX_ADDRESSES + 10):
        delay.end(str(number), wrong=True)
    assert len(delay._wrong) == delay.MAX_ADDRESSES
    began = time.monotonic()
    assert asyncio.run(delay.begin("0"))  # forgotten
    assert time.monotonic() - began < 0.4


def test_others_are_let_in_only_with_a_password(monkeypatch):
    for host in ("127.0.0.1", "localhost", "::1", "[::1]", "127.8.8.8"):
        assert credentials(host, None, share=False) is None
    wide = ("0.0.0.0", "192.168.1.2", "::", "example.org", "localhost.example.org", "", "::ffff:127.0.0.1")
    for host, share, found in (*((host, False, f"--host {host}") for host in wide), ("127.0.0.1", True, "--share")):
        with pytest.raises(UserError, match=f"{found}.*give --auth USER:PASSWORD"):
            credentials(host, None, share=share)
        assert credentials(host, "me:a:b", share=share) == ("me", "a:b")
    for half in ("me", "me:", ":secret", ":"):
        with pytest.raises(UserError, match="USER:PASSWORD"):
            credentials("127.0.0.1", half, share=False)
    monkeypatch.setenv("QALIGN_AUTH", "you:secret")
    assert credentials("0.0.0.0", None, share=True) == ("you", "secret")
