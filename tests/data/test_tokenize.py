"""Chat templates to ids: what is supervised is the answer and its end of turn, to the token.

Expected ids are put together here from the special tokens' ids and plain stretches of text, which the `tokenizers`
library encodes by itself; `qalign.data.tokenize` has no part in them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from qalign.config.stages import Source
from qalign.data.formats import Preference, Refused, preferences
from qalign.data.readers import BadRow
from qalign.data.tokenize import (
    encode_pair,
    encode_pairs,
    encode_prompt,
    end_of_turn_id,
    pad_for_scores,
    prepare_tokenizer,
)
from qalign.errors import UserError
from tests.conftest import FIXTURES

# SmolLM2-Instruct's.
CHATML_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SMOLLM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
# Phi-3's: an EOS after the last end of turn.
PHI3_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)


def raw(name: str) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(FIXTURES / "tokenizers" / name / "tokenizer.json"))


RAW = {name: raw(name) for name in ("llama3", "zephyr", "mistral_v03")}


def plain(name: str, text: str) -> list[int]:
    """Ids of a stretch of text without special tokens."""
    return RAW[name].encode(text, add_special_tokens=False).ids


def fixture_tokenizer(name: str) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(FIXTURES / "tokenizers" / name)


def chatml_tokenizer() -> PreTrainedTokenizerBase:
    """Special tokens and template as SmolLM2-Instruct's: `<|im_start|>` counts as its BOS, which it never adds."""
    backend = raw("llama3")
    backend.post_processor = tokenizers.processors.ByteLevel(trim_offsets=False)
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>", "<|endoftext|>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
    )
    tokenizer.chat_template = CHATML_TEMPLATE
    return tokenizer


def phi3_tokenizer() -> PreTrainedTokenizerBase:
    tokenizer = fixture_tokenizer("llama3")
    tokenizer.eos_token = "<|end_of_text|>"
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|end|>", "<|user|>", "<|assistant|>"]})
    tokenizer.chat_template = PHI3_TEMPLATE
    return tokenizer


# --- by hand: ids and text of a dialogue up to the answer, and of the answer -----------------------------------------

Turns = list[tuple[str, str]]


def llama3_prompt(turns: Turns) -> list[int]:
    ids = [2000]
    for role, text in [*turns, ("assistant", None)]:
        ids += [2003, *plain("llama3", role), 2004]
        ids += plain("llama3", "\n\n") if text is None else [*plain("llama3", "\n\n" + text), 2005]
    return ids


def llama3_text(turns: Turns) -> str:
    said = [f"<|start_header_id|>{role}<|end_header_id|>\n\n{text.strip()}<|eot_id|>" for role, text in turns]
    return "<|begin_of_text|>" + "".join(said) + "<|start_header_id|>assistant<|end_header_id|>\n\n"


def chatml_turns(turns: Turns) -> Turns:
    return turns if turns[0][0] == "system" else [("system", SMOLLM), *turns]


def chatml_prompt(turns: Turns) -> list[int]:
    ids = []
    for role, text in chatml_turns(turns):
        ids += [2006, *plain("llama3", f"{role}\n{text}"), 2007, *plain("llama3", "\n")]
    return [*ids, 2006, *plain("llama3", "assistant\n")]


def chatml_text(turns: Turns) -> str:
    said = [f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in chatml_turns(turns)]
    return "".join(said) + "<|im_start|>assistant\n"


def zephyr_prompt(turns: Turns) -> list[int]:
    ids, before = [1], ""
    for role, text in turns:
        ids += [*plain("zephyr", f"{before}<|{role}|>\n{text}"), 2]
        before = "\n"
    return ids + plain("zephyr", "\n<|assistant|>\n")


def zephyr_text(turns: Turns) -> str:
    return "<s>" + "".join(f"<|{role}|>\n{text}</s>\n" for role, text in turns) + "<|assistant|>\n"


def mistral_prompt(turns: Turns) -> list[int]:
    ids = [1]
    for role, text in turns:  # Mistral puts a "▁" before every stretch of text, as the tokenizer does at the start
        ids += [3, *plain("mistral_v03", text), 4] if role == "user" else [*plain("mistral_v03", text), 2]
    return ids


