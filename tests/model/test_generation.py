"""Answers equal decoding one row at a time from full forward passes, of one role and of several; what vLLM is told."""

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
from qalign.model.decoding import decoder, rows
from qalign.model.generation import Request, Sampling, TransformersEngine, stream, uniform_draws
from tests.data.chat_families import templated
from tests.helpers import scramble
from tests.model.conftest import save_plain

TEXTS = ("Why?", "What is a good first line for a book report?", "Name three rivers, please.", "Why?")
TOKENS = 20
PROMPTS = [[{"role": "user", "content": text}] for text in TEXTS]
CALLING = (
    "{% for m in messages %}{{ m.role + ':' + m.content + (m.tool_calls | string if m.tool_calls else '') }}"
    "{{ '<|end_header_id|>' if m.tool_calls else '<|eot_id|>' }}{% endfor %}{{ 'assistant:' if add_generation_prompt }}"
)
FIFTH = tuple(range(0, 128_256, 5))  # a fifth of all tokens ends an answer


@pytest.fixture(params=["growing", "static"])
def cache(request, monkeypatch):
    """Both kinds of cache on a CPU, whose own is the growing one."""
    if request.param == "static":
        monkeypatch.setattr(decoder, "DEVICES", ("cpu",))
    return request.param


@pytest.fixture
def base(tiny_base, cache):
    """Three adapters that do something, next to the bare base. The third, a DoRA, can't be mixed with others."""
    for name, scale in ((Role.POLICY, 0.3), ("two", 0.2), ("dora", 0.3)):
        tiny_base.add_adapter(name, Lora(r=4, alpha=8, dora=name == "dora"))
        scramble(tiny_base, name, scale)
    yield tiny_base
    assert decoder.decoder_of(tiny_base).reason is None, "a static cache serves this model"


@pytest.fixture
def ids(base) -> list[list[int]]:
    return [encode_prompt(base.template, prompt) for prompt in PROMPTS]


def one_by_one(base, role: Role, prompt: list[int], sampling: Sampling, draws: torch.Tensor) -> list[int]:
    """One token after the other from the full forward pass, without cache or padding; the inverse CDF written out."""
    ids = list(prompt)
    for draw in draws.tolist():
        with torch.no_grad(), base.acting_as(role) as lm:
            logits = lm(input_ids=torch.tensor([ids])).logits[0, -1].double()
        if sampling.temperature:
            cumulative = (logits / sampling.temperature).softmax(-1).cumsum(0).tolist()
            ids.append(next(token for token, total in enumerate(cumulative) if total > draw))
        else:
            ids.append(int(logits.argmax()))
        if ids[-1] in sampling.stop_ids:
            break
    return ids[len(prompt) :]


def sample(base, ids, sampling: Sampling, num_samples: int = 3, seed: int = 9, role: str = "policy"):
    return TransformersEngine().generate(base, role, ids, sampling, num_samples=num_samples, seed=seed)


def test_batched_completions_are_greedy_decoding_of_the_role(base, ids):
    how, found = Sampling(8, 0.0, (base.tokenizer.eos_token_id,)), {}
    for role in (Role.BASE, Role.POLICY, Role.REFERENCE):
        found[role] = generation.complete(base, role, ids, max_new_tokens=8)
        alone = [one_by_one(base, role, prompt, how, torch.zeros(8)) for prompt in ids]
        assert found[role] == [generation.text_of(base.tokenizer, answer) for answer in alone]
    assert found[Role.POLICY] != found[Role.REFERENCE]


