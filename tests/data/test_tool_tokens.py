"""Tools, tool calls and thoughts as token ids, through a template that reads them and through others that don't."""

from dataclasses import replace

import pytest

from qalign.data.formats import Dialogue, Preference, Prompt
from qalign.data.readers import BadRow
from qalign.data.store.sequences import IGNORED
from qalign.data.tokenize import encode_answer, encode_dialogue, encode_pair, encode_questions
from tests.data.chat_families import messages, plain, templated

READS_ALL = (
    "{{ bos_token }}{% if tools %}{{ '<|start_header_id|>tools<|end_header_id|>' }}"
    "{% for tool in tools %}{{ tool.function.name + ': ' + tool.function.description }}{% endfor %}{{ '<|eot_id|>' }}"
    "{% endif %}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>' }}"
    "{% if m.reasoning_content %}{{ '[' + m.reasoning_content + ']' }}{% endif %}"
    "{{ m.content }}"
    "{% for call in m.tool_calls or [] %}{{ '@' + call.function.name + call.function.arguments | tojson }}{% endfor %}"
    "{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>' }}{% endif %}"
)
WEATHER = {"type": "function", "function": {"name": "weather", "description": "Tells the sky.", "parameters": {}}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome", "days": 2}}}
ASKED, OBSERVED = {"role": "user", "content": "Weather in Rome?"}, {"role": "tool", "content": '{"sun": true}'}
CALLED = {"role": "assistant", "content": "A look.", "reasoning_content": "I can't know.", "tool_calls": [CALL]}
SUNNY = {"role": "assistant", "content": "Sunny."}
TALK = Dialogue((ASKED, CALLED, OBSERVED, SUNNY), 0, "rows.jsonl:1", (WEATHER,))

CALLED_IDS = [*plain("llama3", """[I can't know.]A look.@weather{"city": "Rome", "days": 2}"""), 2005]
SUNNY_IDS = [*plain("llama3", "Sunny."), 2005]
TOOLS_IDS = [2000, 2003, *plain("llama3", "tools"), 2004, *plain("llama3", "weather: Tells the sky."), 2005]


def turn_ids(role: str, text: str) -> list[int]:
    return [2003, *plain("llama3", role), 2004, *plain("llama3", text), 2005]


BEGUN = [2003, *plain("llama3", "assistant"), 2004]
ASKED_IDS = [*TOOLS_IDS, *turn_ids("user", "Weather in Rome?"), *BEGUN]


def changed(old: str, new: str = "", **settings):
    assert READS_ALL.count(old) == 1
    return templated(READS_ALL.replace(old, new), **settings)


# --- a template that reads them --------------------------------------------------------------------------------------


def test_thought_call_answer_and_end_of_turn_are_learned_and_the_tools_result_is_seen():
    (sequence,) = encode_dialogue(templated(READS_ALL), TALK, 500)

    between = [*turn_ids("tool", '{"sun": true}'), *BEGUN]
    assert sequence.ids == [*ASKED_IDS, *CALLED_IDS, *between, *SUNNY_IDS]
    seen = [IGNORED] * len(ASKED_IDS), [IGNORED] * len(between)
    assert sequence.labels == [*seen[0], *CALLED_IDS, *seen[1], *SUNNY_IDS]


def test_an_untrained_turn_is_context():
    template, whole = templated(READS_ALL), [*ASKED_IDS, *CALLED_IDS, *turn_ids("tool", '{"sun": true}'), *BEGUN]

    (sequence,) = encode_dialogue(template, replace(TALK, untrained=frozenset({1})), 500)

    assert sequence.ids == [*whole, *SUNNY_IDS]
    assert sequence.labels == [*[IGNORED] * len(whole), *SUNNY_IDS]
    (first,) = encode_dialogue(template, replace(TALK, untrained=frozenset({3})), 500)
    assert (first.ids, first.labels) == ([*ASKED_IDS, *CALLED_IDS], [*[IGNORED] * len(ASKED_IDS), *CALLED_IDS])
    with pytest.raises(BadRow, match="no answer to train on"):
        encode_dialogue(template, replace(TALK, untrained=frozenset({1, 3})), 500)


def test_pairs_prompts_and_scored_answers_have_them_too():
    template = templated(READS_ALL)
    other = CALLED | {"reasoning_content": "No idea."}

    pair = encode_pair(template, Preference((ASKED,), CALLED, other, "w", None, (WEATHER,)), 500)

    assert (pair.prompt_ids, pair.chosen_ids) == (ASKED_IDS, CALLED_IDS)
    assert pair.rejected_ids == [*plain("llama3", CALLED_TEXT.replace("I can't know.", "No idea.")), 2005]
    assert encode_answer(template, replace(TALK, turns=(ASKED, CALLED)), 500) == [*ASKED_IDS, *CALLED_IDS]
    ((_, ids),), refused = encode_questions(template, [Prompt((ASKED,), "w", {}, (WEATHER,))], 500)
    assert (ids, refused) == (ASKED_IDS, [])
    waiting = Prompt((ASKED, CALLED, OBSERVED), "w", {}, (WEATHER,))
    ((_, ids),), _ = encode_questions(template, [waiting], 500)
    assert ids == [*ASKED_IDS, *CALLED_IDS, *turn_ids("tool", '{"sun": true}'), *BEGUN]


CALLED_TEXT = """[I can't know.]A look.@weather{"city": "Rome", "days": 2}"""


def test_old_exchanges_go_with_their_calls_and_results():
    template, later = templated(READS_ALL), {"role": "user", "content": "And in Oslo?"}
    row = replace(TALK, turns=(ASKED, CALLED, OBSERVED, SUNNY, later, SUNNY), first_trained=5)
    shortened = [*TOOLS_IDS, *turn_ids("user", "And in Oslo?"), *BEGUN]

    (whole,), (short,) = (encode_dialogue(template, row, size) for size in (500, len(shortened) + len(SUNNY_IDS)))

    assert (whole.dropped_turns, short.dropped_turns, short.ids) == (0, 4, [*shortened, *SUNNY_IDS])
    with pytest.raises(BadRow, match="fills max_length"):  # never a result without its call
        encode_dialogue(template, replace(row, turns=row.turns[:4], first_trained=3), len(ASKED_IDS) + 5)


def test_arguments_become_json_for_a_template_that_writes_them_as_they_are():
    for written in ("call.function.arguments", "(call.function.arguments | string)"):
        template = changed("call.function.arguments | tojson", written)
        (sequence,) = encode_dialogue(template, replace(TALK, turns=(ASKED, CALLED)), 500)
        assert sequence.ids == [*ASKED_IDS, *CALLED_IDS]


def test_an_end_of_turn_after_a_special_token_that_closes_calls_is_learned():
    template = changed("arguments | tojson }}", "arguments | tojson + '<|finetune_right_pad_id|>' }}")

    (sequence,) = encode_dialogue(template, replace(TALK, turns=(ASKED, CALLED)), 500)

    assert sequence.ids == [*ASKED_IDS, *CALLED_IDS[:-1], 2002, 2005]


# --- templates that don't --------------------------------------------------------------------------------------------

THOUGHTS = "{% if m.reasoning_content %}{{ '[' + m.reasoning_content + ']' }}{% endif %}"
LACKING = {
    "thoughts": (THOUGHTS, "", "part of the answer's reasoning_content: .I can't know"),
    "the end of thoughts": (
        "m.reasoning_content + ",
        "m.reasoning_content[:5] + ",
        "part of the answer's reasoning_content",
    ),
    "calls": ("m.tool_calls or []", "[]", "part of the answer's tool_calls: 'weather'"),
    "arguments": (" + call.function.arguments | tojson", "", "part of the answer's tool_calls: '(city|days|Rome|2)'"),
    "one argument": ("arguments | tojson", "arguments.city", "part of the answer's tool_calls: 'days'"),
    "content beside calls": (
        "{{ m.content }}",
        "{{ '' if m.tool_calls else m.content }}",
        "part of the answer's content: .A l",
    ),
    "tools": ("if tools", "if false", "the row's tools"),
    "results": ("for m in messages", "for m in messages if m.role != 'tool'", "turn 3, the tool's"),
}


@pytest.mark.parametrize("lacking", LACKING)
def test_a_template_that_leaves_something_out_refuses_the_row_by_name(lacking):
    *change, reason = LACKING[lacking]
    template = changed(*change)

    with pytest.raises(BadRow, match=rf"the chat template \(the model's own\) leaves out {reason}"):
        encode_dialogue(template, TALK, 500)
    assert encode_dialogue(template, Dialogue(messages([("user", "Hi"), ("assistant", "Hello")]), 0, "w"), 500)


@pytest.mark.parametrize(
    ("answer", "change", "reason"),
    [
        ({"content": "4", "reasoning_content": "4"}, (THOUGHTS, ""), "the answer's reasoning_content$"),
        ({"content": "weather city Rome days 2", "tool_calls": [CALL]}, ("m.tool_calls or []", "[]"), "tool_calls$"),
        (
            {"content": "Rome", "tool_calls": [CALL]},
            ("m.content }}", "'' if m.tool_calls else m.content }}"),
            "content$",
        ),
    ],
    ids=["thought", "call", "content"],
)
def test_what_stands_there_by_chance_does_not_count(answer, change, reason):
    row = Dialogue((ASKED, {"role": "assistant"} | answer), 0, "w")
    assert encode_dialogue(templated(READS_ALL), row, 500)
    with pytest.raises(BadRow, match=reason):
        encode_dialogue(changed(*change), row, 500)


def test_calls_of_context_must_be_seen_and_its_thoughts_may_be_left_out():
    row = Preference((ASKED, CALLED, OBSERVED), SUNNY, SUNNY | {"content": "Rain."}, "w")

    assert encode_pair(changed("if m.reasoning_content", "if m.reasoning_content and loop.last"), row, 500)
    with pytest.raises(BadRow, match="leaves out part of a tool call: 'weather'"):
        encode_pair(changed("m.tool_calls or []", "[]"), row, 500)


# --- answers that a template changes ---------------------------------------------------------------------------------

STRIPS = "m.content.split('</think>')[-1] if m.role == 'assistant' else m.content }}"
THOUGHT = "<think>\nWith care.\n</think>\n\n4"


@pytest.mark.parametrize(
    ("content", "answer", "reason"),
    [
        (STRIPS, THOUGHT, "'<think>'"),
        ("m.content[:10] }}", "It is four, I think.", "'It is four, I think.'"),
        ("m.content.split('\n')[0] }}", "Yes.\nIt is four.", "'It is four.'"),
        ("m.content.split() | join(' ') }}", "Yes.\n    So", "'Yes..n    So'"),
        ("m.content | replace('  ', ' ') }}", "Yes.\n  So", "'Yes..n  So'"),
        ("m.content | tojson }}", "Yes.\nSo", "'Yes..nSo'"),
        ("m.content | lower }}", "IT IS four.", "'IT IS four.'"),
    ],
    ids=["strips thoughts", "cuts", "keeps a line", "joins lines", "narrows spaces", "writes JSON", "lowers"],
)
def test_an_answer_of_which_the_template_loses_a_part_is_refused(content, answer, reason):
    content = content.replace(" }}", " if m.role == 'assistant' else m.content }}") if "if" not in content else content
    template, other = changed("m.content }}", content), {"role": "assistant", "content": "four"}
    answer = {"role": "assistant", "content": answer}

    for encode, row in (
        (encode_dialogue, Dialogue((ASKED, answer), 0, "w")),
        (encode_answer, Dialogue((ASKED, answer), 0, "w")),
        (encode_pair, Preference((ASKED,), answer, other, "w")),
        (encode_pair, Preference((ASKED,), other, answer, "w")),
    ):
        with pytest.raises(BadRow, match=rf"the chat template \(the model's own\) .*answer's content: {reason}"):
            encode(template, row, 500)
    assert encode_dialogue(template, Dialogue((ASKED, other), 0, "w"), 500)


def test_white_space_that_a_template_trims_is_no_loss():
    answer = {"role": "assistant", "content": "  It is\n\nfour. \n"}
    for asked in (ASKED, {"role": "user", "content": " \nWeather\n  in Rome? "}):
        assert encode_dialogue(changed("m.content }}", "m.content | trim }}"), Dialogue((asked, answer), 0, "w"), 500)


def test_white_space_around_the_tags_of_a_thought_may_be_rearranged():
    """Qwen3's template puts two newlines after it."""
    rearranged = "m.content.replace('</think>', '\n</think>\n\n') if m.role == 'assistant' else m.content }}"
    answer = {"role": "assistant", "content": "<think>\nWith care.</think> \n4"}
    assert encode_dialogue(changed("m.content }}", rearranged), Dialogue((ASKED, answer), 0, "w"), 500)


def test_answers_that_are_rendered_alike_are_no_pair():
    one, two = ({"role": "assistant", "content": text} for text in ("It is four.", " It is four.\n"))

    assert encode_pair(templated(READS_ALL), Preference((ASKED,), one, two, "w"), 500)
    with pytest.raises(BadRow, match=r"the chat template \(the model's own\) renders .* as the same answer"):
        encode_pair(changed("m.content }}", "m.content | trim }}"), Preference((ASKED,), one, two, "w"), 500)
