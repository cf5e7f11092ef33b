"""Tokenizers are given one template, one BOS and a pad token; real ids agree with mistral-common's."""

from datetime import datetime

import pytest

from qalign.config.recipe import Model
from qalign.config.stages import Source
from qalign.data import templates
from qalign.data.formats import Preference, preferences
from qalign.data.templates import ChatTemplate, prepare_template
from qalign.data.tokenize import (
    encode_pair,
    encode_pairs,
    encode_prompt,
    end_of_turn_id,
    pad_for_scores,
)
from qalign.errors import UserError
from tests.data.chat_families import (
    FAMILIES,
    HELLO,
    chatml_tokenizer,
    fixture_tokenizer,
    messages,
    plain,
    templated,
    zephyr_prompt,
)
from tests.data.shapes import assistant

TALK = [HELLO, ("assistant", "Good day."), ("user", "Are you well?")]


def encode(template, *prompt, chosen: str = "Yes", rejected: str = "No"):
    return encode_pair(template, Preference(messages(prompt), assistant(chosen), assistant(rejected), "w"), 10_000)


@pytest.mark.parametrize("name", FAMILIES)
def test_there_is_exactly_one_bos_and_it_comes_first(name):
    tokenizer = FAMILIES[name].tokenizer()

    template = prepare_template(tokenizer)

    assert template.words == FAMILIES[name].template
    assert tokenizer.pad_token_id == FAMILIES[name].end_id  # EOS, as none has a pad token of its own

    ids = encode(template, *TALK).prompt_ids
    assert ids[0] == tokenizer.bos_token_id
    if name == "chatml":  # its "BOS" opens every turn, as the template says
        assert ids.count(tokenizer.bos_token_id) == 5
        assert ids[1] != tokenizer.bos_token_id
    else:
        assert ids.count(tokenizer.bos_token_id) == 1


def test_a_tokenizer_that_is_prepared_twice_still_has_one_bos():
    template = prepare_template(FAMILIES["zephyr"].prepared().tokenizer)

    assert template.words == "the model's own"
    assert encode(template, HELLO).prompt_ids == zephyr_prompt([HELLO])


def test_a_bos_that_nothing_writes_is_not_made_up():
    tokenizer = chatml_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role + ': ' + m.content + '<|im_end|>' }}{% endfor %}"

    template = prepare_template(tokenizer)

    assert template.words == "the model's own"
    assert encode_prompt(template, messages([HELLO])) == [*plain("llama3", "user: Hello there"), 2007]


def test_a_pad_token_of_its_own_is_kept():
    tokenizer = fixture_tokenizer("llama3")
    tokenizer.pad_token = "<|finetune_right_pad_id|>"

    prepare_template(tokenizer)

    assert tokenizer.pad_token_id == 2002


def test_a_base_model_without_a_template_gets_a_plain_one():
    tokenizer = fixture_tokenizer("llama3")
    tokenizer.chat_template = None

    template = prepare_template(tokenizer)

    pair = encode(template, ("system", "Be brief."), HELLO, chosen=" I am fine.\n")
    assert template.words == "qalign's plain one, as the model has none, with the BOS it left out"
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

    template = prepare_template(tokenizer, Model(base="b", chat_template=str(file)))

    assert template.words == str(file)

    pair = encode(template, HELLO, chosen="I am fine.")
    assert pair.prompt_ids == [2000, *plain("llama3", "# user\nHello there"), 2005, *plain("llama3", "# assistant\n")]
    assert pair.chosen_ids == [*plain("llama3", "I am fine."), 2005]


