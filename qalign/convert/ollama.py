"""A Modelfile for Ollama: the chat template as a Go template, where an answer ends, and how tokens are drawn.

Ollama doesn't read Jinja. What a chat template writes around each turn is found by rendering short dialogues, and the
Go template made of these parts is compared with the Jinja one on real prompts before anything is kept.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from transformers import GenerationConfig

from qalign.data.messages import Message
from qalign.data.readers import BadRow
from qalign.data.templates import ChatTemplate
from qalign.errors import UserError
from qalign.model.generation import stop_ids_of

SYSTEM, USER, ANSWER, AGAIN = "qalign says it.", "qalign asks it.", "qalign answers it.", "qalign asks again."
UNFIT = (
    "--to ollama: this chat template writes turns in a way that a Go template of plain parts can't; use --to gguf, "
    "whose file has the template itself"
)


@dataclass(frozen=True)
class Turns:
    """What a chat template writes around what is said."""

    start: str  # before the first turn, such as a BOS
    user: tuple[str, str]  # before and after
    assistant: tuple[str, str]
    generation: str  # where the assistant begins to answer
    system: tuple[str, str] = ("", "")
    place: Literal["own", "first", "last", "none"] = "none"  # of the system's words: a turn, or in which user's turn
    default: str = ""  # what the system says if nobody has it say anything

    def render(self, turns: Sequence[Message]) -> str:
        """A dialogue that ends with a user's turn, as the Go template renders it."""
        given = [turn["content"] for turn in turns if turn["role"] == "system"] or [self.default]
        system, others = "\n\n".join(filter(None, given)), [turn for turn in turns if turn["role"] != "system"]
        text = self.start
        if system and self.place == "own":
            text += system.join(self.system)
        users = [number for number, turn in enumerate(others) if turn["role"] == "user"]
        chosen = {"first": users[:1], "last": users[-1:]}.get(self.place, [])
        for number, turn in enumerate(others):
            before, after = self.user if turn["role"] == "user" else self.assistant
            inside = system.join(self.system) if system and number in chosen else ""
            text += before + inside + turn["content"] + after
        return text + self.generation


def turns_of(template: ChatTemplate) -> Turns:
    """The parts of a chat template; a `UserError` if it isn't made of such parts."""
    first, second = Message(role="user", content=USER), Message(role="user", content=AGAIN)
    answer, system = Message(role="assistant", content=ANSWER), Message(role="system", content=SYSTEM)
    try:
        asked = template.render([first], add_generation_prompt=False)
        asking = template.render([first], add_generation_prompt=True)
        answered = template.render([first, answer], add_generation_prompt=False)
        again = template.render([first, answer, second], add_generation_prompt=True)
    except BadRow:
        raise UserError(UNFIT) from None
    after_user = asked.partition(USER)[2]
    generation = asking.partition(USER)[2].removeprefix(after_user)
    before_first, _, rest = again.partition(USER)
    between, _, rest = rest.partition(ANSWER)
    following, _, _ = rest.partition(AGAIN)
    after_answer = answered.partition(ANSWER)[2]
    before_user = following.removeprefix(after_answer)
    parts = Turns(
        before_first.removesuffix(before_user), (before_user, after_user),
        (between.removeprefix(after_user), after_answer), generation,
    )  # fmt: skip
    parts = _with_system(template, parts, [system, first, answer, second])
    for dialogue in ([first], [first, answer, second], [system, first], [system, first, answer, second]):
        if dialogue[0] is system and parts.place == "none":
            continue
        if parts.render(dialogue) != template.render(dialogue, add_generation_prompt=True):
            raise UserError(UNFIT)
    return parts


