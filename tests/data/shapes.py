"""One row of every known shape, what each form makes of it, and rows that are refused. Shared by the tests of rows."""

import json


def system(text):
    return {"role": "system", "content": text}


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def human(text):
    return {"from": "human", "value": text}


def gpt(text):
    return {"from": "gpt", "value": text}


YES, NO = assistant("Yes"), assistant("No")
ASKED = [user("Why?")]
TALKED = [user("Hi"), assistant("Hello"), user("Why?")]
BRIEFED = [system("Be brief."), user("Why?")]
LISTED = [human("Hi"), gpt("Hello"), human("Why?")]
BRIEF = {"from": "system", "value": "Be brief."}
TRANSCRIPT = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?"
TEMPLATED = "### Instruction: Why?\n### Response: Yes"

SAME = {"prompt": "Why?", "chosen": "Yes", "rejected": "No"}
TEXTS = {"chosen": "Yes", "rejected": "No"}
TURNS = {"chosen": [YES], "rejected": [NO]}
SHAREGPT = {"chosen": gpt("Yes"), "rejected": gpt("No")}


def opened(opening: list) -> dict:
    """Ranked answers that repeat the dialogue before them."""
    return {"chosen": [*opening, YES], "rejected": [*opening, NO]}


def transcripts(opening: str) -> dict:
    return {"chosen": f"{opening}\n\nAssistant: Yes", "rejected": f"{opening}\n\nAssistant: No"}


