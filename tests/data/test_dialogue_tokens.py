"""Dialogues as token ids: supervised are each answer and its end of turn, to the token.

Expected ids are put together as `tests.data.chat_families` says, or come from transformers' own assistant mask.
"""

from dataclasses import replace

import pytest

from qalign.config.stages import Source
from qalign.data.formats import Dialogue, dialogues
from qalign.data.readers import BadRow
from qalign.data.store.sequences import IGNORED, TokenDialogue
from qalign.data.templates import ChatTemplate, prepare_template
from qalign.data.tokenize import encode_dialogue, encode_dialogues
from tests.data.chat_families import (
    CHATML_TEMPLATE,
    FAMILIES,
    HELLO,
    LONG,
    Family,
    Turns,
    chatml_tokenizer,
    llama3_prompt,
    messages,
    phi3_template,
    plain,
    templated,
)

NO, WELL, FINE = ("assistant", "No"), ("user", "Are you well?"), ("assistant", "I am fine.")
TALK = [HELLO, NO, WELL, FINE]
SYSTEM = ("system", "Be brief.")


@pytest.fixture(params=FAMILIES)
def family(request) -> Family:
    return FAMILIES[request.param]


def encode(template, turns: Turns, first_trained: int = 0, max_length: int = 10_000):
    row = Dialogue(messages(turns), first_trained, "rows.jsonl:1")
    return encode_dialogue(template, row, max_length)


def spans(sequence: TokenDialogue) -> list[tuple[int, int]]:
    """Where the supervised stretches begin and end. (Two answers never touch: there is a question between them.)"""
    labels = [IGNORED, *sequence.labels, IGNORED]
    edges = [i for i in range(len(labels) - 1) if (labels[i] == IGNORED) != (labels[i + 1] == IGNORED)]
    return list(zip(edges[::2], edges[1::2], strict=True))


def assert_pieces(sequence: TokenDialogue, *pieces: tuple[list[int], str]) -> None:
    """Compares a sequence with one that is written down piece by piece, each "seen" or "learned"."""
    ids, labels = [], []
    for piece, kind in pieces:
        ids += piece
        labels += piece if kind == "learned" else [IGNORED] * len(piece)
    assert (sequence.ids, sequence.labels) == (ids, labels)


# --- what is supervised ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first_trained", [0, 2, 3])
def test_each_answer_from_the_first_trained_on_is_supervised_with_its_end_of_turn(family, first_trained):
    """From the second question (2) or from the answer to it (3): the same."""
    template = family.prepared()
    no, fine = family.answer_ids("No"), family.answer_ids("I am fine.")
    first, whole = family.prompt_ids([HELLO]), family.prompt_ids([HELLO, NO, WELL])

    (single,), (sequence,) = encode(template, [HELLO, FINE]), encode(template, TALK, first_trained)

    assert_pieces(single, (first, "seen"), (fine, "learned"))
    assert (single.where, single.dropped_turns, len(single)) == ("rows.jsonl:1", 0, len(first) + 7)
    between = whole[len(first) + len(no) :]
    assert_pieces(
        sequence, (first, "seen"), (no, "seen" if first_trained else "learned"), (between, "seen"), (fine, "learned")
    )
    assert sequence.ids == whole + fine  # the very ids that the model sees when it is asked, and those that it gives


@pytest.mark.parametrize("name", ["llama3", "chatml", "zephyr"])
def test_a_system_turn_is_seen_and_not_learned(name):
    family = FAMILIES[name]
    template = family.prepared()

    (sequence,) = encode(template, [SYSTEM, *TALK])

    prompts = [family.prompt_ids([SYSTEM, HELLO]), family.prompt_ids([SYSTEM, HELLO, NO, WELL])]
    answers = [family.answer_ids("No"), family.answer_ids("I am fine.")]
    assert sequence.ids == prompts[1] + answers[1]
    assert spans(sequence) == [(len(p), len(p) + len(a)) for p, a in zip(prompts, answers, strict=True)]


