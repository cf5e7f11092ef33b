"""A tokenizer with its chat template, and everything else that decides how a dialogue becomes text.

They travel together, as one `ChatTemplate`, through training, evaluation, sampling and the page, so that a dialogue is
rendered in one way everywhere. A template may leave out what it has no place for without an error: `check_prompt` and
`check_answer` look for every part of a row in the rendered text, and refuse the row if one is missing.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from qalign.config.recipe import Model
from qalign.data.messages import Message
from qalign.data.readers import BadRow
from qalign.errors import UserError, one_line, short, within

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
PROBES = {"content": "probe of an answer", "reasoning_content": "probe of a thought", "tool_calls": "probe_call"}
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
        asked = {"role": "user", "content": "a"}
        for arguments, as_text in (({"probe": "call"}, False), ('{"probe": "call"}', True)):
            answer = {"role": "assistant", "content": "", "tool_calls": [_call("probe", arguments)]}
            try:
                text = self.tokenizer.apply_chat_template([asked, answer], tokenize=False, **self.kwargs)
            except Exception:
                continue
            if "{'probe': 'call'}" not in text:
                return as_text
        return False

    def ids(self, text: str) -> list[int]:
        """The ids of a rendered text, special tokens included."""
        return self.tokenizer(text, add_special_tokens=False).input_ids


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


# --- is every part of a row in the rendered text? --------------------------------------------------------------------


def check_prompt(template: ChatTemplate, turns: Sequence[Message], text: str) -> None:
    """Raises a `BadRow` if the template leaves out a turn, a call or the tools of a prompt. (Thoughts of earlier
    answers may be left out: that is what the model sees at inference.)

    Args:
        text: the prompt as the template rendered it.
    """
    leaves_out = f"the chat template ({template.words}) leaves out"
    if template.tools or any(turn.keys() > {"role", "content"} for turn in turns):
        lost = _lost_turns(template, turns)
    else:
        lost = _lost_roles(template, tuple(turn["role"] for turn in turns))
    if lost:
        role = turns[lost[0]]["role"]
        fix = f"; {MOVE_IT}" if role == "system" else ""
        raise BadRow(f"{leaves_out} turn {lost[0] + 1}, the {role}'s{fix}")
    for turn in turns:
        if missing := next(_missing_words(turn.get("tool_calls", ()), text), None):
            raise BadRow(f"{leaves_out} part of a tool call: {short(missing)}")
    if template.tools:
        names = [str(tool.get("function", tool).get("name", "")) for tool in template.tools]
        missing = next((name for name in names if name not in text), None)
        if missing is not None or text == replace(template, tools=()).render(turns, add_generation_prompt=True):
            raise BadRow(f"{leaves_out} the row's tools" + (f": {short(missing)}" if missing else ""))


@lru_cache(maxsize=4096)
def _lost_roles(template: ChatTemplate, roles: tuple[str, ...]) -> tuple[int, ...]:
    return _lost_turns(template, [{"role": role, "content": "a"} for role in roles])


def _lost_turns(template: ChatTemplate, turns: Sequence[Message]) -> tuple[int, ...]:
    """Indices of the turns that the template doesn't render, whatever they say."""
    probes = [
        turn if turn["role"] == "assistant" else turn | {"content": f"probe {number}."}
        for number, turn in enumerate(turns)
    ]
    try:
        text = template.render(probes, add_generation_prompt=True)
    except BadRow:  # it refuses the probes, but took what the turns say
        return ()
    said = ((number, turn["content"]) for number, turn in enumerate(probes) if turn["role"] != "assistant")
    return tuple(number for number, content in said if content not in text)


def check_answer(template: ChatTemplate, prompt: Sequence[Message], answer: Message, text: str, start: int) -> None:
    """Raises a `BadRow` if the template leaves out a part of an answer.

    Args:
        text: the dialogue as the template rendered it; the answer begins about at `start`.
    """
    leaves_out = f"the chat template ({template.words}) leaves out"
    for key in ("content", "reasoning_content"):
        said = answer.get(key, "")
        if not _holds(text, said, start):
            lines = (line for line in said.splitlines() if not _holds(text, line, start))
            raise BadRow(f"{leaves_out} part of the answer's {key}: {short(next(lines, said))}")
    calls = answer.get("tool_calls", ())
    if missing := next(_missing_words(calls, text[start:]), None):
        raise BadRow(f"{leaves_out} part of the answer's tool_calls: {short(missing)}")
    if not (calls or answer.get("reasoning_content")):
        return
    # What the parts say may stand in the text by chance, such as a thought "4" before an answer "4".
    probes = {key: probe for key, probe in PROBES.items() if answer.get(key)}
    other = answer | probes | ({"tool_calls": [_call(PROBES["tool_calls"], {})]} if calls else {})
    try:
        found = template.render([*prompt, other], add_generation_prompt=False)
    except BadRow:  # it refuses the probes, but took what the answer says
        return
    if lost := next((key for key, probe in probes.items() if probe not in found), None):
        raise BadRow(f"{leaves_out} the answer's {lost}")


def _call(name: str, arguments: object) -> dict[str, Any]:
    return {"id": "probe0001", "type": "function", "function": {"name": name, "arguments": arguments}}


def _holds(text: str, part: str, start: int) -> bool:
    """Whether a text has a part that ends after `start`. White space doesn't count: templates trim and rearrange it."""
    at = text.rfind(part.strip())
    if (at >= 0 and at + len(part.strip()) > start) or not part.strip():
        return True
    bare = "".join(part.split())
    at = "".join(text.split()).rfind(bare)
    return at >= 0 and at + len(bare) > len("".join(text[:start].split()))


def _missing_words(calls: Sequence[dict[str, Any]], text: str) -> Iterator[str]:
    """The names and arguments of calls that a text lacks, in whichever way the template writes them."""
    for call in calls:
        function = call["function"]
        for word in (function["name"], *leaves(function["arguments"])):
            spellings = {str(word), json.dumps(word), json.dumps(word, ensure_ascii=False), repr(word)}
            if isinstance(word, str):
                spellings |= {spelling[1:-1] for spelling in spellings if spelling != word}
            if not any(_holds(text, spelling, 0) for spelling in spellings):
                yield str(word)


def leaves(value: Any) -> Iterator[Any]:
    """Everything in a value of JSON that is no list and no object, the keys of objects included."""
    left = [value]
    while left:
        item = left.pop()
        if isinstance(item, dict):
            left += [*item.values(), *item]
        elif isinstance(item, (list, tuple)):
            left += item
        else:
            yield item