def mistral_text(turns: Turns) -> str:
    said = [f"[INST] {text}[/INST]" if role == "user" else f" {text.strip()}</s>" for role, text in turns]
    return "<s>" + "".join(said)


@dataclass(frozen=True)
class Family:
    """A kind of model: its tokenizer, and what was worked out by hand for it."""

    tokenizer: Callable[[], PreTrainedTokenizerBase]
    prompt_ids: Callable[[Turns], list[int]]
    prompt_text: Callable[[Turns], str]
    end: str
    end_id: int
    fine: list[str]
    no: list[str]
    """The tokens of "I am fine." and "No" where an answer begins."""
    trims: bool
    """Whether the template trims an answer."""
    special: tuple[str, ...]
    """Special tokens that real rows might spell out."""
    takes_system: bool = True
    answer_prefix: str = ""
    template: str = "the model's own"

    def prepared(self) -> PreTrainedTokenizerBase:
        tokenizer = self.tokenizer()
        prepare_tokenizer(tokenizer)
        return tokenizer


FAMILIES = {
    "llama3": Family(
        tokenizer=lambda: fixture_tokenizer("llama3"),
        prompt_ids=llama3_prompt,
        prompt_text=llama3_text,
        end="<|eot_id|>",
        end_id=2005,
        fine=["I", "Ġa", "m", "Ġf", "ine", "."],
        no=["No"],
        trims=True,
        special=("<|eot_id|>", "<|begin_of_text|>", "<|end_of_text|>"),
    ),
    "chatml": Family(
        tokenizer=chatml_tokenizer,
        prompt_ids=chatml_prompt,
        prompt_text=chatml_text,
        end="<|im_end|>",
        end_id=2007,
        fine=["I", "Ġa", "m", "Ġf", "ine", "."],
        no=["No"],
        trims=False,
        special=("<|im_start|>", "<|im_end|>", "<|endoftext|>"),
    ),
    "zephyr": Family(
        tokenizer=lambda: fixture_tokenizer("zephyr"),
        prompt_ids=zephyr_prompt,
        prompt_text=zephyr_text,
        end="</s>",
        end_id=2,
        fine=["I", "▁a", "m", "▁f", "ine", "."],
        no=["N", "o"],
        trims=False,
        special=("<s>", "</s>", "<unk>"),
        template="the model's own, with the BOS it left out",
    ),
    "mistral": Family(
        tokenizer=lambda: fixture_tokenizer("mistral_v03"),
        prompt_ids=mistral_prompt,
        prompt_text=mistral_text,
        end="</s>",
        end_id=2,
        fine=["▁I", "▁a", "m", "▁f", "ine", "."],
        no=["▁N", "o"],
        trims=True,
        special=("<s>", "</s>", "<unk>", "[INST]", "[/INST]"),
        takes_system=False,
        answer_prefix=" ",
    ),
}


@pytest.fixture(params=FAMILIES)
def family(request) -> Family:
    return FAMILIES[request.param]


def row(*prompt: tuple[str, str], chosen: str = "Yes", rejected: str = "No", where: str = "rows.jsonl:1") -> Preference:
    return Preference(tuple({"role": role, "content": text} for role, text in prompt), chosen, rejected, where)


def encode(tokenizer, *prompt, max_length: int = 10_000, template_kwargs=None, **answers):
    return encode_pair(tokenizer, row(*prompt, **answers), max_length, template_kwargs or {})


HELLO = ("user", "Hello there")
TALK = [HELLO, ("assistant", "Good day."), ("user", "Are you well?")]


# --- what is supervised ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("turns", [[HELLO], TALK], ids=["one turn", "three turns"])
def test_the_prompt_is_the_templates_and_the_completion_the_answer_and_its_end_of_turn(family, turns):
    tokenizer = family.prepared()

    pair = encode(tokenizer, *turns, chosen="I am fine.", rejected="No")

    assert pair.prompt_ids == family.prompt_ids(turns)
    assert tokenizer.convert_ids_to_tokens(pair.chosen_ids) == [*family.fine, family.end]
    assert tokenizer.convert_ids_to_tokens(pair.rejected_ids) == [*family.no, family.end]
    assert (pair.where, pair.dropped_turns) == ("rows.jsonl:1", 0)
    assert len(pair) == len(pair.prompt_ids) + 7


