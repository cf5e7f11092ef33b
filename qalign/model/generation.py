"""Sampling completions from a role: one decoding loop, streamed or collected, and vLLM as another engine.

Inverse-CDF sampling: every (answer, position) has its own uniform number, drawn before decoding. So the tokens depend
on the seed and the model, but not on which answers share a batch or when others end. A resumed run repeats them.
"""

import importlib.util
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from random import shuffle
from typing import Any, cast

import peft
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import DynamicCache, PreTrainedTokenizerBase

from qalign.data.formats import Message
from qalign.data.templates import ChatTemplate
from qalign.data.tokenize import encode_prompt, end_of_turn_ids
from qalign.errors import UserError
from qalign.model.base import Base, Role
from qalign.model.logps import backbone
from qalign.model.memory.forecast import free_memory
from qalign.model.memory.kv_cache import padded_prompts, uncached_logits

COMPACT_AT = 0.25  # ended rows leave the batch once they are this share of it, because leaving copies the KV cache
CACHE_SHARE = 0.5  # share of the free memory that the KV cache may take
GREEDY_BELOW = 1e-3  # nucleus sampling below this temperature is greedy: dividing the logits by less could overflow
TURN_TOKENS = 8  # steps of one batch before the next batch's turn: a change of role costs a third of a token on SmolLM2
VLLM_SHARE = 0.4  # share of the GPU's memory for vLLM's copy of the base and its KV cache


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
    if not logits.amax(dim=-1).isfinite().all():  # a token that is ruled out may have -inf
        raise UserError(
            f"the model gives no numbers in {str(logits.dtype).removeprefix('torch.')} on {logits.device.type}: the "
            "range of this dtype is too small, or the weights of the base or an adapter are not finite; try another "
            "model.compute_dtype"
        )
    if sampling.temperature < GREEDY_BELOW:
        return logits.argmax(dim=-1)
    probabilities = (logits.float() / sampling.temperature).softmax(dim=-1).double()
    descending, order = probabilities.sort(dim=-1, descending=True, stable=True)
    cumulative = descending.cumsum(dim=-1)
    last = (cumulative - descending < sampling.top_p).sum(dim=-1, keepdim=True) - 1  # the likeliest token always stays
    place = torch.searchsorted(cumulative, draws[:, None] * cumulative.gather(1, last), right=True)
    return order.gather(1, torch.minimum(place, last))[:, 0]


def stream(base: Base, requests: Sequence[Request], sampling: Sampling, choose: Choose | None = None) -> Iterator[Step]:
    """Decodes the answers to all requests token by token, and yields the new tokens after each step. An answer is
    complete with one of `stop_ids`, or with `max_new_tokens` tokens.

    Roles whose adapters PEFT can mix in one batch are decoded together: a 4-bit base spends most of a step on unpacking
    its weights, so two roles take little longer than one. Adapters that are more than LoRA take turns.

    While the iterator is suspended, the base stays in its role and gradients are off: exhaust it in one thread, or
    close it. `choose` samples the next tokens; it is `nucleus` if left out.
    """
    turns = deque((batch, _decode(base, batch, sampling, choose or nucleus)) for batch in _batches(base, requests))
    while turns:
        batch, steps = turns.popleft()
        roles = [request.role for request in batch.values()]
        role = next((role for role in roles if role in base.adapters), roles[0])  # PEFT mixes while adapters are on
        with torch.no_grad(), base.acting_as(role):
            for _ in range(TURN_TOKENS) if turns else count():
                if (step := next(steps, None)) is None:
                    break
                yield step
            else:
                turns.append((batch, steps))


def _batches(base: Base, requests: Sequence[Request]) -> list[dict[int, Request]]:
    """The requests by number, in groups that one forward pass can serve. PEFT mixes only plain LoRA adapters in one."""
    roles = sorted({request.role for request in requests})
    configs = [getattr(base.model, "peft_config", {}).get(role) for role in roles]
    if len(roles) == 1 or (
        base.row_cache.name and _keeps_rows_apart(base) and not any(map(_is_more_than_lora, configs))
    ):
        return [dict(enumerate(requests))]
    shuffle(roles)  # in a blind comparison, the order of answering must not tell which model is which
    return [{number: request for number, request in enumerate(requests) if request.role == role} for role in roles]


def _keeps_rows_apart(base: Base) -> bool:
    """Whether every layer with an adapter is given the rows of a batch apart. (Some shared experts are given the tokens
    of all rows as one row.)"""
    batch, sizes = torch.ones(3, 2, dtype=torch.int64, device=base.lm.device), set[int]()
    with ExitStack() as hooks, torch.no_grad(), base.acting_as(base.role):
        for module in base.model.modules():
            if isinstance(module, BaseTunerLayer):
                hook = cast(nn.Module, module).register_forward_pre_hook(lambda _, inputs: sizes.add(len(inputs[0])))
                hooks.callback(hook.remove)
        backbone(base.lm)(input_ids=batch, use_cache=False)
    return sizes <= {len(batch)}


