"""`model.system_turn`: where a system turn goes, through templates that have a place for one and others that don't."""

from dataclasses import replace

import pytest

from qalign.data.formats import Dialogue, Preference, Prompt
from qalign.data.readers import BadRow
from qalign.data.templates import ChatTemplate
from qalign.data.tokenize import (
    encode_answer,
    encode_dialogue,
    encode_dialogues,
    encode_pair,
    encode_pairs,
    encode_prompt,
    encode_question,
    encode_questions,
)
from tests.data.chat_families import FAMILIES, HELLO, Turns, fixture_tokenizer, messages, plain, templated

SYSTEM, YES, WELL = ("system", "Be brief."), ("assistant", "Yes"), ("user", "Are you well?")
HINT = "model.system_turn: into_user puts it before the next user turn"

TURN = "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>' + m.content + '<|eot_id|>' }}"
CUE = "{{ '<|start_header_id|>assistant<|end_header_id|>' if add_generation_prompt }}"
RAISES = (  # Gemma's kind
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('No system role') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}" + TURN + "{% endfor %}" + CUE
)
DROPS = "{{ bos_token }}{% for m in messages %}{% if m.role != 'system' %}" + TURN + "{% endif %}{% endfor %}" + CUE
FIRST_ONLY = DROPS.replace("m.role != 'system'", "m.role != 'system' or loop.first")
WITHOUT = {"raises": RAISES, "drops": DROPS}


def ids(turns: Turns) -> list[int]:
    found = [2000]
    for role, text in turns:
        found += [2003, *plain("llama3", role), 2004, *plain("llama3", text), 2005]
    return [*found, 2003, *plain("llama3", "assistant"), 2004]


def pair(*turns: tuple[str, str]) -> Preference:
    chosen, rejected = messages([YES, ("assistant", "No")])
    return Preference(messages(turns), chosen, rejected, "rows.jsonl:1")


# --- keep ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", WITHOUT)
def test_a_row_whose_system_turn_has_no_place_is_refused_and_told_what_to_set(kind):
    template, asked = templated(WITHOUT[kind]), messages([SYSTEM, HELLO])
    answered = Dialogue((*asked, *messages([YES])), 0, "rows.jsonl:1")

    found = [
        *encode_pairs(template, [pair(SYSTEM, HELLO)], 500)[1],
        *encode_dialogues(template, [answered], 500)[1],
        *encode_questions(template, [Prompt(asked, "rows.jsonl:1", {})], 500)[1],
    ]

    assert len(found) == 3
    assert all(bad.reason.endswith(HINT) for bad in found)
    with pytest.raises(BadRow, match=HINT):
        encode_answer(template, answered, 500)
    assert encode_pair(template, pair(HELLO), 500).prompt_ids == ids([HELLO])


def test_what_only_looks_as_if_the_system_turn_were_there_is_refused():
    """The user repeats what the system turn says."""
    with pytest.raises(BadRow, match=f"leaves out turn 1, the system's; {HINT}"):
        encode_pair(templated(DROPS), pair(SYSTEM, ("user", "Be brief. Are you well?")), 500)


def test_a_later_system_turn_needs_a_place_too():
    turns = [SYSTEM, HELLO, YES, ("system", "It is noon."), WELL]

    assert encode_pair(templated(DROPS.replace("m.role != 'system'", "true")), pair(*turns), 500).prompt_ids == ids(
        turns
    )
    with pytest.raises(BadRow, match=f"leaves out turn 4, the system's; {HINT}"):
        encode_pair(templated(FIRST_ONLY), pair(*turns), 500)
    assert encode_pair(templated(FIRST_ONLY), pair(*turns[:3], WELL), 500).prompt_ids == ids([*turns[:3], WELL])


def test_the_hint_is_only_given_where_it_helps():
    with pytest.raises(BadRow, match=r"refuses it: No system role$"):  # the roles don't alternate either way
        encode_pair(templated(RAISES), pair(SYSTEM, HELLO, WELL), 500)


def test_a_flag_that_a_template_takes_out_of_the_system_turn_is_no_loss():
    template = templated(
        DROPS.replace("m.role != 'system'", "true").replace("m.content", "m.content.replace('/no', '')")
    )
    assert encode_pair(template, pair(("system", "Be brief./no"), HELLO), 500).prompt_ids == ids([SYSTEM, HELLO])


