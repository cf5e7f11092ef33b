"""Two models that answer side by side on one base, streamed: `Chat.answer` yields replies as they grow. No browser."""

import gc
import secrets
import sys
import time
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock

import numpy as np
import torch

from qalign.config.paths import adapters_in
from qalign.config.recipe import Model
from qalign.data.collate import MicroBatchLimit
from qalign.data.formats import Message, check_text
from qalign.data.readers import BadRow
from qalign.data.store.sequences import TokenAnswers
from qalign.data.tokenize import encode_question
from qalign.errors import UserError
from qalign.model import lineage
from qalign.model.adapters.members import Ensemble, answer_scores, load_rewards
from qalign.model.base import Base, Role, load
from qalign.model.decoding.mixture import Mixture
from qalign.model.generation import Request, Sampling, stop_ids_of, stream, text_of, uniform_draws, with_end_of_turn
from qalign.model.logps import completion_logps
from qalign.page.models import BASE, ModelEntry, held_out_quantiles, safe_adapter
from qalign.page.session import CUT, Reply, Reward, aligned_side
from qalign.page.worker import Listeners, Worker

MAX_CHARACTERS = 20_000  # of a prompt, and of the system prompt
MAX_QUESTIONS = 50  # in a dialogue
MAX_SEED = 2**31 - 2
MAX_NEW_TOKENS = 400  # while no base has been loaded, which sets the limit
MAX_DIAL = 3.0  # three times as far as the adapter was trained to go
Dialogues = Sequence[tuple[str, Sequence[Message]]]  # (name of the model, turns without a system turn) of each side


@dataclass(frozen=True)
class Controls:
    """Settings of both sides, as a client sent them: `Chat.answer` checks them. Without a seed, one is drawn. `dial` is
    λ: the aligned side's logits are λ · its own + (1 − λ) · the other side's."""

    temperature: float = 0.7
    top_p: float = 0.95
    max_new_tokens: int = 200
    seed: int | str | None = None
    system: str = ""
    dial: float = 1.0


@dataclass(frozen=True)
class TokenSpan:
    """A piece of an answer: one token, or several tokens that spell one character together. `nats` is its log π/π_ref:
    above 0, the aligned model gives it a higher probability."""

    text: str
    nats: float


