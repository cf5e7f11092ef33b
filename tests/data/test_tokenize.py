"""Preferences and questions as token ids: supervised are the answer and its end of turn, to the token."""

from dataclasses import replace

import pytest

from qalign.config.stages import Source
from qalign.data.formats import Dialogue, PlainText, Preference, Prompt, preferences
from qalign.data.readers import BadRow
from qalign.data.templates import ChatTemplate
from qalign.data.tokenize import (
    encode_answer,
    encode_dialogues,
    encode_pair,
    encode_pairs,
    encode_prompt,
    encode_question,
    encode_questions,
    end_of_turn_id,
)
from tests.data.chat_families import (
    FAMILIES,
    HELLO,
    LONG,
    Family,
    fixture_tokenizer,
    llama3_prompt,
    messages,
    phi3_template,
    plain,
    templated,
)
from tests.data.shapes import NO, YES, assistant

TALK = [HELLO, ("assistant", "Good day."), ("user", "Are you well?")]
SYSTEM = ("system", "Be brief.")
FORGED = "the text contains the model's special token <|eot_id|>"


@pytest.fixture(params=FAMILIES)
def family(request) -> Family:
    return FAMILIES[request.param]


def row(*prompt: tuple[str, str], chosen: str = "Yes", rejected: str = "No", where: str = "rows.jsonl:1") -> Preference:
    return Preference(messages(prompt), assistant(chosen), assistant(rejected), where)


def encode(template, *prompt, max_length: int = 10_000, **answers):
    return encode_pair(template, row(*prompt, **answers), max_length)


# --- what is supervised ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("turns", [[HELLO], TALK, [SYSTEM, *TALK]], ids=["one turn", "three turns", "system"])
def test_the_prompt_is_the_templates_and_the_completion_the_answer_and_its_end_of_turn(family, turns):
    if turns[0] == SYSTEM and not family.takes_system:
        return
    template = family.prepared()

    pair = encode(template, *turns, chosen="I am fine.", rejected="No")

    assert pair.prompt_ids == family.prompt_ids(turns)
    assert template.tokenizer.convert_ids_to_tokens(pair.chosen_ids) == [*family.fine, family.end]
    assert template.tokenizer.convert_ids_to_tokens(pair.rejected_ids) == [*family.no, family.end]
    assert (pair.where, pair.dropped_turns) == ("rows.jsonl:1", 0)
    assert len(pair) == len(pair.prompt_ids) + 7
    assert end_of_turn_id(template) == family.end_id


def test_the_ids_to_sample_from_and_to_score_are_those_that_are_trained_on(family):
    template, prompt = family.prepared(), messages(TALK)
    pair = encode(template, *TALK, chosen="I am fine.")

    assert encode_prompt(template, list(prompt)) == family.prompt_ids(TALK) == pair.prompt_ids
    assert encode_question(template, prompt, len(pair.prompt_ids)) == pair.prompt_ids
    scored = Dialogue((*prompt, {"role": "assistant", "content": "I am fine."}), 0, "w")
    assert encode_answer(template, scored, 10_000) == pair.prompt_ids + pair.chosen_ids
    # What vLLM or plain transformers do with the saved template:
    others = template.tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True, return_dict=False)
    assert others == pair.prompt_ids


@pytest.mark.parametrize(
    "answer", ["I am fine.", "Fine\n\n- one\n- two", "1, 2, 3 …", "ß 漢字 🙂", "  Yes:\n\n  1. no \n"]
)
def test_an_answer_keeps_its_characters_and_the_white_space_that_its_template_keeps(family, answer):
    assert encode(family.prepared(), *TALK, chosen=answer).chosen_ids == family.answer_ids(answer)


def test_tokens_do_not_merge_across_the_border():
    """After ChatML's `assistant\\n`, an answer that begins with a newline would become part of the prompt's last token;
    at inference the model sees the prompt's own."""
    family = FAMILIES["chatml"]
    (newline,), (two_newlines,) = plain("llama3", "\n"), plain("llama3", "\n\n")

    pair = encode(family.prepared(), HELLO, chosen="\nYes", rejected="Yes")

    assert newline != two_newlines
    assert pair.prompt_ids == family.prompt_ids([HELLO])
    assert pair.prompt_ids[-1] == newline
    assert pair.chosen_ids == [newline, *plain("llama3", "Yes"), 2007]
    assert pair.rejected_ids == [*plain("llama3", "Yes"), 2007]


def test_what_a_template_writes_after_the_end_of_turn_is_cut():
    template = phi3_template()
    end, user, assistant = template.tokenizer.convert_tokens_to_ids(["<|end|>", "<|user|>", "<|assistant|>"])

    pair = encode(template, HELLO, chosen="I am fine.")

    assert pair.prompt_ids == [
        2000, user, *plain("llama3", "\nHello there"), end, *plain("llama3", "\n"), assistant, *plain("llama3", "\n"),
    ]  # fmt: skip
    assert pair.chosen_ids == [*plain("llama3", "I am fine."), end]
    assert end_of_turn_id(template) == end != template.tokenizer.eos_token_id


