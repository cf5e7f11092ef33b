"""A tokenizer with its chat template, and everything else that decides how a dialogue becomes text.

They travel together, as one `ChatTemplate`, through training, evaluation, sampling and the page, so that a dialogue is
rendered in one way everywhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from qalign.data.readers import BadRow
from qalign.data.shapes import Message
from qalign.errors import UserError

Tokenizer = Any  # transformers' PreTrainedTokenizerBase; its own type hints are too loose to check against

PLAIN_TEMPLATE = """\
{%- for message in messages %}
{{- '<|' + message['role'] + '|>\\n' + message['content'] | trim + eos_token + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"""
"""For base models without a chat template: Zephyr's, which needs no new tokens (an untrained embedding in a frozen base
would never be learned)."""


@dataclass(frozen=True, eq=False)
class ChatTemplate:
    """How dialogues are rendered: a tokenizer that has a chat template, and the recipe's settings."""

    tokenizer: Tokenizer
    kwargs: dict[str, Any] = field(default_factory=dict[str, Any])  # `model.chat_template_kwargs`
    words: str = "the model's own"  # which template this is

    def __str__(self) -> str:
        return self.words

    def render(self, turns: Sequence[Message], *, add_generation_prompt: bool) -> str:
        """A dialogue as text; a `BadRow` if the template refuses it."""
        try:
            return self.tokenizer.apply_chat_template(
                list(turns), tokenize=False, add_generation_prompt=add_generation_prompt, **self.kwargs
            )
        except (ValueError, TypeError, TemplateError) as error:
            raise BadRow(f"the chat template refuses it: {error}") from None

    def ids(self, text: str) -> list[int]:
        """The ids of a rendered text, special tokens included."""
        return self.tokenizer(text, add_special_tokens=False).input_ids


def prepare_template(
    tokenizer: Tokenizer, template_file: str | None = None, kwargs: dict[str, Any] | None = None
) -> ChatTemplate:
    """Gives a tokenizer a chat template that writes one BOS, and a pad token, in place.

    If the tokenizer puts a BOS before plain text and the template writes none (Zephyr), the template is changed to
    write it, so that training, qalign, vLLM and plain transformers all see the same ids.

    Args:
        template_file, kwargs: the recipe's `model.chat_template` and `model.chat_template_kwargs`.

    Raises:
        UserError: the template file is missing or isn't a valid template.
    """
    if tokenizer.eos_token is None:
        raise UserError("the tokenizer has no end-of-sequence token, so no answer would ever end")
    words = "the model's own"
    if template_file:
        try:
            tokenizer.chat_template, words = Path(template_file).read_text(encoding="utf-8"), template_file
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"model.chat_template: '{template_file}' can't be read: {error}") from None
    elif not tokenizer.chat_template:
        tokenizer.chat_template, words = PLAIN_TEMPLATE, "qalign's plain one, as the model has none"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is masked by length, never by its id
    try:
        text = ChatTemplate(tokenizer).render([{"role": "user", "content": "a"}], add_generation_prompt=True)
    except Exception as error:  # Jinja's own errors have many classes
        raise UserError(f"the chat template ({words}) can't be used: {error}") from None
    bos = tokenizer.bos_token_id
    if bos is not None and tokenizer("a").input_ids[0] == bos and not text.startswith(tokenizer.bos_token):
        tokenizer.chat_template = "{{- bos_token }}" + tokenizer.get_chat_template()
        words += ", with the BOS it left out"
    return ChatTemplate(tokenizer, kwargs or {}, words)