class Chat:
    """One base in memory, and the models that answer on it. The adapters of `names` are loaded now, others at their
    first answer; a `UserError` if one can't be loaded. Without a `model`, while there is no run, nothing is loaded."""

    def __init__(
        self,
        entries: Sequence[ModelEntry] = (),
        model: Model | None = None,
        names: Sequence[str] = (),
        listeners: Listeners | None = None,
    ):
        self._model, self._base, self._loading = model, None, Lock()
        self.entries = {entry.name: entry for entry in entries}
        self.max_new_tokens = MAX_NEW_TOKENS  # the most that a visitor may ask for
        self._worker = Worker(listeners)
        self._forget()
        if model:
            self._worker.run(lambda: [self.base, *(self._role(name) for name in names)])

    @property
    def model(self) -> Model:
        """The base, as its recipe says; a `UserError` if there is no run yet."""
        if self._model is None:
            raise UserError("there is no finished run yet; train one first")
        return self._model

    @property
    def base(self) -> Base:
        """The base. It is loaded if it isn't in memory."""
        with self._loading:
            if self._base is None:
                self._base = load(self.model)
                self.max_new_tokens = max(1, self._base.max_length * 3 // 4)
                self._stop_ids = stop_ids_of(self._base.template)
            return self._base

    def unload(self) -> bool:
        """Frees the memory of the base and its adapters, after the answers that grow now; the next question loads them
        again. Returns whether there was one."""
        had_one = self._base is not None
        self._worker.run(self._forget)
        return had_one

    def hold(self, entries: Sequence[ModelEntry], model: Model) -> None:
        """Other models to choose from, perhaps on another base. The one in memory stays if it serves them too: if none
        of its adapters was trained again since."""
        known = {entry.name: entry for entry in entries}
        stale = any(name in known and known[name].weights_hash != was for name, was in self._hashes.items())
        if stale or model != self._model:
            self.unload()
        self.entries, self._model = known, model
        self._worker.run(lambda: self.base)

    def _forget(self) -> None:
        """Drops the base, if there is one, and what was loaded onto it."""
        self._roles: dict[str, str] = {BASE: Role.BASE}  # of each loaded model, by its name
        self._hashes: dict[str, str | None] = {BASE: None}  # of each loaded model's weights, by its name
        self._reward_models: dict[Path, str | Ensemble | None] = {}  # by adapter folder; None: it could not be loaded
        with self._loading:
            self._base: Base | None = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def weights_hash(self, name: str) -> str | None:
        """Hash of a model's adapter weights as they were loaded; of the files if it isn't loaded yet. None without an
        adapter."""
        if name in self._hashes or name not in self.entries:
            return self._hashes.get(name)
        return self.entries[name].weights_hash

    def answer(self, key: str, dialogues: Dialogues, controls: Controls) -> Iterator[list[Reply]]:
        """Answers on all sides at once. Yields the replies after each step; the last ones have rewards. `key` is the
        visitor, for `stop`.

        Raises:
            UserError: a setting or the question is out of bounds, or a model can't be used.
            BadRow: the text isn't valid Unicode, has special tokens, or is too long.
        """
        self._check(controls, [turns for _, turns in dialogues])
        seed = secrets.randbelow(MAX_SEED) if controls.seed is None else int(controls.seed)
        yield from self._stream(key, lambda: self._grow(self._begin(dialogues, controls, seed), controls))

    def go_on(self, key: str, replies: Sequence[Reply], controls: Controls) -> Iterator[list[Reply]]:
        """The same for answers that were cut or stopped: they go on, by at most `max_new_tokens`, with the tokens that
        a higher limit would have given them in the first place. Answers that ended stay as they are."""
        self._check(controls, [reply.prompt for reply in replies])
        growing = [replace(reply, state="growing") if reply.state in CUT else reply for reply in replies]
        used = max(len(reply.prompt_ids) + len(reply.ids) for reply in growing if reply.state == "growing")
        if used >= self.base.max_length:
            raise UserError(f"the dialogue takes all of model.max_length, {self.base.max_length} tokens")
        room = min(int(controls.max_new_tokens), self.base.max_length - used)
        yield from self._stream(key, lambda: self._grow(growing, replace(controls, max_new_tokens=room)))

    def _stream(self, key: str, generate: Callable[[], Generator[list[Reply]]]) -> Iterator[list[Reply]]:
        last: list[Reply] = []
        for last in self._worker.stream(key, generate):
            yield last
        if any(reply.state == "growing" for reply in last):
            yield [replace(reply, state="stopped") if reply.state == "growing" else reply for reply in last]

    def stop(self, key: str) -> None:
        """Stops the answers of a visitor; the text so far is kept."""
        self._worker.stop(key)

    def token_spans(self, reply: Reply) -> list[TokenSpan]:
        """log π/π_ref of each token of an answer, in nats: its model against the bare base, with the packing and code
        of training. A `UserError` if the answer has no tokens."""
        if not reply.ids:
            raise UserError("there is no answer yet to compare")

        @torch.no_grad()
        def log_ratios() -> list[float]:
            batch, logps = self.base.batch([TokenAnswers(reply.prompt_ids, (list(reply.ids),))]), []
            with self.base.packed_attention():
                for role in (Role.BASE, self._role(reply.model)):  # the reference first, as in training
                    with self.base.acting_as(role) as lm:
                        logps.append(completion_logps(lm, batch))
            return (logps[1] - logps[0]).tolist()

        nats, spans, start, before = self._worker.run(log_ratios), [], 0, ""
        for end in range(1, len(nats) + 1):
            text = str(self.base.tokenizer.decode(list(reply.ids[:end]), clean_up_tokenization_spaces=False))
            if text.endswith("\ufffd") and end < len(nats):  # the rest of this character is in the next token
                continue
            spans.append(TokenSpan(text[len(before) :], sum(nats[start:end])))
            start, before = end, text
        return spans

    def _check(self, controls: Controls, dialogues: list[Sequence[Message]]) -> None:
        """Refuses what is out of bounds; a crafted request may hold anything."""
        texts = [controls.system, *(turn["content"] for turns in dialogues for turn in turns if turn["role"] == "user")]
        if any(len(text) > MAX_CHARACTERS for text in texts):
            raise UserError(f"the prompt is {max(map(len, texts)):,} characters long; at most {MAX_CHARACTERS:,} fit")
        if not all(turns and turns[-1]["content"].strip() for turns in dialogues):
            raise UserError("the prompt is empty")
        if any(sum(turn["role"] == "user" for turn in turns) > MAX_QUESTIONS for turns in dialogues):
            raise UserError(f"a dialogue may have at most {MAX_QUESTIONS} questions; clear it to start a new one")
        for name, value, low, high in (
            ("temperature", controls.temperature, 0, 2),
            ("top-p", controls.top_p, 0.01, 1),
            ("max tokens", controls.max_new_tokens, 1, self.max_new_tokens),
            ("λ", controls.dial, 0, MAX_DIAL),
            ("seed", 0 if controls.seed is None else controls.seed, 0, MAX_SEED),
        ):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
                raise UserError(f"{name}: expected a number from {low} to {high}")
        check_text(texts)

    def _begin(self, dialogues: Dialogues, controls: Controls, seed: int) -> list[Reply]:
        """Empty replies. The second side's seed is one more."""
        room, system = self.base.max_length - int(controls.max_new_tokens), controls.system.strip()
        replies = []
        for number, (name, turns) in enumerate(dialogues):
            self._role(name)  # its adapter is loaded, so its hash is known
            prompt = (*([{"role": "system", "content": system}] if system else []), *turns)
            ids = encode_question(self.base.template, prompt, room)
            replies.append(Reply(name, self._hashes[name], prompt, ids, seed + number))
        number = aligned_side([name for name, _ in dialogues])
        if controls.dial != 1 and len({name for name, _ in dialogues}) == 2:
            reply, other = replies[number], replies[1 - number]
            weights = f"{reply.weights} at λ {controls.dial:g}"  # no vote for it is one for the model itself
            replies[number] = replace(reply, weights=weights, dial=controls.dial, mixed_with=other.model)
        return replies

    def _request(self, reply: Reply, draws: torch.Tensor) -> Request:
        """What a reply asks for. At 0 and 1 a mixture is one of the two models, so it has only the rows of that one."""
        role, ids = self._role(reply.model), [*reply.prompt_ids, *reply.ids]
        if not reply.mixed_with or reply.dial == 1:
            return Request(role, ids, draws)
        other = self._role(reply.mixed_with)
        return Request(role, ids, draws, Mixture(other, reply.dial)) if reply.dial else Request(other, ids, draws)

    def _grow(self, replies: list[Reply], controls: Controls) -> Generator[list[Reply]]:
        """Yields the replies after each step, a new list each time."""
        more = int(controls.max_new_tokens)
        sampling = Sampling(more, controls.temperature, self._stop_ids, controls.top_p)
        replies, before = list(replies), [len(reply.ids) for reply in replies]
        growing = [number for number, reply in enumerate(replies) if reply.state == "growing"]
        requests = []
        for number in growing:
            reply, done = replies[number], before[number]
            draws = uniform_draws(reply.seed, 1, done + more)[:, done:]  # a longer row begins with the shorter one
            requests.append(self._request(reply, draws))
            replies[number] = replace(reply, first_token_seconds=0.0)
        start = time.monotonic()
        for step in stream(self.base, requests, sampling):
            seconds = time.monotonic() - start
            for place, _, token in step:
                number = growing[place]
                replies[number] = self._longer(replies[number], token, seconds, before[number], more)
            if all(reply.state != "growing" for reply in replies):
                replies = self._with_rewards(replies)
            yield list(replies)

    def _longer(self, reply: Reply, token: int, seconds: float, before: int, more: int) -> Reply:
        """The reply with one more token. It had `before` tokens and may get `more`, of which the first came
        `first_token_seconds` after the start."""
        ids, first = (*reply.ids, token), reply.first_token_seconds or seconds
        text, state = text_of(self.base.tokenizer, list(ids)), "growing"
        if token in self._stop_ids:
            state = "ended"
        elif len(ids) == before + more:
            state = "cut"
        else:
            text = text.rstrip("\ufffd")  # the first half of a character
        speed = (len(ids) - before - 1) / (seconds - first) if seconds > first else 0.0
        return replace(reply, ids=ids, text=text, state=state, first_token_seconds=first, tokens_per_second=speed)

    def _with_rewards(self, replies: list[Reply]) -> list[Reply]:
        """The replies with scores from the first of their runs that has a reward model; unchanged if none has one."""
        entries = [self.entries[reply.model] for reply in replies]
        folder, within = next(((e.reward, e.within) for e in entries if e.reward), (None, Path()))
        if folder is None:
            return replies
        try:
            if folder not in self._reward_models:
                role, self._reward_models[folder] = f"{Role.REWARD}_{len(self._reward_models) + 1}", None
                folders = [safe_adapter(place, within) for place in adapters_in(folder)]
                self._reward_models[folder] = load_rewards(self.base, folder.parent.name, role, folders)
            if (model := self._reward_models[folder]) is None:  # its error was printed once
                return replies
            answers = [(with_end_of_turn(list(reply.ids), self._stop_ids),) for reply in replies]
            rows = [TokenAnswers(r.prompt_ids, answer) for r, answer in zip(replies, answers, strict=True)]
            found = answer_scores(self.base, model, rows, MicroBatchLimit(pairs=len(rows)))[:, 0]
            scores = (found if isinstance(model, str) else found.mean(dim=-1)).tolist()
            known, name = held_out_quantiles(folder), f"{folder.parent.parent.name}/{folder.parent.name}"
            shares = np.interp(scores, known, np.linspace(0, 1, len(known))).tolist() if known else [None] * len(scores)
            rewards = [Reward(score, name, share) for score, share in zip(scores, shares, strict=True)]
            return [replace(reply, reward=reward) for reply, reward in zip(replies, rewards, strict=True)]
        except Exception as error:  # answers are useful without scores
            print(f"no rewards: {error_text(error)}", file=sys.stderr)
            return replies

    def _role(self, name: str) -> str:
        """The role of a model on the base; loads its adapter at the first call."""
        if (entry := self.entries.get(name)) is None:
            raise UserError("there is no such model; choose one from the list")
        if name not in self._roles and entry.adapter:
            role, weights_hash = f"side_{len(self._roles)}", entry.weights_hash
            self._load_adapter(role, entry.adapter, entry.within)
            for weight in self.base.trained_weights(role).values():
                # Autocast would round the weights like this at every token; here it is done once.
                weight.data = weight.data.to(self.base.dtype)
            self._roles[name], self._hashes[name] = role, weights_hash
        return self._roles[name]

    def _load_adapter(self, role: str, folder: Path, within: Path) -> None:
        safe_adapter(folder, within)  # again, because the files may have changed since they were listed
        lineage.check(folder.parent.name, folder, self.base.lineage("chat"))
        self.base.load_adapter(role, str(folder), trainable=False)


def error_text(error: BaseException) -> str:
    """What a visitor reads when answering fails. The traceback of an unexpected error is printed in the terminal."""
    if isinstance(error, (UserError, BadRow)):
        return str(error).replace("\n", "; ")
    message = str(error).lower()
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in message:
        return "Out of memory. Clear the dialogue, or lower max tokens, and try again."
    traceback.print_exception(error)
    return f"Answering failed ({type(error).__name__}). The terminal where the page was started shows the details."
