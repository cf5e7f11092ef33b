"""A running vLLM server as another engine for sampling, over its OpenAI-compatible HTTP API.

Before it samples, the role's adapter is written into a folder that the server reads (`/v1/load_lora_adapter`). Each
state of an adapter has a name of its own, made of its content: under an old name vLLM would go on with cached prefixes
of the old weights. Checked against vLLM 0.33 (`vllm/entrypoints/openai` and `vllm/entrypoints/serve/lora`).
"""

import hashlib
import shutil
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import nn

from qalign.config.atomic import replacing_folder
from qalign.config.http import RequestFailed, ask, at_once
from qalign.errors import UserError, short
from qalign.model.adapters.files import CONFIG, WEIGHTS
from qalign.model.adapters.serving import vllm_options
from qalign.model.base import Base

if TYPE_CHECKING:
    from qalign.model.generation import Sampling

KEY = "VLLM_API_KEY"  # environment variable that `vllm serve` reads its own key from
REQUESTS = 128  # at the same time: vLLM makes batches of them
PAUSES = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0)  # seconds before each further try: a minute, for a server that restarts
TIMEOUT_SECONDS = 600
TOKEN = "token_id:"  # how a token is written with `return_tokens_as_token_ids`
NOT_FOUND = 404
Found = TypeVar("Found")
ScoredAnswers = tuple[list[list[list[int]]], list[list[list[float]]]]  # ids, and the log-prob of each when sampled


