"""llama.cpp itself, through the package xllamacpp: what it reads out of a file, and what it computes."""

import json
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch


class LlamaCpp:
    """llama.cpp's server with one model."""

    def __init__(self, address: str):
        self.address = address

    def ask(self, route: str, **body) -> dict:
        request = urllib.request.Request(self.address + route, json.dumps(body).encode())
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.loads(answer.read())

    def tokens(self, text: str, **options) -> list[int]:
        return self.ask("/tokenize", content=text, parse_special=True, **options)["tokens"]

    def greedy(self, prompt: list[int], most: int) -> tuple[list[int], str]:
        """(The tokens of its greedy answer, why it stopped.)"""
        said = self.ask("/completion", prompt=prompt, n_predict=most, temperature=0, return_tokens=True, n_probs=1)
        return [one["id"] for one in said.get("completion_probabilities", [])], said["stop_type"]

    def logps(self, prompt: list[int], size: int) -> torch.Tensor:
        """Log-probs of every token of the vocabulary after a prompt; `size` is that of the vocabulary."""
        said = self.ask("/completion", prompt=prompt, n_predict=1, temperature=0, n_probs=size, ignore_eos=True)
        (place,) = said["completion_probabilities"]
        found = torch.full((size,), -torch.inf, dtype=torch.float64)
        for one in place["top_logprobs"]:
            found[one["id"]] = one["logprob"]
        return found


@contextmanager
def running(model: Path, adapter: Path | None = None) -> Iterator[LlamaCpp]:
    """llama.cpp with a `.gguf` file, and with an adapter beside it."""
    xllamacpp = pytest.importorskip("xllamacpp", reason="llama.cpp's own reading needs the package xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.warmup, params.use_jinja = str(model), 1024, False, True
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    if adapter:
        lora = xllamacpp.CommonAdapterLoraInfo()
        lora.path, lora.scale = str(adapter), 1.0
        params.lora_adapters = [lora]
    server = xllamacpp.Server(params)
    try:
        yield LlamaCpp(server.listening_address)
    finally:
        del server
