"""Another web site, open in the same Chromium, tries to use the page in every way that a browser offers it."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
from selenium.common.exceptions import WebDriverException

from tests.chat_runs import finished_run, serving
from tests.page.browser import Browser

pytestmark = [pytest.mark.browser, pytest.mark.filterwarnings("ignore::ResourceWarning")]  # Selenium's own sockets
LEADS_HERE = (
    "--host-resolver-rules=MAP evil.example 127.0.0.1, MAP rebound.example 127.0.0.2, MAP a.localhost 127.0.0.1"
)
JOIN = {
    "data": [None, "base", "base", False, False, 0, 1, 6, 1, 1, "", "Why?", ""],
    "session_hash": "evil",
    "fn_index": 0,
}
# Writes each request that gets past the guard to a file.
LOGGED = """
import os
from qalign.page import security
class Logged(security.Guard):
    async def _pass_on(self, scope, receive, send):
        with open({path!r}, "a") as file:
            file.write(scope["method"] + " " + scope["path"] + chr(10))
        await super()._pass_on(scope, receive, send)
security.Guard = Logged
"""
FORMS = Path(__file__).with_name("attacker.js").read_text(encoding="utf-8")
NOTHING = {"error", "late", "closed", "opaque", "sent"}  # the browser kept it, or it is empty


class Site(BaseHTTPRequestHandler):
    """An empty page under any name."""

    def do_GET(self):
        self.send_response(200)
        self.send_header("content-type", "text/html")
        self.end_headers()
        self.wfile.write(b"<!doctype html><title>another site</title><body>")

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def evil():
    """The port of a web server of somebody else on this computer."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Site) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


@pytest.fixture(scope="module")
def browser():
    browser = Browser(LEADS_HERE)
    browser.driver.set_script_timeout(90)
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def runs(tiny_folder, tmp_path_factory):
    return finished_run(tmp_path_factory.mktemp("attacked") / "runs" / "a", tiny_folder).parent.parent


class Attacked:
    """A page, and what got past its guard."""

    def __init__(self, address: str, log):
        self.address, self.log, self.port = address, log, address.rpartition(":")[2]

    def passed(self) -> list[str]:
        return self.log.read_text().splitlines()


def attacked(runs, tmp_path, host, *options):
    log = tmp_path / "passed"
    log.touch()
    before = LOGGED.format(path=str(log))
    return log, serving("--runs", str(runs), "--votes", str(tmp_path / "v.jsonl"), *options, before=before, host=host)


@pytest.fixture(scope="module")
def open_page(runs, tmp_path_factory):
    log, server = attacked(runs, tmp_path_factory.mktemp("open"), "127.0.0.2")
    with server as address:
        yield Attacked(address, log)


@pytest.fixture(scope="module")
def locked_page(runs, tmp_path_factory):
    log, server = attacked(runs, tmp_path_factory.mktemp("locked"), "127.0.0.1", "--auth", "me:secret")
    with server as address:
        yield Attacked(address, log)


def attack(browser, site: str, page: Attacked, target: str = "") -> None:
    """Plays all forms from a site; nothing may get past the guard, and nothing may be read."""
    browser.driver.get(site)
    assert "another site" in browser.driver.title
    before = page.passed()
    got = browser.driver.execute_async_script(FORMS, target or page.address, json.dumps(JOIN))
    assert len(got) == 34
    assert page.passed() == before
    refusals = ("another site may not use this page", "this page answers to localhost only", "this page does not offer")
    assert {
        name: what[:80] for name, what in got.items() if what not in NOTHING and not what.startswith(refusals)
    } == {}


def log_in(browser, address: str) -> None:
    browser.driver.get(f"{address}/robots.txt")
    script = """const done = arguments[0]; fetch('/login', {method: 'POST', body: new URLSearchParams(
        {username: 'me', password: 'secret'})}).then(answer => done(answer.status))"""
    assert browser.driver.execute_async_script(script) == 200


@pytest.mark.parametrize("name", ["http://evil.example:{}", "http://localhost:{}", "http://127.0.0.1:{}"])
def test_another_site_gets_nothing_from_a_page_without_a_password(browser, evil, open_page, name):
    attack(browser, name.format(evil), open_page)


@pytest.mark.parametrize(
    ("site", "own"),
    [
        ("http://evil.example:{}", "http://127.0.0.1:{}"),
        ("http://localhost:{}", "http://localhost:{}"),  # the same site: the browser sends the cookie along
        ("http://127.0.0.1:{}", "http://127.0.0.1:{}"),
        ("http://a.localhost:{}", "http://localhost:{}"),
    ],
)
def test_another_site_cannot_use_the_password_of_a_visitor(browser, evil, locked_page, site, own):
    target = own.format(locked_page.port)
    log_in(browser, target)
    kept = browser.driver.get_cookies()
    assert {cookie["sameSite"] for cookie in kept} == {"Lax"}
    assert all(cookie["httpOnly"] for cookie in kept)
    attack(browser, site.format(evil), locked_page, target)
    browser.driver.get(f"{target}/config")
    assert "dependencies" in browser.driver.page_source  # nobody logged the visitor out


@pytest.mark.parametrize("page", ["open_page", "locked_page"])
def test_a_name_that_leads_to_this_computer_is_not_the_pages(browser, page, request):
    page = request.getfixturevalue(page)
    before = page.passed()
    read = """const done = arguments[0]; fetch('/config', {headers: {'X-Forwarded-Host': 'localhost'}})
        .then(answer => answer.text()).then(done)"""
    for name in ("rebound.example", "evil.example", "[::ffff:7f00:1]", "[::ffff:7f00:2]", "a.localhost", "localhost."):
        try:
            browser.driver.get(f"http://{name}:{page.port}/")
        except WebDriverException:  # nothing listens there
            continue
        assert "this page answers to localhost only" in browser.driver.page_source
        assert "this page answers to localhost only" in browser.driver.execute_async_script(read)
    assert page.passed() == before


def test_a_link_opens_the_page_and_gives_the_other_site_no_hold_of_it(browser, evil, open_page):
    browser.driver.get(f"http://evil.example:{evil}")
    first = browser.driver.current_window_handle
    browser.run(
        "window.opened = window.open(arguments[0], '_blank')".replace("arguments[0]", f"'{open_page.address}/'")
    )
    browser.until(lambda: len(browser.driver.window_handles) == 2)
    (second,) = {*browser.driver.window_handles} - {first}
    browser.driver.switch_to.window(second)
    browser.until(lambda: browser("#prompt textarea").is_displayed())
    assert browser.run("return window.opener") is None
    browser.driver.close()
    browser.driver.switch_to.window(first)
    assert browser.run("return window.opened.closed")  # severed


def test_a_program_without_a_browser_is_no_other_site(open_page, locked_page):
    assert httpx.get(f"{open_page.address}/config").status_code == 200
    assert httpx.get(f"{locked_page.address}/config").status_code == 401