@pytest.mark.parametrize("name", ["llama3", "chatml", "zephyr"])
def test_a_system_prompt_comes_first(name):
    family, turns = FAMILIES[name], [("system", "Be brief."), *TALK]

    pair = encode(family.prepared(), *turns, chosen="I am fine.")

    assert pair.prompt_ids == family.prompt_ids(turns)
    assert pair.chosen_ids[-1] == family.end_id


def test_an_answer_keeps_the_white_space_that_its_template_keeps():
    chatml, zephyr = FAMILIES["chatml"].prepared(), FAMILIES["zephyr"].prepared()
    answer = "  Yes:\n\n  1. no \n"

    assert encode(chatml, HELLO, chosen=answer).chosen_ids == [*plain("llama3", answer), 2007]
    whole = plain("zephyr", "\n<|assistant|>\n" + answer)
    assert encode(zephyr, HELLO, chosen=answer).chosen_ids == [*whole[len(plain("zephyr", "\n<|assistant|>\n")) :], 2]


def test_an_answer_loses_the_white_space_that_its_template_trims():
    llama3, mistral = FAMILIES["llama3"].prepared(), FAMILIES["mistral"].prepared()

    assert encode(llama3, HELLO, chosen="\n I am fine.\n\n") == encode(llama3, HELLO, chosen="I am fine.")
    assert encode(mistral, HELLO, chosen="\n I am fine.\n\n") == encode(mistral, HELLO, chosen="I am fine.")


def test_the_end_of_turn_is_supervised_once_and_nothing_after_it(family):
    tokenizer = family.prepared()

    for answer in ("I am fine.", "Fine\n\n- one\n- two", "1, 2, 3 …", "ß 漢字 🙂"):
        ids = encode(tokenizer, *TALK, chosen=answer).chosen_ids
        assert ids.index(family.end_id) == len(ids) - 1


def test_tokens_do_not_merge_across_the_border():
    """After ChatML's `assistant\\n`, an answer that begins with a newline would become part of the prompt's last token;
    at inference the model sees the prompt's own."""
    tokenizer = FAMILIES["chatml"].prepared()
    (newline,), (two_newlines,) = plain("llama3", "\n"), plain("llama3", "\n\n")

    pair = encode(tokenizer, HELLO, chosen="\nYes", rejected="Yes")

    assert newline != two_newlines
    assert pair.prompt_ids == chatml_prompt([HELLO])
    assert pair.prompt_ids[-1] == newline
    assert pair.chosen_ids == [newline, *plain("llama3", "Yes"), 2007]
    assert pair.rejected_ids == [*plain("llama3", "Yes"), 2007]


def test_what_a_template_writes_after_the_end_of_turn_is_cut():
    tokenizer = phi3_tokenizer()
    prepare_tokenizer(tokenizer)
    end, user, assistant = tokenizer.convert_tokens_to_ids(["<|end|>", "<|user|>", "<|assistant|>"])

    pair = encode(tokenizer, HELLO, chosen="I am fine.")

    assert pair.prompt_ids == [
        2000, user, *plain("llama3", "\nHello there"), end, *plain("llama3", "\n"), assistant, *plain("llama3", "\n"),
    ]  # fmt: skip
    assert pair.chosen_ids == [*plain("llama3", "I am fine."), end]
    assert end_of_turn_id(tokenizer, {}) == end != tokenizer.eos_token_id


