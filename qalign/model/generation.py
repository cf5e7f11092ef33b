"""Sampling completions from a role: one interface, `Engine.generate`, with two engines.

A token is the inverse of the distribution's cumulative sum at a number drawn beforehand for this very answer and place.
So what is sampled depends on the seed and the model alone, not on which answers share a batch or when the others end,
and a run that is resumed samples the same.
"""

import importlib.util
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from transformers import DynamicCache

from qalign.data.formats import Message
from qalign.data.tokenize import encode_prompt, end_of_turn_id
from qalign.errors import UserError
from qalign.model.base import Base
from qalign.model.logps import head_logits
from qalign.model.memory import kv_cache_bytes, usable_memory

COMPACT_AT = 0.25  # finished rows leave the batch once they are so large a share of it: leaving copies the KV cache
CACHE_SHARE = 0.5  # of the memory that is free, for the KV cache


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn: from the whole distribution, no top-k, no top-p, so that log-probs at this temperature are
    those of what was sampled.

    Attributes:
        max_new_tokens: where an answer is cut at the latest.
        temperature: 0 takes the likeliest token each time.
        ends: ids that end an answer; they belong to it.
    """

    max_new_tokens: int
    temperature: float
    ends: tuple[int, ...]


class Engine(Protocol):
    """What samples answers."""

    def generate(
        self, base: Base, role: str, prompts: Sequence[list[int]], sampling: Sampling, *, each: int, seed: int
    ) -> list[list[list[int]]]:
        """`each` answers to every prompt, as ids up to and including the token that ends them, if one did.

        Args:
            prompts: ids, generation prompt included.
            seed: fixes all that is drawn; the same for the same prompts gives the same answers.
        """


class TransformersEngine:
    """On the base in memory, with plain forwards: prompts of like length together, padded on the left and read once
    for all their answers; a KV cache; finished rows leave the batch."""

    @torch.no_grad()
    def generate(self, base, role, prompts, sampling, *, each, seed):
        found: list[list[list[int]]] = [[] for _ in prompts]
        draws = _draws(len(prompts) * each, sampling, seed).view(len(prompts), each, -1)
        order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
        at_once = _prompts_at_once(base, max(map(len, prompts)) + sampling.max_new_tokens, each)
        with base.acting_as(role) as lm:
            for start in range(0, len(order), at_once):
                numbers = order[start : start + at_once]
                some = [prompts[number] for number in numbers]
                answers = _generate(lm, base.tokenizer.pad_token_id, some, sampling, draws[numbers].flatten(0, 1), each)
                for place, number in enumerate(numbers):
                    found[number] = answers[place * each : (place + 1) * each]
        return found


def _draws(answers: int, sampling: Sampling, seed: int) -> Tensor:
    """The numbers in [0, 1) that decide each token: float64 `(answers, tokens)`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(answers, sampling.max_new_tokens, dtype=torch.float64, generator=generator)


def _prompts_at_once(base: Base, tokens: int, each: int) -> int:
    """How many prompts' KV caches may be held."""
    device, row = base.lm.device.type, kv_cache_bytes(base.lm.config, tokens, base.dtype.itemsize) * each
    held = torch.cuda.memory_allocated() if device == "cuda" else 0
    return max(1, int(CACHE_SHARE * (usable_memory(device) - held)) // row)


def _generate(lm, pad_id: int, prompts: list[list[int]], sampling: Sampling, draws: Tensor, each: int):
    """Answers to one batch of prompts, `each` in a row: ids. `draws` is `(answers, tokens)`."""
    longest, device = max(map(len, prompts)), lm.device
    ids = torch.full((len(prompts), longest), pad_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):  # on the left, so that all answers begin in the same column
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    ids, mask, draws = ids.to(device), mask.to(device), draws.to(device)
    cache, ends = DynamicCache(config=lm.config), torch.tensor(sampling.ends, device=device)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    states = _last_states(lm, ids, mask, positions, cache)
    if each > 1:
        cache.batch_repeat_interleave(each)
        states, mask, positions = (t.repeat_interleave(each, dim=0) for t in (states, mask, positions))
    position = positions[:, -1:]
    answers: list[list[int]] = [[] for _ in range(len(draws))]
    rows = torch.arange(len(draws), device=device)  # which answer each row of the batch is
    running = torch.ones_like(rows, dtype=torch.bool)
    for token in range(sampling.max_new_tokens):
        drawn = _sampled(head_logits(lm, states), draws[rows, token], sampling.temperature)
        for row, word in zip(rows[running].tolist(), drawn[running].tolist(), strict=True):
            answers[row].append(word)
        running = running & ~torch.isin(drawn, ends)
        left = int(running.sum())
        if not left or token + 1 == sampling.max_new_tokens:
            return answers
        if left <= (1 - COMPACT_AT) * len(rows):
            cache.batch_select_indices(running.nonzero()[:, 0])
            drawn, mask, position, rows = (tensor[running] for tensor in (drawn, mask, position, rows))
            running = running[running]
        mask, position = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1), position + 1
        states = _last_states(lm, drawn[:, None], mask, position, cache)
    return answers


def _last_states(lm, ids: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache) -> Tensor:
    """Hidden states `(rows, hidden)` at the last place."""
    return lm.base_model(
        input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
    ).last_hidden_state[:, -1]


