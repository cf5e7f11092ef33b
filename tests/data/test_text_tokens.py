"""Plain texts as token ids: every token but the first is supervised, once."""

from itertools import pairwise

import pytest
import tokenizers

from qalign.data.formats import PlainText, Refused
from qalign.data.readers import BadRow
from qalign.data.store.sequences import IGNORED
from qalign.data.templates import ChatTemplate
from qalign.data.tokenize import encode_dialogues, encode_text
from tests.data.chat_families import FAMILIES, fixture_tokenizer, plain

PLAIN_ENDS = {"llama3": ([2000], 2005), "chatml": ([], 2007), "zephyr": ([1], 2), "mistral": ([1], 2)}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_plain_text_begins_with_the_bos_and_ends_with_the_eos(name):
    bos, eos = PLAIN_ENDS[name]
    text = "It rained.\n\nThen it stopped."
    vocabulary = {"chatml": "llama3", "mistral": "mistral_v03"}.get(name, name)

    (sequence,) = encode_text(FAMILIES[name].prepared(), PlainText(text, "texts.jsonl:7"), 1000)

    assert sequence.ids == [*bos, *plain(vocabulary, text), eos]
    assert sequence.labels == [IGNORED, *sequence.ids[1:]]  # nothing stands before the first that it could follow from
    assert (sequence.where, sequence.dropped_turns) == ("texts.jsonl:7", 0)


def test_a_tokenizer_that_adds_an_eos_itself_gives_one():
    tokenizer = fixture_tokenizer("llama3")
    tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|begin_of_text|> $A <|eot_id|>",
        special_tokens=[("<|begin_of_text|>", 2000), ("<|eot_id|>", 2005)],
    )

    (sequence,) = encode_text(ChatTemplate(tokenizer), PlainText("Hello there", "w"), 1000)

    assert sequence.ids == [2000, *plain("llama3", "Hello there"), 2005]


@pytest.mark.parametrize("end", ["", " <|eot_id|>"], ids=["no EOS", "an EOS of its own"])
def test_a_text_that_gives_no_tokens_is_refused(end):
    """Some tokenizers drop characters that they don't know, and not all begin with a BOS."""
    tokenizer = fixture_tokenizer("llama3")
    tokenizer.backend_tokenizer.normalizer = tokenizers.normalizers.Replace("\u200b", "")
    tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"$A{end}", special_tokens=[("<|eot_id|>", 2005)]
    )
    rows = [PlainText("\u200b", "a.jsonl:1"), PlainText("Hello there", "a.jsonl:2")]

    sequences, refused = encode_dialogues(ChatTemplate(tokenizer), rows, 1000)

    assert [sequence.ids for sequence in sequences] == [[*plain("llama3", "Hello there"), 2005]]
    assert refused == [Refused("a.jsonl:1", "the text gives no tokens")]


@pytest.mark.parametrize("length", [2, 15, 16, 17, 31, 32, 46, 47])
def test_of_a_long_text_every_token_is_learned_once_and_follows_the_one_before_it(length):
    """The last token, the EOS, is never alone: at the start of a sequence nothing predicts it."""
    text, template = "a" + " a" * (length - 3) if length > 2 else "", FAMILIES["llama3"].prepared()
    whole = [2000, *plain("llama3", text), 2005]
    assert len(whole) == length

    pieces = encode_text(template, PlainText(text, "w"), 16)

    followed = [(before, label) for piece in pieces for before, label in zip(piece.ids, piece.labels[1:], strict=False)]
    assert followed == list(pairwise(whole))
    assert all(piece.labels[0] == IGNORED for piece in pieces)
    assert all(len(piece) == 16 for piece in pieces[:-1])
    assert 2 <= len(pieces[-1]) <= 16


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())
def test_a_plain_text_that_spells_a_special_token_is_refused(family):
    for token in family.special:
        with pytest.raises(BadRow, match=r"^the text contains the model's special token"):
            encode_text(family.prepared(), PlainText(f"one {token} two", "w"), 1000)