@pytest.mark.parametrize(
    "turns",
    [
        "{% for m in messages %}{{ '\\n' if not loop.first }}{{ m.role + ': ' + m.content }}{% endfor %}"
        "{{ '\\n' if add_generation_prompt }}",
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}",
    ],
    ids=["newlines between turns", "newlines after turns"],
)
def test_a_template_without_an_end_of_turn_gets_the_eos(turns):
    tokenizer = fixture_tokenizer("llama3")
    tokenizer.chat_template = turns + "{{ 'assistant:' if add_generation_prompt }}"
    prepare_tokenizer(tokenizer)

    pair = encode(tokenizer, HELLO, chosen="I am fine", rejected="No")

    assert pair.prompt_ids == [2000, *plain("llama3", "user: Hello there\nassistant:")]
    assert pair.chosen_ids == [*plain("llama3", " I am fine"), 2005]
    assert pair.rejected_ids == [*plain("llama3", " No"), 2005]
    assert end_of_turn_id(tokenizer, {}) == 2005


def test_a_template_that_renders_an_answered_prompt_otherwise_is_refused():
    tokenizer = fixture_tokenizer("llama3")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content if loop.last else '…' }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    prepare_tokenizer(tokenizer)

    with pytest.raises(BadRow, match="renders a prompt differently once it is answered; see chat_template_kwargs"):
        encode(tokenizer, HELLO)


@pytest.mark.parametrize(
    ("template", "template_kwargs", "reason"),
    [
        ("{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}<think>{% endif %}", {},
         "renders a prompt differently once it is answered"),
        (None, {"tokenize": True}, "multiple values for keyword argument 'tokenize'"),
    ],
)  # fmt: skip
def test_a_template_whose_end_of_turn_cannot_be_found_is_the_users_to_mend(template, template_kwargs, reason):
    """Reward models ask for it while they load, before any row could be refused."""
    tokenizer = fixture_tokenizer("llama3")
    tokenizer.chat_template = template or tokenizer.chat_template
    with pytest.raises(UserError, match=rf"^model.chat_template: no end of turn can be found: .*{reason}"):
        pad_for_scores(tokenizer, template_kwargs)


def test_a_dialogue_that_the_template_cannot_render_is_refused():
    tokenizer = FAMILIES["llama3"].prepared()

    with pytest.raises(BadRow, match="the chat template refuses it"):
        encode(tokenizer, HELLO, template_kwargs={"tokenize": True})  # given twice then: a TypeError inside


def test_template_kwargs_reach_the_template():
    tokenizer = fixture_tokenizer("llama3")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role + ':' + m.content + ('<|eot_id|>' if brief else '<|end_of_text|>') }}"
        "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    prepare_tokenizer(tokenizer)
    brief = {"brief": True}
    expected = [2000, *plain("llama3", "user:Hello there"), 2005, *plain("llama3", "assistant:")]

    pair = encode(tokenizer, HELLO, template_kwargs=brief)

    assert pair.prompt_ids == expected
    assert pair.chosen_ids == [*plain("llama3", "Yes"), 2005]
    assert encode_prompt(tokenizer, [{"role": "user", "content": "Hello there"}], brief) == expected
    assert (end_of_turn_id(tokenizer, brief), end_of_turn_id(tokenizer, {})) == (2005, 2001)


def test_the_prompt_for_sampling_is_the_prompt_that_was_trained_on(family):
    tokenizer, messages = family.prepared(), list(row(*TALK).prompt)

    assert encode_prompt(tokenizer, messages, {}) == family.prompt_ids(TALK) == encode(tokenizer, *TALK).prompt_ids


def test_the_end_of_turn_of_each_family(family):
    assert end_of_turn_id(family.prepared(), {}) == family.end_id


# --- the tokenizer ---------------------------------------------------------------------------------------------------


def test_there_is_exactly_one_bos_and_it_comes_first(family):
    tokenizer = family.tokenizer()

    assert prepare_tokenizer(tokenizer) == family.template

    ids = encode(tokenizer, *TALK).prompt_ids
    assert ids[0] == tokenizer.bos_token_id
    if family is FAMILIES["chatml"]:  # its "BOS" opens every turn, as the template says
        assert ids.count(tokenizer.bos_token_id) == 5
        assert ids[1] != tokenizer.bos_token_id
    else:
        assert ids.count(tokenizer.bos_token_id) == 1


def test_a_tokenizer_that_is_prepared_twice_still_has_one_bos():
    tokenizer = FAMILIES["zephyr"].prepared()

    assert prepare_tokenizer(tokenizer) == "the model's own"
    assert encode(tokenizer, HELLO).prompt_ids == zephyr_prompt([HELLO])


