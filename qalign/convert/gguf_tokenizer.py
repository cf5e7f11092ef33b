"""The tokenizer of a model in the metadata of a `.gguf` file, with its chat template and where an answer ends."""

import json
from typing import Any

import gguf
from tokenizers import Tokenizer
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from qalign.data.templates import ANSWERED, ASKED, ChatTemplate
from qalign.data.tokenize import end_of_turn_ids
from qalign.errors import UserError

SPLITS = {GGUF_PRE_TOKENIZER_SPLITS[name]: name for name in ("llama-bpe", "tekken", "qwen2", "qwen35", "gpt-4o")}
UNREADABLE = (
    "--to: llama.cpp has no name for how this tokenizer splits text, so it would read other tokens than the model was "
    "trained on; use --to merged"
)
NEVER_MERGED = -1e6  # the score of a piece that no merge makes


def add_tokenizer(writer: gguf.GGUFWriter, template: ChatTemplate, size: int) -> None:
    """Adds vocabulary, merges, special tokens and chat template to a file; `size` is the number of embeddings. A
    `UserError` if llama.cpp couldn't give the same ids."""
    tokenizer = template.tokenizer
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    model, merges = state["model"], [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in _merges(state)]
    is_spm = model.get("byte_fallback", False)
    tokens = [f"[PAD{number}]" for number in range(size)]
    kinds = [gguf.TokenType.UNUSED] * size
    for token, number in tokenizer.get_vocab().items():
        tokens[number], kinds[number] = token, gguf.TokenType.NORMAL
        if is_spm and len(token) == 6 and token.startswith("<0x"):
            kinds[number] = gguf.TokenType.BYTE
    for number, added in tokenizer.added_tokens_decoder.items():
        kinds[number] = gguf.TokenType.CONTROL if added.special else gguf.TokenType.USER_DEFINED
        if is_spm and not added.special:
            tokens[number] = added.content.replace("▁", " ")
    if is_spm and tokenizer.unk_token_id is not None:
        kinds[tokenizer.unk_token_id] = gguf.TokenType.UNKNOWN
    writer.add_tokenizer_model("llama" if is_spm else "gpt2")
    writer.add_tokenizer_pre("default" if is_spm else _split(state))
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    if is_spm:
        writer.add_add_space_prefix(_has_space_prefix(template, state))
        ranks = {}
        for rank, (left, right) in enumerate(merges):
            ranks.setdefault(left + right, float(-rank))
        writer.add_token_scores([ranks.get(token, NEVER_MERGED) for token in tokens])
    else:
        writer.add_token_merges([" ".join(pair) for pair in merges])
    _add_special(writer, template)


def _merges(state: dict[str, Any]) -> list[Any]:
    if state["model"].get("type") != "BPE":
        raise UserError(f"--to: a tokenizer of the kind {state['model'].get('type')} can't be written as GGUF")
    return state["model"]["merges"]


def _split(state: dict[str, Any]) -> str:
    """llama.cpp's name for how a byte-level tokenizer splits text into words; a `UserError` if it has none."""
    before = state.get("pre_tokenizer") or {}
    parts = before.get("pretokenizers", [before])
    kinds = [part.get("type") for part in parts]
    if state.get("normalizer") in (None, {"type": "NFC"}):
        if kinds == ["ByteLevel"] and parts[0]["use_regex"] and not parts[0]["add_prefix_space"]:
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and parts[0]["individual_digits"] and parts[1]["use_regex"]:
            return "smollm"
        if kinds == ["Split", "ByteLevel"] and (name := SPLITS.get(parts[0]["pattern"].get("Regex"))):
            return name
    raise UserError(UNREADABLE)


def _has_space_prefix(template: ChatTemplate, state: dict[str, Any]) -> bool:
    """Whether llama.cpp should put a space before a text and after each special token, as it does or doesn't for a
    whole file: which of the two gives the ids of a rendered dialogue that were trained on. A `UserError` if neither."""
    text = template.render([ASKED, ANSWERED, ASKED], add_generation_prompt=True)
    for prefix in (True, False):
        steps = [{"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
        steps = [{"type": "Prepend", "prepend": "▁"}, *steps] if prefix else steps
        as_llama_cpp = state | {"pre_tokenizer": None, "normalizer": {"type": "Sequence", "normalizers": steps}}
        found = Tokenizer.from_str(json.dumps(as_llama_cpp)).encode(text, add_special_tokens=False)
        if found.ids == template.ids(text):
            return prefix
    raise UserError(UNREADABLE)


def _add_special(writer: gguf.GGUFWriter, template: ChatTemplate) -> None:
    tokenizer = template.tokenizer
    end, *others = end_of_turn_ids(template)
    bos = tokenizer.bos_token_id
    ids = {
        writer.add_bos_token_id: bos,
        writer.add_eos_token_id: tokenizer.eos_token_id,
        writer.add_unk_token_id: tokenizer.unk_token_id,
        writer.add_pad_token_id: tokenizer.pad_token_id,
        writer.add_eot_token_id: end,
        writer.add_eom_token_id: next(iter(others), None),  # after a tool call
    }
    for add, number in ids.items():
        if number is not None:
            add(number)
    writer.add_add_bos_token(bos is not None and tokenizer("a").input_ids[:1] == [bos])
    writer.add_add_eos_token(False)
    writer.add_chat_template(chat_template(template))


def chat_template(template: ChatTemplate) -> str:
    """The template as one text that needs no arguments: those of `model.chat_template_kwargs` are set in it."""
    own = template.tokenizer.get_chat_template()
    given = "".join(f"{{%- set {name} = {_jinja(value)} %}}" for name, value in template.kwargs.items())
    return given + own


def _jinja(value: Any) -> str:
    """A value as Jinja reads it: as JSON, but for three names."""
    named = {True: "true", False: "false", None: "none"}
    return named[value] if value is None or isinstance(value, bool) else json.dumps(value, ensure_ascii=False)
