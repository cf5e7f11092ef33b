"""Two models answering side by side on one base, streamed; what the page shows is made here.

Nothing here knows of a browser: `Chat.answer` yields replies as they grow. One thread owns the model (`qalign.page.worker`).
"""

import secrets
import sys
import time
import traceback
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from qalign.config.recipe import Model
from qalign.data.collate import MicroBatchLimit
from qalign.data.formats import Message, check_text
from qalign.data.readers import BadRow
from qalign.data.tokenize import TokenAnswers, encode_question
from qalign.errors import UserError
from qalign.model import lineage
from qalign.model.base import Base, Role, load
from qalign.model.generation import Request, Sampling, stop_ids_of, stream, text_of, uniform_draws, with_end_of_turn
from qalign.model.logps import completion_logps
from qalign.page.colours import TokenSpan, shaded
from qalign.page.models import BASE, ModelEntry, held_within
from qalign.page.worker import Worker

MAX_CHARACTERS = 20_000  # of a prompt, and of the system prompt
MAX_QUESTIONS = 50  # in a dialogue
MAX_SEED = 2**31 - 2


@dataclass(frozen=True)
class Controls:
    """What both sides are sampled with. `seed`: None draws one."""

    temperature: float = 0.7
    top_p: float = 0.95
    max_new_tokens: int = 200
    seed: int | None = None
    system: str = ""


@dataclass(frozen=True)
class Reply:
    """An answer, or as much of it as there is yet.

    Attributes:
        model: the contender's name.
        prompt: the dialogue that it answers, system turn included.
        prompt_ids, ids: tokens of the prompt as the model saw it, and of the answer with its end of turn.
        text: without special tokens.
        state: `growing`, `ended` by itself, `cut` at the most tokens it may have, or `stopped`.
        first_token_seconds: from the start of the answer to its first token.
        tokens_per_second: since then; 0 before the second token.
        reward: of the run's reward model, once the answer is there.
    """

    model: str
    prompt: tuple[Message, ...]
    prompt_ids: list[int]
    seed: int
    ids: tuple[int, ...] = ()
    text: str = ""
    state: str = "growing"
    first_token_seconds: float = 0.0
    tokens_per_second: float = 0.0
    reward: float | None = None


