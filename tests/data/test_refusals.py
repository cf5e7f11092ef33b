"""Rows that can't be used are refused, and the reason names the key, the turn or what was expected."""

import json

import pytest

from qalign.data.formats import canonical, canonical_dialogue, canonical_prompt, scorable
from qalign.data.readers import BadRow, NoPair
from tests.data.shapes import (
    ASKED,
    BRIEFED,
    LISTED,
    NO,
    SAME,
    SHAREGPT,
    TALKED,
    TEXTS,
    TRANSCRIPT,
    YES,
    assistant,
    gpt,
    human,
    system,
    transcripts,
    user,
)

EVERY = (canonical, canonical_dialogue, canonical_prompt)
ANSWERED, TOOL = [*ASKED, YES], {"role": "tool", "content": "5"}
HI, HELLO, BRIEF = user("Hi"), assistant("Hello"), system("Be brief.")
EMPTY = "the prompt is empty, and chosen and rejected do not share one"
NEEDED = (
    "messages, conversations, prompt (or question) + completion (or response, answer), instruction + output, chosen"
)
QUESTIONS = "turns: expected a list of the user's texts"


def test_of_a_row_that_is_no_object_the_type_is_named():
    for convert in (*EVERY, scorable):
        for raw, found in ((["Why?", "Yes", "No"], "list"), (None, "NoneType"), ("Why?", "str"), (5, "int")):
            with pytest.raises(BadRow, match=f"^expected an object with keys, found {found}$"):
                convert(raw, "")


