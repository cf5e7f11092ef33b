"""`python app.py` over HTTP, as a crafted client would use it."""

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from qalign.page.launch import main
from tests.chat_runs import finished_run, serving
from tests.conftest import ROOT

SETTINGS = ["base", "a/dpo", False, False, 0, 1, 6, 1, ""]  # in the order of `ui.ENTERED`, as the prompt and comment


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
VALUES = ((4, "x"), (5, -5), (6, 10**9), (7, "soon"), (7, "9" * 10), (8, "s" * 50000))


@pytest.mark.parametrize(
    "settings",
    [SETTINGS[:2], *([*SETTINGS[:n], new, *SETTINGS[n + 1 :]] for n, new in (*((0, x) for x in NAMES), *VALUES))],
)
def test_a_crafted_request_cannot_name_another_adapter_or_leave_the_bounds(client, settings):
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


def test_who_hangs_up_stops_the_answer(runs):
    with serving("--runs", str(runs), before=SLOW) as address, httpx.Client(base_url=address, timeout=60) as client:
        number = function(client, "submit")
        for session in ("gone1", "gone2"):
            assert join(client, number, [None, *SETTINGS[:6], 190, 1, "", "Why?", ""], session).status_code == 200
            next(event for event in events(client, session) if event["msg"] == "process_generating")
        began = time.monotonic()
        assert ask(client, "next")["success"]
        assert time.monotonic() - began < 30  # each of the two would take a minute


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--share"], "--share puts the page on the internet"),
        (["runs/nowhere"], "there is no finished"),
        (["--recipe", "nowhere.yaml"], "there is no such recipe"),
    ],
)
def test_a_mistake_is_a_line_before_anything_is_loaded(options, words, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "qalign.page.chat", None)  # it can't be imported
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(SystemExit, match="2"):
        main(options)
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


def test_with_a_password_nothing_is_served_without_it(runs):
    with serving("--runs", str(runs), "--auth", "me:se:cret") as address, httpx.Client(base_url=address) as client:
        assert client.get("/config").status_code == 401
        assert join(client, 1, [], "x").status_code == 401
        assert client.post("/login", data={"username": "me", "password": "wrong"}).status_code == 400
        assert client.post("/login", data={"username": "me", "password": "se:cret"}).status_code == 200
        assert client.get("/config").status_code == 200


def test_without_a_run_the_page_says_which_command_makes_one(tmp_path):
    with serving("--runs", str(tmp_path)) as address:
        assert "python -m qalign.dpo recipes/smollm2_demo.yaml" in httpx.get(address).text