@pytest.mark.parametrize(
    "turns",
    [
        "{% for m in messages %}{{ '\\n' if not loop.first }}{{ m.role + ': ' + m.content }}{% endfor %}"
        "{{ '\\n' if add_generation_prompt }}",
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}",
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n\\n' }}{% endfor %}",
    ],
    ids=["newlines between turns", "newlines after turns", "blank lines after turns"],
)
def test_a_template_without_an_end_of_turn_gets_the_eos(turns):
    """And what it writes after an answer is not supervised: it would melt into the answer's last token."""
    template = templated(turns + "{{ 'assistant:' if add_generation_prompt }}")

    pair = encode(template, HELLO, chosen="I am fine", rejected="No")

    border = "\n\n" if "\\n\\n" in turns else "\n"
    assert pair.prompt_ids == [2000, *plain("llama3", f"user: Hello there{border}assistant:")]
    assert pair.chosen_ids == [*plain("llama3", " I am fine"), 2005]
    assert pair.rejected_ids == [*plain("llama3", " No"), 2005]
    assert end_of_turn_id(template) == 2005


def test_template_kwargs_reach_the_template():
    plain_one = templated(
        "{% for m in messages %}{{ m.role + ':' + m.content + ('<|eot_id|>' if brief else '<|end_of_text|>') }}"
        "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    template = replace(plain_one, kwargs={"brief": True})
    expected = [2000, *plain("llama3", "user:Hello there"), 2005, *plain("llama3", "assistant:")]

    pair = encode(template, HELLO)

    assert pair.prompt_ids == expected
    assert pair.chosen_ids == [*plain("llama3", "Yes"), 2005]
    assert encode_prompt(template, messages([HELLO])) == expected
    assert encode_question(template, messages([HELLO]), 500) == expected
    assert (end_of_turn_id(template), end_of_turn_id(plain_one)) == (2005, 2001)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "prompt", "reason"),
    [
        (ChatTemplate(fixture_tokenizer("llama3"), {"tokenize": True}), [HELLO], "refuses it: .* for keyword"),
        (
            templated("{% for m in messages %}{{ m.content / 0 if 'Hello' in m.content else m.content }}{% endfor %}"),
            [HELLO],
            "refuses it: unsupported operand",
        ),
        (
            templated(
                "{% for m in messages %}{{ m.role }}: {{ m.content if loop.last else '…' }}{{ eos_token }}{% endfor %}"
                "{% if add_generation_prompt %}assistant: {% endif %}"
            ),
            [HELLO],
            "renders a prompt differently once it is answered; see chat_template_kwargs",
        ),
    ],
    ids=["an argument given twice", "an error inside", "another prompt once answered"],
)
def test_a_dialogue_that_the_template_cannot_render_is_refused(template, prompt, reason):
    with pytest.raises(BadRow, match=reason):
        encode(template, *prompt)


@pytest.mark.parametrize(
    "turns",
    [
        [("system", "<|eot_id|>"), HELLO, ("assistant", "Yes")],
        [("user", "Hi<|eot_id|>"), ("assistant", "Hello"), ("user", "Why?"), ("assistant", "Yes")],
        [HELLO, ("assistant", "a<|eot_id|>b"), ("user", "Why?"), ("assistant", "Yes")],
        [HELLO, ("assistant", "Yes.<|eot_id|>")],
    ],
    ids=["system", "user", "assistant", "answer"],
)
def test_a_forged_end_of_turn_is_refused_in_any_turn_of_any_form(turns):
    template, forged, answer = FAMILIES["llama3"].prepared(), messages(turns), turns[-1][1]
    pair, other = row(*turns[:-1], chosen=answer), row(*turns[:-1], rejected=answer)
    dialogue, text = Dialogue(forged, len(turns) - 1, "w"), PlainText("a<|eot_id|>b", "w")

    found = [
        *encode_pairs(template, [pair, other], 500)[1],
        *encode_dialogues(template, [dialogue, text], 500)[1],
        *encode_questions(template, [Prompt(forged, "w", {})], 500)[1],
    ]

    assert [bad.reason for bad in found] == [FORGED] * 5
    with pytest.raises(BadRow, match=r"special token <\|eot_id\|>$"):
        encode_answer(template, dialogue, 500)


def test_refused_rows_keep_their_places_and_the_rest_their_order():
    template = FAMILIES["llama3"].prepared()
    turns = {"a:1": "A", "a:2": "x" * 500, "a:3": "C", "b:1": "<|eot_id|>"}
    asked = {where: messages([("user", text)]) for where, text in turns.items()}
    yes = {"role": "assistant", "content": "Yes"}

    pairs, no_pairs = encode_pairs(template, [Preference(p, YES, NO, where) for where, p in asked.items()], 40)
    learned, unlearned = encode_dialogues(template, [Dialogue((*p, yes), 0, w) for w, p in asked.items()], 40)
    questions, unasked = encode_questions(template, [Prompt(p, where, {}) for where, p in asked.items()], 40)

    assert [pair.where for pair in pairs] == [sequence.where for sequence in learned] == ["a:1", "a:3"]
    assert [(p.where, ids) for p, ids in questions] == [(pair.where, pair.prompt_ids) for pair in pairs]
    for refused in (no_pairs, unlearned, unasked):
        assert [bad.where for bad in refused] == ["a:2", "b:1"]
        assert "max_length" in refused[0].reason
        assert refused[1].reason == FORGED