# Each row with (part of) the reason; "…" stands for any text between.
# fmt: off
ALIKE = [  # refused alike in every form
    ({"prompt": [{"role": "x" * 9999, "content": "Why?"}], **TEXTS}, "prompt: unknown role 'xxxxxxxxxxxx...x"),
    ({"prompt": [{"role": ["user"], "content": "Why?"}], **TEXTS}, "prompt: unknown role ['user']; known: system"),
    ({"prompt": [HI, {"role": "narrator", "content": "So"}], **TEXTS}, "prompt: unknown role 'narrator'; known"),
    ({"prompt": [HI, TOOL, user("Why?")], **TEXTS}, "turn 2 of the prompt is a tool's, but the turn before calls none"),
    ({"prompt": [{"role": "user"}], **TEXTS}, "prompt: the user's turn has no content"),
    ({"prompt": [user(5)], **TEXTS}, "prompt: a turn's content is int, expected text"),
    ({"system": ["Be brief."], **SAME}, "system: expected a text, found list"),
    ({"system_prompt": 5, **SAME}, "system_prompt: expected a text, found int"),
    ({"system": "Be brief.", "system_prompt": "Be long.", **SAME}, "system, system_prompt mean the same, but differ"),
    ({"system": "Be long.", "prompt": BRIEFED, **TEXTS}, "two system prompts that differ: a column, and the"),
    ({"system": "Be long.", "chosen": [*BRIEFED, YES], "rejected": [*BRIEFED, NO]}, "two system prompts that differ"),
    ({"images": ["a.png"], **SAME}, "images: images are not supported"),
    ({"question": 17, **TEXTS}, "question: expected a text or turns, found int"),
    ({"prompt": "<|im_start|>user\nWhy?<|im_end|>\n", **TEXTS}, "was put through a chat template (<|im_start|> …)"),
    ({"prompt": "<s>[INST] Why? [/INST]", **TEXTS}, "was put through a chat template (<s>[INST] …)"),
    ({"prompt": 5, **TEXTS}, "prompt: expected a text or turns, found int"),
    ({"prompt": ["Why?", "And?"], **TEXTS}, "prompt: expected a text or turns, found list"),
    (SAME | {"chosen": 5}, "chosen: expected a text or turns, found int"),
    (TEXTS, "no prompt: expected prompt, messages, conversations"),
    ({"query_id": "Why?", "prompt_id": "Why?", **TEXTS}, "no prompt: expected prompt, messages, conversations"),
    ({"conversations": [], **SHAREGPT}, EMPTY),
    ({"prompt": [BRIEF], **TEXTS}, EMPTY),
    ({"instruction": 5, **TEXTS}, "instruction and input: expected texts"),
    ({"instruction": "Why?", "input": 5, **TEXTS}, "instruction and input: expected texts"),
    ({"instruction": "Why?", "history": [["Hi"]], **TEXTS}, "history: expected a list of [question, answer]"),
    ({"instruction": "Why?", "history": ["Hi"], **TEXTS}, "history: expected a list of [question, answer]"),
    (transcripts("Rules.\n\nHuman: Why?"), "text before its first 'Human:'"),
    ({"prompt": " ", **TEXTS}, "turn 1 of the prompt is empty"),
    ({"prompt": [HI, assistant(""), user("Why?")], **TEXTS}, "turn 2 of the prompt is empty"),
    ({"prompt": [HELLO, HELLO, *ASKED], **TEXTS}, "turn 2 of the prompt is the assistant's, expected the user's"),
    ({"prompt": [HI, *ASKED], **TEXTS}, "turn 2 of the prompt is the user's, expected the assistant's"),
    ({"prompt": [BRIEF, HI, *ASKED], **TEXTS}, "turn 2 of the prompt is the user's, expected the assistant's"),
    ({"prompt": [HI, BRIEF, *ASKED], **TEXTS}, "turn 2 of the prompt is the user's, expected the assistant's"),
    ({"prompt": "Why\ud800?", **TEXTS}, "not valid Unicode…'\\ud800'"),
]
PREFERENCES = [
    ({}, "no 'chosen' answer…this one has no keys"),
    ({"pro\nmpt": "Why?", "\ud800": 1, "réponse": "Yes"}, "no 'chosen' answer…has 'pro\\nmpt', '\\ud800', réponse"),
    ({"prompt": "Why?", "rejected": "No"}, "no 'chosen' answer…this one has prompt, rejected"),
    ({"prompt": "Why?", "chosen": "Yes"}, "no 'rejected' answer…this one has prompt, chosen"),
    (SAME | {"rejected": None}, "no 'rejected' answer…this one has prompt, chosen"),
    ({"instruction": "Why?", "input": "", "output": "Yes"}, "no 'chosen' answer…has instruction, input, output"),
    ({"instruction": "Why?", "output": ["Yes", "No", "Maybe"]}, "output: expected two answers, the better"),
    ({"prompt": "Why?", "response_a": "Yes", "response_b": "No"}, "no 'winner' says which answer is better…response_b"),
    ({"prompt": '["Why?"]', "response_a": '["Yes"]', "response_b": '["No"]', "winner": "a"}, "lists of texts, stored"),
    ({"prompt": "Why?", "answer_1": "Yes", "answer_2": "No", "winner": "Yes"}, "winner: expected 1, 2 or tie"),
    (SAME | {"chosen": YES | {"weight": 0}}, "an answer has weight 0"),
    (SAME | {"chosen": "Yes<|im_end|>\n"}, "was put through a chat template (<|im_end|>"),
    ({"messages": ANSWERED, "label": True}, "no 'chosen' answer…this one has messages, label"),
    ({"input": {"messages": ASKED}, "preferred_output": [YES]}, "no 'rejected' answer"),
    ({"input": {"messages": ASKED}, "non_preferred_output": [NO]}, "no 'chosen' answer"),
    ({"conversations": [{"from": "observation", "value": "5"}], **SHAREGPT}, "turn 1 of the prompt is a tool's, but"),
    (SAME | {"chosen": " \n"}, "chosen: the answer is empty"),
    (SAME | {"rejected": ""}, "rejected: the answer is empty"),
    (SAME | {"rejected": "Yes"}, "chosen and rejected are the same answer"),
    (SAME | {"rejected": " Yes\n"}, "chosen and rejected are the same answer"),
    ({"chosen": [*TALKED, YES], "rejected": [*TALKED, YES]}, "chosen and rejected are the same answer"),
    (SAME | {"rejected": ["No"]}, "rejected: expected a text or turns, found list"),
    ({"prompt": ASKED, "chosen": [], "rejected": []}, "chosen: expected one assistant turn…nothing"),
    ({"conversations": [human("Why?")], "chosen": gpt("Yes"), "rejected": human("No")}, "rejected: expected one…user"),
    ({"prompt": ASKED, "chosen": [YES, *ASKED, YES], "rejected": "No"}, "chosen: …assistant → user → assistant"),
    ({"chosen": [*ANSWERED, user("Oh"), YES], "rejected": ANSWERED}, "chosen: expected…assistant → user → assistant"),
    ({"prompt": "Why?", "chosen": [HI, YES], "rejected": [HI, NO]}, "chosen: expected one…user → assistant"),
    ({"chosen": "\n\nHuman: Why?\n\nAssistant: Well\n\nAssistant: Yes", "rejected": "\n\nHuman: Why?\n\nAssistant: No"},
     "chosen: expected one assistant turn…assistant → assistant"),
    ({"chosen": "\n\nHuman: Why?\n\nAssistant: Yes", "rejected": "\n\nHuman: How?\n\nAssistant: No"}, EMPTY),
    ({"prompt": [HI, HELLO], **TEXTS}, "the prompt ends with the assistant's turn, expected the user's"),
    (SAME | {"chosen": "\ud800"}, "not valid Unicode…'\\ud800'"),
]
DIALOGUES = [
    ({}, f"this row has no keys; expected {NEEDED}"),
    ({"question_id": "Why?", "answer": "Yes"}, f"this row has question_id, answer; expected {NEEDED}"),
    ({"a\nb": 1, "\ud800": 2, "größe": 3}, f"this row has 'a\\nb', '\\ud800', größe; expected {NEEDED}"),
    ({"prompt": "Why?"}, f"this row has prompt; expected {NEEDED}"),
    ({"completion": "Yes"}, f"this row has completion; expected {NEEDED}"),
    ({"instruction": "Why?"}, f"this row has instruction; expected {NEEDED}"),
    ({"messages": None, "text": None}, f"this row has no keys; expected {NEEDED}"),
    ({"rejected": "No", "messages": ANSWERED}, "no 'chosen' answer…this row has rejected, messages"),
    (SAME | {"chosen": " "}, "turn 2 of the dialogue is empty"),
    (SAME | {"chosen": user("Yes")}, "turn 2 of the dialogue is the user's, expected the assistant's"),
    ({"prompt": [HI, HELLO], "chosen": ANSWERED}, "the prompt ends with the assistant's turn, expected the user's"),
    ({"messages": []}, "the dialogue is empty"),
    ({"conversations": [BRIEF]}, "the dialogue is empty"),
    ({"messages": ASKED}, "the dialogue ends with the user's turn, expected the assistant's"),
    ({"conversations": LISTED}, "the dialogue ends with the user's turn, expected the assistant's"),
    ({"messages": [*ANSWERED, BRIEF]}, "the dialogue ends with the system's turn, expected the assistant's"),
    ({"messages": [HELLO, HELLO, *ANSWERED]}, "turn 2 of the dialogue is the assistant's, expected the user's"),
    ({"messages": [HELLO]}, "the dialogue has no user's turn"),
    ({"messages": [HI, *ANSWERED]}, "turn 2 of the dialogue is the user's, expected the assistant's"),
    ({"messages": [*ANSWERED, YES]}, "turn 3 of the dialogue is the assistant's, expected the user's"),
    ({"system": "Be kind.", "messages": [*BRIEFED, YES]}, "two system prompts that differ: a column, and the"),
    ({"messages": [*ASKED, YES | {"weight": 0}]}, "all of the assistant's turns have weight 0"),
    ({"messages": [HI, assistant(""), *ANSWERED]}, "turn 2 of the dialogue is empty"),
    ({"messages": [user(" "), YES]}, "turn 1 of the dialogue is empty"),
    ({"messages": [*ASKED, TOOL, YES]}, "turn 2 of the dialogue is a tool's, but the turn before calls none"),
    ({"conversations": [human("Why?"), {"from": "function_call", "value": "{}"}]}, "conversations: a tool call"),
    ({"messages": [*ASKED, {"role": "assistant", "content": None, "tool_calls": [{}]}]}, "messages: a tool call"),
    ({"messages": json.dumps(["Why?"])}, "the dialogue ends with the user's turn, expected the assistant's"),
    ({"system": json.dumps(ANSWERED), "messages": ANSWERED}, "system: expected a text, found turns of the user"),
    ({"messages": "Why?"}, "messages: expected a list of turns, found str"),
    ({"conversations": gpt("Yes")}, "conversations: expected a list of turns, found dict"),
    ({"messages": ["Why?", 5]}, "messages: expected a text or turns, found list"),
    ({"messages": ["Why?"]}, "the dialogue ends with the user's turn"),
    ({"conversation": [{"input": "Why?", "output": 5}]}, "conversation: a turn has no role; it has input, output"),
    ({"system": ["Be brief."], "messages": ANSWERED}, "system: expected a text, found list"),
    ({"instruction": "Why?", "input": "", "output": ""}, "turn 2 of the dialogue is empty"),
    ({"instruction": "", "input": " ", "output": "Yes"}, "turn 1 of the dialogue is empty"),
    ({"instruction": "Why?", "output": 5}, "output: expected a text or turns, found int"),
    ({"instruction": "Why?", "output": ["Yes", "No", "Maybe"]}, "output: expected a text or turns, found list of str"),
    ({"instruction": "Why?", "output": "Yes", "history": [["Hi"]]}, "history: expected a list of [question, answer]"),
    ({"instruction": "Why?", "output": "Yes", "history": [["Hi", ""]]}, "turn 2 of the dialogue is empty"),
    ({"prompt": "", "completion": "Yes"}, "turn 1 of the prompt is empty"),
    ({"prompt": [], "completion": "Yes"}, "the dialogue has no user's turn"),
    ({"text": "Once.", "label": False}, "label is false"),
    ({"text": TRANSCRIPT + "\n\nAssistant: Yes", "label": "false"}, "label is false"),
    ({"prompt": "Why?", "chosen": "Yes", "label": False}, "label is false"),
    ({"question": "Why?", "answer": "Yes", "kto_tag": False}, "kto_tag is false"),
    ({"text": "<|im_start|>user\nWhy?<|im_end|>"}, "was put through a chat template (<|im_start|> …)"),
    ({"text": "<s>[INST] Why? [/INST] Yes </s>"}, "was put through a chat template (<s>[INST] …)"),
    ({"prompt": [BRIEF], "completion": "Yes"}, "the prompt is empty"),
    ({"prompt": ANSWERED, "completion": [HI, YES]}, "the prompt ends with the assistant's turn, expected the user's"),
    ({"prompt": "Why?", "completion": ""}, "turn 2 of the dialogue is empty"),
    ({"prompt": ASKED, "completion": []}, "the dialogue ends with the user's turn, expected the assistant's"),
    ({"prompt": "Why?", "completion": ANSWERED}, "turn 2 of the dialogue is the user's, expected the assistant's"),
    ({"prompt": "Why?", "completion": [YES, HI]}, "the dialogue ends with the user's turn, expected the assistant's"),
    ({"prompt": "Why?", "completion": True}, "completion: expected a text or turns, found bool"),
    ({"messages": ANSWERED, "label": False}, "label is false"),
    ({"conversations": [human("Why?"), gpt("Yes")], "label": False}, "label is false"),
    ({"instruction": "Why?", "output": "Yes", "label": False}, "label is false"),
    ({"prompt": "Why?", "completion": "Yes", "label": "False"}, "label is false"),  # out of a CSV
    ({"prompt": "Why?", "completion": "Yes", "label": "FALSE"}, "label is false"),
    ({"prompt": "Why?", "completion": "Yes", "label": 0}, "label is false"),
    ({"prompt": "Why?", "completion": "Yes", "label": "0"}, "label is false"),
    ({"text": "hi", "role": "prompter"}, "a single turn, with its own 'role'"),
    ({"text": " \n"}, "the text is empty"),
    ({"text": ["Once"]}, "text: expected a text, found list"),
    ({"text": TRANSCRIPT + "\n\nAssistant:"}, "turn 4 of the dialogue is empty"),
    ({"text": TRANSCRIPT}, "the dialogue ends with the user's turn, expected the assistant's"),
    ({"messages": [*ASKED, assistant("\ud83d")]}, "not valid Unicode…'\\ud83d'"),
    ({"text": "Once\ud83d"}, "not valid Unicode…'\\ud83d'"),
]
PROMPTS = [
    ({}, "no user's turn to answer…has no keys; expected prompt, messages, conversations"),
    ({"prompt": None, "q": "Why?"}, "no user's turn to answer…has q; expected prompt"),
    ({"text": "Once upon a time."}, "no user's turn to answer…has text; expected prompt"),
    ({"text": "Hm.\n\nHuman: Why?"}, "no user's turn to answer…has text; expected prompt"),
    ({"text": 5}, "no user's turn to answer…has text; expected prompt"),
    ({"system": "Be brief."}, "no user's turn to answer…has system; expected prompt"),
    ({"messages": []}, "no user's turn to answer…has messages; expected prompt"),
    ({"messages": [HELLO]}, "no user's turn to answer…has messages; expected prompt"),
    ({"messages": [BRIEF]}, "no user's turn to answer…has messages; expected prompt"),
    ({"prompt": ""}, "turn 1 of the prompt is empty"),
    ({"instruction": "", "input": " ", "output": "Yes"}, "turn 1 of the prompt is empty"),
    ({"text": "\n\nHuman: \n\nAssistant: Hello"}, "turn 1 of the prompt is empty"),
    ({"turns": [""]}, "turn 1 of the prompt is empty"),
    ({"text": TRANSCRIPT + "\n\nAssistant: Yes\n\nAssistant:"}, "the prompt ends with the assistant's turn"),
    ({"messages": [*ASKED, BRIEF, *ASKED]}, "turn 2 of the prompt is the user's, expected the assistant's"),
    ({"messages": BRIEFED, "system": "Be long."}, "two system prompts that differ: a column, and the"),
    ({"messages": [*ANSWERED, NO]}, "the prompt ends with the assistant's turn, expected the user's"),
    ({"messages": [*ASKED, TOOL]}, "turn 2 of the prompt is a tool's, but the turn before calls none"),
    ({"conversations": "Why?", "system": ["Be brief."]}, "system: expected a text, found list"),
    ({"instruction": ["Why?"]}, "instruction and input: expected texts"),
    ({"turns": "Why?"}, QUESTIONS), ({"turns": []}, QUESTIONS), ({"turns": ASKED}, QUESTIONS),
    ({"chosen": [YES]}, EMPTY),
    ({"messages": "user: Why?"}, "messages: expected a list of turns, found str"),
    ({"messages": [{"user": "Why?"}]}, "messages: a turn has no role; it has user"),
]
SCORABLE = [
    ({"text": "Once."}, "plain text: expected a dialogue"),
    (SAME | {"rejected": "Yes"}, "chosen and rejected are the same answer"),
    (SAME | {"rejected": ""}, "rejected: the answer is empty"),
    ({"messages": ASKED}, "the dialogue ends with the user's turn, expected the assistant's"),
    ({"question": "Why?"}, "this row has question; expected messages"),
]
# fmt: on
CASES = [(convert, *case) for convert in EVERY for case in ALIKE]
for one, cases in (
    (canonical, PREFERENCES),
    (canonical_dialogue, DIALOGUES),
    (canonical_prompt, PROMPTS),
    (scorable, SCORABLE),
):
    CASES += [(one, *case) for case in cases]