def _is_more_than_lora(config: peft.LoraConfig | None) -> bool:
    return config is not None and bool(config.use_dora or config.modules_to_save or config.trainable_token_indices)


def _decode(base: Base, batch: dict[int, Request], sampling: Sampling, choose: Choose) -> Iterator[Step]:
    """Decodes one batch. Complete answers leave it once they are `COMPACT_AT` of its rows."""
    rows = [(number, sample) for number, request in batch.items() for sample in range(len(request.draws))]
    running, stop_ids = set(rows), frozenset(sampling.stop_ids)
    draws = torch.cat([request.draws for request in batch.values()]).to(base.lm.device)
    inputs = _prompt_inputs(base, list(batch.values()))
    model, cache = base.model if "adapter_names" in inputs else base.lm, base.row_cache.name
    for length in range(sampling.max_new_tokens):
        logits = model(**inputs).logits[:, -1] if cache else uncached_logits(base.lm, inputs)
        if len(logits) < len(rows):  # a prompt is read once for all its answers
            prompt_rows = [place for place, request in enumerate(batch.values()) for _ in request.draws]
            logits, inputs = logits[prompt_rows], _select(inputs, prompt_rows, cache)
        tokens = choose(logits, draws[:, length], sampling)
        step = [(*row, token) for row, token in zip(rows, tokens.tolist(), strict=True)]
        yield [grown for grown in step if grown[:2] in running]
        running -= {(number, sample) for number, sample, token in step if token in stop_ids}
        if not running:
            return
        if len(running) <= (1 - COMPACT_AT) * len(rows):
            kept = [place for place, row in enumerate(rows) if row in running]
            rows, draws, tokens = [rows[k] for k in kept], draws[kept], tokens[kept]
            inputs = _select(inputs, kept, cache)
        before = inputs["input_ids"][:, :0] if cache else inputs["input_ids"]
        inputs["input_ids"] = torch.cat([before, tokens[:, None]], dim=1)
        inputs["position_ids"] = inputs["position_ids"][:, -1:] + 1
        inputs["attention_mask"] = pad(inputs["attention_mask"], (0, 1), value=1)


def _prompt_inputs(base: Base, requests: Sequence[Request]) -> dict[str, Any]:
    """What the model reads first."""
    prompts = [torch.tensor(request.prompt_ids, device=base.lm.device) for request in requests]
    inputs = padded_prompts(prompts, base.tokenizer.pad_token_id)
    if name := base.row_cache.name:
        inputs |= {name: DynamicCache(config=base.lm.config), "use_cache": True}
    # An index instead of 1, which gives the head a strided slice: 80 times slower in bfloat16 on a CPU.
    inputs["logits_to_keep"] = inputs["input_ids"].new_tensor([-1])
    adapters = [request.role if request.role in base.adapters else "__base__" for request in requests]
    return inputs | ({"adapter_names": adapters} if len(set(adapters)) > 1 else {})  # PEFT's, one for each row


def _select(inputs: dict[str, Any], rows: list[int], cache: str | None) -> dict[str, Any]:
    """Keeps these rows of the inputs and of their cache, in this order; a row may be named several times."""
    if cache:
        inputs[cache].reorder_cache(torch.tensor(rows, device=inputs["attention_mask"].device))
    names = {"adapter_names": [inputs["adapter_names"][row] for row in rows]} if "adapter_names" in inputs else {}
    return inputs | {name: inputs[name][rows] for name in ("input_ids", "attention_mask", "position_ids")} | names


