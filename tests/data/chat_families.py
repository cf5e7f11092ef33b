"""Kinds of models and their chat templates, with the ids that were worked out by hand for each.

Expected ids are put together from the special tokens' ids and plain stretches of text, which the `tokenizers` library
encodes by itself; `qalign.data.tokenize` has no part in them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from qalign.config.recipe import Model
from qalign.data.templates import ChatTemplate, prepare_template
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


def phi3_template() -> ChatTemplate:
    tokenizer = fixture_tokenizer("llama3")
    tokenizer.eos_token = "<|end_of_text|>"
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|end|>", "<|user|>", "<|assistant|>"]})
    tokenizer.chat_template = PHI3_TEMPLATE
    return prepare_template(tokenizer)


# --- by hand: ids of a dialogue up to the answer ---------------------------------------------------------------------

Turns = list[tuple[str, str]]
ZEPHYR_CUE = "\n<|assistant|>\n"


def llama3_prompt(turns: Turns) -> list[int]:
    ids = [2000]
    for role, text in [*turns, ("assistant", None)]:
        ids += [2003, *plain("llama3", role), 2004]
        ids += plain("llama3", "\n\n") if text is None else [*plain("llama3", "\n\n" + text.strip()), 2005]
    return ids


def chatml_turns(turns: Turns) -> Turns:
    return turns if turns[0][0] == "system" else [("system", SMOLLM), *turns]


def chatml_prompt(turns: Turns) -> list[int]:
    ids = []
    for role, text in chatml_turns(turns):
        ids += [2006, *plain("llama3", f"{role}\n{text}"), 2007, *plain("llama3", "\n")]
    return [*ids, 2006, *plain("llama3", "assistant\n")]


def zephyr_prompt(turns: Turns) -> list[int]:
    ids, before = [1], ""
    for role, text in turns:
        ids += [*plain("zephyr", f"{before}<|{role}|>\n{text}"), 2]
        before = "\n"
    return ids + plain("zephyr", ZEPHYR_CUE)


def mistral_prompt(turns: Turns) -> list[int]:
    ids = [1]
    for role, text in turns:  # Mistral puts a "▁" before every stretch of text, as the tokenizer does at the start
        ids += [3, *plain("mistral_v03", text), 4] if role == "user" else [*plain("mistral_v03", text.strip()), 2]
    return ids


@dataclass(frozen=True)
class Family:
    """A kind of model: its tokenizer, and what was worked out by hand for it."""

    tokenizer: Callable[[], PreTrainedTokenizerBase]
    prompt_ids: Callable[[Turns], list[int]]
    answer_ids: Callable[[str], list[int]]  # end of turn included
    end: str
    end_id: int
    fine: list[str]
    no: list[str]  # the tokens of "I am fine." and "No" where an answer begins
    special: tuple[str, ...]  # special tokens that real rows might spell out
    takes_system: bool = True
    template: str = "the model's own"

    def prepared(self) -> ChatTemplate:
        return prepare_template(self.tokenizer())


FAMILIES = {
    "llama3": Family(
        tokenizer=lambda: fixture_tokenizer("llama3"),
        prompt_ids=llama3_prompt,
        answer_ids=lambda text: [*plain("llama3", text.strip()), 2005],
        end="<|eot_id|>",
        end_id=2005,
        fine=["I", "Ġa", "m", "Ġf", "ine", "."],
        no=["No"],
        special=("<|eot_id|>", "<|begin_of_text|>", "<|end_of_text|>"),
    ),
    "chatml": Family(
        tokenizer=chatml_tokenizer,
        prompt_ids=chatml_prompt,
        answer_ids=lambda text: [*plain("llama3", text), 2007],
        end="<|im_end|>",
        end_id=2007,
        fine=["I", "Ġa", "m", "Ġf", "ine", "."],
        no=["No"],
        special=("<|im_start|>", "<|im_end|>", "<|endoftext|>"),
    ),
    "zephyr": Family(
        tokenizer=lambda: fixture_tokenizer("zephyr"),
        prompt_ids=zephyr_prompt,
        answer_ids=lambda text: [*plain("zephyr", ZEPHYR_CUE + text)[len(plain("zephyr", ZEPHYR_CUE)) :], 2],
        end="</s>",
        end_id=2,
        fine=["I", "▁a", "m", "▁f", "ine", "."],
        no=["N", "o"],
        special=("<s>", "</s>", "<unk>"),
        template="the model's own, with the BOS it left out",
    ),
    "mistral": Family(
        tokenizer=lambda: fixture_tokenizer("mistral_v03"),
        prompt_ids=mistral_prompt,
        answer_ids=lambda text: [*plain("mistral_v03", text.strip()), 2],
        end="</s>",
        end_id=2,
        fine=["▁I", "▁a", "m", "▁f", "ine", "."],
        no=["▁N", "o"],
        special=("<s>", "</s>", "<unk>", "[INST]", "[/INST]"),
        takes_system=False,
    ),
}

HELLO = ("user", "Hello there")
LONG = [("user", "A"), ("assistant", "B"), ("user", "C"), ("assistant", "D"), ("user", "E")]


def messages(turns: Turns) -> tuple[dict, ...]:
    return tuple({"role": role, "content": text} for role, text in turns)


def templated(template: str, name: str = "llama3", **settings) -> ChatTemplate:
    """A family's tokenizer with another chat template, prepared; `settings` are the recipe's under `model`."""
    tokenizer = fixture_tokenizer(name)
    tokenizer.chat_template = template
    return prepare_template(tokenizer, Model(base=name, **settings))