def test_what_a_template_writes_after_the_last_turn_alone_does_not_part_the_turns():
    """Phi-3 writes an EOS behind the whole dialogue."""
    template = phi3_template()
    end, user, assistant = template.tokenizer.convert_tokens_to_ids(["<|end|>", "<|user|>", "<|assistant|>"])
    newline = plain("llama3", "\n")

    (sequence,) = encode(template, TALK)

    assert_pieces(
        sequence,
        ([2000, user, *plain("llama3", "\nHello there"), end, *newline, assistant, *newline], "seen"),
        ([*plain("llama3", "No"), end], "learned"),
        ([*newline, user, *plain("llama3", "\nAre you well?"), end, *newline, assistant, *newline], "seen"),
        ([*plain("llama3", "I am fine."), end], "learned"),
    )


def test_a_template_without_an_end_of_turn_gives_a_sequence_a_turn():
    """The EOS that each answer is taught to end with never stands in a history."""
    template = templated(
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}"
        "{{ 'assistant:' if add_generation_prompt }}"
    )

    first, second = encode(template, TALK)

    asked = [2000, *plain("llama3", "user: Hello there\nassistant:")]
    assert_pieces(first, (asked, "seen"), ([*plain("llama3", " No"), 2005], "learned"))
    again = [2000, *plain("llama3", "user: Hello there\nassistant: No\nuser: Are you well?\nassistant:")]
    assert_pieces(second, (again, "seen"), ([*plain("llama3", " I am fine."), 2005], "learned"))


def test_an_answer_whose_tokens_merge_with_the_prompts_in_a_history_is_learned_as_it_is_given():
    """ChatML's `assistant\\n` and an answer that begins with a newline: two tokens when it is given, one when it
    is looked back on."""
    template = FAMILIES["chatml"].prepared()
    newline, two_newlines = plain("llama3", "\n"), plain("llama3", "\n\n")
    assert len(newline) == len(two_newlines) == 1

    first, second = encode(template, [SYSTEM, HELLO, ("assistant", "\nNo"), WELL, FINE])

    asked = FAMILIES["chatml"].prompt_ids([SYSTEM, HELLO])
    assert_pieces(first, (asked, "seen"), ([*newline, *plain("llama3", "No"), 2007], "learned"))
    assert second.ids[: len(asked) + 2] == [*asked[:-1], *two_newlines, *plain("llama3", "No"), 2007]
    assert spans(second) == [(len(second) - 7, len(second))]


# --- generation markers ----------------------------------------------------------------------------------------------

MARKED = {
    "the answer alone": "{% generation %}{{ message['content'] }}{% endgeneration %}{{ '<|im_end|>\n' }}",
    "the end of turn too": "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}",
}


@pytest.mark.parametrize("inside", MARKED)
@pytest.mark.parametrize("turns", [[HELLO, FINE], [SYSTEM, *TALK]], ids=["one exchange", "two with a system turn"])
def test_generation_markers_change_nothing_and_mark_the_same_tokens(inside, turns):
    unmarked, marked = chatml_tokenizer(), chatml_tokenizer()
    content = "message['content'] + '<|im_end|>' + '\n'}}"
    assert CHATML_TEMPLATE.count(content) == 1
    marked.chat_template = CHATML_TEMPLATE.replace(
        "{{'<|im_start|>' + message['role'] + '\n' + " + content,
        "{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
        + MARKED[inside]
        + "{% else %}{{ " + content + "{% endif %}",
    )  # fmt: skip
    theirs = marked.apply_chat_template(list(messages(turns)), return_dict=True, return_assistant_tokens_mask=True)
    learned = theirs["assistant_masks"]
    if inside == "the answer alone":
        learned = [now or (before and token == 2007) for token, before, now in
                   zip(theirs["input_ids"], [0, *learned], learned, strict=False)]  # fmt: skip

    (sequence,) = encode(ChatTemplate(marked), turns)

    assert [sequence] == encode(ChatTemplate(unmarked), turns)
    assert sequence.ids + plain("llama3", "\n") == theirs["input_ids"]  # no newline after the end of turn
    assert [label != IGNORED for label in sequence.labels] == [bool(bit) for bit in learned[:-1]]