# fmt: off
RANKED = {  # name: (prompt, row); the answers are Yes and No
    "TRL standard": (ASKED, SAME),
    "TRL standard, more columns": (ASKED, SAME | {"id": 7, "score_chosen": 9.5, "tags": ["a"]}),
    "TRL conversational": (TALKED, {"prompt": TALKED, **TURNS}),
    "TRL conversational, a system prompt": (BRIEFED, {"prompt": BRIEFED, **TURNS}),
    "TRL conversational, turns with a null": (
        ASKED, {"prompt": [{"role": None, "from": "human", "content": "Why?"}], **TEXTS}),
    "TRL conversational, prompt implicit": (TALKED, opened(TALKED)),
    "TRL conversational, prompt implicit, a system prompt": (BRIEFED, opened(BRIEFED)),
    "TRL conversational, prompt explicit and repeated": (TALKED, {"prompt": TALKED, **opened(TALKED)}),
    "HH transcripts": (TALKED, transcripts(TRANSCRIPT)),
    "HH transcripts, one turn": (ASKED, transcripts("\n\nHuman: Why?")),
    "HH transcript as prompt, with the assistant's cue": (TALKED, {"prompt": TRANSCRIPT + "\n\nAssistant:", **TEXTS}),
    "UltraFeedback binarized": (
        ASKED, {"prompt": "Why?", "prompt_id": "0f", **opened(ASKED), "messages": [*ASKED, YES], "score_chosen": 8.0}),
    "UltraFeedback binarized, a system prompt": (BRIEFED, {"prompt": "Why?", **opened(BRIEFED)}),
    "UltraFeedback binarized, a system column": (BRIEFED, {"system": "Be brief.", **opened(ASKED)}),
    "UltraFeedback binarized, the prompt opens a longer dialogue": (TALKED, {"prompt": "Hi", **opened(TALKED)}),
    "sharegpt ranking": (TALKED, {"conversations": LISTED, **SHAREGPT}),
    "sharegpt ranking, a system turn": (BRIEFED, {"conversations": [BRIEF, human("Why?")], **SHAREGPT}),
    "sharegpt ranking, a system column": (
        BRIEFED, {"system": "Be brief.", "conversations": [human("Why?")], **SHAREGPT}),
    "sharegpt ranking, an empty system column": (ASKED, {"system": "", "conversations": [human("Why?")], **SHAREGPT}),
    "alpaca ranking": (ASKED, {"instruction": "Why?", "input": "", **TEXTS}),
    "alpaca ranking, an input": (
        [user("Translate:\nWarum?")], {"instruction": "Translate:", "input": "Warum?", **TEXTS}),
    "alpaca ranking, output pair": (ASKED, {"instruction": "Why?", "input": None, "output": ["Yes", "No"]}),
    "alpaca ranking, system and history": (
        [system("Be brief."), *TALKED],
        {"instruction": "Why?", "system": "Be brief.", "history": [["Hi", "Hello"]], **TEXTS}),
    "alpaca ranking, a longer history": (
        [user("A"), assistant("B"), user("C"), assistant("D"), user("Why?")],
        {"instruction": "Why?", "history": [["A", "B"], ["C", "D"]], "output": ["Yes", "No"]}),
    "alpaca ranking, all of it in 'prompt' and 'output' too": (
        ASKED, {"instruction": "How?", "output": "Yes", **SAME, "turns": 2, "text": "\n\nHuman: How?"}),
    "ranked answers that share a prompt, with 'turns' and 'text' too": (
        ASKED, opened(ASKED) | {"turns": ["How?"], "text": "\n\nHuman: How?"}),
    "OpenAI preference": (
        TALKED, {"input": {"messages": TALKED, "tools": []}, "preferred_output": [YES], "non_preferred_output": [NO]}),
    "OpenAI messages with chosen and rejected": (BRIEFED, {"messages": BRIEFED, "chosen": YES, "rejected": NO}),
    "OpenAI messages with plain answers": (TALKED, {"messages": TALKED, **TEXTS}),
    "OpenAI messages, the assistant first": (
        [assistant("Hello"), *ASKED], {"messages": [assistant("Hello"), *ASKED], **TEXTS}),
    "a question": (BRIEFED, {"system_message": "Be brief.", "question": "Why?", **TEXTS}),
    "a query with an input": ([user("Translate:\nWarum?")], {"query": "Translate:", "input": "Warum?", **TEXTS}),
    "an input alone": (ASKED, {"input": "Why?", **TEXTS}),
    "a question beside a prompt": (ASKED, {"prompt": "Why?", "question": "How?", "question_id": "7", **TEXTS}),
    "an empty system turn": (ASKED, {"prompt": [system(""), *ASKED], **TEXTS}),
    "a system prompt that is missing in a CSV": (ASKED, {"system": "nan", **SAME}),
    "a prompt with a history": (TALKED, {"prompt": "Why?", "history": [["Hi", "Hello"]], **TEXTS}),
    "a query with a history, of a CSV": (TALKED, {"query": "Why?", "history": '[["Hi", "Hello"]]', **TEXTS}),
    "a system column before transcripts": (
        [system("Be brief."), *TALKED], {"system": "Be brief.", **transcripts(TRANSCRIPT)}),
    "a prompt that the answers repeat with other white space": (
        [user("Why? ")], {"prompt": "Why? ", "chosen": [user("Why?"), YES], "rejected": [user(" Why?"), NO]}),
    "columns that are empty in a CSV": (ASKED, {**SAME, "messages": "", "tools": " ", "history": "", "turns": ""}),
    "a whole dialogue, of which the answers repeat all but the end": (
        TALKED, {"messages": [*TALKED, assistant("So")], **opened(TALKED)}),
    "two dialogues and a winner": (
        TALKED, {"conversation_a": [*TALKED, NO], "conversation_b": [*TALKED, YES], "winner": "model_b", "turn": 2}),
    "two answers and a winner": (
        ASKED, {"prompt": "Why?", "response_a": "Yes", "response_b": "No", "winner": "A", "model_a": "x"}),
    "two answers and the better one's number": (
        ASKED, {"prompt": "Why?", "response_0": "No", "response_1": "Yes", "better_response_id": 1}),
    "two answers and the better one's number, of a CSV": (
        ASKED, {"prompt": "Why?", "response_0": "Yes", "response_1": "No", "better_response_id": "0"}),
    "two answers and flags": (
        ASKED, {"prompt": "Why?", "response_a": "No", "response_b": "Yes", "winner_model_a": 0, "winner_model_b": 1}),
    "two answers of which j is the better one": (ASKED, {"question": "Why?", "response_j": "Yes", "response_k": "No"}),
}