def test_a_bos_that_nothing_writes_is_not_made_up():
    tokenizer = chatml_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role + ': ' + m.content + '<|im_end|>' }}{% endfor %}"

    assert prepare_tokenizer(tokenizer) == "the model's own"
    assert encode_prompt(tokenizer, [{"role": "user", "content": "Hello there"}], {}) == [
        *plain("llama3", "user: Hello there"),
        2007,
    ]


def test_others_see_the_same_ids_through_the_template_alone(family):
    """What vLLM or plain transformers do with the saved template."""
    tokenizer = family.prepared()

    ids = tokenizer.apply_chat_template(list(row(*TALK).prompt), add_generation_prompt=True, return_dict=False)

    assert ids == encode(tokenizer, *TALK).prompt_ids


@pytest.mark.parametrize(("name", "pad"), [("llama3", 2005), ("zephyr", 2), ("mistral", 2), ("chatml", 2007)])
def test_a_tokenizer_without_a_pad_token_pads_with_eos(name, pad):
    assert FAMILIES[name].prepared().pad_token_id == pad


def test_a_pad_token_of_its_own_is_kept():
    tokenizer = fixture_tokenizer("llama3")
    tokenizer.pad_token = "<|finetune_right_pad_id|>"

    prepare_tokenizer(tokenizer)

    assert tokenizer.pad_token_id == 2002


def test_a_base_model_without_a_template_gets_a_plain_one():
    tokenizer = fixture_tokenizer("llama3")
    tokenizer.chat_template = None

    words = prepare_tokenizer(tokenizer)

    pair = encode(tokenizer, ("system", "Be brief."), HELLO, chosen=" I am fine.\n")
    assert words == "qalign's plain one, as the model has none, with the BOS it left out"
    assert pair.prompt_ids == [
        2000,
        *plain("llama3", "<|system|>\nBe brief."), 2005,
        *plain("llama3", "\n<|user|>\nHello there"), 2005,
        *plain("llama3", "\n<|assistant|>\n"),
    ]  # fmt: skip
    assert pair.chosen_ids == [*plain("llama3", "I am fine."), 2005]


def test_a_template_from_a_file_replaces_the_models_own(tmp_path):
    file = tmp_path / "mine.jinja"
    file.write_text(
        "{{ bos_token }}{% for m in messages %}{{ '# ' + m.role + '\\n' + m.content + eos_token }}{% endfor %}"
        "{{ '# assistant\\n' if add_generation_prompt }}"
    )
    tokenizer = fixture_tokenizer("llama3")

    words = prepare_tokenizer(tokenizer, str(file))

    pair = encode(tokenizer, HELLO, chosen="I am fine.")
    assert words == str(file)
    assert pair.prompt_ids == [2000, *plain("llama3", "# user\nHello there"), 2005, *plain("llama3", "# assistant\n")]
    assert pair.chosen_ids == [*plain("llama3", "I am fine."), 2005]


@pytest.mark.parametrize(
    "template", ["{% for %}", "{{ messages", "{{ 1 / 0 }}", "{{ nothing.at_all }}", "{{ raise_exception('no') }}"]
)
def test_a_broken_template_file_is_one_line(tmp_path, template):
    file = tmp_path / "broken.jinja"
    file.write_text(template)

    with pytest.raises(UserError) as caught:
        prepare_tokenizer(fixture_tokenizer("llama3"), str(file))

    (line,) = caught.value.lines
    assert line.startswith(f"the chat template ({file}) can't be used: ")
    assert "\n" not in line


def test_a_missing_template_file_is_one_line():
    with pytest.raises(UserError) as caught:
        prepare_tokenizer(fixture_tokenizer("llama3"), "gone.jinja")

    (line,) = caught.value.lines
    assert line.startswith("model.chat_template: 'gone.jinja' can't be read: ")


