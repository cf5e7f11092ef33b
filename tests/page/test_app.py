"""`python app.py` over HTTP, as a crafted client would use it."""

import json
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

from qalign.page.launch import main
from tests.chat_runs import finished_run, serving
from tests.conftest import ROOT

SETTINGS = ["base", "a/dpo", False, False, 0, 1, 6, 1, 1, ""]  # in the order of `ui.ENTERED`, as the prompt and comment


@pytest.fixture(scope="module")
def runs(tiny_folder, tmp_path_factory):
    return finished_run(tmp_path_factory.mktemp("app") / "runs" / "a", tiny_folder).parent.parent


@pytest.fixture(scope="module")
def address(runs):
    with serving("--runs", str(runs), "--votes", str(runs.parent / "votes.jsonl")) as address:
        yield address


def function(client: httpx.Client, target: str) -> int:
    """The number of what happens on an event, such as `submit`."""
    found = client.get("/config").json()["dependencies"]
    return next(d["id"] for d in found if any(event == target for _, event in d["targets"]))


def join(client: httpx.Client, number: int, data: list, session: str) -> httpx.Response:
    body = {"data": data, "fn_index": number, "session_hash": session, "event_data": None, "trigger_id": None}
    return client.post("/gradio_api/queue/join", json=body)


def events(client: httpx.Client, session: str):
    with client.stream("GET", "/gradio_api/queue/data", params={"session_hash": session}, timeout=60) as response:
        for line in response.iter_lines():
            if line.startswith("data:"):
                yield json.loads(line[5:])


def completed(client: httpx.Client, session: str) -> dict:
    """The last event of a session's question."""
    return [event for event in events(client, session) if event["msg"] == "process_completed"][-1]


def ask(client: httpx.Client, session: str, settings=SETTINGS) -> dict:
    assert join(client, function(client, "submit"), [None, *settings, "Why?", ""], session).status_code == 200
    return completed(client, session)


@pytest.fixture
def client(address):
    with httpx.Client(base_url=address, timeout=60) as client:
        yield client


@pytest.mark.parametrize(
    "path",
    [
        *("/gradio_api/file=/etc/passwd", "/gradio_api/file=../../../../etc/passwd", "/file=/etc/passwd"),
        *(f"/gradio_api/file={ROOT / 'pyproject.toml'}", "/static/../../../../../../etc/passwd"),
        *("/assets/..%2f..%2f..%2f..%2fetc%2fpasswd", "/gradio_api/proxy=http://127.0.0.1:1/"),
        *("/gradio_api/file=http://127.0.0.1:1/", "/gradio_api/file=https://example.org/"),
    ],
)
def test_no_file_can_be_read_and_no_other_server_reached(client, path):
    answer = client.get(path, follow_redirects=False)
    assert answer.status_code in (307, 400, 403, 404), answer.status_code
    assert "root:" not in answer.text
    assert "setuptools" not in answer.text


NAMES = ("../../../etc", "/etc", "runs/a/dpo/adapter", ["a/dpo"], {"path": "/etc/passwd"}, None)
VALUES = (
    *((4, "x"), (5, -5), (6, 10**9), (7, -0.5), (7, "x"), (7, 10**9), (8, "soon"), (8, "9" * 10)),
    (9, "s" * 50000),
)


class Counting(BaseHTTPRequestHandler):
    """A web server that counts who asks."""

    def do_GET(self):
        self.server.hits.append(self.path)
        self.send_response(200)
        self.end_headers()

    do_POST = do_HEAD = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture
def elsewhere():
    with ThreadingHTTPServer(("127.0.0.1", 0), Counting) as server:
        server.hits = []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


URLS = ("http://{}/a", "%20http://{}/a", "%09http://{}/a", "HTTP://{}/a", "hTTp:%2f%2f{}/a", "http:/{}/a",
        "http%3A//{}/a", "http:%5c%5c{}/a", "//{}/a", "%2f%2f{}/a", "file:///etc/hostname", "FILE:///etc/hostname", "%00http://{}/a",
        "http://me@{}/a", "ftp://{}/a", "%2568ttp://{}/a", "http://{}/a.png?x=1", "http://{}%23/a")  # fmt: skip


def test_no_url_is_fetched_for_anybody(client, elsewhere):
    name = f"127.0.0.1:{elsewhere.server_port}"
    for form in ("/gradio_api/file={}", "/gradio_api/file/{}", "/file={}", "/gradio_api/proxy={}",
                 "//gradio_api/file={}", "/gradio_api//file={}", "/GRADIO_API/FILE={}", "/proxy={}",
                 "/gradio_api/%66ile={}", "/gradio_api/stream/{}", "/gradio_api/custom_component/{}"):  # fmt: skip
        for url in URLS:
            asked = f"GET {form.format(url.format(name))} HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n\r\n"
            with socket.create_connection(client.base_url.netloc.decode().split(":")) as raw:  # nothing is normalised
                raw.sendall(asked.encode())
                assert raw.recv(99).startswith(b"HTTP/1.1 404"), (form, url)
    uploads = ({"files": b"x"}, {"url": f"http://{name}/a"})
    assert {client.post("/gradio_api/upload", files=files).status_code for files in uploads} == {404}
    file = {"path": f"http://{name}/a", "url": f"http://{name}/a", "meta": {"_type": "gradio.FileData"}}
    number = function(client, "submit")
    for value in (file, [file], {"value": file}):
        assert join(client, number, [None, *SETTINGS, value, ""], "file").status_code == 400
    assert elsewhere.hits == []