def test_what_is_sampled_is_the_inverse_cdf_at_the_draws_of_the_seed(base, ids):
    how = Sampling(6, 0.7, FIFTH)
    found = [answer for answers in sample(base, ids, how, 2, seed=5) for answer in answers]
    draws = torch.rand(8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    assert found == [one_by_one(base, Role.POLICY, ids[row // 2], how, draws[row]) for row in range(8)]
    assert len(set(map(tuple, found))) > 4, "answers to one prompt differ"
    assert len(set(map(len, found))) > 2, "some end by themselves, before the limit"


def test_answers_to_some_prompts_are_those_among_all(base, ids):
    how, wanted = Sampling(6, 0.7, FIFTH), {"num_samples": 2, "seed": 5}
    every = sample(base, ids, how, 2, seed=5)
    some = TransformersEngine().generate(base, Role.POLICY, ids, how, only=[3, 1], **wanted)
    assert some == [every[3], every[1]]
    assert TransformersEngine().generate(base, Role.POLICY, ids, how, only=[], **wanted) == []


@pytest.mark.parametrize("choose", [generation.inverse_cdf, generation.nucleus])
@pytest.mark.parametrize(("temperature", "shares"), [(1.0, [2 / 16, 8 / 16, 4 / 16, 2 / 16]),
                                                     (0.5, [1 / 22, 16 / 22, 4 / 22, 1 / 22])])  # fmt: skip
def test_tokens_are_sampled_as_often_as_they_are_likely(choose, temperature, shares):
    logits = torch.tensor([0.125, 0.5, 0.25, 0.125]).log().repeat(40_000, 1)
    found = choose(logits, uniform_draws(0, 1, 40_000)[0], Sampling(1, temperature, ())).bincount(minlength=4) / 40_000
    assert found.tolist() == pytest.approx(shares, abs=0.01)  # 4 standard errors


@pytest.mark.parametrize("choose", [generation.inverse_cdf, generation.nucleus])
@pytest.mark.parametrize("draw", [0.0, 1 - 2**-53])
def test_the_outermost_draws_give_tokens_that_are_possible(choose, draw):
    logits = torch.tensor([[float("-inf"), 2.0, 1.0, float("-inf")]])
    found = choose(logits, torch.tensor([draw], dtype=torch.float64), Sampling(1, 1.0, ())).item()
    assert found == (1 if draw == 0 else 2)


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_samples_do_not_depend_on_which_answers_share_a_batch(base, ids, monkeypatch, top_p):
    how = Sampling(12, 1.0, FIFTH, top_p)
    together = sample(base, ids, how)
    assert len({len(answer) for answers in together for answer in answers}) > 2, "some rows left long before others"
    monkeypatch.setattr(generation, "CACHE_SHARE", 0.0)  # one prompt at a time
    assert sample(base, ids, how) == together
    monkeypatch.setattr(rows, "COMPACT_AT", 2.0)  # nobody leaves
    assert sample(base, ids, how) == together


def test_a_prompt_is_read_once_and_complete_answers_leave_the_batch(base, ids, cache):
    assert base.row_cache.bytes(1) > 0, "measured before, with forward passes of its own"
    assert decoder.decoder_of(base).is_static(base) == (cache == "static"), "tried before, too"
    shapes = []
    hook = base.lm.base_model.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    found = sample(base, ids, Sampling(12, 1.0, FIFTH))
    hook.remove()
    assert shapes[0] == (4, max(map(len, ids)))
    sizes = [count for count, _ in shapes[1:]]
    running = [sum(len(answer) > token for answers in found for answer in answers) for token in range(1, 12)]
    assert sizes == sorted(sizes, reverse=True)
    most = [needed / 0.75 if cache == "growing" else 2 * rows.row_bucket(needed) for needed in running]
    assert all(needed <= size <= limit for size, needed, limit in zip(sizes, running, most, strict=False))
    assert sizes[-1] < 12


def test_a_reward_model_reads_every_answer_at_its_end_of_turn(base):
    stop_ids = generation.stop_ids_of(base.template)
    assert base.tokenizer.convert_ids_to_tokens(list(stop_ids)) == ["<|eot_id|>"], "EOS and the end of turn are one"
    template = templated(CALLING)  # its end of turn, of a turn that calls, and EOS are three
    template.tokenizer.eos_token = "<|end_of_text|>"
    end, call, eos = stops = generation.stop_ids_of(template)
    assert template.tokenizer.convert_ids_to_tokens(stops) == ["<|eot_id|>", "<|end_header_id|>", "<|end_of_text|>"]
    ended = [generation.with_end_of_turn(a, stops) for a in ([5, 6, end], [5, 6, eos], [5, 6], [5, 6, call])]
    assert ended == [[5, 6, end]] * 4


def sampling(base, temperature: float = 0.0, top_p: float = 1.0) -> Sampling:
    return Sampling(TOKENS, temperature, generation.stop_ids_of(base.template), top_p)


def request(base, role: str, text: str = "Why?", seed: int = 0, num_samples: int = 1) -> Request:
    ids = encode_prompt(base.template, [{"role": "user", "content": text}])
    return Request(role, ids, uniform_draws(seed, num_samples, TOKENS))


def answers(base, requests, how) -> list[list[int]]:
    """All answers, request by request."""
    found = {(number, k): [] for number, wanted in enumerate(requests) for k in range(len(wanted.draws))}
    for step in stream(base, requests, how):
        for number, sample, token in step:
            found[number, sample].append(token)
    return list(found.values())


def alone(base, wanted: Request) -> list[int]:
    return sample(base, [wanted.prompt_ids], sampling(base), num_samples=1, role=wanted.role)[0][0]


@pytest.mark.parametrize(
    "roles", ["base policy", "policy two", "two two", "base base", "policy base", "dora base", "base reference"]
)
def test_two_roles_at_once_say_what_each_says_alone(base, roles):
    requests = [request(base, role, text) for role, text in zip(roles.split(), TEXTS[:2], strict=True)]
    assert answers(base, requests, sampling(base)) == [alone(base, wanted) for wanted in requests]


def test_every_adapter_gives_another_answer(base):
    found = answers(base, [request(base, role) for role in ("base", "policy", "two", "dora")], sampling(base))
    assert len(set(map(tuple, found))) == 4


def test_adapters_that_cannot_share_a_batch_take_turns(base):
    requests = [request(base, role) for role in ("dora", "base")]
    steps = [[number for number, *_ in step] for step in stream(base, requests, sampling(base))]
    assert {len(step) for step in steps} == {1}
    assert {number for step in steps[:10] for number in step} == {0, 1}
    first = {next(stream(base, requests, sampling(base)))[0][0] for _ in range(20)}
    assert first == {0, 1}, "in a blind test, the order would tell which one is the base"


def test_a_seed_gives_the_same_answer_whatever_is_decoded_beside_it(base):
    how = sampling(base, temperature=1.0, top_p=0.9)
    one, other = request(base, "policy", TEXTS[1], seed=5), request(base, "base", seed=6)
    both = answers(base, [one, other], how)
    assert answers(base, [one], how)[0] == both[0] == answers(base, [other, one], how)[1]
    assert answers(base, [request(base, "policy", TEXTS[1], seed=7)], how)[0] != both[0]
    several = answers(base, [request(base, "base", seed=6, num_samples=2), one], how)
    assert [several[0], several[2]] == [both[1], both[0]]
    assert several[1] != several[0], "two answers to one prompt have draws of their own"


def test_an_answer_that_ends_leaves_and_the_other_goes_on_as_before(base):
    one, other = request(base, "policy"), request(base, "base", TEXTS[1])
    expected, third = alone(base, one), alone(base, other)[2]
    assert third not in expected
    found = answers(base, [one, other], Sampling(TOKENS, 0.0, (third,)))
    assert len(found[1]) == 3
    assert found[0] == expected


def test_the_model_is_as_it_was_after_a_stream_that_is_closed_half_way(base):
    base.model.train()
    modes, flags = ([m.training for m in base.model.modules()], [p.requires_grad for p in base.model.parameters()])
    hooks = [len(m._forward_hooks) for m in base.model.modules()]
    streaming, role = stream(base, [request(base, "two")], sampling(base)), base.role
    next(streaming)
    assert not any(m.training for m in base.model.modules())
    streaming.close()
    assert [len(m._forward_hooks) for m in base.model.modules()] == hooks, "no adapter is held any more"
    assert (base.role, [m.training for m in base.model.modules()]) == (role, modes)
    assert [p.requires_grad for p in base.model.parameters()] == flags


def test_without_an_adapter_the_bare_base_answers(tiny_base):
    ids = answers(tiny_base, [request(tiny_base, Role.BASE), request(tiny_base, Role.REFERENCE)], sampling(tiny_base))
    assert ids[0] == ids[1] != []


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_logits_that_are_not_finite_are_reported(base, temperature, monkeypatch):
    """They may be out of float16's range; an index made from them would stop a GPU for good."""
    nothing = torch.full((2, 9), torch.nan)
    for choose in (generation.inverse_cdf, generation.nucleus):
        found = choose(nothing, torch.tensor([0.0, 0.9], dtype=torch.float64), sampling(base, temperature))
        assert all(0 <= token < 9 for token in found.tolist())
    answers(base, [request(base, "policy")], sampling(base, temperature))
    monkeypatch.setattr(base.lm.lm_head, "forward", lambda hidden: torch.full((*hidden.shape[:2], 2048), torch.nan))
    with pytest.raises(UserError, match=r"float32 on cpu: .*model\.compute_dtype"):
        answers(base, [request(base, "policy")], sampling(base, temperature))


@pytest.mark.parametrize(
    ("temperature", "top_p", "expected"),
    [
        # 0.5 alone is short of 0.6, with 0.3 it is enough: 0.5 / 0.8 = 0.625 is where one ends and the other begins.
        (1.0, 0.6, [1, 1, 2, 2, 2]),
        (1.0, 0.5, [1, 1, 1, 1, 1]),
        (1.0, 1.0, [1, 2, 2, 3, 3]),
        *[(temperature, 0.95, [1, 1, 1, 1, 1]) for temperature in (0.0, 1e-320, 1e-30, 1e-6)],
    ],
)
def test_the_nucleus_is_as_worked_out_by_hand(temperature, top_p, expected):
    logits = torch.tensor([0.1, 0.5, 0.3, 0.1]).log().repeat(5, 1)
    draws = torch.tensor([0.0, 0.62, 0.63, 0.99, 0.999999], dtype=torch.float64)
    assert generation.nucleus(logits, draws, Sampling(1, temperature, (), top_p)).tolist() == expected


@pytest.mark.parametrize("settings", [{"modules_to_save": ["norm"]}, {"trainable_token_indices": [20, 21]},
                                      {"target_modules": ["embed_tokens"]}])  # fmt: skip
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")
def test_adapters_that_are_more_than_lora_on_linear_layers_answer_beside_others_as_alone(
    base, spec, tmp_path, settings
):
    base.load_adapter("more", save_plain(spec, tmp_path / "more", **settings), trainable=False)
    roles = ("more", "base", "policy")
    found = answers(base, [request(base, role) for role in roles], sampling(base))
    assert found == [answers(base, [request(base, role)], sampling(base))[0] for role in roles]


@pytest.fixture
def vllm(monkeypatch):
    """A stand-in, as no CPU has vLLM: it keeps what it is called with."""
    module, request, told = types.ModuleType("vllm"), types.ModuleType("vllm.lora.request"), {}

    class LLM:
        def __init__(self, **options):
            told["options"] = options

        def generate(self, prompts, params, *, lora_request, use_tqdm):
            told.update(prompts=prompts, params=params, adapter=lora_request)
            told["files"] = lora_request and {file.name for file in Path(lora_request[2]).iterdir()}
            say, numbers = types.SimpleNamespace, range(len(params))
            logps = ([{7: say(logprob=-1.0)}, {number: say(logprob=-0.5 * number)}] for number in numbers)
            answers = (say(token_ids=(7, number), logprobs=found) for number, found in enumerate(logps))
            return [say(outputs=[answer]) for answer in answers]

    module.LLM, module.SamplingParams, request.LoRARequest = LLM, lambda **options: options, lambda *args: args
    for name, stub in (("vllm", module), ("vllm.lora", types.ModuleType("vllm.lora")), ("vllm.lora.request", request)):
        monkeypatch.setitem(sys.modules, name, stub)
    return told


def test_vllm_is_told_the_same(base, ids, vllm):
    used, how = generation.VllmEngine(base, max_tokens=64), Sampling(6, 0.7, (3, 5))
    found, logps = used.generate_scored(base, Role.POLICY, ids, how, num_samples=2, seed=10)
    assert found == [[[7, 0], [7, 1]], [[7, 2], [7, 3]], [[7, 4], [7, 5]], [[7, 6], [7, 7]]]
    assert logps[1] == [[-1.0, -1.0], [-1.0, -1.5]]
    options = {
        "logprobs_mode": "processed_logprobs",
        "generation_config": "vllm",
        "quantization": "bitsandbytes",
        "max_model_len": 64,
    }
    assert [prompt["prompt_token_ids"] for prompt in vllm["prompts"]] == [x for x in ids for _ in range(2)]
    expected = {"max_tokens": 6, "temperature": 0.7, "top_p": 1.0, "top_k": -1, "stop_token_ids": [3, 5]}
    assert all(params.items() >= expected.items() for params in vllm["params"])
    assert vllm["options"].items() >= options.items()
    seeds = {params["seed"] for params in vllm["params"]}
    assert len(seeds) == 8
    assert {"adapter_config.json", "adapter_model.safetensors"} <= vllm["files"]
    first = vllm["adapter"]
    used.generate_scored(base, Role.POLICY, ids, how, num_samples=2, seed=10)
    assert all(now != then for now, then in zip(vllm["adapter"], first, strict=True)), "or vLLM keeps the old adapter"
    assert seeds == {params["seed"] for params in vllm["params"]}
    used.generate_scored(base, Role.BASE, ids, how, num_samples=2, seed=11)
    assert vllm["adapter"] is None
    assert not seeds & {params["seed"] for params in vllm["params"]}, "another seed, other answers"


@pytest.mark.parametrize(("rank", "room"), [(4, 8), (8, 8), (24, 32), (64, 64)])
def test_vllm_makes_room_for_the_adapters_own_rank(tiny_base, vllm, rank, room):
    tiny_base.add_adapter(Role.POLICY, Lora(r=rank))
    generation.VllmEngine(tiny_base, max_tokens=64)
    assert vllm["options"]["max_lora_rank"] == room


def test_vllm_is_not_given_an_adapter_that_it_cannot_serve(tiny_base, vllm, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    tiny_base.add_adapter(Role.POLICY, Lora(dora=True))
    monkeypatch.setattr(tiny_base, "lm", types.SimpleNamespace(device=torch.device("cuda")))
    with pytest.raises(UserError, match=r"ppo\.engine: .*no DoRA.*use 'transformers'"):
        generation.engine("vllm", tiny_base, 64, "ppo.engine", Path())


@pytest.mark.parametrize(
    ("device", "held", "problem"),
    [
        ("cpu", {}, "needs a GPU"),
        ("cuda", {"quantization": "none"}, r"model\.quantization is 'none'"),
        ("cuda", {"double_quant": False}, r"model\.quantization has double_quant: false"),
    ],
)
def test_vllm_needs_a_gpu_and_a_base_in_nf4_with_double_quantisation(base, vllm, monkeypatch, device, held, problem):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    base.lm = types.SimpleNamespace(device=torch.device(device))
    base.spec = base.spec.model_copy(update=held)
    with pytest.raises(UserError, match=rf"ppo\.engine: .*{problem}.*use 'transformers'"):
        generation.engine("vllm", base, 64, "ppo.engine", Path())