def _sampled(logits: Tensor, draws: Tensor, temperature: float) -> Tensor:
    """The token of each row at which the cumulative probability first exceeds its number: `(rows,)`."""
    if not temperature:
        return logits.argmax(dim=-1)
    cumulative = (logits.float() / temperature).softmax(dim=-1).double().cumsum(dim=-1)
    drawn = torch.searchsorted(cumulative, draws[:, None] * cumulative[:, -1:], right=True)[:, 0]
    return drawn.clamp(max=logits.shape[-1] - 1)


VLLM_SHARE = 0.4  # of the card, for vLLM's copy of the base and its KV cache


class VllmEngine:
    """vLLM on the same GPU: faster rollouts, for a second copy of the base in 4 bits in vLLM's own memory. The role's
    adapter is written out and loaded into it at every call.

    Args:
        base: whose weights vLLM loads for itself, from the folder or hub id that they come from.
        max_tokens: of prompt and answer.
        memory_share: of the GPU, for vLLM's copy and its KV cache.
    """

    def __init__(self, base: Base, max_tokens: int, memory_share: float = VLLM_SHARE):
        import vllm

        self._calls = 0
        ranks = [config.r for config in getattr(base.model, "peft_config", {}).values()]
        self._llm = vllm.LLM(
            model=base.origin.source,
            revision=base.origin.hub_revision,
            dtype=str(base.dtype).removeprefix("torch."),
            quantization="bitsandbytes",
            enable_lora=True,
            max_lora_rank=max(8, 1 << (max(ranks, default=1) - 1).bit_length()),  # it takes powers of 2
            max_model_len=max_tokens,
            gpu_memory_utilization=memory_share,
            enforce_eager=True,  # graphs would take memory that the updates need
            generation_config="vllm",  # not the model's own, which may end answers at ids of its own
        )

    def generate(self, base, role, prompts, sampling, *, each, seed):
        import vllm
        from vllm.lora.request import LoRARequest

        self._calls += 1
        # A request an answer: vLLM numbers the seeds of one request's answers on, into those of the next.
        seeds = torch.randint(2**62, (len(prompts) * each,), generator=torch.Generator().manual_seed(seed)).tolist()
        params = [
            vllm.SamplingParams(
                max_tokens=sampling.max_new_tokens,
                temperature=sampling.temperature,
                top_p=1.0,
                top_k=-1,
                stop_token_ids=list(sampling.ends),
                seed=own,
                detokenize=False,
            )
            for own in seeds
        ]
        with tempfile.TemporaryDirectory() as folder:
            adapter = None
            if role in base.adapters:
                base.save_adapter(role, Path(folder) / role)
                adapter = LoRARequest(f"{role}-{self._calls}", self._calls, str(Path(folder) / role))
            asked = [{"prompt_token_ids": list(prompt)} for prompt in prompts for _ in range(each)]
            outputs = self._llm.generate(asked, params, lora_request=adapter, use_tqdm=False)
        answers = [list(output.outputs[0].token_ids) for output in outputs]
        return [answers[start : start + each] for start in range(0, len(answers), each)]


def engine(name: str, base: Base, max_tokens: int) -> Engine:
    """The engine of a recipe: `transformers`, or `vllm`.

    Raises:
        UserError: vLLM is asked for and can't be had, or would hold another model.
    """
    if name == "transformers":
        return TransformersEngine()
    if base.lm.device.type != "cuda" or importlib.util.find_spec("vllm") is None:
        raise UserError("ppo.engine: 'vllm' needs a GPU and `pip install vllm`; use 'transformers'")
    if base.spec.quantization != "nf4":
        raise UserError(
            f"ppo.engine: 'vllm' holds its copy in nf4, model.quantization is '{base.spec.quantization}': its answers "
            "would be another model's; use 'transformers'"
        )
    return VllmEngine(base, max_tokens)


def end_ids(tokenizer, template_kwargs: dict) -> tuple[int, ...]:
    """The ids that end an answer: the template's end of turn, and EOS."""
    return tuple(dict.fromkeys([end_of_turn_id(tokenizer, template_kwargs), tokenizer.eos_token_id]))


def with_end_of_turn(answer: list[int], ends: tuple[int, ...]) -> list[int]:
    """An answer with the end of turn that a reward model reads its score at, whatever it ended with, if with anything.

    Args:
        ends: as `end_ids` has them.
    """
    return [*(answer[:-1] if answer[-1] in ends else answer), ends[0]]


def text_of(tokenizer, answer: list[int]) -> str:
    """An answer without special tokens."""
    return tokenizer.decode(answer, skip_special_tokens=True).strip()


def complete(
    base: Base, role: str, prompts: list[list[Message]], *, max_new_tokens: int, template_kwargs: dict
) -> list[str]:
    """The likeliest answer (greedy decoding) of a role to each prompt, as text without special tokens.

    Args:
        base: with a policy, if the role is one.
        prompts: dialogues that end with a user's turn.
        max_new_tokens: where an answer is cut at the latest.
        template_kwargs: the recipe's `model.chat_template_kwargs`.
    """
    ids = [encode_prompt(base.tokenizer, prompt, template_kwargs) for prompt in prompts]
    sampling = Sampling(max_new_tokens, 0.0, end_ids(base.tokenizer, template_kwargs))
    found = TransformersEngine().generate(base, role, ids, sampling, each=1, seed=0)
    return [text_of(base.tokenizer, answer) for (answer,) in found]
