"""Completions of a role: what greedy decoding gives row by row, in batches too."""

import torch

from qalign.base import Role
from qalign.recipe import Lora
from qalign.rollout import complete
from qalign.tokens import encode_prompt
from tests.helpers import scramble

PROMPTS = [[{"role": "user", "content": text}] for text in ("Why?", "What is a good first line for a book report?")]


def greedy(base, role: Role, prompt: list, tokens: int) -> str:
    """One token after the other from the full forward, without cache or padding."""
    ids = encode_prompt(base.tokenizer, prompt, {})
    start = len(ids)
    for _ in range(tokens):
        with torch.no_grad(), base.acting_as(role) as lm:
            ids.append(lm(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item())
        if ids[-1] == base.tokenizer.eos_token_id:
            break
    return base.tokenizer.decode(ids[start:], skip_special_tokens=True).strip()


def test_batched_completions_are_greedy_decoding_of_the_role(tiny_base):
    tiny_base.add_adapter(Role.POLICY, Lora(r=4))
    scramble(tiny_base)
    tiny_base.model.eval()
    answers = {}
    for role in Role:
        answers[role] = complete(tiny_base, role, PROMPTS, max_new_tokens=8, template_kwargs={})
        assert answers[role] == [greedy(tiny_base, role, prompt, 8) for prompt in PROMPTS]
    assert answers[Role.POLICY] != answers[Role.REFERENCE]