# --- templates that leave thoughts out of the history ----------------------------------------------------------------

# As Qwen3's: thoughts stand only in the last answer, where they are empty if there are none.
THINKING = """\
{%- for m in messages %}
{%- set said = m.content.split('</think>')[-1].lstrip('\n') %}
{{- '<|im_start|>' + m.role + '\n' }}
{%- if m.role != 'assistant' or not loop.last %}
{{- said }}
{%- elif '</think>' in m.content %}
{{- m.content }}
{%- else %}
{{- '<think>\n\n</think>\n\n' + said }}
{%- endif %}
{{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% if enable_thinking is false %}\
{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"""


@pytest.fixture
def thinker():
    tokenizer = chatml_tokenizer()
    tokenizer.chat_template = THINKING
    return prepare_template(tokenizer)


def chatml(role: str, text: str) -> list[int]:
    return [2006, *plain("llama3", f"{role}\n{text}"), 2007, *plain("llama3", "\n")]


BEGUN = [2006, *plain("llama3", "assistant\n")]
THOUGHT = [HELLO, ("assistant", "<think>\nHm.\n</think>\n\nNo"), WELL, ("assistant", "<think>\nOh.\n</think>\n\nWhy?")]


def test_where_thoughts_are_left_out_of_the_history_each_answer_is_seen_as_at_inference(thinker):
    first, second = encode(thinker, THOUGHT)

    assert_pieces(
        first,
        ([*chatml("user", "Hello there"), *BEGUN], "seen"),
        ([*plain("llama3", "<think>\nHm.\n</think>\n\nNo"), 2007], "learned"),
    )
    history = [*chatml("user", "Hello there"), *chatml("assistant", "No"), *chatml("user", "Are you well?")]
    assert_pieces(
        second, ([*history, *BEGUN], "seen"), ([*plain("llama3", "<think>\nOh.\n</think>\n\nWhy?"), 2007], "learned")
    )
    asked = thinker.tokenizer.apply_chat_template(
        list(messages(THOUGHT[:3])), add_generation_prompt=True, return_dict=False
    )
    assert second.ids[: len(asked)] == asked
    assert encode(thinker, THOUGHT, first_trained=3) == [second]  # no sequence for a turn that isn't trained


def test_the_empty_thoughts_that_a_template_adds_are_learned_where_they_are_not_part_of_the_prompt(thinker):
    history = [*chatml("user", "Hello there"), *chatml("assistant", "No"), *chatml("user", "Are you well?"), *BEGUN]
    empty, fine = "<think>\n\n</think>\n\n", "I am fine."

    *_, second = encode(thinker, TALK)
    *_, without = encode(replace(thinker, kwargs={"enable_thinking": False}), TALK)

    whole = [*plain("llama3", empty + fine), 2007]
    assert_pieces(second, (history, "seen"), (whole, "learned"))
    given = [*history[:-1], *plain("llama3", "\n" + empty)]  # the prompt's last newline and the empty thoughts
    assert_pieces(without, (given, "seen"), ([*plain("llama3", fine), 2007], "learned"))


# --- length ----------------------------------------------------------------------------------------------------------

YES = ("assistant", "Yes")


@pytest.mark.parametrize("first", [[], [SYSTEM]], ids=["no system", "system"])
def test_a_turn_that_does_not_fit_goes_into_a_sequence_of_its_own(first):
    """LONG asks A, C and E, and is answered B, D and Yes; the history is shortened from its oldest end."""
    template = FAMILIES["llama3"].prepared()
    b, d, yes = ([*plain("llama3", text), 2005] for text in ("B", "D", "Yes"))
    most = len(llama3_prompt([*first, *LONG])) + len(yes)
    to_b, to_d = (llama3_prompt([*first, *LONG[:n]]) for n in (1, 3))

    (whole,) = encode(template, [*first, *LONG, YES], max_length=most)
    assert (len(whole), whole.dropped_turns, len(spans(whole))) == (most, 0, 3)

    before, after = encode(template, [*first, *LONG, YES], max_length=most - 1)
    assert_pieces(before, (to_b, "seen"), (b, "learned"), (to_d[len(to_b) + len(b) :], "seen"), (d, "learned"))
    kept = llama3_prompt([*first, *LONG[2:]])
    assert_pieces(after, (kept, "seen"), (yes, "learned"))
    assert (before.dropped_turns, after.dropped_turns) == (0, 2)