DIALOGUES = {  # name: (turns, index of the first that is trained on, row)
    "messages": ([*TALKED, YES], 0, {"messages": [*TALKED, YES]}),
    "messages, a system turn": ([*BRIEFED, YES], 0, {"messages": [*BRIEFED, YES]}),
    "messages, a system column": ([*BRIEFED, YES], 0, {"system": "Be brief.", "messages": [*ASKED, YES]}),
    "messages, an empty system column": ([*ASKED, YES], 0, {"system": " ", "messages": [*ASKED, YES]}),
    "messages, more in each turn": (
        [*ASKED, YES], 0, {"messages": [turn | {"name": None, "id": 1} for turn in (*ASKED, YES)]}),
    "ultrachat": ([*TALKED, YES], 0, {"prompt": "Hi", "prompt_id": "0f", "messages": [*TALKED, YES]}),
    "sharegpt": ([*TALKED, YES], 0, {"conversations": [*LISTED, gpt("Yes")]}),
    "sharegpt, a system column": (
        [*BRIEFED, YES], 0, {"system": "Be brief.", "conversations": [human("Why?"), gpt("Yes")], "tools": ""}),
    "sharegpt, a system turn": (
        [system("Be brief."), *TALKED, YES], 0, {"id": "x_0", "conversations": [BRIEF, *LISTED, gpt("Yes")]}),
    "alpaca": ([*ASKED, YES], 0, {"instruction": "Why?", "input": "", "output": "Yes"}),
    "alpaca, no input": ([*ASKED, YES], 0, {"instruction": "Why?", "output": "Yes"}),
    "alpaca, an input": (
        [user("Translate:\nJa"), YES], 0, {"instruction": "Translate:", "input": "Ja", "output": "Yes"}),
    "alpaca, system and history": (
        [system("Be brief."), *TALKED, YES], 0,
        {"instruction": "Why?", "output": "Yes", "system": "Be brief.", "history": [["Hi", "Hello"]]}),
    "alpaca, the first edition, with all of it in 'text' too": (
        [*ASKED, YES], 0, {"instruction": "Why?", "input": "", "output": "Yes", "text": TEMPLATED}),
    "alpaca, an edition with all of it in 'prompt' too": (
        [*ASKED, YES], 0, {"instruction": "Why?", "input": "", "output": "Yes", "prompt": TEMPLATED}),
    "prompt and completion, texts": ([*ASKED, YES], 1, {"prompt": "Why?", "completion": "Yes"}),
    "prompt and response": ([*ASKED, YES], 1, {"prompt": "Why?", "response": "Yes", "helpfulness": 3}),
    "prompt and completion, turns": ([*TALKED, YES], 3, {"prompt": TALKED, "completion": [YES]}),
    "prompt and completion, one turn each": ([*ASKED, YES], 1, {"prompt": user("Why?"), "completion": YES}),
    "prompt and completion, a completion of three turns": (
        [*TALKED, YES], 1, {"prompt": TALKED[:1], "completion": [*TALKED[1:], YES]}),
    "prompt and completion, a system turn": ([*BRIEFED, YES], 2, {"prompt": BRIEFED, "completion": "Yes"}),
    "prompt and completion, a system column": (
        [*BRIEFED, YES], 2, {"system": "Be brief.", "prompt": "Why?", "completion": "Yes"}),
    "prompt and completion, a transcript": (
        [*TALKED, YES], 3, {"prompt": TRANSCRIPT + "\n\nAssistant:", "completion": "Yes"}),
    "text, a transcript": ([*TALKED, YES], 0, {"text": TRANSCRIPT + "\n\nAssistant: Yes"}),
    "KTO messages": ([*TALKED, YES], 0, {"messages": [*TALKED, YES], "label": True}),
    "KTO prompt and completion": ([*ASKED, YES], 1, {"prompt": "Why?", "completion": "Yes", "label": True}),
    "messages with a label that is none of KTO's": ([*ASKED, YES], 0, {"messages": [*ASKED, YES], "label": 0}),
    "chosen alone": ([*TALKED, YES], 3, {"prompt": TALKED, "chosen": "Yes"}),
    "chosen alone, the prompt in it": ([*TALKED, YES], 3, {"chosen": [*TALKED, YES]}),
    "instruction and response, with a context": (
        [user("Translate:\nJa"), YES], 0,
        {"instruction": "Translate:", "context": "Ja", "response": "Yes", "category": "x"}),
    "question and answer": ([*ASKED, YES], 1, {"question": "Why?", "answer": "Yes"}),
    "query and response": ([*BRIEFED, YES], 2, {"system_prompt": "Be brief.", "query": "Why?", "response": "Yes"}),
    "input and output": ([*ASKED, YES], 1, {"input": "Why?", "output": "Yes"}),
    "input and output, turns": ([*TALKED, YES], 3, {"input": TALKED, "output": [YES]}),
    "prompt and output": ([*ASKED, YES], 1, {"prompt": "Why?", "output": "Yes"}),
    "conversation": ([*TALKED, YES], 0, {"conversation": [*TALKED, YES]}),
    "Gemini's contents": (
        [*BRIEFED, YES], 0,
        {"systemInstruction": {"role": "system", "parts": [{"text": "Be brief."}]},
         "contents": [{"role": "user", "parts": [{"text": "Why?"}]}, {"role": "model", "parts": [{"text": "Yes"}]}]}),
    "text, a transcript, and a system column": (
        [system("Be brief."), *TALKED, YES], 0,
        {"text": TRANSCRIPT + "\n\nAssistant: Yes", "system": "Be brief."}),
    "messages, a system column that says the same": (
        [*BRIEFED, YES], 0, {"system_message": "Be brief. ", "messages": [*BRIEFED, YES]}),
    "messages, an empty system turn": ([*ASKED, YES], 0, {"messages": [system(" "), *ASKED, YES]}),
    "the assistant speaks first": (
        [assistant("Hello"), *ASKED, YES], 0, {"messages": [assistant("Hello"), *ASKED, YES]}),
    "a system turn in the middle": (
        [*TALKED[:2], system("Be brief."), *ASKED, YES], 0,
        {"messages": [*TALKED[:2], system("Be brief."), *ASKED, YES]}),
    "pairs, as Capybara has them": (
        [*TALKED, YES], 0,
        {"source": "x", "conversation": [{"input": "Hi", "output": "Hello"}, {"input": "Why?", "output": "Yes"}]}),
    "texts in turn, as LIMA has them": ([*TALKED, YES], 0, {"conversations": ["Hi", "Hello", "Why?", "Yes"]}),
    "columns of lists, as Arrow has them": (
        [*ASKED, YES], 0, {"messages": {"role": ["user", "assistant"], "content": ["Why?", "Yes"]}}),
    "a history of turns": ([*TALKED, YES], 0, {"instruction": "Why?", "history": TALKED[:2], "output": "Yes"}),
    "prompt, input and completion": (
        [user("Translate:\nJa"), YES], 1, {"prompt": "Translate:", "input": "Ja", "completion": "Yes"}),
    "a prompt that holds its context": (
        [user("It rains. Why?"), YES], 1, {"prompt": "It rains. Why?", "context": "It rains.", "response": "Yes"}),
    "preferred output alone": ([*TALKED, YES], 3, {"input": {"messages": TALKED}, "preferred_output": YES}),
}
FIRST_QUESTION = ("ultrachat", "prompt and completion, a completion of three turns")  # where the prompt says it ends

