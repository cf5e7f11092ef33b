"""Chat template to ids, with the completion's span known to the token.

A model is trained on what it will see: the prompt's ids are the template's own, generation prompt included, with one
BOS; the supervised ids are exactly the answer and its end of turn.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from jinja2 import TemplateError
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from qalign.data.formats import Dialogue, Message, PlainText, Preference, Prompt, Refused
from qalign.data.readers import BadRow
from qalign.errors import UserError

PLAIN_TEMPLATE = """\
{%- for message in messages %}
{{- '<|' + message['role'] + '|>\\n' + message['content'] | trim + eos_token + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"""
"""For base models without a chat template: Zephyr's layout, which needs no new tokens (an untrained embedding in a
frozen base would never be learned)."""


class TooLong(BadRow):
    """A row doesn't fit, even without its oldest turns."""


IGNORED = -100  # the label of a token that is not supervised, as PyTorch's cross entropy has it


@dataclass(frozen=True)
class TokenPair:
    """A preference row as ids; the prompt is stored once."""

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
        """The longer of the two sequences, in tokens."""
        return len(self.prompt_ids) + max(len(self.chosen_ids), len(self.rejected_ids))


@dataclass(frozen=True)
class TokenAnswers:
    """A prompt and the answers that were sampled to it, as ids; the prompt is stored once."""

    prompt_ids: list[int]
    answers: tuple[list[int], ...]

    def __len__(self) -> int:
        """The longest of the sequences, in tokens."""
        return len(self.prompt_ids) + max(map(len, self.answers))


@dataclass(frozen=True)
class TokenDialogue:
    """A sequence to learn from; `labels` are its ids where they are supervised and `IGNORED` elsewhere."""

    ids: list[int]
    labels: list[int]
    where: str
    dropped_turns: int = 0

    def __len__(self) -> int:
        return len(self.ids)


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase, template_file: str | None = None) -> str:
    """Gives a tokenizer one chat template with one BOS, and a pad token, in place.

    Where the tokenizer puts a BOS before plain text but the template writes none (Zephyr), the template is made to
    write it: then training, qalign, vLLM and plain transformers all see the same ids.

    Returns:
        Which template this is, in words.

    Raises:
        UserError: the template file is missing or no valid template.
    """
    if tokenizer.eos_token is None:
        raise UserError("the tokenizer has no end-of-sequence token, so no answer would ever end")
    words = "the model's own"
    if template_file:
        try:
            tokenizer.chat_template, words = Path(template_file).read_text(encoding="utf-8"), template_file
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"model.chat_template: '{template_file}' can't be read: {error}") from None
    elif not tokenizer.chat_template:
        tokenizer.chat_template, words = PLAIN_TEMPLATE, "qalign's plain one, as the model has none"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is masked by length, never by its id
    try:
        text = _render(tokenizer, [{"role": "user", "content": "a"}], {}, add_generation_prompt=True)
    except Exception as error:  # Jinja's own errors have many classes
        raise UserError(f"the chat template ({words}) can't be used: {error}") from None
    bos = tokenizer.bos_token_id
    if bos is not None and tokenizer("a").input_ids[0] == bos and not text.startswith(tokenizer.bos_token):
        tokenizer.chat_template = "{{- bos_token }}" + tokenizer.get_chat_template()
        words += ", with the BOS it left out"
    return words


def encode_pairs(tokenizer, rows: list[Preference], max_length: int, template_kwargs: dict):
    """Rows as ids.

    Returns:
        (pairs, refused): `list[TokenPair]` and `list[Refused]`.
    """
    pairs, refused = [], []
    for row in tqdm(rows, desc="tokenizing", unit="row", disable=len(rows) < 2000):
        try:
            pairs.append(encode_pair(tokenizer, row, max_length, template_kwargs))
        except BadRow as reason:
            refused.append(Refused(row.where, str(reason)))
    return pairs, refused


def encode_pair(tokenizer, row: Preference, max_length: int, template_kwargs: dict) -> TokenPair:
    """One row as ids; the oldest turns are dropped until it fits, an answer is never cut.

    Raises:
        BadRow: the row doesn't fit `max_length`, or the template can't render it.
    """
    _refuse_special(tokenizer, [*row.prompt, {"content": row.chosen}, {"content": row.rejected}])
    answers = (row.chosen, row.rejected)
    prompt_ids, (chosen, rejected), dropped = _fitted(tokenizer, row.prompt, answers, max_length, template_kwargs)
    return TokenPair(prompt_ids, chosen, rejected, row.where, dropped, row.margin)