def seeds_of(count: int, seed: int) -> list[int]:
    """A seed for each of `count` answers. Every answer has its own request: vLLM gives the answers of one request
    consecutive seeds."""
    return torch.randint(2**62, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def by_prompt(answers: list[tuple[list[int], list[float]]], num_samples: int) -> ScoredAnswers:
    """Answers, each as ids and log-probs, in groups of `num_samples` to a prompt."""
    parts = [answers[start : start + num_samples] for start in range(0, len(answers), num_samples)]
    return [[ids for ids, _ in part] for part in parts], [[logps for _, logps in part] for part in parts]


class EngineFailed(UserError):
    """The server failed while a run samples; the state of training is unchanged since the last iteration."""


class VllmServer:
    """Samples on a vLLM server that serves the base.

    Args:
        key: of the recipe, for messages.
        url: such as `http://localhost:8000`.
        folder: where adapters are written for the server; deleted when the engine is no longer used.
    """

    def __init__(self, base: Base, key: str, url: str, folder: Path):
        self._key, self._url = key, url.rstrip("/").removesuffix("/v1")
        self._folder, self._served = folder.absolute(), dict[str, str]()  # the name of each role's adapter there
        self._model, self._longest = self._base_model()
        self._raw_logps: bool | None = None  # whether its log-probs leave the temperature out; None: not tried yet
        if self._longest < base.max_length:
            fix = f"start it with --max-model-len {base.max_length}"
            raise UserError(f"{key}: {url} takes {self._longest} tokens, model.max_length is {base.max_length}; {fix}")
        self._withdraw = weakref.finalize(self, _withdraw, self._url, self._served, self._folder)

    def _base_model(self) -> tuple[str, int]:
        """The name under which the base is served, and the most tokens that it takes."""
        listed = self._get("/v1/models")
        with suppress(LookupError, TypeError, ValueError, AttributeError, StopIteration):
            found = next(model for model in listed["data"] if not model.get("parent"))
            return str(found["id"]), int(found["max_model_len"])
        raise UserError(f"{self._key}: {self._url} is no vLLM server: /v1/models says {short(listed)}")

    def generate_scored(
        self, base: Base, role: str, prompts: Sequence[list[int]], sampling: "Sampling", *, num_samples: int, seed: int
    ) -> ScoredAnswers:
        """`num_samples` answers to every prompt, as `TransformersEngine.generate`, with the log-probs of their tokens
        by the server. Raises `EngineFailed`."""
        wanted: Any = {"num_samples": num_samples, "seed": seed}
        try:
            return self._generate(base, role, prompts, sampling, **wanted)
        except RequestFailed as error:
            if error.status == NOT_FOUND and self._served:  # it was started again without our adapters
                self._served.clear()
                with suppress(RequestFailed):
                    return self._generate(base, role, prompts, sampling, **wanted)
            fix = "the last checkpoint is kept, and --resume goes on"
            raise EngineFailed(f"{self._key}: {self._url} {error}; {fix}") from None

    def _generate(
        self, base: Base, role: str, prompts: Sequence[list[int]], sampling: "Sampling", *, num_samples: int, seed: int
    ) -> ScoredAnswers:
        """As `generate_scored`; raises `RequestFailed` too."""
        model = self._pushed(base, role) if role in base.adapters else self._model
        if sampling.temperature != 1 and self._raw_logps is None:
            self._check_logps(model, prompts[0], sampling)
        asked = [
            self._request(model, prompts[number // num_samples], sampling, seed=answer_seed)
            for number, answer_seed in enumerate(seeds_of(len(prompts) * num_samples, seed))
        ]
        vocabulary = cast(nn.Embedding, base.lm.get_input_embeddings()).num_embeddings
        found = at_once(self._completion, asked, REQUESTS)
        return by_prompt([self._checked(*answer, sampling, vocabulary) for answer in found], num_samples)

    def _request(self, model: str, prompt: list[int], sampling: "Sampling", **more: Any) -> dict[str, Any]:
        """The body of a request. Everything that the model's generation config could change on the server is written
        out: its sampling (vLLM's `--generation-config auto`), and the ids that end an answer (`ignore_eos`)."""
        return {
            "model": model,
            "prompt": list(prompt),
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "ignore_eos": True,
            "stop_token_ids": list(sampling.stop_ids),
            "logprobs": 0,  # of the sampled token alone
            "return_tokens_as_token_ids": True,
            **more,
        }

    def _completion(self, body: dict[str, Any]) -> tuple[list[int], list[float]]:
        return self._read(body, _answer)

    def _read(self, body: dict[str, Any], read: Callable[[Any], Found]) -> Found:
        """What `read` finds in the log-probs of a completion."""
        said = self._post("/v1/completions", body)
        try:
            (choice,) = said["choices"]
            return read(choice["logprobs"])
        except (LookupError, TypeError, ValueError, AttributeError):
            problem = (
                f"{self._key}: {self._url} gives no token ids with log-probs: {short(said)}; is it vLLM 0.6 or newer?"
            )
            raise EngineFailed(problem) from None

    def _checked(
        self, ids: list[int], logps: list[float], sampling: "Sampling", vocabulary: int
    ) -> tuple[list[int], list[float]]:
        """An answer that the base could have given."""
        if not ids or max(ids) >= vocabulary:
            found = f"token {max(ids)}, of which model.base has none" if ids else "no token"
            raise EngineFailed(f"{self._key}: {self._url} sampled {found}; does it serve another model?")
        if len(ids) < sampling.max_new_tokens and ids[-1] not in sampling.stop_ids:
            fix = "start it again without a shorter --max-model-len"
            raise EngineFailed(f"{self._key}: {self._url} cut an answer after {len(ids)} tokens; {fix}")
        return ids, logps

    def _check_logps(self, model: str, prompt: list[int], sampling: "Sampling") -> None:
        """At a temperature other than 1 the server must give the log-probs that it samples with: those of the same
        most likely tokens must change with the temperature."""
        at = [sampling.temperature, 2 * sampling.temperature]
        found: list[dict[str, float]] = []
        for temperature in at:
            body = self._request(model, prompt, sampling) | {"temperature": temperature, "max_tokens": 1, "logprobs": 5}
            found.append(self._read(body, _most_likely))
        both = found[0].keys() & found[1].keys()
        self._raw_logps = all(abs(found[0][token] - found[1][token]) < 1e-6 for token in both)
        if self._raw_logps:
            fix = "start it with --logprobs-mode processed_logprobs, or set temperature to 1"
            raise EngineFailed(f"{self._key}: {self._url} gives log-probs without the temperature; {fix}")

    # --- adapters ----------------------------------------------------------------------------------------------------

    def _pushed(self, base: Base, role: str) -> str:
        """The name of the role's adapter on the server, which has it in its present state."""
        if not self._served:
            shutil.rmtree(self._folder, ignore_errors=True)  # what a killed session left
        new = self._folder / f"{role}.new"
        with replacing_folder(new) as aside:
            base.save_adapter(role, aside)
        digest = hashlib.sha256((new / CONFIG).read_bytes() + (new / WEIGHTS).read_bytes()).hexdigest()[:16]
        name, before = f"qalign-{role}-{digest}", self._served.get(role)
        if name == before:
            shutil.rmtree(new)
            return name
        shutil.rmtree(self._folder / name, ignore_errors=True)
        new.rename(self._folder / name)
        try:
            self._post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(self._folder / name)})
        except RequestFailed as error:
            if "already been loaded" not in str(error):
                options = vllm_options(self._folder / name)
                raise EngineFailed(f"{self._key}: {self._url} {error}; {_fix(error, options)}") from None
        if before:
            _unload(self._url, before, self._folder)
        self._served[role] = name
        return name

    def _get(self, path: str) -> Any:
        try:
            return ask(self._url + path, key=KEY, pauses=(), seconds=30)
        except RequestFailed as error:
            fix = "start it with `vllm serve`, or set engine: transformers"
            raise UserError(f"{self._key}: {self._url} {error}; {fix}") from None

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        return ask(self._url + path, body, key=KEY, pauses=PAUSES, seconds=TIMEOUT_SECONDS)


def _answer(scored: dict[str, Any]) -> tuple[list[int], list[float]]:
    """The ids of a completion and their log-probs."""
    ids = [int(token.removeprefix(TOKEN)) for token in scored["tokens"]]
    return ids, [float(logp) for _, logp in zip(ids, scored["token_logprobs"], strict=True)]


def _most_likely(scored: dict[str, Any]) -> dict[str, float]:
    """The log-probs of the most likely first tokens, by token."""
    return {str(token): float(logp) for token, logp in scored["top_logprobs"][0].items()}


def _fix(error: RequestFailed, options: str) -> str:
    if error.status == NOT_FOUND and "adapter" not in str(error).lower():
        return f"start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True and {options}"
    if error.status == NOT_FOUND:
        return "it must read this machine's disk under the same path"
    return f"start it with {options}" if error.status else "the last checkpoint is kept; --resume goes on"


def _unload(url: str, name: str, folder: Path) -> None:
    """Takes an adapter off the server as far as it lets us, and deletes its files."""
    with suppress(RequestFailed):
        ask(f"{url}/v1/unload_lora_adapter", {"lora_name": name}, key=KEY, pauses=(), seconds=10)
    shutil.rmtree(folder / name, ignore_errors=True)


def _withdraw(url: str, served: dict[str, str], folder: Path) -> None:
    """Leaves the server, and the run's folder, as they were."""
    for name in served.values():
        _unload(url, name, folder)
    shutil.rmtree(folder, ignore_errors=True)