@pytest.mark.parametrize(
    "settings",
    [SETTINGS[:2], *([*SETTINGS[:n], new, *SETTINGS[n + 1 :]] for n, new in (*((0, x) for x in NAMES), *VALUES))],
)
def test_a_crafted_request_cannot_name_another_adapter_or_leave_the_bounds(client, settings):
    if any(isinstance(value, (list, dict)) for value in settings):
        assert join(client, function(client, "submit"), [None, *settings, "Why?", ""], "crafted").status_code == 400
    else:
        done = json.dumps(ask(client, f"crafted {str(settings)[:99]}", settings))
        assert "tokens/s" not in done
        assert "Traceback" not in done
    assert "6 tokens" in json.dumps(ask(client, "after"))


def test_what_the_page_itself_does_not_send_is_turned_away(client):
    assert client.get("/", headers={"origin": "http://evil.example"}).status_code == 403
    assert client.get("/", headers={"host": "evil.example"}).status_code == 403
    assert join(client, 0, [None, *SETTINGS, "x" * 2**20, ""], "big").status_code == 413
    assert client.post("/gradio_api/upload", files={"files": b"x"}).status_code == 404
    assert client.post("/gradio_api/run/send", json={"data": []}).status_code == 404


@pytest.mark.slow
def test_two_hundred_at_once_queue_or_are_refused_and_the_page_serves_on(client, address):
    number = function(client, "submit")

    def one(index: int) -> int:
        with httpx.Client(base_url=address, timeout=60) as own:
            return join(own, number, [None, *SETTINGS, "Why?", ""], f"many{index}").status_code

    with ThreadPoolExecutor(40) as pool:
        found = list(pool.map(one, range(200)))
    assert set(found) <= {200, 503}
    assert 0 < found.count(200) < 100
    deadline = time.monotonic() + 60
    while join(client, number, [None, *SETTINGS, "Why?", ""], "afterwards").status_code != 200:
        assert time.monotonic() < deadline
        time.sleep(0.5)
    assert completed(client, "afterwards")["success"]


SLOW = """
import time
from qalign.model import generation
nucleus = generation.nucleus
generation.nucleus = lambda *args: (time.sleep(0.3), nucleus(*args))[1]
"""


@pytest.fixture(scope="module")
def slow(runs):
    with serving("--runs", str(runs), before=SLOW) as address, httpx.Client(base_url=address, timeout=60) as client:
        yield client


@pytest.mark.slow
def test_who_hangs_up_stops_the_answer(slow):
    number = function(slow, "submit")
    for session in ("gone1", "gone2"):
        assert join(slow, number, [None, *SETTINGS[:6], 190, 1, 1, "", "Why?", ""], session).status_code == 200
        next(event for event in events(slow, session) if event["msg"] == "process_generating")
    began = time.monotonic()
    assert ask(slow, "next")["success"]
    assert time.monotonic() - began < 30  # each of the two would take a minute


@pytest.mark.slow
def test_twenty_answers_that_nobody_listens_to_hold_up_nobody(slow):
    number = function(slow, "submit")
    for index in range(20):  # each would take a minute
        data = [None, *SETTINGS[:6], 190, 1, 1, "", "Why?", ""]
        assert join(slow, number, data, f"unheard{index}").status_code == 200
    began = time.monotonic()
    assert ask(slow, "heard")["success"]
    assert time.monotonic() - began < 30


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--share"], "--share puts the page on the internet"),
        (["runs/nowhere"], "there is no finished"),
        *((["--runs", path], "there is no such folder") for path in ("nowhere", "~nosuchuser/x", "n" * 300, "a\0b")),
        (["--recipe", "nowhere.yaml"], "there is no such recipe"),
        *(
            (["--port", port], f"--port {port}: expected a number from 1 to 65535")
            for port in ("0", "-1", "70000", "65536")
        ),
        (["--port", "9" * 5000], "--port"),
        (["--host", "nowhere.invalid", "--auth", "a:b"], "--host nowhere.invalid"),
        (["--host", "192.0.2.1", "--auth", "a:b"], "--host 192.0.2.1"),
        (["--host", "a" * 99, "--auth", "a:b"], "--host"),
        (["--runs", "~nosuchuser/x"], "--runs ~nosuchuser/x: there is no such folder"),
        (["--votes", "/"], "--votes /: expected a file"),
        (["--votes", "/proc/votes.jsonl"], "--votes /proc/votes.jsonl: votes can't be written there"),
    ],
)
def test_a_mistake_is_a_line_before_anything_is_loaded(options, words, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "qalign.page.chat", None)  # it can't be imported
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        main(options)
    *_, line = capsys.readouterr().err.splitlines()
    assert words in line
    assert "Traceback" not in line
    assert not [*tmp_path.iterdir()]