@pytest.mark.parametrize(
    ("convert", "raw", "reason"), CASES, ids=[f"{n} {c[0].__name__} {c[2][:60]!a}" for n, c in enumerate(CASES)]
)
def test_a_row_is_refused_with_the_reason(convert, raw, reason):
    with pytest.raises(BadRow) as caught:
        convert(raw, "")
    rest = str(caught.value)
    for part in reason.split("…"):
        assert part in rest
        rest = rest.partition(part)[2]


def test_a_disliked_answer_is_scored_like_any_other():
    assert scorable({"prompt": "Why?", "completion": "No", "label": False}, "").turns == (*ASKED, NO)


def test_a_row_that_says_that_it_holds_no_preference_is_left_out_unless_it_has_answers():
    tie = {"prompt": "Why?", "no_pair": "a tie"}
    for convert in (canonical, canonical_dialogue):
        with pytest.raises(NoPair, match=r"^a tie$"):
            convert(tie, "")
    assert canonical_prompt(tie, "").turns == tuple(ASKED)
    assert canonical(SAME | {"no_pair": "a tie"}, "").chosen == YES


def test_a_number_beside_a_text_is_a_class():
    assert canonical_dialogue({"text": "Once.", "label": 0}, "").text == "Once."


def test_a_text_of_many_blanks_takes_no_time():
    """Nested repetitions took 3 s for 20,000 blanks, and hours for a million."""
    row = {"prompt": "Why?", "completion": " " * 1_000_000 + "Yes"}
    assert canonical_dialogue(row, "").turns[-1]["content"].strip() == "Yes"