# --- into_user -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", WITHOUT)
@pytest.mark.parametrize(
    ("turns", "moved"),
    [
        ([SYSTEM, HELLO], [("user", "Be brief.\n\nHello there")]),
        ([SYSTEM, HELLO, YES, WELL], [("user", "Be brief.\n\nHello there"), YES, WELL]),
        ([HELLO, YES, SYSTEM, WELL], [HELLO, YES, ("user", "Be brief.\n\nAre you well?")]),
        ([SYSTEM, ("system", "It is noon."), HELLO], [("user", "Be brief.\n\nIt is noon.\n\nHello there")]),
        ([HELLO], [HELLO]),
    ],
    ids=["one question", "two questions", "in the middle", "two system turns", "no system turn"],
)
def test_a_system_turn_stands_before_the_next_question(kind, turns, moved):
    template = templated(WITHOUT[kind], system_turn="into_user")
    expected, asked = ids(moved), messages(turns)

    assert encode_pair(template, pair(*turns), 500).prompt_ids == expected
    assert encode_question(template, asked, 500) == encode_prompt(template, asked) == expected
    row = Dialogue((*asked, *messages([YES])), len(turns), "w")
    (sequence,) = encode_dialogue(template, row, 500)
    assert sequence.ids == encode_answer(template, row, 500) == [*expected, *plain("llama3", "Yes"), 2005]


def test_every_answer_of_a_dialogue_follows_the_moved_turn():
    template = templated(RAISES, system_turn="into_user")

    (sequence,) = encode_dialogue(template, Dialogue(messages([SYSTEM, HELLO, YES, WELL, YES]), 0, "w"), 500)

    prompt = ids([("user", "Be brief.\n\nHello there"), YES, WELL])
    assert sequence.ids == [*prompt, *plain("llama3", "Yes"), 2005]
    assert [label for label in sequence.labels if label >= 0] == 2 * [*plain("llama3", "Yes"), 2005]


def test_the_system_turn_stays_where_old_turns_are_dropped():
    template = templated(RAISES, system_turn="into_user")
    left = ids([("user", "Be brief.\n\nAre you well?")])

    found = encode_pair(template, pair(SYSTEM, HELLO, YES, WELL), len(left) + 3)

    assert (found.prompt_ids, found.dropped_turns) == (left, 2)


def test_a_system_turn_that_no_question_follows_is_refused():
    with pytest.raises(BadRow, match="no user turn after it"):
        encode_pair(templated(DROPS, system_turn="into_user"), pair(HELLO, SYSTEM), 500)


def test_mistrals_own_template_takes_the_moved_turn():
    template = replace(FAMILIES["mistral"].prepared(), system_turn="into_user")

    found = encode_pair(template, pair(SYSTEM, HELLO), 500)

    assert found.prompt_ids == FAMILIES["mistral"].prompt_ids([("user", "Be brief.\n\nHello there")])
    with pytest.raises(BadRow, match=HINT):
        encode_pair(ChatTemplate(fixture_tokenizer("mistral_v03")), pair(SYSTEM, HELLO), 500)


# --- refuse, and what is recorded ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama3", "mistral"])
def test_rows_with_a_system_turn_can_be_refused(name):
    template = replace(FAMILIES[name].prepared(), system_turn="refuse")

    pairs, refused = encode_pairs(template, [pair(SYSTEM, HELLO), pair(HELLO)], 500)

    assert [bad.reason for bad in refused] == ["has a system turn, and model.system_turn is 'refuse'"]
    assert [found.prompt_ids for found in pairs] == [FAMILIES[name].prompt_ids([HELLO])]


def test_what_was_trained_with_moved_turns_has_another_hash_and_other_words():
    kept, moved, refusing = (templated(DROPS, system_turn=way) for way in ("keep", "into_user", "refuse"))

    assert kept.source == refusing.source != moved.source
    assert (kept.words, moved.words) == ("the model's own", "the model's own, with system turns put into the user's")


# --- an assistant that speaks first ----------------------------------------------------------------------------------


def test_a_greeting_is_context_and_after_a_system_turn_it_is_learned():
    template, greeting = templated(DROPS.replace("m.role != 'system'", "true")), ("assistant", "Welcome")
    yes = [*plain("llama3", "Yes"), 2005]

    (first,) = encode_dialogue(template, Dialogue(messages([greeting, HELLO, YES]), 0, "w"), 500)
    (second,) = encode_dialogue(template, Dialogue(messages([SYSTEM, greeting, HELLO, YES]), 0, "w"), 500)

    assert first.ids == [*ids([greeting, HELLO]), *yes]
    assert [label for label in first.labels if label >= 0] == yes
    assert [label for label in second.labels if label >= 0] == [*plain("llama3", "Welcome"), 2005, *yes]
    with pytest.raises(BadRow, match="no answer to train on"):
        encode_dialogue(template, Dialogue(messages([greeting]), 0, "w"), 500)
    moved = replace(template, system_turn="into_user")
    (third,) = encode_dialogue(moved, Dialogue(messages([SYSTEM, greeting, HELLO, YES]), 0, "w"), 500)
    assert third.ids == [*ids([greeting, ("user", "Be brief.\n\nHello there")]), *yes]
