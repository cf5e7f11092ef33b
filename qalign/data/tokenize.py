"""Chat template to token ids, with the span of each completion exact to the token.

A model is trained on what it sees at inference: the prompt's ids are the template's own, generation prompt included,
with one BOS; the supervised ids are exactly the answer and its end of turn. Each function that encodes one row raises a
`BadRow` if the row doesn't fit, spells a special token, or can't be rendered.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

from tqdm.auto import tqdm

from qalign.data.formats import Dialogue, Message, PlainText, Preference, Prompt, Read, Refused
from qalign.data.readers import BadRow
from qalign.data.templates import ChatTemplate
from qalign.errors import UserError

Row = TypeVar("Row", bound=Preference | Dialogue | PlainText | Prompt)
Encoded = TypeVar("Encoded")

IGNORED = -100  # the label of tokens outside the loss, as PyTorch's cross entropy has it


@dataclass(frozen=True)
class TokenPair:
    """A preference as token ids."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    where: str
    dropped_turns: int = 0
    margin: float | None = None

    @property
    def answers(self) -> tuple[list[int], list[int]]:
        return self.chosen_ids, self.rejected_ids

    def __len__(self) -> int:
        """The length of the longer sequence, in tokens."""
        return len(self.prompt_ids) + max(len(self.chosen_ids), len(self.rejected_ids))


@dataclass(frozen=True)
class TokenAnswers:
    """A prompt and its sampled answers as token ids."""

    prompt_ids: list[int]
    answers: tuple[list[int], ...]

    def __len__(self) -> int:
        """The length of the longest sequence, in tokens."""
        return len(self.prompt_ids) + max(map(len, self.answers))


@dataclass(frozen=True)
class TokenDialogue:
    """A sequence for supervised fine-tuning; `labels` are its ids where they are supervised, `IGNORED` elsewhere."""

    ids: list[int]
    labels: list[int]
    where: str
    dropped_turns: int = 0

    def __len__(self) -> int:
        return len(self.ids)


def _encode_all(rows: list[Row], encode: Callable[[Row], Encoded]) -> Read[Encoded]:
    encoded: list[Encoded] = []
    refused: list[Refused] = []
    for row in tqdm(rows, desc="tokenizing", unit="row", disable=len(rows) < 2000):
        try:
            encoded.append(encode(row))
        except BadRow as reason:
            refused.append(Refused(row.where, str(reason)))
    return encoded, refused


def encode_pairs(template: ChatTemplate, rows: list[Preference], max_length: int) -> Read[TokenPair]:
    return _encode_all(rows, lambda row: encode_pair(template, row, max_length))


def encode_dialogues(template: ChatTemplate, rows: list[Dialogue | PlainText], max_length: int) -> Read[TokenDialogue]:
    """Token sequences and refused rows; a long row gives several sequences."""

    def encode(row: Dialogue | PlainText) -> list[TokenDialogue]:
        if isinstance(row, PlainText):
            return encode_text(template, row, max_length)
        return encode_dialogue(template, row, max_length)

    encoded, refused = _encode_all(rows, encode)
    return [sequence for sequences in encoded for sequence in sequences], refused


def encode_questions(template: ChatTemplate, rows: list[Prompt], room: int) -> Read[tuple[Prompt, list[int]]]:
    """Each prompt with its ids, and the refused rows."""
    return _encode_all(rows, lambda row: (row, encode_question(template, row.turns, room)))


def encode_pair(template: ChatTemplate, row: Preference, max_length: int) -> TokenPair:
    """A preference as ids. The oldest turns are dropped until both sequences fit; an answer is never cut."""
    answers = (row.chosen, row.rejected)
    _refuse_special(template, (turn["content"] for turn in (*row.prompt, *answers)))
    prompt_ids, (chosen, rejected), dropped = _fitted(template, row.prompt, answers, max_length)
    return TokenPair(prompt_ids, chosen, rejected, row.where, dropped, row.margin)


def encode_dialogue(template: ChatTemplate, row: Dialogue, max_length: int) -> list[TokenDialogue]:
    """A dialogue as ids. Exactly its assistant turns are supervised, each with its end of turn, in the ids that the
    model would see and give at inference.

    A turn extends the sequence of the turn before it if the template renders it as a continuation and it fits.
    Otherwise (Qwen3 leaves out the thoughts of earlier turns) it starts a new sequence, with as many of the oldest
    turns dropped as needed. Generation markers in a template are neither needed nor used.
    """
    turns = list(row.turns)
    _refuse_special(template, (turn["content"] for turn in turns))
    sequences: list[TokenDialogue] = []
    for number, turn in enumerate(turns):
        if turn["role"] != "assistant" or number < row.first_trained:
            continue
        try:
            prompt_ids, (answer_ids,), dropped = _fitted(template, turns[:number], (turn,), max_length)
        except BadRow as reason:
            raise BadRow(f"turn {number + 1}: {reason}") from None
        kept: list[int] = []
        if sequences and prompt_ids[: len(sequences[-1])] == sequences[-1].ids:
            before = sequences.pop()
            kept, dropped = before.labels, before.dropped_turns
        labels = [*kept, *[IGNORED] * (len(prompt_ids) - len(kept)), *answer_ids]
        sequences.append(TokenDialogue(prompt_ids + answer_ids, labels, row.where, dropped))
    return sequences


def encode_answer(template: ChatTemplate, row: Dialogue, max_length: int) -> list[int]:
    """A dialogue as ids up to its last end of turn, as a reward model reads it."""
    _refuse_special(template, (turn["content"] for turn in row.turns))
    prompt_ids, (answer_ids,), _ = _fitted(template, row.turns[:-1], row.turns[-1:], max_length)
    return prompt_ids + answer_ids