PROMPTS = {  # name: (prompt, row); these are prompts only
    "TRL prompt, a text": (ASKED, {"prompt": "Why?"}),
    "TRL prompt, turns": (TALKED, {"prompt": TALKED}),
    "TRL prompt, one turn": (ASKED, {"prompt": user("Why?")}),
    "TRL prompt, and other columns": (ASKED, {"prompt": "Why?", "answer": 4, "tags": ["sum"]}),
    "TRL prompt, a system turn": (BRIEFED, {"prompt": BRIEFED}),
    "TRL prompt, a system column": (BRIEFED, {"prompt": "Why?", "system": "Be brief."}),
    "TRL prompt, an empty system column": (ASKED, {"prompt": "Why?", "system": " "}),
    "TRL prompt that ends with an answer": (TALKED, {"prompt": [*TALKED, YES]}),
    "KTO, disliked": (ASKED, {"prompt": "Why?", "completion": "Nonsense", "label": False}),
    "KTO messages, disliked": (TALKED, {"messages": [*TALKED, NO], "label": False}),
    "rejected alone": (TALKED, {"rejected": [*TALKED, NO]}),
    "chosen and rejected alike": (ASKED, SAME | {"rejected": "Yes"}),
    "HH transcript as prompt": (TALKED, {"prompt": TRANSCRIPT}),
    "HH transcript as prompt, answered": (TALKED, {"prompt": TRANSCRIPT + "\n\nAssistant: Yes"}),
    "HH transcript as text": (TALKED, {"text": TRANSCRIPT}),
    "HH transcript as text, a system column": (
        [system("Be brief."), *TALKED], {"text": TRANSCRIPT, "system": "Be brief."}),
    "HH transcript, chosen, without its last answer": (TALKED, {"chosen": TRANSCRIPT}),
    "HH transcript, chosen, with an empty answer": (TALKED, {"chosen": TRANSCRIPT + "\n\nAssistant: "}),
    "HH transcript, the assistant answers twice": (
        TALKED, {"chosen": TRANSCRIPT + "\n\nAssistant: Yes\n\nAssistant: No"}),
    "sharegpt": (TALKED, {"conversations": LISTED}),
    "alpaca, no output": (ASKED, {"instruction": "Why?"}),
    "OpenAI messages": (TALKED, {"messages": TALKED}),
    "OpenAI messages, an empty answer": (TALKED, {"messages": [*TALKED, assistant("")]}),
    "ultrachat, its first question": (ASKED, {"prompt": "Why?", "messages": [*ASKED, YES, user("Oh")]}),
    "MT-bench": (ASKED, {"question_id": 81, "category": "writing", "turns": ["Why?", "Say it again."]}),
    "MT-bench, a system column": (BRIEFED, {"turns": ["Why?"], "system": "Be brief."}),
    "query": (ASKED, {"query": "Why?"}),
    "question and its context": ([user("Why?\nIt rains.")], {"question": "Why?", "context": "It rains.", "id": "q7"}),
    "input": (ASKED, {"input": "Why?"}),
    "a system column with another name": (BRIEFED, {"query": "Why?", "system_instruction": "Be brief."}),
    "a tie": (ASKED, {"prompt": "Why?", "response_a": "Yes", "response_b": "No", "winner": "tie"}),
    "a ranking of three": (ASKED, {"instruction": "Why?", "output": ["Yes", "No", "Maybe"]}),
    "a prompt, and how many turns it has": (ASKED, {"prompt": "Why?", "turns": 2}),
    "messages, and the user's among them": (TALKED, {"messages": TALKED, "turns": ["Hi", "Why?"]}),
}
# fmt: on