def _with_system(template: ChatTemplate, parts: Turns, dialogue: list[Message]) -> Turns:
    """The same, with where and how the system's words are written."""
    start, user, bos = parts.start, parts.user, template.tokenizer.bos_token or ""
    bare = bos if bos and start.startswith(bos) else ""
    plain = Turns(start, user, parts.assistant, parts.generation)
    try:
        text = template.render(dialogue, add_generation_prompt=True)
    except BadRow:
        return plain
    before, found, after = text.partition(SYSTEM)
    if not found:
        return plain
    until_user = after.partition(USER)[0]
    if USER in before:  # in the last user's turn
        head, place = before[before.rindex(user[0]) + len(user[0]) :], "last"
        tail = after.partition(AGAIN)[0]
    elif until_user.endswith(user[0]) and not before.endswith(user[0]):
        head, tail, place = before.removeprefix(bare), until_user.removesuffix(user[0]), "own"
    else:
        head, tail, place = before[len(start) + len(user[0]) :], until_user, "first"
    default = start.removeprefix(bare)
    if place == "own" and default.startswith(head) and default.endswith(tail):
        default = default[len(head) : len(default) - len(tail)]
        return Turns(bare, user, parts.assistant, parts.generation, (head, tail), place, default)
    return Turns(start, user, parts.assistant, parts.generation, (head, tail), place)


def go_template(turns: Turns, *, writes_bos: bool, bos: str) -> str:
    """The parts as a Go template for Ollama. With `writes_bos`, llama.cpp puts a BOS before the text by itself."""
    start = turns.start.removeprefix(bos) if writes_bos else turns.start
    (head, tail), (before, after) = map(_go, turns.system), map(_go, turns.assistant)
    inside = f"{head}{{{{- $.System -}}}}{tail}"
    first = {
        "first": f'{{{{- if $system -}}}}{inside}{{{{- $system = "" -}}}}{{{{- end -}}}}',
        "last": f"{{{{- if and $.System $last -}}}}{inside}{{{{- end -}}}}",
    }.get(turns.place, "")
    lines = [
        _go(start),
        "{{- $system := .System -}}" if turns.place == "first" else "",
        "{{- range $i, $_ := .Messages -}}",
        "{{- $last := eq (len (slice $.Messages $i)) 1 -}}",
        '{{- if eq .Role "user" -}}',
        f"{_go(turns.user[0])}{first}{{{{- .Content -}}}}{_go(turns.user[1])}",
        '{{- else if eq .Role "assistant" -}}',
        f"{before}{{{{- .Content -}}}}{{{{- if not $last -}}}}{after}{{{{- end -}}}}",
        f'{{{{- else if eq .Role "system" -}}}}\n{head}{{{{- .Content -}}}}{tail}' if turns.place == "own" else "",
        "{{- end -}}",
        f'{{{{- if and $last (ne .Role "assistant") -}}}}{_go(turns.generation)}{{{{- end -}}}}',
        "{{- end -}}",
    ]
    return "\n".join(filter(None, lines))


def _go(text: str) -> str:
    """A text as an action that writes it, so that spaces and newlines between actions mean nothing."""
    return f"{{{{- {json.dumps(text, ensure_ascii=False)} -}}}}" if text else ""


def modelfile(template: ChatTemplate, source: str, adapter: str | None, config: GenerationConfig) -> str:
    """The Modelfile of a model, or of an adapter on the model `source`."""
    tokenizer, turns = template.tokenizer, turns_of(template)
    bos = tokenizer.bos_token or ""
    writes_bos = bool(bos) and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    stops = [tokenizer.convert_ids_to_tokens(number) for number in stop_ids_of(template)]
    draws = (
        {name: getattr(config, name, None) for name in ("temperature", "top_p", "top_k")} if config.do_sample else {}
    )
    lines = [
        f"FROM {source}",
        *([f"ADAPTER {adapter}"] if adapter else []),
        f'TEMPLATE """{go_template(turns, writes_bos=writes_bos, bos=bos)}"""',
        *([f'SYSTEM """{turns.default}"""'] if turns.default else []),
        *(f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stops),
        *(f"PARAMETER {name} {value:g}" for name, value in draws.items() if value is not None),
        "PARAMETER repeat_penalty 1",  # with Ollama's own 1.1 it would be another model than the one that was trained
    ]
    return "\n".join(lines) + "\n"
