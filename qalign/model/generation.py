"""Sampling completions from a role: one decoding loop, streamed or collected, and vLLM as another engine.

Inverse-CDF sampling: every (answer, position) has its own uniform number, drawn before decoding. So the tokens depend
on the seed and the model, but not on which answers share a batch or when others end. A resumed run repeats them.
"""

import importlib.util
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import accumulate, count, groupby
from pathlib import Path
from random import shuffle
from typing import cast

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from qalign.data.templates import ChatTemplate
from qalign.data.tokenize import end_of_turn_ids
from qalign.errors import UserError
from qalign.model.adapters.serving import MAX_RANKS, highest_rank
from qalign.model.base import Base, Role
from qalign.model.decoding.adapters import is_plain_lora, serves, spans_of
from qalign.model.decoding.decoder import Decoder, decoder_of
from qalign.model.decoding.mixture import Mixture, RowPlan
from qalign.model.decoding.rows import last_logits, prompt_inputs
from qalign.model.decoding.vllm_engine import VllmEngine
from qalign.model.decoding.vllm_server import VllmServer
from qalign.model.memory.first_step import free_unused, is_out_of_memory
from qalign.model.memory.forecast import free_memory

CACHE_SHARE = 0.5  # share of the free memory that the KV cache may take
GREEDY_BELOW = 1e-3  # nucleus sampling below this temperature is greedy: dividing the logits by less could overflow
TURN_TOKENS = 8  # steps of one batch before the next batch's turn: a change of role costs a third of a token on SmolLM2


@dataclass(frozen=True)
class Sampling:
    """How answers are sampled. There is no top-k."""

    max_new_tokens: int  # the longest an answer may get; it is cut there
    temperature: float  # the logits are divided by it; 0 decodes greedily
    stop_ids: tuple[int, ...]  # ids that end an answer; the answer includes the one that ended it
    # Nucleus sampling (Holtzman et al. 2020, arXiv:1904.09751): only the likeliest tokens that together have this
    # probability are sampled. 1, the whole distribution, is for those who need its log-probs.
    top_p: float = 1.0


@dataclass(frozen=True, eq=False)
class Request:
    """Answers wanted from a role to one prompt."""

    role: str  # a `Role`, or the name of an adapter on the base
    prompt_ids: list[int]  # generation prompt included
    draws: Tensor  # `uniform_draws`: float64 `(num_samples, max_new_tokens)` in [0, 1), one for every token
    mixture: Mixture | None = None  # another role whose logits are mixed with those of `role`

    @property
    def roles(self) -> list[str]:
        """The roles that read it."""
        return [self.role] if self.mixture is None else [self.role, self.mixture.other]


Choose = Callable[[Tensor, Tensor, Sampling], Tensor]  # (logits, draws, sampling) to tokens: `inverse_cdf`, `nucleus`
Step = list[tuple[int, int, int]]  # (number of the request, number of its answer, new token) of every answer that grew