TEMPLATED = {
    "ChatML": "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n",
    "Llama 3": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nWhy?",
    "Llama 4": "<|header_start|>user<|header_end|>\n\nWhy?",
    "Llama 2, a system turn": "<<SYS>>\nBe brief.\n<</SYS>>\n\nWhy?",
    "Mistral, a system turn": "<s>[SYSTEM_PROMPT]Be brief.[/SYSTEM_PROMPT][INST]Why?",
    "Gemma": "<bos><start_of_turn>user\nWhy?",
    "Gemma 4": "<bos><|turn>user\nWhy?",
    "Phi": "<|user|>\nWhy?",
    "DeepSeek": "<｜User｜>Why?<｜Assistant｜><think>\n",
    "DeepSeek, a system turn": "<｜begin▁of▁sentence｜>Be brief.<｜User｜>Why?<｜Assistant｜><think>\n",
    "Command R": "<BOS_TOKEN><|START_OF_TURN_TOKEN|><|USER_TOKEN|>Why?",
    "gpt-oss": "<|start|>user<|message|>Why?<|end|><|start|>assistant",
    "gpt-oss, an answer": "<|start|>assistant<|channel|>final<|message|>Yes",
    "Granite": "<|start_of_role|>user<|end_of_role|>Why?",
    "GLM": "[gMASK]<sop><|user|>\nWhy?",
    "GLM, a tool's turn": "<|observation|>\n5",
    "Kimi": "<|im_user|>user<|im_middle|>Why?",
    "EXAONE": "[|user|]Why?",
    "Hunyuan": "<｜hy_User｜>Why?",
    **{
        f"the end {end}": f"Yes{end}"
        for end in ("<|eot|>", "<|return|>", "<turn|>", "<|END_OF_TURN_TOKEN|>", "<|eom_id|>")
    },
    **{
        f"the end {end}": f"Yes{end}\n"
        for end in ("<｜end▁of▁sentence｜>", "<|end_of_text|>", "<|endoftext|>", "[|endofturn|]")
    },
}