def _fitted(tokenizer, prompt: Sequence[Message], answers: tuple[str, ...], max_length: int, template_kwargs: dict):
    """(prompt ids, ids of each answer, how many of the oldest turns were dropped to make them fit)."""
    turns = list(prompt)
    while True:
        prompt_ids, completions = _encode(tokenizer, turns, answers, template_kwargs)
        longest = max(map(len, completions), default=0)
        if len(prompt_ids) + longest <= max_length:
            return prompt_ids, completions, len(prompt) - len(turns)
        first = 1 if turns[0]["role"] == "system" else 0
        if len(turns) - first < 3:  # only the last question is left
            break
        del turns[first : first + 2]
    if len(prompt_ids) >= max_length:
        raise TooLong(f"the prompt fills max_length: {len(prompt_ids)} of {max_length} tokens")
    raise TooLong(f"prompt and answer are {len(prompt_ids)} + {longest} tokens, over max_length {max_length}")


def encode_dialogues(tokenizer, rows: list[Dialogue | PlainText], max_length: int, template_kwargs: dict):
    """Rows as ids; a long row gives several sequences.

    Returns:
        (sequences, refused): `list[TokenDialogue]` and `list[Refused]`.
    """
    sequences, refused = [], []
    for row in tqdm(rows, desc="tokenizing", unit="row", disable=len(rows) < 2000):
        try:
            if isinstance(row, PlainText):
                sequences += encode_text(tokenizer, row, max_length)
            else:
                sequences += encode_dialogue(tokenizer, row, max_length, template_kwargs)
        except BadRow as reason:
            refused.append(Refused(row.where, str(reason)))
    return sequences, refused


def encode_dialogue(tokenizer, row: Dialogue, max_length: int, template_kwargs: dict) -> list[TokenDialogue]:
    """One dialogue as ids. Supervised are exactly its assistant turns, each with its end of turn, in the very ids that
    the model would see and give at inference.

    A turn goes into the sequence of the turn before where the template renders it as its continuation and it fits;
    else (Qwen3 leaves the thoughts of earlier turns out) it begins a sequence of its own, with as many of the oldest
    turns dropped as it takes. Generation markers in a template are not needed and not used.

    Raises:
        BadRow: a turn doesn't fit `max_length` even without those before, or the template can't render it.
    """
    turns = list(row.turns)
    _refuse_special(tokenizer, turns)
    sequences: list[TokenDialogue] = []
    for number, turn in enumerate(turns):
        if turn["role"] != "assistant" or number < row.first_trained:
            continue
        try:
            prompt_ids, (answer_ids,), dropped = _fitted(
                tokenizer, turns[:number], (turn["content"],), max_length, template_kwargs
            )
        except BadRow as reason:
            raise BadRow(f"turn {number + 1}: {reason}") from None
        before = sequences[-1] if sequences else None
        if before and prompt_ids[: len(before)] == before.ids:
            kept, dropped = before.labels, before.dropped_turns
            sequences.pop()
        else:
            kept = []
        ids = prompt_ids + answer_ids
        labels = [*kept, *[IGNORED] * (len(prompt_ids) - len(kept)), *answer_ids]
        sequences.append(TokenDialogue(ids, labels, row.where, dropped))
    return sequences


def encode_answer(tokenizer, row: Dialogue, max_length: int, template_kwargs: dict) -> list[int]:
    """A dialogue as ids up to the end of its last turn, as a reward model reads it.

    Raises:
        BadRow: as `encode_pair`.
    """
    _refuse_special(tokenizer, list(row.turns))
    *prompt, answer = row.turns
    prompt_ids, (ids,), _ = _fitted(tokenizer, prompt, (answer["content"],), max_length, template_kwargs)
    return prompt_ids + ids


def encode_text(tokenizer, row: PlainText, max_length: int) -> list[TokenDialogue]:
    """A plain text as ids, with EOS at its end; a long one in pieces of `max_length`, each of which begins with the
    last token of the one before. So all of its tokens but the first are supervised, each once: the token at the start
    of a sequence is predicted from nothing.

    Raises:
        BadRow: the tokenizer makes nothing of the text, or it spells out a special token.
    """
    _refuse_special(tokenizer, [{"content": row.text}])
    ids = [*tokenizer(row.text).input_ids, tokenizer.eos_token_id]
    if ids[-2:-1] == [tokenizer.eos_token_id]:  # some tokenizers add one themselves
        ids.pop()
    if len(ids) < 2:
        raise BadRow("the text gives no tokens")
    pieces = [ids[start : start + max_length] for start in range(0, len(ids) - 1, max_length - 1)]
    return [TokenDialogue(piece, [IGNORED, *piece[1:]], row.where) for piece in pieces]


def encode_questions(tokenizer, rows: list[Prompt], room: int, template_kwargs: dict):
    """Prompts as ids.

    Returns:
        (questions, refused): `list[tuple[Prompt, list[int]]]` and `list[Refused]`.
    """
    questions, refused = [], []
    for row in tqdm(rows, desc="tokenizing", unit="row", disable=len(rows) < 2000):
        try:
            questions.append((row, encode_question(tokenizer, row.turns, room, template_kwargs)))
        except BadRow as reason:
            refused.append(Refused(row.where, str(reason)))
    return questions, refused


