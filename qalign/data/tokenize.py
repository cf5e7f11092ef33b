"""Chat template to token ids, with the span of each completion exact to the token.

A model is trained on what it sees at inference: the prompt's ids are the template's own, generation prompt included,
with one BOS; the supervised ids are exactly the answer and its end of turn. Each function that encodes one row raises a
`BadRow` if the row doesn't fit, spells a special token, or can't be rendered.
"""

from bisect import bisect_left
from collections.abc import Sequence
from contextlib import suppress
from functools import cache, lru_cache
from typing import Any, NamedTuple, TypeVar

from tqdm.auto import tqdm

from qalign.data.formats import Dialogue, Labelled, Message, PlainText, Preference, Prompt, Read, Refused
from qalign.data.readers import BadRow
from qalign.data.rows import check_answer, check_prompt, check_texts
from qalign.data.store.rows import OnDemand, RowFile
from qalign.data.store.sequences import IGNORED, TokenDialogue, TokenLabelled, TokenPair, TokenQuestion
from qalign.data.store.tokens import Encode, TokenFile, encoded_on_disk
from qalign.data.templates import ANSWERED, ASKED, ChatTemplate, call_of, through_end_of_turn
from qalign.errors import UserError

Encoded = TypeVar("Encoded")

TOOL: dict[str, Any] = {"type": "function", "function": {"name": "call", "description": "", "parameters": {}}}


def _encode_all(
    template: ChatTemplate, rows: Sequence[Any], encode: Encode[Encoded], kind: type[Encoded], max_length: int
) -> tuple[Sequence[Encoded], list[int], list[Refused]]:
    """(the token sequences of rows, objects of the dataclass `kind`; the number of the row that each is from; the
    refused rows). Rows in a file are encoded by all cores into a file, others here into a list."""
    if isinstance(rows, RowFile) and (found := encoded_on_disk(template, rows, encode, kind, max_length)):
        return found[0], found[0].row_numbers, found[1]
    encoded, numbers, refused = list[Encoded](), list[int](), list[Refused]()
    for number, row in enumerate(tqdm(rows, desc="tokenizing", unit="row", disable=len(rows) < 2000)):
        try:
            sequences = encode(template, row, max_length)
            encoded += sequences
            numbers += [number] * len(sequences)
        except BadRow as reason:
            refused.append(Refused(row.where, str(reason)))
    return encoded, numbers, refused


def encode_pairs(template: ChatTemplate, rows: Sequence[Preference], max_length: int) -> Read[TokenPair]:
    encoded, _, refused = _encode_all(template, rows, _pair, TokenPair, max_length)
    return encoded, refused


def _pair(template: ChatTemplate, row: Preference, max_length: int) -> list[TokenPair]:
    return [encode_pair(template, row, max_length)]


def encode_labelled(template: ChatTemplate, rows: Sequence[Labelled], max_length: int) -> Read[TokenLabelled]:
    """Answers with their labels; a row with two answers gives two. The second ones come last, so that neighbours, from
    which the KL estimate takes its answers, have other prompts."""
    encoded, numbers, refused = _encode_all(template, rows, _labelled, TokenLabelled, max_length)
    order = sorted(range(len(numbers)), key=lambda n: n > 0 and numbers[n - 1] == numbers[n])
    return encoded.reordered(order) if isinstance(encoded, TokenFile) else [encoded[n] for n in order], refused


def _labelled(template: ChatTemplate, row: Labelled, max_length: int) -> list[TokenLabelled]:
    template = template.with_tools(row.tools)
    check_texts(template, (*row.prompt, *row.answers), max_length)
    found = _fitted(template, row.prompt, row.answers, max_length)
    if len(row.answers) == 2 and found.answer_ids[0] == found.answer_ids[1] and len({*row.desirable}) == 2:
        raise BadRow(f"the chat template ({template.words}) renders a good and a bad answer as the same")
    labelled = zip(found.answer_ids, row.desirable, strict=True)
    return [TokenLabelled(found.prompt_ids, ids, good, row.where, found.dropped_turns) for ids, good in labelled]


def encode_dialogues(
    template: ChatTemplate, rows: Sequence[Dialogue | PlainText], max_length: int
) -> Read[TokenDialogue]:
    """Token sequences and refused rows; a long row gives several sequences."""
    encoded, _, refused = _encode_all(template, rows, _dialogue, TokenDialogue, max_length)
    return encoded, refused


def _dialogue(template: ChatTemplate, row: Dialogue | PlainText, max_length: int) -> list[TokenDialogue]:
    return (encode_text if isinstance(row, PlainText) else encode_dialogue)(template, row, max_length)  # type: ignore


def encode_questions(template: ChatTemplate, rows: Sequence[Prompt], room: int) -> Read[tuple[Prompt, list[int]]]:
    """Each prompt with its ids, and the refused rows."""
    encoded, numbers, refused = _encode_all(template, rows, _question, TokenQuestion, room)
    if isinstance(encoded, TokenFile):
        return OnDemand(len(encoded), lambda n: (rows[numbers[n]], encoded[n].ids)), refused
    return [(rows[number], each.ids) for number, each in zip(numbers, encoded, strict=True)], refused