@pytest.mark.parametrize("text", TEMPLATED.values(), ids=TEMPLATED)
def test_a_text_that_any_familys_template_made_is_refused(text):
    for raw in ({"text": text}, {"prompt": text, "completion": "Yes"}, {"prompt": "Why?", "completion": text}):
        with pytest.raises(BadRow, match="was put through a chat template"):
            canonical_dialogue(raw, "")


@pytest.mark.parametrize(
    "text",
    [
        "<|begin_of_thought|>\nHm.\n<|end_of_thought|>\n<|begin_of_solution|>\n4\n<|end_of_solution|>",
        '<|python_tag|>{"name": "f"}',
        "<｜tool▁calls▁begin｜>f<｜tool▁calls▁end｜>",
        "<|fim_prefix|>def f<|fim_suffix|>1<|fim_middle|>",
        "Qwen writes <|im_start|>user before a turn, and <|im_end|> after it.",
        "<s>Old</s> <b>new</b>",
        "<user>Ann</user>",
        "<|> is `or` in Haskell: a <|> b",
        "[x | x <- xs]",
        "⟨ψ|φ⟩, or <ψ|φ>",
        "[INST",
        "[USER] Ann",
    ],
)
def test_other_marks_and_marks_in_a_sentence_are_text(text):
    assert canonical_dialogue({"prompt": text, "completion": text}, "").turns == (user(text), assistant(text))


def test_long_marks_take_no_time():
    for text in ("<|" + "user" * 200_000, "<|user" * 100_000 + "Yes", "Yes" + "<|end|> " * 100_000 + "Yes"):
        canonical_dialogue({"prompt": "Why?", "completion": "Yes " + text}, "")
