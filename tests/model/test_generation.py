"""Completions of a role: what decoding token by token gives row by row, in batches too; and exact sampling."""

import importlib.util
import sys
import types
from pathlib import Path

import pytest
import torch

from qalign.config.recipe import Lora
from qalign.data.tokenize import encode_prompt
from qalign.errors import UserError
from qalign.model import generation
from qalign.model.base import Role
from qalign.model.generation import Sampling, TransformersEngine, complete, engine, stop_ids_of
from tests.helpers import scramble

PROMPTS = [[{"role": "user", "content": text}] for text in ("Why?", "What is a good first line for a book report?")]


@pytest.fixture
def base(tiny_base):
    tiny_base.add_adapter(Role.POLICY, Lora(r=4))
    scramble(tiny_base)
    tiny_base.model.eval()
    return tiny_base


@pytest.fixture
def ids(base) -> list[list[int]]:
    texts = ["Why?", "What is a good first line for a book report?", "Name three rivers, please.", "Why?"]
    return [encode_prompt(base.tokenizer, [{"role": "user", "content": text}], {}) for text in texts]


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


def sampled(base, prompt: list[int], draws: torch.Tensor, sampling: Sampling) -> list[int]:
    """The same with the inverse of the cumulative distribution, written out."""
    ids = list(prompt)
    for draw in draws.tolist():
        with torch.no_grad(), base.acting_as(Role.POLICY) as lm:
            logits = lm(input_ids=torch.tensor([ids])).logits[0, -1].double()
        total, drawn = 0.0, None
        for token, share in enumerate((logits / sampling.temperature).softmax(-1).tolist()):
            total += share
            if total > draw:
                drawn = token
                break
        ids.append(drawn)
        if drawn in sampling.stop_ids:
            break
    return ids[len(prompt) :]


def test_batched_completions_are_greedy_decoding_of_the_role(base):
    answers = {}
    for role in (Role.BASE, Role.POLICY, Role.REFERENCE):
        answers[role] = complete(base, role, PROMPTS, max_new_tokens=8, template_kwargs={})
        assert answers[role] == [greedy(base, role, prompt, 8) for prompt in PROMPTS]
    assert answers[Role.POLICY] != answers[Role.REFERENCE]