def _question(template: ChatTemplate, row: Prompt, room: int) -> list[TokenQuestion]:
    return [TokenQuestion(encode_question(template.with_tools(row.tools), row.turns, room))]


def encode_pair(template: ChatTemplate, row: Preference, max_length: int) -> TokenPair:
    """A preference as ids. The oldest turns are dropped until both sequences fit; an answer is never cut."""
    template, answers = template.with_tools(row.tools), (row.chosen, row.rejected)
    check_texts(template, (*row.prompt, *answers), max_length)
    found = _fitted(template, row.prompt, answers, max_length)
    chosen, rejected = found.answer_ids
    if chosen == rejected:
        raise BadRow(f"the chat template ({template.words}) renders chosen and rejected as the same answer")
    labels = row.margin, row.chosen_probability
    return TokenPair(found.prompt_ids, chosen, rejected, row.where, found.dropped_turns, *labels)


def encode_dialogue(template: ChatTemplate, row: Dialogue, max_length: int) -> list[TokenDialogue]:
    """A dialogue as ids. Exactly its assistant turns are supervised, each with its end of turn, in the ids that the
    model would see and give at inference. A greeting, before which nothing was said, is context, as `untrained` turns
    are.

    A turn extends the sequence of the turn before it if the template renders it as a continuation and it fits.
    Otherwise (Qwen3 leaves out the thoughts of earlier turns) it starts a new sequence, with as many of the oldest
    turns dropped as needed. Generation markers in a template are neither needed nor used.
    """
    template, turns = template.with_tools(row.tools), list(row.turns)
    check_texts(template, turns, max_length)
    sequences: list[TokenDialogue] = []
    dropped = 0
    for number, turn in enumerate(turns):
        if turn["role"] != "assistant" or number < row.first_trained or number in row.untrained:
            continue
        try:
            if not template.arranged(turns[:number]):
                continue
            found = _fitted(template, turns[:number], (turn,), max_length, dropped)
        except BadRow as reason:
            raise BadRow(f"turn {number + 1}: {reason}") from None
        dropped, kept = found.dropped_turns, []
        if sequences and found.prompt_ids[: len(sequences[-1])] == sequences[-1].ids:
            kept = sequences.pop().labels
        labels = [*kept, *[IGNORED] * (len(found.prompt_ids) - len(kept)), *found.answer_ids[0]]
        sequences.append(TokenDialogue(found.prompt_ids + found.answer_ids[0], labels, row.where, dropped))
    if not sequences:
        raise BadRow("has no answer to train on")
    return sequences


def encode_answer(template: ChatTemplate, row: Dialogue, max_length: int) -> list[int]:
    """A dialogue as ids up to its last end of turn, as a reward model reads it."""
    template = template.with_tools(row.tools)
    check_texts(template, row.turns, max_length)
    found = _fitted(template, row.turns[:-1], row.turns[-1:], max_length)
    return found.prompt_ids + found.answer_ids[0]


def encode_text(template: ChatTemplate, row: PlainText, max_length: int) -> list[TokenDialogue]:
    """A plain text as ids with an EOS at its end, in pieces of at most `max_length` tokens.

    Each piece begins with the last token of the piece before it, so every token but the first is supervised once: the
    first token of a sequence is predicted from nothing.
    """
    check_texts(template, [row.text], max_length)
    ids = [*template.tokenizer(row.text).input_ids, template.tokenizer.eos_token_id]
    if ids[-2:-1] == [template.tokenizer.eos_token_id]:  # some tokenizers add one themselves
        ids.pop()
    if len(ids) < 2:
        raise BadRow("the text gives no tokens")
    pieces = [ids[start : start + max_length] for start in range(0, len(ids) - 1, max_length - 1)]
    return [TokenDialogue(piece, [IGNORED, *piece[1:]], row.where) for piece in pieces]


def encode_question(template: ChatTemplate, prompt: Sequence[Message], room: int) -> list[int]:
    """A prompt as ids; the oldest turns are dropped until it has at most `room` tokens."""
    check_texts(template, prompt, room)
    return _fitted(template, prompt, (), room).prompt_ids


def encode_prompt(template: ChatTemplate, prompt: Sequence[Message]) -> list[int]:
    """The ids of a dialogue up to where the assistant begins to answer."""
    return template.ids(template.render(prompt, add_generation_prompt=True))


def end_of_turn_id(template: ChatTemplate) -> int:
    """The id with which the template ends an assistant's turn; a `UserError` if it can't render one."""
    return end_of_turn_ids(template)[0]


@lru_cache(maxsize=4)
def end_of_turn_ids(template: ChatTemplate) -> tuple[int, ...]:
    """The same, and the ids with which it ends a turn that calls a tool, if they are others."""
    try:
        found = [_encode(template, [ASKED], [ANSWERED], 0).answer_ids[0][-1]]
    except BadRow as reason:
        raise UserError(f"model.chat_template: no end of turn can be found: {reason}") from None
    for content in ("", "b"):
        with suppress(BadRow):  # a template that has no place for calls
            calling = ANSWERED | {"content": content, "tool_calls": [call_of("call", {})]}
            found.append(_encode(template.with_tools([TOOL]), [ASKED], [calling], 0).answer_ids[0][-1])
    return tuple(dict.fromkeys(found))


