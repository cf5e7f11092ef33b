"""A tokenizer with its chat template, and everything else that decides how a dialogue becomes text.

They travel together, as one `ChatTemplate`, through training, evaluation, sampling and the page, so that a dialogue is
rendered in one way everywhere. A template may leave out what it has no place for without an error; that is found by
`qalign.data.rows`.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property, lru_cache
from pathlib import Path
from threading import get_ident
from typing import Any

from qalign.config.recipe import Model
from qalign.data.messages import Message
from qalign.data.readers import BadRow
from qalign.errors import UserError, one_line, within

Tokenizer = Any  # transformers' PreTrainedTokenizerBase; its own type hints are too loose to check against
Tools = Sequence[dict[str, Any]]  # schemas of functions

PLAIN_TEMPLATE = """\
{%- for message in messages %}
{{- '<|' + message['role'] + '|>\\n' + message['content'] | trim + eos_token + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"""
"""For base models without a chat template: Zephyr's, which needs no new tokens (an untrained embedding in a frozen base
would never be learned)."""

MOVE_IT = "model.system_turn: into_user puts it before the next user turn"
ASKED, ANSWERED = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
SECONDS = 10  # in which a template must have rendered a short dialogue
LATE = f"model.chat_template: the chat template takes more than {SECONDS} s for one question; give another"
DIRECTIVES = "aAbBcCdDeFgGhHIjklmMnpPrRsStTuUVwWxXyYzZ"  # of C's strftime, after a %


@dataclass(frozen=True, eq=False)
class ChatTemplate:
    """How dialogues are rendered: a tokenizer that has a chat template, and the recipe's settings."""

    tokenizer: Tokenizer
    kwargs: dict[str, Any] = field(default_factory=dict[str, Any])  # `model.chat_template_kwargs`
    system_turn: str = "keep"  # `model.system_turn`
    now: datetime = field(default_factory=datetime.now)  # what the template is told when it asks for the date
    words: str = "the model's own"  # which template this is
    tools: Tools = ()  # of one row; see `with_tools`
    left_out: set[str] = field(default_factory=set[str])  # facts of turns that it doesn't show; for the header
    # Of each thread, the last text that ended with a special token, and its ids.
    read: dict[int, tuple[str, list[int]]] = field(default_factory=dict[int, tuple[str, list[int]]], repr=False)

    def __str__(self) -> str:
        return self.words + (f", with the date {self.now:%Y-%m-%d}" if self.is_dated else "")

    @property
    def source(self) -> str:
        """The template, and the settings that change what it renders (but not the date), as one text to hash."""
        named = self.tokenizer.chat_template
        text = json.dumps(named, sort_keys=True) if isinstance(named, dict) else named
        moved = self.system_turn if self.system_turn == "into_user" else ""
        return text + json.dumps(self.kwargs, sort_keys=True) + moved

    @cached_property
    def is_dated(self) -> bool:
        """Whether the template asks for the date."""
        return "strftime_now" in self.source

    def with_tools(self, tools: Tools) -> "ChatTemplate":
        """The same, for a row with tools."""
        return replace(self, tools=tools) if tools else self

    def render(self, turns: Sequence[Message], *, add_generation_prompt: bool) -> str:
        """A dialogue as text; a `BadRow` if the template refuses it."""
        try:
            return self._text(self.arranged(turns), add_generation_prompt)
        except BadRow:
            raise
        except Exception as error:  # a template can raise anything
            reason = f"the chat template ({self.words}) refuses it: {one_line(error, 120)}"
            if self.system_turn == "keep" and self._renders_moved(turns, add_generation_prompt):
                reason = f"the chat template has no place for a system turn: {one_line(error, 120)}; {MOVE_IT}"
            raise BadRow(reason) from None

    def arranged(self, turns: Sequence[Message]) -> list[Message]:
        """The turns as the template is given them, their system turns treated as `system_turn` says."""
        if self.system_turn == "keep":
            return list(turns)
        found: list[Message] = []
        system: list[str] = []
        for turn in turns:
            if turn["role"] == "system":
                system.append(turn["content"])
            elif turn["role"] == "user" and system:
                found.append(turn | {"content": "\n\n".join([*system, turn["content"]])})
                system = []
            else:
                found.append(turn)
        if self.system_turn == "refuse" and any(turn["role"] == "system" for turn in turns):
            raise BadRow("has a system turn, and model.system_turn is 'refuse'")
        if system and found:
            raise BadRow("has a system turn with no user turn after it, which model.system_turn: into_user needs")
        return found

    def _renders_moved(self, turns: Sequence[Message], add_generation_prompt: bool) -> bool:
        """Whether the dialogue can be rendered once its system turns are part of the user's."""
        if all(turn["role"] != "system" for turn in turns):
            return False
        try:
            replace(self, system_turn="into_user").render(turns, add_generation_prompt=add_generation_prompt)
        except BadRow:
            return False
        return True

    def _text(self, turns: Sequence[Message], add_generation_prompt: bool) -> str:
        given = self.kwargs | ({"tools": list(self.tools)} if self.tools else {})
        if self.is_dated:
            own = self.tokenizer.get_chat_template(given.pop("chat_template", None), tools=given.get("tools"))
            given |= {"chat_template": _date_macro(self.now) + own}
        if any("tool_calls" in turn for turn in turns) and self._takes_arguments_as_text:
            turns = [_with_arguments_as_text(turn) for turn in turns]
        return self.tokenizer.apply_chat_template(
            list(turns), tokenize=False, add_generation_prompt=add_generation_prompt, **given
        )

    @cached_property
    def _takes_arguments_as_text(self) -> bool:
        """Whether the template writes the arguments of a call as they are, so that they must be JSON already. (As an
        object they would raise, or be written as Python writes them.)"""
        for arguments, as_text in (({"probe": "call"}, False), ('{"probe": "call"}', True)):
            answer = {"role": "assistant", "content": "", "tool_calls": [call_of("probe", arguments)]}
            try:
                text = self.tokenizer.apply_chat_template([ASKED, answer], tokenize=False, **self.kwargs)
            except Exception:
                continue
            if "{'probe': 'call'}" not in text:
                return as_text
        return False

    def ids(self, text: str) -> list[int]:
        """The ids of a rendered text, special tokens included.

        A tokenizer of `tokenizers` cuts a text at its special tokens and encodes the parts apart. So of a text that
        goes on after one that ended with a special token, only what is new is encoded, behind that special token: each
        turn of a dialogue once, not once more for every later answer.
        """
        before, known = self.read.get(get_ident(), ("", []))
        if known and text.startswith(before):
            mark = self.tokenizer.convert_ids_to_tokens(known[-1])
            ids = known[:-1] + self._all_ids(mark + text[len(before) :])
        else:
            ids = self._all_ids(text)
        if ids and ids[-1] in self._cutting and text.endswith(self._cutting[ids[-1]]):
            self.read[get_ident()] = text, ids
        return ids

    def _all_ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    @cached_property
    def _cutting(self) -> dict[int, str]:
        """The special tokens at which a text may be cut, by their ids."""
        if not hasattr(self.tokenizer, "backend_tokenizer"):  # one of Python code
            return {}
        known: dict[int, Any] = self.tokenizer.added_tokens_decoder
        return {number: token.content for number, token in known.items() if token.special and not token.normalized}


@lru_cache(maxsize=8)
def _date_macro(now: datetime) -> str:
    """The head of a template in which `strftime_now` gives the time `now`: a macro hides the function of the same name
    that transformers gives to templates."""
    replaced = "".join(
        f" | replace({json.dumps(directive)}, {json.dumps(now.strftime(directive))})"
        for letter in DIRECTIVES
        for directive in (f"%{letter}", f"%-{letter}")
    )
    marked = r"format | replace('%%', '\x00')" + replaced + r" | replace('\x00', '%')"
    return "{%- macro strftime_now(format) %}{{ " + marked + " }}{% endmacro %}\n"  # Jinja drops the last newline


def call_of(name: str, arguments: object) -> dict[str, Any]:
    """A tool call in OpenAI's form."""
    return {"id": "probe0001", "type": "function", "function": {"name": name, "arguments": arguments}}


def _with_arguments_as_text(turn: Message) -> Message:
    calls: list[dict[str, Any]] = []
    for call in turn.get("tool_calls", ()):
        text = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        calls.append(call | {"function": call["function"] | {"arguments": text}})
    return turn | ({"tool_calls": calls} if calls else {})


def prepare_template(tokenizer: Tokenizer, spec: Model | None = None, now: datetime | None = None) -> ChatTemplate:
    """Gives a tokenizer a chat template that writes one BOS, and a pad token, in place.

    If the tokenizer puts a BOS before plain text and the template writes none (Zephyr), the template is changed to
    write it, so that training, qalign, vLLM and plain transformers all see the same ids.

    Args:
        spec: the recipe's `model`, for its template, arguments and `system_turn`; by default the tokenizer's own.
        now: what the template is told when it asks for the date; by default today.

    Raises:
        UserError: the template file is missing, isn't a valid template, or leaves out what is said.
    """
    if tokenizer.eos_token is None:
        raise UserError("the tokenizer has no end-of-sequence token, so no answer would ever end")
    spec, words = spec or Model(base="the tokenizer's"), "the model's own"
    if spec.chat_template:
        words = spec.chat_template
        try:
            tokenizer.chat_template = Path(words).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:  # a NUL in the path is a ValueError
            raise UserError(f"model.chat_template: '{words}' can't be read: {error}") from None
    elif not tokenizer.chat_template:
        tokenizer.chat_template, words = PLAIN_TEMPLATE, "qalign's plain one, as the model has none"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is masked by length, never by its id
    template = ChatTemplate(tokenizer, spec.chat_template_kwargs, spec.system_turn, now or datetime.now(), words)
    text = _probed(template)
    bos = tokenizer.bos_token_id
    if bos is not None and tokenizer("a").input_ids[0] == bos and not text.startswith(tokenizer.bos_token):
        own, bos = tokenizer.chat_template, "{{- bos_token }}"  # a tokenizer may have several templates, by name
        tokenizer.chat_template = {k: bos + own[k] for k in own} if isinstance(own, dict) else bos + own  # type: ignore
        words += ", with the BOS it left out"
    if spec.system_turn == "into_user":
        words += ", with system turns put into the user's"
    return replace(template, words=words)


def _probed(template: ChatTemplate) -> str:
    """A short dialogue as the template renders it; a `UserError` if it can't, or leaves out what the turns say."""
    asked, answer = {"role": "user", "content": "probe 0."}, {"role": "assistant", "content": "probe 1."}
    try:
        text = within(SECONDS, LATE, lambda: template.render([asked], add_generation_prompt=True))
    except BadRow as error:
        reason = str(error).partition("refuses it: ")[2]
        raise UserError(f"model.chat_template: the chat template ({template.words}) can't be used: {reason}") from None
    try:
        dialogue = within(SECONDS, LATE, lambda: template.render([asked, answer], add_generation_prompt=False))
        left_out = answer["content"] not in dialogue
    except BadRow:  # a template for prompts alone: each row with an answer is refused with its words
        left_out = False
    if left_out or asked["content"] not in text:
        who = "assistant" if asked["content"] in text else "user"
        raise UserError(
            f"model.chat_template: the chat template ({template.words}) leaves out what the {who} says, so every row "
            "would be the same; give another with model.chat_template"
        )
    return text


# --- how a turn ends -----------------------------------------------------------------------------------------------


def through_end_of_turn(template: ChatTemplate, text: str) -> str:
    """Cuts what a template writes after the end of turn (ChatML's newline, Phi-3's EOS); adds EOS if it wrote none."""
    closing = _closing(template, text)
    if not closing:
        return text.rstrip() + template.tokenizer.eos_token
    if len(closing) > 1:  # a special token may close a tool call, before the one that ends the turn
        end, *after = _usual_closing(template) or [None]
        usual = [place for token, place in closing if token == end]
        return text[: (usual or [place for token, place in closing if token not in after][-1:] or [closing[0][1]])[0]]
    return text[: closing[0][1]]


def _closing(template: ChatTemplate, text: str) -> list[tuple[str, int]]:
    """The special tokens at the end of a text, each with the index after it."""
    special, body = special_tokens(template.tokenizer), text.rstrip()
    found: list[tuple[str, int]] = []
    while body.endswith(special):
        token = max(filter(body.endswith, special), key=len)
        found.insert(0, (token, len(body)))
        body = body.removesuffix(token).rstrip()
    return found


@lru_cache(maxsize=4)
def _usual_closing(template: ChatTemplate) -> list[str]:
    """The special tokens after an answer without tool calls: the end of turn first."""
    try:
        text = template.render([ASKED, ANSWERED], add_generation_prompt=False)
    except BadRow:
        return []
    return [token for token, _ in _closing(template, text)]


@lru_cache(maxsize=4)
def special_tokens(tokenizer: Tokenizer) -> tuple[str, ...]:
    """The special tokens as text; EOS counts as one even if it isn't marked as special."""
    marked = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return tuple(sorted({tokenizer.eos_token, *marked}))
