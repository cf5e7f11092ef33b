"""A stand-in for a vLLM server that runs the tiny model: its HTTP API as read in vLLM 0.33 (`vllm/entrypoints`), its
rules for adapters, and a base of its own, so that what a client sees is what it would see of vLLM."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch

from qalign.config.recipe import Model
from qalign.model.base import load
from qalign.model.generation import Request, Sampling, inverse_cdf, stream, uniform_draws

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


class StandIn(ThreadingHTTPServer):
    """Serves a base with the adapters that it is told to load. What it does wrong is set by tests."""

    def __init__(self, folder: str, *, port: int = 0, dtype: str = "float32", max_rank: int = 16, runtime_lora=True):
        super().__init__(("127.0.0.1", port), Handler)
        self.base = load(Model(base=folder, compute_dtype=dtype, max_length=256))
        self.folder, self.max_rank, self.runtime_lora = folder, max_rank, runtime_lora
        self.paths: dict[str, str] = {}  # of the adapters, by name
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.sent_headers: list[dict[str, str]] = []
        self.failures: dict[int, int] = {}  # number of a completion, from 1, to the status that it gets
        self.max_model_len, self.processed, self.shift = 256, True, 0.0
        self.cut: int | None = None  # tokens after which an answer is cut
        self.foreign: int | None = None  # the token that every answer begins with
        self.nameless, self.listed = False, None  # tokens as text; what /v1/models says instead of the models
        self.draws: dict[int, torch.Tensor] = {}  # random numbers of an answer, by its seed
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def asked(self, path: str) -> list[dict[str, Any]]:
        return [body for where, body in self.requests if where == path]

    def loaded(self, body: dict[str, Any]) -> tuple[int, Any]:
        name, folder = body["lora_name"], Path(body["lora_path"])
        if name in self.paths and not body.get("load_inplace"):
            return 400, f"The lora adapter '{name}' has already been loaded."
        config = json.loads((folder / "adapter_config.json").read_text())
        if config["r"] > self.max_rank:
            return 500, f"LoRA rank {config['r']} is greater than max_lora_rank {self.max_rank}."
        if name not in self.base.adapters:  # vLLM's cache too may still have it
            self.base.load_adapter(name, str(folder), trainable=False)
        self.paths[name] = str(folder)
        return 200, f"Success: LoRA adapter '{name}' added successfully."

    def completion(self, body: dict[str, Any]) -> tuple[int, Any]:
        name = body["model"]
        if name not in (self.folder, *self.paths):
            return 404, f"The model `{name}` does not exist."
        role = name if name in self.paths else "base"
        stops = tuple(body["stop_token_ids"]) + (() if body["ignore_eos"] else (self.base.tokenizer.eos_token_id,))
        sampling = Sampling(body["max_tokens"], body["temperature"], stops, body["top_p"])
        ids, logps, best = self._sample(role, body["prompt"], sampling, body.get("seed", 0))
        ids = ids[: self.cut]
        ids = ids if self.foreign is None else [self.foreign, *ids[1:]]
        tokens = ["word" if self.nameless else f"token_id:{token}" for token in ids]
        scored = {
            "tokens": tokens,
            "token_logprobs": logps[: len(ids)],
            "top_logprobs": best,
            "text_offset": [0] * len(ids),
        }
        reason = "stop" if ids[-1] in stops else "length"
        return 200, {"choices": [{"index": 0, "text": "", "logprobs": scored, "finish_reason": reason}]}

    def _sample(self, role: str, prompt: list[int], sampling: Sampling, seed: int) -> tuple[list, list, list]:
        ids, logps, best = [], [], []

        def choose(logits, draws, sampling):
            scaled = logits.float() / sampling.temperature
            token = inverse_cdf(logits, draws, sampling)
            shown = (scaled if self.processed else logits.float()).log_softmax(dim=-1)[0]
            logps.append(shown[token].item() + self.shift)
            values, places = shown.topk(5)
            best.append(
                {f"token_id:{place}": value for place, value in zip(places.tolist(), values.tolist(), strict=True)}
            )
            return token

        request = Request(role, prompt, self.draws.get(seed, uniform_draws(seed, 1, sampling.max_new_tokens)))
        for step in stream(self.base, [request], sampling, choose):
            ids += [token for *_, token in step]
        return ids, logps[: len(ids)], best[: len(ids)]


class Handler(BaseHTTPRequestHandler):
    server: StandIn

    def do_GET(self):
        if self.server.listed is not None:
            self._answer(200, self.server.listed)
            return
        known = {"id": self.server.folder, "root": self.server.folder, "max_model_len": self.server.max_model_len}
        adapters = [{"id": name, "parent": self.server.folder} for name in self.server.paths]
        self._answer(200, {"object": "list", "data": [known | {"parent": None}, *adapters]})

    def do_POST(self):
        server, body = self.server, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock, torch.random.fork_rng():
            server.requests.append((self.path, body))
            server.sent_headers.append(dict(self.headers))
            completions = len(server.asked("/v1/completions"))
            if self.path == "/v1/completions" and (status := server.failures.get(completions)):
                self._answer(status, {"error": {"message": "told to fail", "code": status}})
                return
            if self.path == "/v1/completions":
                status, said = server.completion(body)
            elif not server.runtime_lora:
                self._answer(404, {"detail": "Not Found"})
                return
            elif self.path == "/v1/load_lora_adapter":
                try:
                    status, said = server.loaded(body)
                except FileNotFoundError:
                    status, said = 404, f"No adapter found for '{body['lora_name']}'"
            else:
                status, said = (200, "ok") if server.paths.pop(body["lora_name"], None) else (404, "cannot be found")
        self._answer(status, said if status == 200 else {"error": {"message": said, "code": status}})

    def _answer(self, status: int, said: Any) -> None:
        content = (said if isinstance(said, str) else json.dumps(said)).encode()
        self.send_response(status)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@contextmanager
def serving(folder: str, **options):
    """The server, in a thread."""
    with StandIn(folder, **options) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
