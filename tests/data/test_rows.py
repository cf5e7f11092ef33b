"""What a chat template leaves out of a row refuses the row, or is noted for the header."""

from dataclasses import replace

import pytest

from qalign.data import rows as checks
from qalign.data.formats import Dialogue, Preference, Prompt
from qalign.data.readers import BadRow
from qalign.data.templates import ChatTemplate
from qalign.data.tokenize import (
    encode_dialogue,
    encode_pair,
    encode_pairs,
    encode_question,
    encode_questions,
    end_of_turn_ids,
)
from tests.data.chat_families import FAMILIES, templated
from tests.data.shapes import assistant, system, user

TEMPLATE = (
    "{{ bos_token }}{% for tool in tools or [] %}{{ TOOL }}{% endfor %}"
    "{% for m in messages %}{{ '<|start_header_id|>' + m.role + (m.name or '') + (m.tool_call_id or '') }}"
    "{{ '<|end_header_id|>' + (WRITTEN if m.role == ROLE else m.content) }}"
    "{% for call in m.tool_calls or [] %}{{ call.function | tojson + (call.id or '') }}{% endfor %}{{ '<|eot_id|>' }}"
    "{% endfor %}{{ '<|start_header_id|>assistant<|end_header_id|>' if add_generation_prompt }}"
)
CITY = {"type": "string", "description": "Where it is.", "enum": ["Rome", "Oslo"]}
PARAMETERS = {"type": "object", "properties": {"city": CITY}}
TOOL = {
    "type": "function",
    "function": {"name": "sky", "description": "Tells the weather.", "parameters": PARAMETERS},
}
CODE = "def one():\n    return 1\n\nSo it goes on, and on."
CALL = {"type": "function", "id": "call12345", "function": {"name": "sky", "arguments": {"city": "Rome"}}}
TALK = (
    system(f"Rules: {CODE}"), user(f"Mine: {CODE}"), assistant(f"Look: {CODE}") | {"tool_calls": [CALL]},
    {"role": "tool", "content": f"Found: {CODE}", "name": "sky_station", "tool_call_id": "call12345"},
)  # fmt: skip


def written(role="", how="m.content", tool="tool | tojson", old="", new="") -> ChatTemplate:
    """A template that writes one role's content in this way, and tools in that, `old` replaced by `new`."""
    text = TEMPLATE.replace("ROLE", repr(role)).replace("WRITTEN", how).replace("TOOL", tool)
    assert old in text
    return templated(text.replace(old, new) if old else text)


def refusals(template: ChatTemplate, turns=TALK, tools=()) -> list[str]:
    """Why a pair, a dialogue and a prompt with these turns are refused."""
    found, answers = [], (assistant("It is fine."), assistant("No idea."))
    for encode in (
        lambda: encode_pair(template, Preference(turns, *answers, "w", None, tools), 5000),
        lambda: encode_dialogue(template, Dialogue((*turns, answers[0]), len(turns), "w", tools), 5000),
        lambda: encode_question(template.with_tools(tools), turns, 5000),
    ):
        try:
            encode()
        except BadRow as reason:
            found.append(str(reason))
    return found


LOSSES = {
    "cuts": "m.content[:20]",
    "cuts the start": "m.content[5:]",
    "joins lines": "m.content.split() | join(' ')",
    "narrows spaces": "m.content | replace('    ', ' ')",
    "takes indents": "m.content | replace('\n    ', '\n')",
    "lowers": "m.content | lower",
    "keeps a line": "m.content.split('\n')[0]",
    "escapes": "m.content | replace('(', '&#40;')",
    "drops": "''",
}