def encode_text(template: ChatTemplate, row: PlainText, max_length: int) -> list[TokenDialogue]:
    """A plain text as ids with an EOS at its end, in pieces of at most `max_length` tokens.

    Each piece begins with the last token of the piece before it, so every token but the first is supervised once: the
    first token of a sequence is predicted from nothing.
    """
    _refuse_special(template, [row.text])
    ids = [*template.tokenizer(row.text).input_ids, template.tokenizer.eos_token_id]
    if ids[-2:-1] == [template.tokenizer.eos_token_id]:  # some tokenizers add one themselves
        ids.pop()
    if len(ids) < 2:
        raise BadRow("the text gives no tokens")
    pieces = [ids[start : start + max_length] for start in range(0, len(ids) - 1, max_length - 1)]
    return [TokenDialogue(piece, [IGNORED, *piece[1:]], row.where) for piece in pieces]


def encode_question(template: ChatTemplate, prompt: Sequence[Message], room: int) -> list[int]:
    """A prompt as ids; the oldest turns are dropped until it has at most `room` tokens."""
    _refuse_special(template, (turn["content"] for turn in prompt))
    return _fitted(template, prompt, (), room)[0]


def encode_prompt(template: ChatTemplate, prompt: Sequence[Message]) -> list[int]:
    """The ids of a dialogue up to where the assistant begins to answer."""
    return template.ids(template.render(prompt, add_generation_prompt=True))


def end_of_turn_id(template: ChatTemplate) -> int:
    """The id with which the template ends an assistant's turn; a `UserError` if it can't render one."""
    try:
        asked, answered = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
        _, ((*_, last),) = _encode(template, [asked], [answered])
    except BadRow as reason:
        raise UserError(f"model.chat_template: no end of turn can be found: {reason}") from None
    return last


def pad_for_scores(template: ChatTemplate) -> str:
    """A pad token that no rendered dialogue ends with.

    Sequence classifiers read the score at the last token that isn't padding. With the usual pad = EOS that would be the
    token before the end of turn, so whether an answer ended would never count.
    """
    end, tokenizer = end_of_turn_id(template), template.tokenizer
    ids = (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id, *tokenizer.all_special_ids, 0, 1)
    return tokenizer.convert_ids_to_tokens(next(token for token in ids if token not in (None, end)))


def _fitted(
    template: ChatTemplate,
    prompt: Sequence[Message],
    answers: Sequence[Message],
    max_length: int,
) -> tuple[list[int], list[list[int]], int]:
    """(prompt ids, ids of each answer, number of the oldest turns that were dropped to make them fit)."""
    turns = list(prompt)
    while True:
        prompt_ids, completions = _encode(template, turns, answers)
        longest = max(map(len, completions), default=0)
        if len(prompt_ids) + longest <= max_length:
            return prompt_ids, completions, len(prompt) - len(turns)
        first = 1 if turns[0]["role"] == "system" else 0
        if len(turns) - first < 3:  # only the last question is left
            break
        del turns[first : first + 2]
    length = len(prompt_ids)
    if not answers:
        raise BadRow(f"the prompt is {length} tokens; max_length less max_new_tokens leaves {max_length}")
    if length >= max_length:
        raise BadRow(f"the prompt fills max_length: {length} of {max_length} tokens")
    raise BadRow(f"prompt and answer are {length} + {longest} tokens, over max_length {max_length}")


def _encode(
    template: ChatTemplate, prompt: Sequence[Message], answers: Sequence[Message]
) -> tuple[list[int], list[list[int]]]:
    """(prompt ids, one list of completion ids per answer)."""
    prompt_text = template.render(prompt, add_generation_prompt=True)
    prompt_ids = template.ids(prompt_text)
    completions: list[list[int]] = []
    for answer in answers:
        text = template.render([*prompt, answer], add_generation_prompt=False)
        if not text.startswith(prompt_text):
            raise BadRow("the chat template renders a prompt differently once it is answered; see chat_template_kwargs")
        text = _through_end_of_turn(template, text)
        ids = template.ids(text)
        if ids[: len(prompt_ids)] != prompt_ids:
            # Tokens merge across the border. At inference the model sees the prompt's own ids, so train on those. The
            # rest is encoded after a special token, because at the start of a text some tokenizers add a space.
            rest = template.ids(template.tokenizer.eos_token + text[len(prompt_text) :])[1:]
            if template.tokenizer.decode(prompt_ids + rest) != template.tokenizer.decode(ids):
                raise BadRow("tokens merge across the border of prompt and answer, and can't be told apart")
            ids = prompt_ids + rest
        completions.append(ids[len(prompt_ids) :])
    return prompt_ids, completions


def _through_end_of_turn(template: ChatTemplate, text: str) -> str:
    """Cuts what a template writes after the end of turn (ChatML's newline, Phi-3's EOS); adds EOS if it wrote none."""
    special = _special(template)
    body, end = text.rstrip(), None
    while body.endswith(special):  # backwards, up to the first of the tokens that close the turn
        end = len(body)
        body = body.removesuffix(max(filter(body.endswith, special), key=len)).rstrip()
    return text[:end] if end else body + template.tokenizer.eos_token


@lru_cache(maxsize=4)
def _special(template: ChatTemplate) -> tuple[str, ...]:
    """The special tokens as text; EOS counts as one even if it isn't marked as special."""
    marked = {token.content for token in template.tokenizer.added_tokens_decoder.values() if token.special}
    return tuple(sorted({template.tokenizer.eos_token, *marked}))


def _refuse_special(template: ChatTemplate, texts: Iterable[str]) -> None:
    """A text that spells a special token would be read as one: a forged end of turn."""
    texts = list(texts)
    for token in _special(template):
        if any(token in text for text in texts):
            raise BadRow(f"the text contains the model's special token {token}")
