"""A hub of one's own on this machine, for tests of what the real one answers; it counts the bytes that it serves."""

import hashlib
import json
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "a" * 40
REFUSALS = {"gated": (403, "GatedRepo"), "sick": (500, ""), "gone": (404, "RepoNotFound"), "secret": (401, "")}


class FakeHub(ThreadingHTTPServer):
    """Serves `files` as `org/set` and under unknown names, and counts what was asked for; `org/gated`,
    `org/sick`, `org/gone` and `org/secret` are refused."""

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]):
        super().__init__(("127.0.0.1", 0), _Answers)
        self.files, self.served, self.asked = files, Counter(), Counter()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeHub

    def log_message(self, *_):
        pass

    def do_GET(self):
        path = self.path.partition("?")[0]
        self.server.asked[path] += 1
        name = next((name for name in REFUSALS if f"/org/{name}" in path), "set")
        if name in REFUSALS:
            code, reason = REFUSALS[name]
            self._answer(b"{}", code, {"X-Error-Code": reason, "X-Error-Message": reason})
        elif "/revision/none" in path:
            self._answer(b"{}", 404, {"X-Error-Code": "RevisionNotFound"})
        elif "/resolve/" in path:
            self._file(path.split("/resolve/")[1].partition("/")[2])
        elif "/tree/" in path:
            inside = path.split("/tree/")[1].partition("/")[2]
            self._json([self._entry(file) for file in self.server.files if file.startswith(inside)])
        else:
            self._json({"id": "org/set", "sha": COMMIT, "siblings": [], "private": False, "gated": False, "tags": []})

    do_HEAD = do_GET

    def _entry(self, file):
        content = self.server.files[file]
        return {"type": "file", "path": file, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}

    def _file(self, file):
        if (content := self.server.files.get(file)) is None:
            return self._answer(b"", 404, {"X-Error-Code": "EntryNotFound"})
        headers = {"ETag": f'"{self._entry(file)["oid"]}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        first, last = 0, len(content) - 1
        if wanted := self.headers.get("Range"):
            start, _, end = wanted.removeprefix("bytes=").partition("-")
            first, last = int(start), min(int(end or last), last)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        return self._answer(content[first : last + 1], 206 if wanted else 200, headers, file)

    def _json(self, value):
        self._answer(json.dumps(value).encode(), 200, {"Content-Type": "application/json"})

    def _answer(self, content, code, headers, file=""):
        self.send_response(code)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        for start in range(0, len(content), 1 << 16):  # in pieces, as the other side may close when it has enough
            try:
                self.wfile.write(content[start : start + (1 << 16)])
            except OSError:
                return
            self.server.served[file] += len(content[start : start + (1 << 16)])