class TransformersEngine:
    """Collects what `stream` decodes on the base in memory, in batches of prompts of similar length."""

    def generate(
        self, base: Base, role: str, prompts: Sequence[list[int]], sampling: Sampling, *, num_samples: int, seed: int
    ) -> list[list[list[int]]]:
        """`num_samples` answers to every prompt, as token ids with the stop id if an answer ended by itself. Prompts
        are token ids with the generation prompt. The same seed, role and prompts give the same answers."""
        draws = uniform_draws(seed, len(prompts) * num_samples, sampling.max_new_tokens).split(num_samples)
        requests = [Request(role, ids, drawn) for ids, drawn in zip(prompts, draws, strict=True)]
        answers: list[list[list[int]]] = [[[] for _ in range(num_samples)] for _ in prompts]
        order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
        max_tokens = max(map(len, prompts)) + sampling.max_new_tokens
        choose = inverse_cdf if sampling.top_p >= 1 else nucleus
        with torch.no_grad(), base.acting_as(role):
            prompt_bytes = base.row_cache.bytes(max_tokens) * num_samples
            size = max(1, int(CACHE_SHARE * free_memory(base.lm.device.type)) // prompt_bytes)
            for start in range(0, len(order), size):
                numbers = order[start : start + size]
                for step in stream(base, [requests[number] for number in numbers], sampling, choose):
                    for place, sample, token in step:
                        answers[numbers[place]][sample].append(token)
        return answers


class VllmEngine:
    """vLLM on the same GPU: faster sampling, but vLLM loads a second copy of the base in 4 bits. Each call saves the
    role's adapter to a temporary folder, from which vLLM loads it.

    Args:
        max_tokens: the most tokens of a prompt and its answer together.
        memory_share: share of the GPU's memory for vLLM's copy and its KV cache.
    """

    def __init__(self, base: Base, max_tokens: int, memory_share: float = VLLM_SHARE):
        import vllm  # pyright: ignore[reportMissingImports]: optional, needs a GPU

        self._calls = 0
        ranks = [config.r for config in getattr(base.model, "peft_config", {}).values()]
        self._llm = vllm.LLM(
            model=base.origin.source,
            revision=base.origin.hub_revision,
            dtype=str(base.dtype).removeprefix("torch."),
            quantization="bitsandbytes",
            enable_lora=True,
            max_lora_rank=max(8, 1 << (max(ranks, default=1) - 1).bit_length()),  # vLLM takes powers of 2
            max_model_len=max_tokens,
            gpu_memory_utilization=memory_share,
            enforce_eager=True,  # CUDA graphs would take memory that the updates need
            generation_config="vllm",  # not the model's own, which may end answers at other ids
        )

    def generate(
        self, base: Base, role: str, prompts: Sequence[list[int]], sampling: Sampling, *, num_samples: int, seed: int
    ) -> list[list[list[int]]]:
        """As `TransformersEngine.generate`; the tokens differ from its."""
        import vllm  # pyright: ignore[reportMissingImports]
        from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports]

        self._calls += 1
        # Every answer has its own request: vLLM gives the answers of one request consecutive seeds.
        generator = torch.Generator().manual_seed(seed)
        seeds = torch.randint(2**62, (len(prompts) * num_samples,), generator=generator).tolist()
        params = [
            vllm.SamplingParams(
                max_tokens=sampling.max_new_tokens,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=-1,
                stop_token_ids=list(sampling.stop_ids),
                seed=answer_seed,
                detokenize=False,
            )
            for answer_seed in seeds
        ]
        with tempfile.TemporaryDirectory() as folder:
            adapter = None
            if role in base.adapters:
                base.save_adapter(role, Path(folder) / role)
                adapter = LoRARequest(f"{role}-{self._calls}", self._calls, str(Path(folder) / role))
            asked = [{"prompt_token_ids": list(prompt)} for prompt in prompts for _ in range(num_samples)]
            outputs = self._llm.generate(asked, params, lora_request=adapter, use_tqdm=False)
        answers = [list(output.outputs[0].token_ids) for output in outputs]
        return [answers[start : start + num_samples] for start in range(0, len(answers), num_samples)]


Engine = TransformersEngine | VllmEngine


def engine(name: str, base: Base, max_tokens: int) -> Engine:
    """The engine that a recipe names: `transformers` or `vllm`. Raises `UserError` if vLLM or its GPU is missing, or if
    vLLM would hold other weights than the base."""
    if name == "transformers":
        return TransformersEngine()
    if base.lm.device.type != "cuda" or importlib.util.find_spec("vllm") is None:
        raise UserError("ppo.engine: 'vllm' needs a GPU and `pip install vllm`; use 'transformers'")
    if _is_more_than_lora(getattr(base.model, "peft_config", {}).get(Role.POLICY)):
        raise UserError("ppo.engine: 'vllm' takes plain LoRA alone, no DoRA and no modules_to_save; use 'transformers'")
    spec = base.spec  # of a base that is stored in 4 bits, vLLM loads the same weights
    if base.origin.stored is None and (spec.quantization != "nf4" or not spec.double_quant):
        held = f"is '{spec.quantization}'" if spec.quantization != "nf4" else "has double_quant: false"
        raise UserError(
            "ppo.engine: 'vllm' quantises its copy to nf4 with double quantisation, but model.quantization "
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


def complete(base: Base, role: str, prompts: list[list[Message]], *, max_new_tokens: int) -> list[str]:
    """The greedy answer of a role to each prompt, as text without special tokens. A prompt is a dialogue that ends with
    a user's turn."""
    ids = [encode_prompt(base.template, prompt) for prompt in prompts]
    sampling = Sampling(max_new_tokens, 0.0, stop_ids_of(base.template))
    answers = TransformersEngine().generate(base, role, ids, sampling, num_samples=1, seed=0)
    return [text_of(base.tokenizer, answer) for (answer,) in answers]