ALL = {name: raw for table in (RANKED, DIALOGUES, PROMPTS) for name, (*_, raw) in table.items()}
COLUMNS = ("chosen", "rejected", "preferred_output", "messages", "conversations", "prompt", "completion", "response")
COLUMNS += ("instruction", "input", "output", "history", "system", "label", "text", "turns", "question", "query")
COLUMNS += ("system_prompt", "context", "answer", "tools", "functions", "conversation", "winner", "response_a")


# --- any JSON value anywhere -----------------------------------------------------------------------------------------

ODD = [None, True, False, 0, -1, 2.5, 10**400, float("nan"), float("inf")]
ODD += ["", " ", "\n\nHuman:", "\ud800", "Yes\n\u2028"]
ODD += [[], {}, [None], [[]], [{}], ["a", "b"], [["a", "b"]], [["a", 1]], {"role": "user"}, {"content": []}]
ODD += [{"role": {}, "content": "a"}, user("a"), assistant("a"), [user("a"), assistant("b")], {"messages": [None]}]
ODD += [json.loads("[" * 900 + "]" * 900), json.loads('{"a":' * 900 + "1" + "}" * 900)]


def spots(value, path=()):
    """The way to each value within a JSON value, itself included."""
    yield path
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inside:
        yield from spots(item, (*path, key))


def put(value, path, *new):
    """A copy of a JSON value with another value at one spot, or without that spot."""
    if not path:
        return new[0]
    again = value.copy()
    if len(path) == 1 and not new:
        del again[path[0]]
    else:
        again[path[0]] = put(value[path[0]], path[1:], *new)
    return again


def variants(raw):
    for path in spots(raw):
        yield from (put(raw, path, odd) for odd in ODD)
        if path:
            yield put(raw, path)
    for key in ("system", "label", "text", "messages", "chosen", "rejected", "prompt", "completion", "history"):
        yield from (raw | {key: odd} for odd in ODD)