def test_what_is_sampled_is_the_distribution_at_the_numbers_drawn(base, ids):
    sampling = Sampling(6, 0.7, (base.tokenizer.eos_token_id,))
    found = TransformersEngine().generate(base, Role.POLICY, ids, sampling, num_samples=2, seed=5)
    generator = torch.Generator().manual_seed(5)
    draws = torch.rand(8, 6, dtype=torch.float64, generator=generator)
    expected = [sampled(base, ids[row // 2], draws[row], sampling) for row in range(8)]
    assert [answer for answers in found for answer in answers] == expected
    assert len({tuple(answer) for answers in found for answer in answers}) > 4, "answers to one prompt differ"


def test_tokens_are_drawn_as_often_as_they_are_likely():
    logits = torch.tensor([0.5, 0.25, 0.125, 0.125]).log().repeat(40_000, 1)
    draws = torch.rand(40_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for temperature, shares in ((1.0, [0.5, 0.25, 0.125, 0.125]), (0.5, [16 / 22, 4 / 22, 1 / 22, 1 / 22])):
        found = generation.inverse_cdf(logits, draws, Sampling(1, temperature, ())).bincount(minlength=4) / 40_000
        assert found.tolist() == pytest.approx(shares, abs=0.01)  # 4 standard errors


@pytest.mark.parametrize("draw", [0.0, 1 - 2**-53])
def test_the_outermost_numbers_give_tokens_that_are_possible(draw):
    logits = torch.tensor([[float("-inf"), 1.0, 2.0, float("-inf")]])
    found = generation.inverse_cdf(logits, torch.tensor([draw], dtype=torch.float64), Sampling(1, 1.0, ())).item()
    assert found == (1 if draw == 0 else 2)


def test_samples_do_not_depend_on_which_share_a_batch(base, ids, monkeypatch):
    sampling = Sampling(12, 1.0, tuple(range(0, 128_256, 5)))  # a fifth of all tokens ends an answer
    together = TransformersEngine().generate(base, Role.POLICY, ids, sampling, num_samples=3, seed=9)
    monkeypatch.setattr(generation, "CACHE_SHARE", 0.0)  # one prompt at a time
    assert TransformersEngine().generate(base, Role.POLICY, ids, sampling, num_samples=3, seed=9) == together
    lengths = {len(answer) for answers in together for answer in answers}
    assert len(lengths) > 2, "some rows left long before others"
    monkeypatch.setattr(generation, "COMPACT_AT", 2.0)  # nobody leaves
    assert TransformersEngine().generate(base, Role.POLICY, ids, sampling, num_samples=3, seed=9) == together


def test_finished_rows_leave_the_batch(base, ids):
    rows = []
    hook = base.lm.base_model.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    sampling = Sampling(12, 1.0, tuple(range(0, 128_256, 5)))
    found = TransformersEngine().generate(base, Role.POLICY, ids, sampling, num_samples=3, seed=9)
    hook.remove()
    assert rows[0] == (4, max(map(len, ids))), "each prompt is read once"
    sizes = [count for count, _ in rows[1:]]
    running = [sum(len(answer) > token for answers in found for answer in answers) for token in range(1, 12)]
    assert sizes == sorted(sizes, reverse=True)
    assert all(needed <= size <= needed / 0.75 for size, needed in zip(sizes, running, strict=False))
    assert sizes[-1] < 12


def test_answers_stop_at_the_token_that_ends_them_and_at_the_limit(base, ids):
    ends = tuple(range(0, 128_256, 5))
    for answers in TransformersEngine().generate(
        base, Role.POLICY, ids, Sampling(12, 1.0, ends), num_samples=3, seed=1
    ):
        for answer in answers:
            assert 1 <= len(answer) <= 12
            assert not any(token in ends for token in answer[:-1])
            assert answer[-1] in ends or len(answer) == 12


@pytest.mark.parametrize("answer", [[5, 6, 3], [5, 6, 4], [5, 6]])
def test_a_reward_model_reads_every_answer_at_its_end_of_turn(answer):
    assert generation.with_end_of_turn(answer, (3, 4)) == [5, 6, 3]


def test_sampling_leaves_the_model_as_it_was(base, ids):
    base.model.train()
    before = [(module, module.training) for module in base.model.modules()]
    flags = [p.requires_grad for p in base.model.parameters()]
    TransformersEngine().generate(base, Role.POLICY, ids, Sampling(2, 1.0, (0,)), num_samples=1, seed=0)
    assert all(module.training is was for module, was in before)
    assert [p.requires_grad for p in base.model.parameters()] == flags


def test_an_answer_ends_at_the_end_of_turn_and_at_eos(base):
    words = base.tokenizer.convert_ids_to_tokens(list(stop_ids_of(base.tokenizer, {})))
    assert words == ["<|eot_id|>"], "here they are one"


# --- vLLM, which no CPU has: what it would be told -------------------------------------------------------------------


@pytest.fixture
def vllm(monkeypatch):
    """A stand-in that keeps what it is called with."""
    module, told = types.ModuleType("vllm"), {}

    class LLM:
        def __init__(self, **options):
            told["options"] = options

        def generate(self, prompts, params, *, lora_request, use_tqdm):
            told.update(prompts=prompts, params=params, adapter=lora_request)
            told["files"] = lora_request and sorted(file.name for file in Path(lora_request[2]).iterdir())
            answers = (types.SimpleNamespace(token_ids=(7, number)) for number in range(len(params)))
            return [types.SimpleNamespace(outputs=[answer]) for answer in answers]

    module.LLM, module.SamplingParams = LLM, lambda **options: options
    request = types.ModuleType("vllm.lora.request")
    request.LoRARequest = lambda *args: args
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setitem(sys.modules, "vllm.lora", types.ModuleType("vllm.lora"))
    monkeypatch.setitem(sys.modules, "vllm.lora.request", request)
    return told


def test_vllm_is_told_the_same(base, ids, vllm):
    used = generation.VllmEngine(base, max_tokens=64)
    found = used.generate(base, Role.POLICY, ids, Sampling(6, 0.7, (3, 5)), num_samples=2, seed=10)
    assert found == [[[7, 0], [7, 1]], [[7, 2], [7, 3]], [[7, 4], [7, 5]], [[7, 6], [7, 7]]]
    assert vllm["options"]["max_lora_rank"] == 8
    assert vllm["options"]["generation_config"] == "vllm"
    assert vllm["options"]["quantization"] == "bitsandbytes"
    assert vllm["options"]["max_model_len"] == 64
    assert [prompt["prompt_token_ids"] for prompt in vllm["prompts"]] == [x for x in ids for _ in range(2)]
    expected = {"max_tokens": 6, "temperature": 0.7, "top_p": 1.0, "top_k": -1, "stop_token_ids": [3, 5]}
    assert all(params.items() >= expected.items() for params in vllm["params"])
    seeds = {params["seed"] for params in vllm["params"]}
    assert len(seeds) == 8
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(vllm["files"])
    first = vllm["adapter"]
    used.generate(base, Role.POLICY, ids, Sampling(6, 0.7, (3, 5)), num_samples=2, seed=10)
    assert vllm["adapter"][:2] != first[:2], "a new adapter needs a new name and number, or vLLM keeps the old one"
    assert seeds == {params["seed"] for params in vllm["params"]}
    used.generate(base, Role.BASE, ids, Sampling(6, 0.7, (3, 5)), num_samples=2, seed=11)
    assert vllm["adapter"] is None
    assert not seeds & {params["seed"] for params in vllm["params"]}, "the next iteration's are others"


@pytest.mark.parametrize(("rank", "room"), [(8, 8), (24, 32), (64, 64)])
def test_vllm_makes_room_for_the_adapters_own_rank(tiny_base, vllm, rank, room):
    tiny_base.add_adapter(Role.POLICY, Lora(r=rank))
    generation.VllmEngine(tiny_base, max_tokens=64)
    assert vllm["options"]["max_lora_rank"] == room


def test_vllm_would_answer_for_another_model_unless_the_base_is_in_nf4(base, vllm, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    base.lm = types.SimpleNamespace(device=torch.device("cuda"))
    base.spec = base.spec.model_copy(update={"quantization": "none"})
    with pytest.raises(UserError, match=r"model\.quantization is 'none'"):
        engine("vllm", base, 64)


def test_vllm_needs_a_gpu(base):
    with pytest.raises(UserError, match=r"ppo\.engine: 'vllm' needs a GPU and `pip install vllm`; use 'transformers'"):
        engine("vllm", base, 64)