# --- special tokens in the text --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "forged",
    [
        {"prompt": [("system", "<|eot_id|>"), HELLO]},
        {"prompt": [("user", "Hi<|eot_id|>"), ("assistant", "Hello"), ("user", "Why?")]},
        {"prompt": [HELLO], "chosen": "Yes.<|eot_id|>"},
        {"prompt": [HELLO], "rejected": "a<|eot_id|>b"},
    ],
    ids=["system", "user", "chosen", "rejected"],
)
def test_a_text_that_spells_a_special_token_is_refused(forged):
    prompt = forged.pop("prompt")

    with pytest.raises(BadRow, match=r"^the text contains the model's special token <\|eot_id\|>$"):
        encode(FAMILIES["llama3"].prepared(), *prompt, **forged)


def test_what_only_resembles_a_special_token_is_text():
    zephyr = FAMILIES["zephyr"].prepared()

    pair = encode(zephyr, ("user", "<|user|> </ s> <|eot_id|>"), chosen="[INST]")

    assert pair.prompt_ids == zephyr_prompt([("user", "<|user|> </ s> <|eot_id|>")])
    assert pair.chosen_ids.count(2) == 1


def test_an_added_token_that_is_not_special_may_be_written():
    """Qwen3's `<think>` is one."""
    tokenizer = fixture_tokenizer("llama3")
    tokenizer.add_tokens(["<think>", "</think>"])
    prepare_tokenizer(tokenizer)
    think, done = tokenizer.convert_tokens_to_ids(["<think>", "</think>"])

    pair = encode(tokenizer, HELLO, chosen="<think>So</think>Yes", rejected="Yes</think>")

    assert pair.chosen_ids == [think, *plain("llama3", "So"), done, *plain("llama3", "Yes"), 2005]
    assert pair.rejected_ids == [*plain("llama3", "Yes"), done, 2005]


# --- length ----------------------------------------------------------------------------------------------------------

LONG = [("user", "A"), ("assistant", "B"), ("user", "C"), ("assistant", "D"), ("user", "E")]


@pytest.mark.parametrize("first", [[], [("system", "Be brief.")]], ids=["no system", "system"])
def test_the_oldest_turns_are_dropped_until_the_row_fits(first):
    tokenizer = FAMILIES["llama3"].prepared()
    whole, shorter, shortest = ([*first, *LONG[drop:]] for drop in (0, 2, 4))
    completion = [*plain("llama3", "Yes"), 2005]
    answer = len(completion)

    def fits(turns, max_length, dropped):
        pair = encode(tokenizer, *first, *LONG, max_length=max_length)
        assert pair.prompt_ids == llama3_prompt(turns)
        assert (pair.chosen_ids, pair.dropped_turns) == (completion, dropped)

    fits(whole, len(llama3_prompt(whole)) + answer, 0)
    fits(shorter, len(llama3_prompt(whole)) + answer - 1, 2)
    fits(shorter, len(llama3_prompt(shorter)) + answer, 2)
    fits(shortest, len(llama3_prompt(shorter)) + answer - 1, 4)
    fits(shortest, len(llama3_prompt(shortest)) + answer, 4)
    with pytest.raises(BadRow):
        encode(tokenizer, *first, *LONG, max_length=len(llama3_prompt(shortest)) + answer - 1)


@pytest.mark.parametrize("longer", ["chosen", "rejected"])
def test_the_longer_answer_decides_what_fits(longer):
    tokenizer = FAMILIES["llama3"].prepared()
    prompt = len(llama3_prompt([HELLO]))

    assert len(encode(tokenizer, HELLO, **{longer: "I am fine."}, max_length=prompt + 7)) == prompt + 7
    with pytest.raises(BadRow) as caught:
        encode(tokenizer, HELLO, **{longer: "I am fine."}, max_length=prompt + 6)
    assert str(caught.value) == f"prompt and answer are {prompt} + 7 tokens, over max_length {prompt + 6}"


def test_a_last_question_that_fills_max_length_is_refused():
    tokenizer = FAMILIES["llama3"].prepared()
    left = len(llama3_prompt([LONG[-1]]))

    for max_length in (left, left - 1):
        with pytest.raises(BadRow) as caught:
            encode(tokenizer, *LONG, max_length=max_length)
        assert str(caught.value) == f"the prompt fills max_length: {left} of {max_length} tokens"