@pytest.mark.parametrize("how", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize(("number", "role"), [*enumerate(("system", "user", "assistant", "tool"), start=1)])
def test_a_turn_of_which_the_template_changes_a_part_refuses_the_row(number, role, how):
    found = refusals(written(role, f"({how} if 'one()' in m.content else m.content)"))
    assert len(found) == 3
    assert all(f"turn {number}, the {role}'s" in reason for reason in found)


def test_what_is_left_out_is_shown():
    assert refusals(written()) == []
    found = refusals(written("user", "m.content[:35]"), (user(f"Mine: {CODE}"),))
    assert "part of turn 1, the user's: 'So it goes on, and on.'" in found[0]


@pytest.mark.parametrize("how", ["m.content | trim", "'  \n' + m.content + '\n '", "m.content"])
@pytest.mark.parametrize("role", ["system", "user", "assistant", "tool"])
def test_white_space_at_the_ends_does_not_count(role, how):
    turns = tuple(turn | {"content": f" \n{turn['content']}\n "} for turn in TALK)
    assert refusals(written(role, how), turns) == []


def test_a_tools_result_may_be_written_as_json():
    """Llama 3.1's template does so."""
    assert refusals(written("tool", "m.content | tojson")) == []
    assert refusals(written("user", "m.content | tojson"))


def test_of_earlier_answers_only_the_thoughts_may_be_left_out():
    turns = (user("Why?"), assistant("<think>\nSo\n</think>\n\nYes\n  it is."), user("Sure?"))
    cut = "m.content.split('</think>')[-1]"
    assert refusals(written("assistant", cut), turns) == []
    assert len(refusals(written("assistant", f"{cut} | replace('  ', '')"), turns)) == 3
    assert len(refusals(written("user", cut), (user("Why?</think> A"),))) == 3


def test_turns_in_another_order_are_seen():
    """Mistral's template puts the system turn before the last question."""
    text = (
        "{% for m in messages %}{{ messages[0].content if loop.index == 4 }}"
        "{{ m.content + '<|eot_id|>' if m.role != 'system' }}{% endfor %}"
    )
    turns = (system("Brief."), user("Hi"), assistant("Ho"), user("Well?"))
    assert encode_question(templated(text), turns, 500)
    with pytest.raises(BadRow, match="leaves out turn 1, the system's"):
        encode_question(templated(text.replace("4", "5")), turns, 500)


# --- tools -----------------------------------------------------------------------------------------------------------

HALF = "tool.function.name + tool.function.description"


@pytest.mark.parametrize(
    ("shown", "missing"),
    [
        ("tool.function.name", "'Tells the weather.'"),
        (HALF, "'city'"),
        (f"{HALF} + tool.function.parameters.properties | list | string", "'Where it is.'"),
        ("tool | tojson | replace('Oslo', '')", "'Oslo'"),
        ("tool.function.parameters | tojson", "'sky'"),
        ("'a tool'", "'sky'"),
    ],
)
def test_tools_of_which_a_part_is_left_out_refuse_the_row(shown, missing):
    found = refusals(written(tool=shown), (user("Hi"),), (TOOL,))
    assert [reason.partition("leaves out ")[2] for reason in found] == [f"the row's tools: {missing}"] * 3


@pytest.mark.parametrize("shown", ["tool | tojson", "tool | string", "tool.function | tojson(indent=2)"])
def test_tools_may_be_written_as_json_or_as_python_does(shown):
    assert refusals(written(tool=shown), (user("Hi"),), (TOOL,)) == []


@pytest.mark.parametrize(
    "parameters",
    [None, {}, {"properties": []}, {"properties": None, "enum": 5}, {"properties": {"properties": {"enum": [1, None]}}},
     {"properties": {"description": {"description": ""}, "name": True}}, {"anyOf": [{"type": "string"}]}, [], "none"],
)  # fmt: skip
def test_schemas_may_have_any_form(parameters):
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    assert refusals(written(tool="tool | tojson"), (user("Hi"),), (tool,)) == []


# --- facts about turns -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "noted"),
    [
        ("+ (m.name or '')", {"name"}),
        ("+ (m.tool_call_id or '')", {"tool_call_id"}),  # the same id still stands beside the call
        ("+ (call.id or '')", {"id of a tool call"}),  # and beside the result
        ("", set()),
    ],
)
def test_facts_that_the_template_does_not_show_are_noted(old, noted):
    template = written(old=old)
    assert refusals(template) == []
    assert template.left_out == noted


def test_they_are_noted_of_prompts_and_of_answers():
    template = written(old="+ (m.name or '') + (m.tool_call_id or '')")
    other = replace(template, left_out=set())
    encode_questions(template, [Prompt((user("Hi") | {"name": "H"},), "w", {}), Prompt(TALK, "w", {})], 5000)
    assert template.left_out == {"name", "tool_call_id"}
    encode_dialogue(other, Dialogue((user("Hi"), assistant("Ho") | {"name": "Ann"}), 1, "w"), 5000)
    assert other.left_out == {"name"}


# --- ends of turns, and cost -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("end", "ids"),
    [
        ("'<|eot_id|>'", [2005]),
        ("'<|end_header_id|>' if m.tool_calls else '<|eot_id|>'", [2005, 2004]),
        ("'<|finetune_right_pad_id|><|end_header_id|>' if m.tool_calls else '<|eot_id|>'", [2005, 2004]),
        ("'<|finetune_right_pad_id|><|eot_id|>' if m.tool_calls else '<|eot_id|>'", [2005]),
        ("('<|end_header_id|>' if m.tool_calls else '<|eot_id|>') + '<|end_of_text|>'", [2005, 2004]),
        ("raise_exception('no calls') if m.tool_calls else '<|eot_id|>'", [2005]),
        ("'<|end_header_id|>' if m.tool_calls and not m.content else '<|eot_id|>'", [2005, 2004]),
    ],
)
def test_a_turn_that_calls_a_tool_may_end_with_another_token(end, ids):
    assert list(end_of_turn_ids(written(old="'<|eot_id|>'", new=end))) == ids


@pytest.mark.parametrize("name", FAMILIES)
def test_a_row_is_rendered_no_more_often_to_be_checked(name, monkeypatch):
    """Prompt, chosen and rejected; and once for each order of roles."""
    template, renderings = FAMILIES[name].prepared(), []
    own = ChatTemplate.render
    monkeypatch.setattr(ChatTemplate, "render", lambda *args, **kwargs: renderings.append(1) or own(*args, **kwargs))
    checks._lost_roles.cache_clear()
    rows = [Preference((user(f"{n}?"),), assistant("Yes"), assistant("No"), "w") for n in range(50)]
    assert len(encode_pairs(template, rows, 500)[0]) == 50
    assert len(renderings) <= 3 * 50 + 2  # Phi-3's kind renders one more to learn how turns end