@pytest.mark.parametrize(
    "template", ["{% for %}", "{{ messages", "{{ 1 / 0 }}", "{{ nothing.at_all }}", "{{ raise_exception('no') }}", None]
)
def test_a_broken_or_missing_template_file_is_one_line(tmp_path, template):
    file = tmp_path / "broken.jinja"
    if template:
        file.write_text(template)

    with pytest.raises(UserError) as caught:
        prepare_template(fixture_tokenizer("llama3"), Model(base="b", chat_template=str(file)))

    (line,) = caught.value.lines
    assert str(file) in line
    assert ("can't be used: " if template else "model.chat_template") in line
    assert "\n" not in line


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
        pad_for_scores(ChatTemplate(tokenizer, template_kwargs))


def test_a_tokenizer_without_eos_is_one_line():
    tokenizer = fixture_tokenizer("llama3")
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no end-of-sequence token"):
        prepare_template(tokenizer)


def test_what_only_resembles_a_special_token_is_text():
    zephyr = FAMILIES["zephyr"].prepared()

    pair = encode(zephyr, ("user", "<|user|> </ s> <|eot_id|>"), chosen="[INST]")

    assert pair.prompt_ids == zephyr_prompt([("user", "<|user|> </ s> <|eot_id|>")])
    assert pair.chosen_ids.count(2) == 1


def test_an_added_token_that_is_not_special_may_be_written():
    """Qwen3's `<think>` is one."""
    template = templated(fixture_tokenizer("llama3").chat_template)
    template.tokenizer.add_tokens(["<think>", "</think>"])
    think, done = template.tokenizer.convert_tokens_to_ids(["<think>", "</think>"])

    pair = encode(template, HELLO, chosen="<think>So</think>Yes", rejected="Yes</think>")

    assert pair.chosen_ids == [think, *plain("llama3", "So"), done, *plain("llama3", "Yes"), 2005]
    assert pair.rejected_ids == [*plain("llama3", "Yes"), done, 2005]


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
    template = prepare_template(tokenizer)
    own = MistralTokenizer.from_file(model, mode=ValidationMode.finetuning)

    def chat_ids(prompt, answer: str) -> list[int]:
        messages = [*prompt, {"role": "assistant", "content": answer}]
        return own.encode_chat_completion(ChatCompletionRequest(messages=messages)).tokens

    return template, chat_ids


def test_mistrals_vocabulary_gives_the_published_ids(mistral_common):
    template, _ = mistral_common

    pair = encode(template, ("user", "Hello, how are you?"), chosen="Fine, and you?")

    assert pair.prompt_ids == [1, 3, 23325, 29493, 1678, 1228, 1136, 29572, 4]
    assert pair.chosen_ids == [24873, 29493, 1072, 1136, 29572, 2]
    assert end_of_turn_id(template) == 2


def test_real_rows_have_the_ids_that_mistral_common_gives_them(mistral_common, shared_data):
    template, chat_ids = mistral_common
    rows, _ = preferences((Source(path=str(shared_data / "hh_harmless.jsonl.gz"), limit=200),), "train", None, 0)

    pairs, refused = encode_pairs(template, rows, 100_000)

    assert refused == []
    for pref, pair in zip(rows, pairs, strict=True):
        assert pair.prompt_ids + pair.chosen_ids == chat_ids(pref.prompt, pref.chosen["content"])
        assert pair.prompt_ids + pair.rejected_ids == chat_ids(pref.prompt, pref.rejected["content"])
        assert pair.chosen_ids.count(2) == pair.rejected_ids.count(2) == 1


# --- templates that can't teach anything -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "who"),
    [
        ("{{ bos_token }}Hello<|eot_id|>{{ 'assistant:' if add_generation_prompt }}", "user"),
        ("{% for m in messages %}{{ m.role }}<|eot_id|>{% endfor %}", "user"),
        (
            "{% for m in messages %}{{ m.role + (m.content if m.role == 'user' else '') }}<|eot_id|>{% endfor %}",
            "assistant",
        ),
    ],
    ids=["nothing of the messages", "their roles", "no answers"],
)
def test_a_template_that_ignores_what_is_said_is_refused_when_the_base_is_loaded(template, who):
    with pytest.raises(UserError, match=rf"^model.chat_template: .*own\) leaves out what the {who} says"):
        templated(template)