def test_refused_rows_keep_their_places_and_the_rest_their_order():
    tokenizer = FAMILIES["llama3"].prepared()
    rows = [
        row(HELLO, where="a.jsonl:1"),
        row(("user", "x" * 500), where="a.jsonl:2"),
        row(HELLO, chosen="Fine", where="a.jsonl:3"),
        row(("user", "<|eot_id|>"), where="b.jsonl:1"),
    ]

    pairs, refused = encode_pairs(tokenizer, rows, 40, {})

    assert [pair.where for pair in pairs] == ["a.jsonl:1", "a.jsonl:3"]
    assert [bad.where for bad in refused] == ["a.jsonl:2", "b.jsonl:1"]
    assert refused[0].reason.startswith("the prompt fills max_length: ")
    assert refused[1] == Refused("b.jsonl:1", "the text contains the model's special token <|eot_id|>")


# --- Mistral's own tokenizer -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mistral_common():
    """(transformers' tokenizer with Mistral v0.3's true vocabulary, prepared; ids of a chat by mistral-common)."""
    pytest.importorskip("mistral_common")
    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    from mistral_common.protocol.instruct.validator import ValidationMode
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
    from sentencepiece import SentencePieceProcessor
    from transformers import AddedToken, LlamaTokenizer
    from transformers.tokenization_utils_base import generate_merges

    model = str(MistralTokenizer._data_path() / "mistral_instruct_tokenizer_240323.model.v3")
    pieces = SentencePieceProcessor(model_file=model)
    vocab = {pieces.id_to_piece(i): i for i in range(pieces.get_piece_size())}
    scores = {piece: pieces.get_score(i) for piece, i in vocab.items()}
    control = [AddedToken(p, special=True, normalized=False) for p, i in vocab.items() if pieces.is_control(i)]
    tokenizer = LlamaTokenizer(
        vocab=vocab,
        merges=generate_merges(vocab, scores),
        legacy=False,
        add_bos_token=True,
        extra_special_tokens=control,
    )
    tokenizer.chat_template = fixture_tokenizer("mistral_v03").chat_template
    prepare_tokenizer(tokenizer)
    own = MistralTokenizer.from_file(model, mode=ValidationMode.finetuning)

    def chat_ids(prompt, answer: str) -> list[int]:
        messages = [*prompt, {"role": "assistant", "content": answer}]
        return own.encode_chat_completion(ChatCompletionRequest(messages=messages)).tokens

    return tokenizer, chat_ids


def test_mistrals_vocabulary_gives_the_published_ids(mistral_common):
    tokenizer, _ = mistral_common

    pair = encode(tokenizer, ("user", "Hello, how are you?"), chosen="Fine, and you?")

    assert pair.prompt_ids == [1, 3, 23325, 29493, 1678, 1228, 1136, 29572, 4]
    assert pair.chosen_ids == [24873, 29493, 1072, 1136, 29572, 2]
    assert end_of_turn_id(tokenizer, {}) == 2


def test_real_rows_have_the_ids_that_mistral_common_gives_them(mistral_common, shared_data):
    tokenizer, chat_ids = mistral_common
    rows, _ = preferences((Source(path=str(shared_data / "hh_harmless.jsonl.gz"), limit=200),), "train", None, 0)

    pairs, refused = encode_pairs(tokenizer, rows, 100_000, {})

    assert refused == []
    for pref, pair in zip(rows, pairs, strict=True):
        assert pair.prompt_ids + pair.chosen_ids == chat_ids(pref.prompt, pref.chosen)
        assert pair.prompt_ids + pair.rejected_ids == chat_ids(pref.prompt, pref.rejected)
        assert pair.chosen_ids.count(2) == pair.rejected_ids.count(2) == 1


# --- real rows -------------------------------------------------------------------------------------------------------


