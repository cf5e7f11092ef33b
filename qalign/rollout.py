"""Sampling completions from a role."""

import torch

from qalign.base import Base, Role
from qalign.rows import Message
from qalign.tokens import encode_prompt, end_of_turn_id


@torch.no_grad()
def complete(
    base: Base, role: Role, prompts: list[list[Message]], *, max_new_tokens: int, template_kwargs: dict
) -> list[str]:
    """The likeliest answer (greedy decoding) of a role to each prompt, as text without special tokens.

    Args:
        base: with a policy, if the role is one.
        prompts: dialogues that end with a user's turn.
        max_new_tokens: where an answer is cut at the latest.
        template_kwargs: the recipe's `model.chat_template_kwargs`.
    """
    prompt_ids = [encode_prompt(base.tokenizer, prompt, template_kwargs) for prompt in prompts]
    longest = max(map(len, prompt_ids))
    input_ids = torch.full((len(prompts), longest), base.tokenizer.pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    for row, ids in enumerate(prompt_ids):  # on the left, so that all answers begin in the same column
        input_ids[row, longest - len(ids) :] = torch.tensor(ids)
        attention_mask[row, longest - len(ids) :] = 1
    with base.acting_as(role) as lm:
        output = lm.generate(
            input_ids=input_ids.to(lm.device),
            attention_mask=attention_mask.to(lm.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=[base.tokenizer.eos_token_id, end_of_turn_id(base.tokenizer, template_kwargs)],
            pad_token_id=base.tokenizer.pad_token_id,
        )
    return [text.strip() for text in base.tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True)]