def pad_for_scores(template: ChatTemplate) -> str:
    """A pad token that no rendered dialogue ends with.

    Sequence classifiers read the score at the last token that isn't padding. With the usual pad = EOS that would be the
    token before the end of turn, so whether an answer ended would never count.
    """
    end, tokenizer = end_of_turn_id(template), template.tokenizer
    ids = (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id, *tokenizer.all_special_ids, 0, 1)
    return tokenizer.convert_ids_to_tokens(next(token for token in ids if token not in (None, end)))


class _Encoded(NamedTuple):
    """A prompt and its answers as ids, and as the text that the ids were made from."""

    prompt_ids: list[int]
    answer_ids: list[list[int]]
    dropped_turns: int
    prompt_text: str
    texts: list[str]  # of prompt and answer together


def _fitted(
    template: ChatTemplate, prompt: Sequence[Message], answers: Sequence[Message], max_length: int, guess: int = 0
) -> _Encoded:
    """The ids of a prompt and its answers, with as few of the oldest turns dropped as needed.

    Args:
        guess: how many turns might have to go; it saves time in long dialogues, and changes nothing.

    Raises:
        BadRow: they don't fit, or the template leaves out a part of them.
    """
    first, starts = _starts(prompt)

    @cache
    def shortened(number: int) -> _Encoded:
        kept = [*prompt[:first], *prompt[starts[number] :]]
        return _encode(template, kept, answers, starts[number] - first)

    def fits(number: int) -> bool:
        encoded = shortened(number)
        return len(encoded.prompt_ids) + max(map(len, encoded.answer_ids), default=0) <= max_length

    start = bisect_left(starts, first + guess, hi=len(starts) - 1)
    while start and fits(start - 1):
        start -= 1
    if not fits(start):
        start = bisect_left(range(len(starts)), True, lo=start + 1, key=fits)
    if start == len(starts):
        raise _too_long(shortened(start - 1), max_length)
    found, kept = shortened(start), [*prompt[:first], *prompt[starts[start] :]]
    check_prompt(template, kept, found.prompt_text)
    for answer, text in zip(answers, found.texts, strict=True):
        check_answer(template, kept, answer, text, len(found.prompt_text))
    return found


def _starts(prompt: Sequence[Message]) -> tuple[int, list[int]]:
    """(how many system turns stand first and stay, where a shortened prompt may begin after them): with a user's turn,
    or with the system turns before it."""
    roles = [turn["role"] for turn in prompt]
    first = next((number for number, role in enumerate(roles) if role != "system"), len(roles))
    last = max((number for number, role in enumerate(roles) if role == "user"), default=first)
    later = range(first + 1, last + 1)
    openings = [n for n in later if roles[n] in ("system", "user") and roles[n - 1] != "system"]
    return first, [first, *openings]


def _too_long(encoded: _Encoded, max_length: int) -> BadRow:
    length = len(encoded.prompt_ids)
    if not encoded.answer_ids:
        return BadRow(f"the prompt is {length} tokens; max_length less max_new_tokens leaves {max_length}")
    if length >= max_length:
        return BadRow(f"the prompt fills max_length: {length} of {max_length} tokens")
    longest = max(map(len, encoded.answer_ids))
    return BadRow(f"prompt and answer are {length} + {longest} tokens, over max_length {max_length}")


def _encode(
    template: ChatTemplate, prompt: Sequence[Message], answers: Sequence[Message], dropped_turns: int
) -> _Encoded:
    prompt_text = template.render(prompt, add_generation_prompt=True)
    found = _Encoded(template.ids(prompt_text), [], dropped_turns, prompt_text, [])
    for answer in answers:
        text = template.render([*prompt, answer], add_generation_prompt=False)
        if not text.startswith(prompt_text):
            raise BadRow("the chat template renders a prompt differently once it is answered; see chat_template_kwargs")
        text = through_end_of_turn(template, text)
        found.texts.append(text)
        found.answer_ids.append(_answer_ids(template, found.prompt_ids, text, len(prompt_text)))
    return found


def _answer_ids(template: ChatTemplate, prompt_ids: list[int], text: str, start: int) -> list[int]:
    """The ids of what stands in a text from `start` on, after the prompt."""
    ids = template.ids(text)
    if ids[: len(prompt_ids)] == prompt_ids:
        return ids[len(prompt_ids) :]
    # Tokens merge across the border. At inference the model sees the prompt's own ids, so train on those. The rest is
    # encoded after a special token, because at the start of a text some tokenizers add a space.
    rest = template.ids(template.tokenizer.eos_token + text[start:])[1:]
    if template.tokenizer.decode(prompt_ids + rest) != template.tokenizer.decode(ids):
        raise BadRow("tokens merge across the border of prompt and answer, and can't be told apart")
    return rest