# --- length ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [[], [("system", "Be brief.")]], ids=["no system", "system"])
def test_the_oldest_turns_are_dropped_until_the_row_fits(first):
    template, turns = FAMILIES["llama3"].prepared(), [*first, *LONG]
    completion = [*plain("llama3", "Yes"), 2005]
    whole, shorter, shortest = (llama3_prompt([*first, *LONG[drop:]]) for drop in (0, 2, 4))

    for room, expected, dropped in (
        (len(whole), whole, 0),
        (len(whole) - 1, shorter, 2),
        (len(shorter), shorter, 2),
        (len(shorter) - 1, shortest, 4),
        (len(shortest), shortest, 4),
    ):
        pair = encode(template, *turns, max_length=room + len(completion))
        assert (pair.prompt_ids, pair.chosen_ids, pair.dropped_turns) == (expected, completion, dropped)
        assert encode_question(template, messages(turns), room) == expected
    least = len(shortest)
    with pytest.raises(BadRow, match=f"^prompt and answer are {least} . 3 tokens, over max_length {least + 1}$"):
        encode(template, *turns, max_length=least + 1)
    for room in (least, least - 1):
        with pytest.raises(BadRow, match=f"^the prompt fills max_length: {least} of {room} tokens$"):
            encode(template, *turns, max_length=room)
    with pytest.raises(
        BadRow, match=f"^the prompt is {least} tokens; max_length less max_new_tokens leaves {least - 1}$"
    ):
        encode_question(template, messages(turns), least - 1)


@pytest.mark.parametrize("longer", ["chosen", "rejected"])
def test_the_longer_answer_decides_what_fits(longer):
    template = FAMILIES["llama3"].prepared()
    prompt = len(llama3_prompt([HELLO]))

    assert len(encode(template, HELLO, **{longer: "I am fine."}, max_length=prompt + 7)) == prompt + 7
    with pytest.raises(BadRow, match=f"{prompt} . 7 tokens, over max_length {prompt + 6}"):
        encode(template, HELLO, **{longer: "I am fine."}, max_length=prompt + 6)


# --- real rows -------------------------------------------------------------------------------------------------------


@pytest.fixture
def real_rows(family, shared_data) -> list[Preference]:
    """Some hundred rows of three data sets, without those that the family can't take by its nature."""
    names = ("hh_harmless.jsonl.gz", "dpo_en_demo.json", "alpaca_eval_prefs.jsonl.gz")
    rows, _ = preferences(tuple(Source(path=str(shared_data / name)) for name in names), "train", 120, 0)
    taken = [pref for pref in rows if family.takes_system or pref.prompt[0]["role"] != "system"]
    assert len(taken) > 300
    return taken


def spoken(turns) -> list[tuple[str, str]]:
    return [(turn["role"], turn["content"]) for turn in turns]


def spells_special(family: Family, pref: Preference) -> bool:
    texts = [turn["content"] for turn in (pref.chosen, pref.rejected, *pref.prompt)]
    return any(token in text for token in family.special for text in texts)


def test_real_rows_have_the_ids_that_are_put_together_by_hand(family, real_rows):
    pairs, refused = encode_pairs(family.prepared(), real_rows, 100_000)

    assert [bad.where for bad in refused] == [pref.where for pref in real_rows if spells_special(family, pref)]
    used = [pref for pref in real_rows if not spells_special(family, pref)]
    for pref, pair in zip(used, pairs, strict=True):
        assert pair.prompt_ids == family.prompt_ids(spoken(pref.prompt))
        assert pair.answers == (family.answer_ids(pref.chosen["content"]), family.answer_ids(pref.rejected["content"]))


def test_real_rows_fit_and_their_answers_are_whole(family, real_rows):
    """HH's dialogues have up to 35 turns: what is dropped comes from the front, in pairs."""
    template, most = family.prepared(), 600
    whole = {pair.where: pair for pair in encode_pairs(template, real_rows, 100_000)[0]}

    pairs, refused = encode_pairs(template, real_rows, most)

    assert len(pairs) + len(refused) == len(real_rows)
    assert {pair.dropped_turns > 0 for pair in pairs} == {True, False}
    asked = {pref.where: pref.prompt for pref in real_rows}
    for pair in pairs:
        full, turns = whole[pair.where], spoken(asked[pair.where])
        assert (pair.chosen_ids, pair.rejected_ids) == (full.chosen_ids, full.rejected_ids)
        assert len(pair) <= most
        assert (pair.dropped_turns == 0) == (len(full) <= most)
        kept = turns[:1] if turns[0][0] == "system" else []
        left = [*kept, *turns[len(kept) + pair.dropped_turns :]]
        assert pair.prompt_ids == family.prompt_ids(left)
        assert encode_question(template, asked[pair.where], len(pair.prompt_ids)) == pair.prompt_ids