def test_a_port_that_is_taken_is_a_line_before_anything_is_loaded(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "qalign.page.chat", None)
    monkeypatch.chdir(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(SystemExit, match="2"):
        main(["--port", str(taken.getsockname()[1])])
    assert "Address already in use" in capsys.readouterr().err


@pytest.fixture(scope="module")
def behind_a_password(runs):
    with serving("--runs", str(runs), "--auth", "me:se:cret") as address:
        yield address


def test_with_a_password_nothing_is_served_without_it(behind_a_password):
    with httpx.Client(base_url=behind_a_password) as client:
        assert client.get("/config").status_code == 401
        assert join(client, 1, [], "x").status_code == 401
        assert login(client, "wrong").status_code == 400
        began = time.monotonic()
        assert login(client, "se:cret").status_code == 200
        assert time.monotonic() - began > 0.3  # the wrong one is held against it
        assert client.get("/config").status_code == 200
        for site in ("cross-site", "same-site"):
            link = {"sec-fetch-site": site, "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}
            assert client.get("/logout", headers=link).status_code == 403
        assert client.get("/config").status_code == 200
        assert client.get("/logout", headers={"sec-fetch-site": "same-origin"}).is_redirect
        assert client.get("/config").status_code == 401


TUNNEL = "import gradio.networking\ngradio.networking.setup_tunnel = lambda *_: 'http://x.gradio.live'"


@pytest.mark.slow
def test_behind_the_share_tunnel_the_page_is_served_under_its_public_name(runs):
    with serving("--runs", str(runs), "--share", "--auth", "me:se:cret", before=TUNNEL) as address:
        public = {"x-forwarded-host": "x.gradio.live", "x-forwarded-proto": "https", "host": "10.0.0.1"}
        with httpx.Client(base_url=address, headers=public) as client:
            assert login(client, "se:cret", origin="http://10.0.0.1").status_code == 403
            answer = login(client, "se:cret", origin="https://x.gradio.live")
            assert answer.status_code == 200
            cookies = answer.headers.get_list("set-cookie")
            assert len(cookies) == 2
            assert all(cookie.endswith("; SameSite=Lax") and "none" not in cookie.lower() for cookie in cookies)
            token = cookies[0].partition(";")[0]
            assert client.get("/config", headers={"cookie": token}).json()["root"] == "https://x.gradio.live"
        assert httpx.get(f"{address}/config", headers={"host": "y.gradio.live"}).status_code == 403


def login(client: httpx.Client, password: str, **headers: str) -> httpx.Response:
    return client.post("/login", data={"username": "me", "password": password}, headers=headers, timeout=60)


def test_guessing_passwords_is_slow_and_one_try_waits_at_a_time(behind_a_password):
    with httpx.Client(base_url=behind_a_password) as client:
        with ThreadPoolExecutor(30) as pool:
            began = time.monotonic()
            found = [answer.status_code for answer in pool.map(lambda _: login(client, "wrong"), range(60))]
        took = time.monotonic() - began
        assert set(found) == {400, 429}
        assert found.count(400) <= 2 + took  # no faster than 1, 2, 3.5, 5.5 … seconds allow
        assert login(client, "se:cret").status_code == 200


def test_the_folder_of_the_page_is_removed_at_its_end_and_that_of_a_killed_one_at_the_next_start(tmp_path):
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom qalign.page.launch import own_folder\n"
        "print(own_folder(Path(sys.argv[1])), flush=True)\nsys.stdin.read()"
    )

    def start() -> tuple[subprocess.Popen, Path]:
        words = [sys.executable, "-c", script, str(tmp_path)]
        process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        return process, Path(process.stdout.readline().strip())

    def end(process: subprocess.Popen, how=lambda process: process.stdin.close()) -> None:
        how(process)
        process.wait(20)
        process.stdin.close()
        process.stdout.close()

    somebody, other = tmp_path / "qalign-page-not-a-folder", tmp_path / "other"
    somebody.touch()
    other.mkdir()
    killed, left = start()
    (left / "votes.jsonl").touch()
    assert left.stat().st_mode & 0o777 == 0o700
    end(killed, subprocess.Popen.kill)
    assert left.is_dir()
    living, kept = start()
    assert {*tmp_path.iterdir()} == {somebody, other, kept}
    ended, own = start()
    assert {*tmp_path.iterdir()} == {somebody, other, kept, own}  # that of a living page stays
    end(ended)
    end(living)
    assert {*tmp_path.iterdir()} == {somebody, other}


@pytest.mark.slow
def test_without_a_run_the_page_says_which_command_makes_one(tmp_path):
    with serving("--runs", str(tmp_path)) as address:
        assert "python -m qalign.dpo recipes/smollm2_demo.yaml" in httpx.get(address).text