class Chat:
    """One base in memory, and the contenders that answer on it.

    Attributes:
        contenders: by the name that the page knows them by.
        max_new_tokens: the most that a person may ask for.
        weights: the hash of each contender's weights, as they were when it was put on the base.
    """

    def __init__(self, base: Base, contenders: Sequence[ModelEntry], model: Model):
        self.base, self.model = base, model
        self.contenders = {contender.name: contender for contender in contenders}
        self.max_new_tokens = max(1, model.max_length * 3 // 4)
        self._stop_ids = stop_ids_of(base.tokenizer, model.chat_template_kwargs)
        self._worker = Worker()
        self._loaded: dict[str, str] = {BASE: Role.BASE}  # contender's name to what the base calls it
        self.weights: dict[str, str | None] = {BASE: None}
        self._judges: dict[Path, str | None] = {}  # a reward adapter's folder to what the base calls it

    @classmethod
    def open(cls, contenders: Sequence[ModelEntry], model: Model) -> "Chat":
        """Loads the base.

        Raises:
            UserError: it can't be had.
        """
        return cls(load(model), contenders, model)

    def load(self, *names: str) -> None:
        """Puts contenders on the base now rather than at their first answer.

        Raises:
            UserError: there is no such contender, or its adapter can't be used.
        """
        self._worker.run(lambda: [self._role(name) for name in names])

    def answer(
        self, key: str, dialogues: Sequence[tuple[str, Sequence[Message]]], controls: Controls
    ) -> Iterator[list[Reply]]:
        """Answers of all sides at once: their replies after each step, the last time with rewards.

        Args:
            key: who asks, for `stop`.
            dialogues: each side's contender and its turns, the system turn left out; the last is the question.

        Raises:
            UserError: what was asked is out of bounds, or a contender can't be used.
        """
        controls = self._checked(controls, [turns for _, turns in dialogues])
        seed = secrets.randbelow(MAX_SEED) if controls.seed is None else controls.seed

        def pieces() -> Generator[list[Reply]]:
            replies = [self._opened(*side, controls, seed + number) for number, side in enumerate(dialogues)]
            yield from self._grow(replies, controls)

        last: list[Reply] = []
        for last in self._worker.stream(key, pieces):
            yield last
        if any(reply.state == "growing" for reply in last):
            yield [replace(reply, state="stopped") if reply.state == "growing" else reply for reply in last]

    def stop(self, key: str) -> None:
        """Ends what a key's answers are at; they keep what they have."""
        self._worker.stop(key)

    def differences(self, reply: Reply) -> list[TokenSpan]:
        """log π/π_ref of each token of an answer in nats: the model that gave it against the bare base, by the code
        that training computes log-probs with.

        Raises:
            UserError: the answer has no tokens.
        """
        if not reply.ids:
            raise UserError("there is no answer yet to compare")
        return self._worker.run(lambda: self._differences(reply))

    @torch.no_grad()
    def _differences(self, reply: Reply) -> list[TokenSpan]:
        batch = self.base.batch([TokenAnswers(reply.prompt_ids, (list(reply.ids),))])
        logps = []
        with self.base.packed_attention():
            for role in (Role.BASE, self._role(reply.model)):  # the reference first, as in training
                with self.base.acting_as(role) as lm:
                    logps.append(completion_logps(lm, batch))
        return shaded(self.base.tokenizer, list(reply.ids), (logps[1] - logps[0]).tolist())

    def _checked(self, controls: Controls, dialogues: list[Sequence[Message]]) -> Controls:
        """Holds what a person typed, or a crafted request sent, to its bounds."""
        texts = [controls.system, *(turn["content"] for turns in dialogues for turn in turns if turn["role"] == "user")]
        if any(len(text) > MAX_CHARACTERS for text in texts):
            raise UserError(f"the prompt is {max(map(len, texts)):,} characters long; {MAX_CHARACTERS:,} are the most")
        if not all(turns and turns[-1]["content"].strip() for turns in dialogues):
            raise UserError("the prompt is empty")
        if any(sum(turn["role"] == "user" for turn in turns) > MAX_QUESTIONS for turns in dialogues):
            raise UserError(f"the dialogue has {MAX_QUESTIONS} questions, the most it may have; clear it to go on")
        for name, value, low, high in (
            ("temperature", controls.temperature, 0, 2),
            ("top-p", controls.top_p, 0.01, 1),
            ("max tokens", controls.max_new_tokens, 1, self.max_new_tokens),
            ("seed", 0 if controls.seed is None else controls.seed, 0, MAX_SEED),
        ):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
                raise UserError(f"{name}: expected a number from {low} to {high}")
        try:
            check_text(texts)
        except BadRow as reason:
            raise UserError(str(reason)) from None
        seed = None if controls.seed is None else int(controls.seed)
        return replace(controls, max_new_tokens=int(controls.max_new_tokens), seed=seed)

    def _opened(self, name: str, turns: Sequence[Message], controls: Controls, seed: int) -> Reply:
        """A reply without a word yet, its contender on the base."""
        self._role(name)
        system = [{"role": "system", "content": controls.system.strip()}] if controls.system.strip() else []
        prompt, room = (*system, *turns), self.model.max_length - controls.max_new_tokens
        try:
            ids = encode_question(self.base.tokenizer, prompt, room, self.model.chat_template_kwargs)
        except BadRow as reason:
            raise UserError(str(reason)) from None
        return Reply(name, prompt, ids, seed)

    def _grow(self, replies: list[Reply], controls: Controls) -> Iterator[list[Reply]]:
        """The replies after each step, a new list each time."""
        sampling = Sampling(controls.max_new_tokens, controls.temperature, self._stop_ids, controls.top_p)
        requests = [
            Request(self._role(r.model), r.prompt_ids, uniform_draws(r.seed, 1, sampling.max_new_tokens))
            for r in replies
        ]
        began = time.monotonic()
        for step in stream(self.base, requests, sampling):
            now = time.monotonic() - began
            for number, _, token in step:
                replies[number] = self._longer(replies[number], token, now, sampling)
            if all(reply.state != "growing" for reply in replies):
                replies = self._rewarded(replies)
            yield list(replies)

    def _longer(self, reply: Reply, token: int, seconds: float, sampling: Sampling) -> Reply:
        ids, first = (*reply.ids, token), reply.first_token_seconds or seconds
        text = text_of(self.base.tokenizer, list(ids))
        state = "growing"
        if token in sampling.stop_ids:
            state = "ended"
        elif len(ids) == sampling.max_new_tokens:
            state = "cut"
        else:
            text = text.rstrip("\ufffd")  # a character whose other half is to come
        speed = (len(ids) - 1) / (seconds - first) if seconds > first else 0.0
        return replace(reply, ids=ids, text=text, state=state, first_token_seconds=first, tokens_per_second=speed)

    def _rewarded(self, replies: list[Reply]) -> list[Reply]:
        """With the scores of the reward model that belongs to one of their runs, if there is one."""
        found = (self.contenders[reply.model] for reply in replies)
        if not (contender := next((c for c in found if c.reward), None)):
            return replies
        try:
            if not (role := self._judge(contender)):
                return replies
            rewards = self._scores(role, replies)
            return [replace(reply, reward=reward) for reply, reward in zip(replies, rewards, strict=True)]
        except Exception as error:  # answers are worth seeing without their scores
            print(f"no rewards: {explained(error)}", file=sys.stderr)
            return replies

    def _judge(self, contender: ModelEntry) -> str | None:
        """What the base calls the reward model of a contender's run, which is put on it if it isn't yet; None if it
        can't be used, which is said once."""
        if contender.reward not in self._judges:
            role, self._judges[contender.reward] = f"{Role.REWARD}_{len(self._judges) + 1}", None
            self._put_on(role, contender.reward, contender.within)
            self._judges[contender.reward] = role
        return self._judges[contender.reward]

    def _scores(self, role: str, replies: list[Reply]) -> list[float]:
        """What a reward model gives to each answer, with its end of turn, which a cut answer lacks."""
        rows = [
            TokenAnswers(reply.prompt_ids, (with_end_of_turn(list(reply.ids), self._stop_ids),)) for reply in replies
        ]
        return self.base.answer_scores(role, rows, MicroBatchLimit(pairs=len(rows)))[:, 0].tolist()

    def _role(self, name: str) -> str:
        """What the base calls a contender, which is put on it if it isn't yet."""
        if name not in self.contenders:
            raise UserError("there is no such model; choose one of the list")
        if name not in self._loaded:
            role, contender = f"side_{len(self._loaded)}", self.contenders[name]
            weights = contender.weights
            self._put_on(role, contender.adapter, contender.within)
            self._loaded[name], self.weights[name] = role, weights
        return self._loaded[name]

    def _put_on(self, role: str, folder: Path, within: Path) -> None:
        held_within(folder, within)  # once more: it may have changed since it was listed
        lineage.check(folder.parent.name, folder, self.base.lineage("chat"))
        self.base.load_adapter(role, str(folder), trainable=False)
        for weight in self.base.trained_weights(role).values() if role.startswith("side_") else ():
            weight.data = weight.data.to(self.base.dtype)  # as autocast rounds it, but once instead of at every token


def explained(error: BaseException) -> str:
    """What a person is told when answering fails; where it is no mistake of theirs, the traceback is printed."""
    if isinstance(error, UserError):
        return "; ".join(error.lines)
    words = str(error).lower()
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in words:
        return "Out of memory. Clear the dialogue, or lower max tokens, and try again."
    traceback.print_exception(error)
    return f"Answering failed ({type(error).__name__}). The details are in the terminal where app.py runs."