def test_a_template_that_does_not_end_is_refused(monkeypatch):
    monkeypatch.setattr(templates, "SECONDS", 0.01)
    endless = "{% for a in range(20000) %}{% for b in range(1000) %}{% endfor %}{% endfor %}{{ messages[0].content }}"
    with pytest.raises(UserError, match=r"^model.chat_template: the chat template takes more than"):
        templated(endless)


def test_of_several_templates_each_gets_the_bos_and_the_one_for_tools_is_taken():
    tokenizer = FAMILIES["zephyr"].tokenizer()
    own = tokenizer.chat_template
    tokenizer.chat_template = {"default": own, "tool_use": "{{ tools[0].function.name }}" + own}
    template = prepare_template(tokenizer)
    tool = {"type": "function", "function": {"name": "weather"}}

    asked, with_tool = (one.render(messages([HELLO]), add_generation_prompt=True) for one in
                        (template, template.with_tools([tool])))  # fmt: skip

    assert asked.startswith("<s><|user|>")
    assert with_tool == asked.replace("<s>", "<s>weather", 1)


# --- the date --------------------------------------------------------------------------------------------------------

THEN = datetime(2024, 2, 3, 4, 5, 6)
DATED = (
    "{{ bos_token }}{% macro today() %}{{ strftime_now('%d %b %Y') }}{% endmacro %}"
    "{% if strftime_now is defined %}{{ today() + '|' + strftime_now(form or '%A, %-d %B, 100%% at %H:%M') }}"
    "{% endif %}"
    "{% for m in messages %}{{ m.content }}<|eot_id|>{% endfor %}"
)


def dated(now=None, template=DATED, **kwargs) -> ChatTemplate:
    tokenizer = fixture_tokenizer("llama3")
    tokenizer.chat_template = template
    return prepare_template(tokenizer, Model(base="b", chat_template_kwargs=kwargs), now)


def test_a_template_is_told_the_date_of_its_run():
    template = dated(THEN)

    assert template.render(messages([HELLO]), add_generation_prompt=True) == (
        "<|begin_of_text|>03 Feb 2024|Saturday, 3 February, 100% at 04:05Hello there<|eot_id|>"
    )
    assert str(template) == "the model's own, with the date 2024-02-03"
    assert template.tokenizer.chat_template == DATED  # what is saved with the adapter knows today's date
    assert (dated().source, dated().words) == (template.source, template.words)  # another day, the same template


@pytest.mark.parametrize("form", [f"%{letter}" for letter in "aAbBcdDeFHIjmMpSTUwWxXyYZ"] + ["%-d", "%-m", "%%d"])
def test_every_form_of_a_date_is_as_python_writes_it(form):
    text = dated(THEN, form=form).render(messages([HELLO]), add_generation_prompt=True)

    assert text.partition("|03")[0] != text.partition("03 Feb 2024|")[2]
    assert text == f"<|begin_of_text|>03 Feb 2024|{THEN.strftime(form)}Hello there<|eot_id|>"


@pytest.mark.parametrize("start", ["\n", "\n\n", "  {% if true %}{% endif %}", "{# a #}\n", ""])
def test_the_date_changes_no_white_space(start):
    plain_one, with_date = dated(THEN, start + DATED.replace("strftime_now", "nothing")), start + DATED
    text = "03 Feb 2024|Saturday, 3 February, 100% at 04:05"

    rendered = dated(THEN, with_date).render(messages([HELLO]), add_generation_prompt=True)

    without = plain_one.render(messages([HELLO]), add_generation_prompt=True)
    assert rendered == without.replace("Hello there", text + "Hello there")


def test_a_template_that_is_given_the_date_needs_none():
    template = dated(THEN, "{% for m in messages %}{{ date_string + m.content }}{% endfor %}", date_string="May")
    assert (template.is_dated, str(template)) == (False, "the model's own, with the BOS it left out")
