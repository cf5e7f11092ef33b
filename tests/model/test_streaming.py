"""Several roles decoded at once say what each says alone."""

import pytest
import torch

from qalign.config.recipe import Lora
from qalign.data.tokenize import encode_prompt
from qalign.errors import UserError
from qalign.model.base import Role
from qalign.model.generation import Request, Sampling, complete, nucleus, stop_ids_of, stream, text_of, uniform_draws
from tests.helpers import scramble

QUESTIONS = ["Why?", "Is it too late to plant tulips in December, or is there still some time left for it?"]


@pytest.fixture
def base(tiny_base):
    """Two adapters that do something, beside the bare base."""
    for name in ("one", "two"):
        tiny_base.add_adapter(name, Lora(r=4, alpha=8))
    scramble(tiny_base, "one", 0.3)
    scramble(tiny_base, "two", 0.2)
    return tiny_base


def drawing(base, tokens: int = 12, temperature: float = 0.0, top_p: float = 1.0) -> Sampling:
    return Sampling(tokens, temperature, stop_ids_of(base.tokenizer, {}), top_p)


def prompt_ids(base, text: str) -> list[int]:
    return encode_prompt(base.tokenizer, [{"role": "user", "content": text}], {})


def request(role, ids, seed) -> Request:
    return Request(role, ids, uniform_draws(seed, 1, 20))


def answers(base, lines, how) -> list[list[int]]:
    found = [[] for _ in lines]
    for step in stream(base, lines, how):
        for number, _, token in step:
            found[number].append(token)
    return found


@pytest.mark.parametrize("roles", [("base", "one"), ("one", "two"), ("two", "two"), ("base", "base"), ("one", "base")])
def test_two_sides_at_once_say_what_each_says_alone(base, roles):
    lines = [request(role, prompt_ids(base, text), 0) for role, text in zip(roles, QUESTIONS, strict=True)]
    found = answers(base, lines, drawing(base))
    for role, text, ids in zip(roles, QUESTIONS, found, strict=True):
        alone = complete(base, role, [[{"role": "user", "content": text}]], max_new_tokens=12, template_kwargs={})
        assert text_of(base.tokenizer, ids) == alone[0]
    if roles[0] != roles[1]:
        same = [request(role, prompt_ids(base, "Why?"), 0) for role in roles]
        assert len(set(map(tuple, answers(base, same, drawing(base))))) == 2


def test_adapters_that_cannot_share_a_batch_take_turns(base):
    base.add_adapter("three", Lora(r=4, alpha=8, dora=True))
    scramble(base, "three", 0.3)
    lines = [request(role, prompt_ids(base, "Why?"), 0) for role in ("three", "base")]
    steps = [[number for number, *_ in step] for step in stream(base, lines, drawing(base, 20))]
    assert {len(step) for step in steps} == {1}
    assert {number for step in steps[:10] for number in step} == {0, 1}
    for line, ids in zip(lines, answers(base, lines, drawing(base, 20)), strict=True):
        question = [[{"role": "user", "content": "Why?"}]]
        alone = complete(base, line.role, question, max_new_tokens=20, template_kwargs={})
        assert text_of(base.tokenizer, ids) == alone[0]


def test_who_begins_where_sides_take_turns_tells_nothing_about_them(base):
    base.add_adapter("three", Lora(r=4, alpha=8, dora=True))
    lines = [request(role, prompt_ids(base, "Why?"), 0) for role in ("base", "three")]
    begins = {next(stream(base, lines, drawing(base)))[0][0] for _ in range(20)}
    assert begins == {0, 1}  # in a blind test, always the same one would give the base away


def test_a_seed_gives_the_same_answer_whatever_is_decoded_beside_it(base):
    how = drawing(base, 16, temperature=1.0, top_p=0.9)
    line, other = request("one", prompt_ids(base, QUESTIONS[1]), 5), request("base", prompt_ids(base, "Why?"), 6)
    both = answers(base, [line, other], how)
    assert answers(base, [line], how)[0] == both[0] == answers(base, [other, line], how)[1]
    assert answers(base, [request(line.role, line.prompt_ids, 7)], how)[0] != both[0]


def test_a_side_that_ends_leaves_and_the_other_goes_on_as_before(base):
    how = drawing(base, 16)
    line, other = request("one", prompt_ids(base, "Why?"), 0), request("base", prompt_ids(base, QUESTIONS[1]), 0)
    alone = answers(base, [line], how)[0]
    third = answers(base, [other], how)[0][2]
    ends = Sampling(16, 0.0, (third,))
    assert third not in alone
    found = answers(base, [line, other], ends)
    assert len(found[1]) == 3
    assert found[0] == alone


def test_everything_is_as_it_was_once_a_stream_is_closed_half_way(base):
    role, grads = base.role, [p.requires_grad for p in base.model.parameters()]
    streaming = stream(base, [request("two", prompt_ids(base, "Why?"), 0)], drawing(base))
    next(streaming)
    assert base.role == "two"
    streaming.close()
    assert (base.role, [p.requires_grad for p in base.model.parameters()]) == (role, grads)


def test_without_an_adapter_the_bare_base_answers(tiny_base):
    ids = answers(tiny_base, [request(Role.BASE, prompt_ids(tiny_base, "Why?"), 0)] * 2, drawing(tiny_base, 4))
    assert ids[0] == ids[1]
    assert len(ids[0]) == 4


def test_the_nucleus_is_what_a_hand_would_draw():
    logits = torch.tensor([0.1, 0.5, 0.3, 0.1]).log().repeat(5, 1)
    draws = torch.tensor([0.0, 0.62, 0.63, 0.99, 0.999999], dtype=torch.float64)
    # 0.5 alone is short of 0.6, with 0.3 it is enough: 0.5 / 0.8 = 0.625 is where one ends and the other begins.
    assert nucleus(logits, draws, Sampling(1, 1.0, (), 0.6)).tolist() == [1, 1, 2, 2, 2]
    assert nucleus(logits, draws, Sampling(1, 1.0, (), 0.5)).tolist() == [1] * 5
    assert nucleus(logits, draws, Sampling(1, 0.0, (), 1.0)).tolist() == [1] * 5
    assert nucleus(logits, draws, Sampling(1, 1.0, (), 1.0)).tolist() == [1, 2, 2, 3, 3]


@pytest.mark.parametrize("temperature", [0.0, 1e-320, 1e-30, 1e-6])
def test_a_temperature_next_to_nothing_takes_the_likeliest_token(temperature):
    logits, draws = torch.tensor([[1.0, 3.0, 2.0], [500.0, 0.0, -500.0]]), torch.tensor([0.99, 0.5]).double()
    assert nucleus(logits, draws, Sampling(1, temperature, (), 0.95)).tolist() == [1, 0]


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_logits_that_are_no_numbers_are_told_of(base, temperature, monkeypatch):
    """Out of fp16's range, say; an index from them would bring a GPU down for good."""
    line = request("one", prompt_ids(base, "Why?"), 0)
    monkeypatch.setattr(base.lm.lm_head, "forward", lambda hidden: torch.full((*hidden.shape[:2], 2048), torch.nan))
    with pytest.raises(UserError, match="gives no numbers"):
        answers(base, [line], drawing(base, 4, temperature=temperature))


def test_top_p_of_1_draws_from_the_whole_distribution():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(6, generator=generator)
    draws = torch.rand(40000, dtype=torch.float64, generator=generator)
    counts = nucleus(logits.expand(40000, 6), draws, Sampling(1, 1.3, (), 1.0)).bincount(minlength=6)
    assert torch.allclose(counts / 40000, (logits / 1.3).softmax(0), atol=0.01)