def uniform_draws(seed: int, num_samples: int, max_new_tokens: int) -> Tensor:
    """Uniform numbers in [0, 1), one for every token of every answer: float64 `(num_samples, max_new_tokens)`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(num_samples, max_new_tokens, dtype=torch.float64, generator=generator)


def inverse_cdf(logits: Tensor, draws: Tensor, sampling: Sampling) -> Tensor:
    """The first token of each row, in the vocabulary's order, whose cumulative probability exceeds the row's draw:
    int64 `(rows,)`, from logits `(rows, vocabulary)` and draws float64 `(rows,)` in [0, 1). It ignores `top_p`."""
    if not sampling.temperature:
        return logits.argmax(dim=-1)
    cumulative = (logits.float() / sampling.temperature).softmax(dim=-1).double().cumsum(dim=-1)
    tokens = torch.searchsorted(cumulative, draws[:, None] * cumulative[:, -1:], right=True)[:, 0]
    return tokens.clamp(max=logits.shape[-1] - 1)


def nucleus(logits: Tensor, draws: Tensor, sampling: Sampling) -> Tensor:
    """Like `inverse_cdf`, but in the order of probability, likeliest first, and within the `top_p` nucleus only."""
    if sampling.temperature < GREEDY_BELOW:
        return logits.argmax(dim=-1)
    probabilities = (logits.float() / sampling.temperature).softmax(dim=-1)
    descending, order = probabilities.sort(dim=-1, descending=True, stable=True)
    cumulative = (descending := descending.double()).cumsum(dim=-1)
    last = (cumulative - descending < sampling.top_p).sum(dim=-1, keepdim=True) - 1  # the likeliest token always stays
    last = last.clamp(min=0)  # without numbers there is none, and an index that is out of range stops a GPU for good
    place = torch.searchsorted(cumulative, draws[:, None] * cumulative.gather(1, last), right=True)
    return order.gather(1, torch.minimum(place, last))[:, 0]


def stream(base: Base, requests: Sequence[Request], sampling: Sampling, choose: Choose | None = None) -> Iterator[Step]:
    """Decodes the answers to all requests token by token, and yields the new tokens after each step. An answer is
    complete with one of `stop_ids`, or with `max_new_tokens` tokens.

    Roles with plain LoRA adapters are decoded together: a 4-bit base spends most of a step on unpacking its weights, so
    two roles take little longer than one. Adapters that are more than LoRA take turns.

    While the iterator is suspended, the base stays in a role and gradients are off: exhaust it in one thread, or close
    it. `choose` samples the next tokens; it is `nucleus` if left out.
    """
    decoder, roles = decoder_of(base), {role for request in requests for role in request.roles}
    held = {role for role in roles if serves(base, role)}
    with torch.no_grad(), decoder.session(base, held), ExitStack() as closing:
        turns = deque[tuple[str, Iterator[Step]]]()
        for batch in _batches(base, decoder, requests):
            role = next(iter(batch.values())).role
            steps = _decode(base, decoder, batch, sampling, choose or nucleus)
            closing.callback(steps.close)
            turns.append((Role.BASE if role in held else role, steps))
        while turns:
            role, steps = turns.popleft()
            with base.acting_as(role), decoder.adapters.on():
                for _ in range(TURN_TOKENS) if turns else count():
                    if (step := next(steps, None)) is None:
                        break
                    yield step
                else:
                    turns.append((role, steps))


def _batches(base: Base, decoder: Decoder, requests: Sequence[Request]) -> list[dict[int, Request]]:
    """The requests by number, in groups that one forward pass can serve, roles beside each other."""
    roles = sorted({request.role for request in requests})
    shuffle(roles)  # in a blind comparison, the order of answering must not tell which model is which
    by_role = [{number: request for number, request in enumerate(requests) if request.role == role} for role in roles]
    every = {role for request in requests for role in request.roles}
    if len(every) > 1 and decoder.adapters.mixes(base, every):
        return [{number: request for group in by_role for number, request in group.items()}]
    if any(request.mixture for request in requests):
        raise UserError("logits are mixed of the bare base and plain LoRA adapters alone: no DoRA, no modules_to_save")
    return by_role


def _decode(
    base: Base, decoder: Decoder, batch: dict[int, Request], sampling: Sampling, choose: Choose
) -> Generator[Step]:
    """Decodes one batch. Complete answers leave it when that pays."""
    answers = [(number, sample) for number, request in batch.items() for sample in range(len(request.draws))]
    running, stop_ids = set(answers), frozenset(sampling.stop_ids)
    requests = list(batch.values())
    draws = torch.cat([request.draws for request in requests]).to(base.lm.device)
    read = [(request.prompt_ids, role) for request in requests for role in request.roles]
    starts = accumulate((len(request.roles) for request in requests), initial=0)
    plan = RowPlan([(s, request.mixture) for s, request in zip(starts, requests, strict=False) for _ in request.draws])
    inputs = prompt_inputs(base.lm, [ids for ids, _ in read], base.tokenizer.pad_token_id, base.row_cache.name)
    with decoder.adapters.answering(spans_of([role for _, role in read])):
        logits = plan.logits(last_logits(base.lm, inputs)[plan.prompts])
    roles = [read[place][1] for place in plan.prompts]
    with decoder.rows(base, inputs, plan.prompts, roles, sampling.max_new_tokens) as rows:
        for length in range(sampling.max_new_tokens):
            tokens = choose(logits, draws[:, length], sampling)
            step = [(*answer, token) for answer, token in zip(answers, _on_host(tokens, logits), strict=True)]
            yield [grown for grown in step if grown[:2] in running]
            running -= {(number, sample) for number, sample, token in step if token in stop_ids}
            if not running or length + 1 == sampling.max_new_tokens:
                return
            kept = [place for place, answer in enumerate(answers) if answer in running]
            if len(kept) < len(answers):
                fewer, kept_rows = plan.keep(kept)
                if rows.keep(kept_rows):
                    answers, draws, tokens, plan = [answers[p] for p in kept], draws[kept], tokens[kept], fewer
            logits = plan.logits(rows.step(plan.tokens(tokens)))


def _on_host(tokens: Tensor, logits: Tensor) -> list[int]:
    """The tokens that were sampled: the one time in a step that the host waits for the device."""
    has_numbers = logits.amax(dim=-1).isfinite()  # a token that is ruled out may have -inf
    found = tokens.where(has_numbers, -1).tolist()
    if min(found) < 0:
        raise UserError(
            f"the model gives no numbers in {str(logits.dtype).removeprefix('torch.')} on {logits.device.type}: the "
            "range of this dtype is too small, or the weights of the base or an adapter are not finite; try another "
            "model.compute_dtype"
        )
    return found


class TransformersEngine:
    """Collects what `stream` decodes on the base in memory, in batches of prompts of similar length.

    A batch that runs out of memory is decoded again in halves, down to one answer, and later ones are no larger; as
    every token has a draw of its own, the same tokens are sampled."""

    def __init__(self):
        self._most_answers = sys.maxsize  # at once, after memory ran out

    def generate(
        self,
        base: Base,
        role: str | Sequence[str],
        prompts: Sequence[list[int]],
        sampling: Sampling,
        *,
        num_samples: int,
        seed: int,
        mixture: Mixture | None = None,
        only: Sequence[int] | None = None,
    ) -> list[list[list[int]]]:
        """`num_samples` answers to every prompt, as token ids with the stop id if an answer ended by itself. Prompts
        are token ids with the generation prompt; `role` is that of all, or one for each, and a `mixture` that
        of all. The same seed, roles and prompts give the same answers, also to prompts with these numbers `only`."""
        roles = [role] * len(prompts) if isinstance(role, str) else role
        draws = uniform_draws(seed, len(prompts) * num_samples, sampling.max_new_tokens)
        answers: list[list[int]] = [[] for _ in draws]
        wanted = range(len(prompts)) if only is None else only
        shortest_first = sorted(wanted, key=lambda number: len(prompts[number]))
        order = [number * num_samples + sample for number in shortest_first for sample in range(num_samples)]
        max_tokens = max(map(len, prompts)) + sampling.max_new_tokens
        decoder, start = decoder_of(base), 0
        with decoder.session(base, ()):
            memory = CACHE_SHARE * free_memory(base.lm.device.type) / (2 if mixture else 1)
            size = max(1, decoder.rows_within(memory, base, max_tokens) // num_samples) * num_samples
            while start < len(order):
                part = order[start : start + min(size, self._most_answers)]
                requests = {
                    number: Request(roles[number], prompts[number], draws[list(ids)], mixture)
                    for number, ids in groupby(part, lambda answer: answer // num_samples)
                }
                try:
                    for answer, ids in zip(part, _collected(base, [*requests.values()], sampling), strict=True):
                        answers[answer] = ids
                except RuntimeError as error:
                    if len(part) == 1 or not is_out_of_memory(error):
                        raise
                    self._most_answers = len(part) // 2
                else:
                    start += len(part)
                    continue
                free_unused()  # out here the traceback is gone, whose frames hold the cache
                fewer = f"it goes on with at most {self._most_answers} at once"
                tqdm.write(f"out of memory while sampling answers: {fewer}, which changes no token")
        return [answers[number * num_samples : (number + 1) * num_samples] for number in wanted]


def _collected(base: Base, requests: list[Request], sampling: Sampling) -> list[list[int]]:
    """The answers to one batch of requests, one after the other."""
    answers: list[list[list[int]]] = [[[] for _ in request.draws] for request in requests]
    for step in stream(base, requests, sampling, inverse_cdf if sampling.top_p >= 1 else nucleus):
        for place, sample, token in step:
            answers[place][sample].append(token)
    return [answer for of_request in answers for answer in of_request]


Engine = TransformersEngine | VllmEngine | VllmServer


def engine(name: str, base: Base, max_tokens: int, key: str, folder: Path) -> Engine:
    """The engine that a recipe names: `transformers`, `vllm` or the address of a vLLM server, which reads adapters in
    `folder`. Raises `UserError` if vLLM, its GPU or the server is missing, if vLLM doesn't serve the policy's adapter,
    or if it would hold other weights than the base."""
    if name == "transformers":
        return TransformersEngine()
    if not is_plain_lora(config := getattr(base.model, "peft_config", {}).get(Role.POLICY)):
        raise UserError(f"{key}: '{name}' takes plain LoRA alone, no DoRA and no modules_to_save; use 'transformers'")
    if config and highest_rank(config) > MAX_RANKS[-1]:
        raise UserError(f"{key}: '{name}' takes LoRA up to rank {MAX_RANKS[-1]}; lower lora.r, or use 'transformers'")
    if name != "vllm":
        return VllmServer(base, key, name, folder)
    if base.lm.device.type != "cuda" or importlib.util.find_spec("vllm") is None:
        raise UserError(f"{key}: 'vllm' needs a GPU and `pip install vllm`; use 'transformers'")
    spec = base.spec  # of a base that is stored in 4 bits, vLLM loads the same weights
    if base.origin.stored is None and (spec.quantization != "nf4" or not spec.double_quant):
        held = f"is '{spec.quantization}'" if spec.quantization != "nf4" else "has double_quant: false"
        raise UserError(
            f"{key}: 'vllm' quantises its copy to nf4 with double quantisation, but model.quantization "
            f"{held}: its answers would come from another model; use 'transformers'"
        )
    return VllmEngine(base, max_tokens)


def stop_ids_of(template: ChatTemplate) -> tuple[int, ...]:
    """The ids that end an answer: the chat template's ends of turn, then EOS if it is another."""
    return tuple(dict.fromkeys([*end_of_turn_ids(template), cast("int", template.tokenizer.eos_token_id)]))


def with_end_of_turn(answer: list[int], stop_ids: tuple[int, ...]) -> list[int]:
    """An answer with the chat template's end of turn as its last id, where a reward model reads its score: it replaces
    another of the `stop_ids_of`, and is appended to an answer that was cut."""
    return [*(answer[:-1] if answer[-1] in stop_ids else answer), stop_ids[0]]


def text_of(tokenizer: PreTrainedTokenizerBase, answer: list[int]) -> str:
    """An answer as text, without special tokens."""
    return str(tokenizer.decode(answer, skip_special_tokens=True)).strip()


def complete(base: Base, role: str, prompts: Sequence[list[int]], *, max_new_tokens: int) -> list[str]:
    """The greedy answer of a role to each prompt, as text without special tokens. A prompt is token ids with the
    generation prompt."""
    sampling = Sampling(max_new_tokens, 0.0, stop_ids_of(base.template))
    answers = TransformersEngine().generate(base, role, prompts, sampling, num_samples=1, seed=0)
    return [text_of(base.tokenizer, answer) for (answer,) in answers]