@pytest.fixture
def real_rows(family, shared_data) -> list[Preference]:
    """Some hundred rows of three data sets, without those that the family can't take by its nature."""
    names = ("hh_harmless.jsonl.gz", "dpo_en_demo.json", "alpaca_eval_prefs.jsonl.gz")
    rows, _ = preferences(tuple(Source(path=str(shared_data / name)) for name in names), "train", 120, 0)
    taken = [pref for pref in rows if family.takes_system or pref.prompt[0]["role"] != "system"]
    assert len(taken) > 300
    return taken


def spells_special(family: Family, pref: Preference) -> bool:
    texts = [pref.chosen, pref.rejected, *(turn["content"] for turn in pref.prompt)]
    return any(token in text for token in family.special for text in texts)


def decoded(family: Family, tokenizer, ids: list[int]) -> str:
    text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    if family is FAMILIES["zephyr"]:  # Llama marks where each stretch begins, which is decoded as a space
        text = text.replace("<s> ", "<s>").replace("</s> ", "</s>")
    return text


def test_real_rows_decode_to_the_rendered_dialogue_up_to_the_end_of_turn(family, real_rows):
    tokenizer = family.prepared()

    pairs, refused = encode_pairs(tokenizer, real_rows, 100_000, {})

    assert [bad.where for bad in refused] == [pref.where for pref in real_rows if spells_special(family, pref)]
    used = [pref for pref in real_rows if not spells_special(family, pref)]
    for pref, pair in zip(used, pairs, strict=True):
        prompt = family.prompt_text([(turn["role"], turn["content"]) for turn in pref.prompt])
        assert decoded(family, tokenizer, pair.prompt_ids) == prompt
        for answer, ids in ((pref.chosen, pair.chosen_ids), (pref.rejected, pair.rejected_ids)):
            said = family.answer_prefix + (answer.strip() if family.trims else answer)
            assert decoded(family, tokenizer, pair.prompt_ids + ids) == prompt + said + family.end
            assert ids.index(family.end_id) == len(ids) - 1


def test_real_rows_fit_and_their_answers_are_whole(family, real_rows):
    tokenizer, most = family.prepared(), 600
    whole = {pair.where: pair for pair in encode_pairs(tokenizer, real_rows, 100_000, {})[0]}

    pairs, refused = encode_pairs(tokenizer, real_rows, most, {})

    assert len(pairs) + len(refused) == len(real_rows)
    assert {pair.dropped_turns > 0 for pair in pairs} == {True, False}
    for pair in pairs:
        full = whole[pair.where]
        assert (pair.chosen_ids, pair.rejected_ids) == (full.chosen_ids, full.rejected_ids)
        assert len(pair) <= most
        assert (pair.dropped_turns == 0) == (len(full) <= most)
    asked = {pref.where: [(turn["role"], turn["content"]) for turn in pref.prompt] for pref in real_rows}
    for pair in pairs:
        turns = asked[pair.where]
        kept = turns[:1] if turns[0][0] == "system" else []
        left = [*kept, *turns[len(kept) + pair.dropped_turns :]]
        assert decoded(family, tokenizer, pair.prompt_ids) == family.prompt_text(left)


# --- what once went wrong --------------------------------------------------------------------------------------------


def test_a_template_that_refuses_a_system_prompt_refuses_the_row_alone():
    mistral = fixture_tokenizer("mistral_v03")
    row = Preference(
        ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}), "Yes", "No", "w"
    )
    with pytest.raises(BadRow, match="the chat template refuses it"):
        encode_pair(mistral, row, 1000, {})


def test_what_a_template_writes_after_the_answer_is_not_supervised():
    """No end of turn but blank lines: they would melt into the answer's last token."""
    tokenizer = fixture_tokenizer("llama3")
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    row = Preference(({"role": "user", "content": "How are you?"},), "I am fine.", "No", "w")
    pair = encode_pair(tokenizer, row, 1000, {})
    assert tokenizer.decode(pair.chosen_ids).removesuffix("<|eot_id|>").strip() == "I am fine."
    assert pair.chosen_ids[-1] == tokenizer.eos_token_id
    assert "\n" not in tokenizer.decode(pair.chosen_ids)


def test_a_tokenizer_without_eos_is_one_line():
    tokenizer = fixture_tokenizer("llama3")
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no end-of-sequence token"):
        prepare_tokenizer(tokenizer)