def test_a_sequence_with_a_shortened_history_takes_further_turns():
    template = FAMILIES["llama3"].prepared()
    turns = [("user", "long" + " long" * 40), *LONG[1:], YES]
    most = len(llama3_prompt(turns[:1])) + len(plain("llama3", "B")) + 1

    first, second = encode(template, turns, max_length=most)

    assert (len(first), first.dropped_turns) == (most, 0)
    to_d, to_yes = llama3_prompt(turns[2:3]), llama3_prompt(turns[2:5])
    d, yes = ([*plain("llama3", text), 2005] for text in ("D", "Yes"))
    assert_pieces(second, (to_d, "seen"), (d, "learned"), (to_yes[len(to_d) + len(d) :], "seen"), (yes, "learned"))
    assert second.dropped_turns == 2


def test_an_exchange_that_does_not_fit_alone_is_refused_and_never_cut():
    template = FAMILIES["llama3"].prepared()
    question = len(llama3_prompt([WELL]))

    *_, last = encode(template, TALK, max_length=question + 7)
    assert len(last) == question + 7

    with pytest.raises(BadRow, match=f"^turn 4: .* {question} . 7 tokens, over max_length {question + 6}$"):
        encode(template, TALK, max_length=question + 6)
    with pytest.raises(BadRow, match=r"^turn 4: the prompt fills max_length: "):
        encode(template, TALK, max_length=question)


# --- real rows -------------------------------------------------------------------------------------------------------


def check(family: Family, rows: list[Dialogue], max_length: int) -> tuple[int, int]:
    """Properties of real rows; returns how many had one sequence, and how many several."""
    template = family.prepared()
    found: dict[str, list[TokenDialogue]] = {}
    sequences, refused = encode_dialogues(template, rows, max_length)
    for sequence in sequences:
        found.setdefault(sequence.where, []).append(sequence)
    assert len(found) + len(refused) == len(rows)
    assert not found.keys() & {bad.where for bad in refused}
    for row in rows:
        parts = found.get(row.where, [])
        for part in parts:
            assert len(part) == len(part.ids) == len(part.labels) <= max_length
            assert all(label in (IGNORED, token) for label, token in zip(part.labels, part.ids, strict=True))
        answers = [turn["content"] for turn in row.turns[row.first_trained :] if turn["role"] == "assistant"]
        learned = [part.ids[begin:end] for part in parts for begin, end in spans(part)]
        assert learned == (list(map(family.answer_ids, answers)) if parts else [])
    return sum(len(parts) == 1 for parts in found.values()), sum(len(parts) > 1 for parts in found.values())


def test_of_real_instructions_exactly_the_outputs_are_learned(family, shared_data):
    rows, _ = dialogues((Source(path=str(shared_data / "alpaca_en_demo.json")),), "train", 150, 0)

    assert check(family, rows, 2048) == (150, 0)


def test_of_real_preferences_exactly_the_chosen_answer_is_learned(family, shared_data):
    rows, _ = dialogues((Source(path=str(shared_data / "hh_harmless.jsonl.gz")),), "train", 100, 0)
    assert {row.first_trained for row in rows} > {1, 3, 5}

    assert check(family, rows, 4096) == (100, 0)


def test_of_real_dialogues_that_are_too_long_every_answer_is_learned_once(family, shared_data):
    rows, _ = dialogues((Source(path=str(shared_data / "hh_harmless.jsonl.gz")),), "train", 100, 0)

    one, several = check(family, [replace(row, first_trained=0) for row in rows], 400)

    assert min(one, several) > 10
