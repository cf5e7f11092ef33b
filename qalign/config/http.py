"""JSON over HTTP: requests that are sent again where this may help, and many at once. For judges behind a URL and for a
vLLM server."""

import json
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import deque
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import suppress
from http.client import HTTPException, InvalidURL
from os import environ
from queue import SimpleQueue
from threading import Thread
from typing import Any, TypeVar, cast

from qalign.errors import one_line, short

T = TypeVar("T")
R = TypeVar("R")

BUSY = (408, 409, 429, 502, 503, 504)  # what a server answers that may have time later


class RequestFailed(Exception):
    """Why a request has no answer, in words that follow the URL, with the tries that it took; `status` is that of the
    last answer, 0 if there was none."""

    def __init__(self, problem: str, status: int = 0, tries: int = 1):
        super().__init__(one_line(problem, 200) + (f" after {tries} tries" if tries > 1 else ""))
        self.status = status


def url_problem(url: str) -> str | None:
    """Why no request can be sent to a URL, in words that follow it; None if one can. The host may be unknown."""
    if not (url.isascii() and url.isprintable()) or " " in url:
        return "holds characters that no URL has; write them percent-encoded, such as %C3%A9"
    try:
        parts = urllib.parse.urlsplit(url)
        is_address = bool(parts.hostname) and parts.port != 0 and "@" not in parts.netloc
    except ValueError:
        is_address = False
    return None if is_address else "names no host and port; expected a URL such as http://localhost:8000/v1"


def ask(
    url: str,
    body: dict[str, Any] | None = None,
    *,
    key: str,
    pauses: Sequence[float],
    seconds: float,
    again: Container[int] = BUSY,
) -> Any:
    """What a server answers, read as JSON if it is JSON: to a POST of `body`, or to a GET without one.

    Args:
        key: name of the environment variable whose value, if it is set, goes along as the bearer token.
        pauses: seconds before each further try, where nothing answers or the status is one of `again`.
        seconds: until one try counts as unanswered.

    Raises `RequestFailed`.
    """
    headers = {"Content-Type": "application/json"}
    if token := environ.get(key, "").strip():
        if not (token.isascii() and token.isprintable()):
            raise RequestFailed(f"can't be asked: {key} holds characters that no key has")
        headers["Authorization"] = f"Bearer {token}"
    content = None if body is None else json.dumps(body).encode()
    tries = 1
    while True:
        try:
            request = urllib.request.Request(url, content, headers)
            with urllib.request.urlopen(request, timeout=seconds) as answer:
                return _read(answer.read())
        except urllib.error.HTTPError as error:
            said = "" if error.code in again else _message(error)
            failed = RequestFailed(f"answers {error.code} {said or error.reason}", error.code, tries)
        except (ValueError, InvalidURL) as error:  # no URL: this one, or that of a redirection
            raise RequestFailed(f"can't be asked: {short(error)}") from None
        except (OSError, HTTPException) as error:  # nobody listens, no answer in time, half an answer
            failed = RequestFailed(f"doesn't answer ({getattr(error, 'reason', error) or short(error)})", 0, tries)
        if tries > len(pauses) or (failed.status and failed.status not in again):
            raise failed from None
        time.sleep(pauses[tries - 1])
        tries += 1


def _read(answer: bytes) -> Any:
    with suppress(ValueError):
        return json.loads(answer)
    return answer.decode(errors="replace")


def _message(error: urllib.error.HTTPError) -> str:
    """What the server says about a refused request, in OpenAI's form; empty if it says nothing in this form."""
    with suppress(OSError):
        said = _read(error.read())
        while isinstance(said, dict):
            keys = cast(dict[str, Any], said)
            said = keys.get("error", keys.get("message", keys.get("detail")))
        return said if isinstance(said, str) else ""
    return ""


def at_once(work: Callable[[T], R], items: Sequence[T], most: int) -> Iterator[R]:
    """`map(work, items)` in `most` threads, in the order of the items; raises what `work` raises. Unlike those of a
    ThreadPoolExecutor the threads don't keep the process alive when it is stopped: an answer may never come."""
    left, done = deque(enumerate(items)), SimpleQueue[tuple[int, R | None, BaseException | None]]()

    def run() -> None:
        while True:
            try:
                number, item = left.popleft()
            except IndexError:
                return
            try:
                done.put((number, work(item), None))
            except BaseException as error:
                left.clear()  # what has begun goes on, so that everything before the failure is there
                done.put((number, None, error))

    for _ in range(min(most, len(items))):
        Thread(target=run, daemon=True).start()
    found: dict[int, tuple[Any, BaseException | None]] = {}
    try:
        for number in range(len(items)):
            while number not in found:
                finished, value, error = done.get()
                found[finished] = value, error
            value, error = found.pop(number)
            if error is not None:
                raise error
            yield value
    finally:
        left.clear()