def encode_question(tokenizer, prompt: Sequence[Message], room: int, template_kwargs: dict) -> list[int]:
    """A prompt as ids, its oldest turns dropped until it leaves room for an answer.

    Args:
        room: for the prompt, in tokens.

    Raises:
        BadRow: the last question alone is longer, or the template can't render it.
    """
    _refuse_special(tokenizer, list(prompt))
    try:
        return _fitted(tokenizer, prompt, (), room, template_kwargs)[0]
    except TooLong:
        shortest = [turn for turn in prompt[:1] if turn["role"] == "system"] + [prompt[-1]]
        length = len(encode_prompt(tokenizer, shortest, template_kwargs))
        raise BadRow(f"the prompt is {length} tokens; max_length less max_new_tokens leaves {room}") from None


def encode_prompt(tokenizer, prompt: list[Message], template_kwargs: dict) -> list[int]:
    """Ids of a dialogue up to where the assistant begins to answer."""
    return _ids(tokenizer, _render(tokenizer, prompt, template_kwargs, add_generation_prompt=True))


def end_of_turn_id(tokenizer, template_kwargs: dict) -> int:
    """The id with which the template ends an assistant's turn; a `UserError` if it can't render one."""
    try:
        _, ((*_, last),) = _encode(tokenizer, [{"role": "user", "content": "a"}], ("b",), template_kwargs)
    except BadRow as reason:
        raise UserError(f"model.chat_template: no end of turn can be found: {reason}") from None
    return last


def pad_for_scores(tokenizer, template_kwargs: dict) -> str:
    """A pad token that no rendered dialogue ends with.

    Sequence classifiers read the score at the last token that is no pad token. With the usual pad = EOS that would be
    the one before the end of turn, so whether an answer ended would never count.
    """
    end = end_of_turn_id(tokenizer, template_kwargs)
    ids = (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id, *tokenizer.all_special_ids, 0, 1)
    return tokenizer.convert_ids_to_tokens(next(token for token in ids if token not in (None, end)))


def _encode(tokenizer, prompt: list[Message], answers: tuple[str, ...], template_kwargs: dict):
    """(prompt ids, one list of completion ids an answer)."""
    prompt_text = _render(tokenizer, prompt, template_kwargs, add_generation_prompt=True)
    prompt_ids = _ids(tokenizer, prompt_text)
    completions = []
    for answer in answers:
        turns = [*prompt, {"role": "assistant", "content": answer}]
        text = _render(tokenizer, turns, template_kwargs, add_generation_prompt=False)
        if not text.startswith(prompt_text):
            raise BadRow("the chat template renders a prompt differently once it is answered; see chat_template_kwargs")
        text = _through_end_of_turn(tokenizer, text)
        ids = _ids(tokenizer, text)
        if ids[: len(prompt_ids)] != prompt_ids:
            # Tokens merge across the border. At inference the model sees the prompt's own ids, so train on those. After
            # a special token no tokenizer takes the text for the start of a sentence, which would get a space.
            rest = _ids(tokenizer, tokenizer.eos_token + text[len(prompt_text) :])[1:]
            if tokenizer.decode(prompt_ids + rest) != tokenizer.decode(ids):
                raise BadRow("tokens merge across the border of prompt and answer, and can't be told apart")
            ids = prompt_ids + rest
        completions.append(ids[len(prompt_ids) :])
    return prompt_ids, completions


def _through_end_of_turn(tokenizer, text: str) -> str:
    """Cuts what a template writes after the end of turn (ChatML's newline, Phi-3's EOS); adds EOS if it wrote none."""
    special = _special(tokenizer)
    body, end = text.rstrip(), None
    while body.endswith(special):  # from the back, until the first of the tokens that close the turn
        end = len(body)
        body = body.removesuffix(max(filter(body.endswith, special), key=len)).rstrip()
    return text[:end] if end else body + tokenizer.eos_token


@lru_cache(maxsize=4)
def _special(tokenizer) -> tuple[str, ...]:
    """Special tokens as text; EOS counts as one even where it isn't marked."""
    marked = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return tuple(sorted({tokenizer.eos_token, *marked}))


def _refuse_special(tokenizer, turns: list[Message]) -> None:
    """A turn that spells out a special token would be read as one: a forged end of turn."""
    for token in _special(tokenizer):
        if any(token in turn["content"] for turn in turns):
            raise BadRow(f"the text contains the model's special token {token}")


def _render(tokenizer, turns: list[Message], template_kwargs: dict, *, add_generation_prompt: bool) -> str:
    try:
        return tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=add_generation_prompt, **template_kwargs
        )
    except (ValueError, TypeError, TemplateError) as error:
        raise BadRow(f"the chat template refuses it: {error}") from None


def _ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids
