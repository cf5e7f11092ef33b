"""Packed rows give the log-probs, loss and gradients of each answer in a row of its own, for every family that can run
them; the other families are recognised."""

from itertools import product

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention
from transformers import AutoTokenizer

from qalign.data.collate import pack
from qalign.data.packing import Layout
from qalign.data.tokenize import TokenPair, prepare_tokenizer
from qalign.losses import preference_loss
from qalign.model import attention, logps
from qalign.model.attention import packed_attention, why_not_packed
from tests.conftest import FIXTURES
from tests.data.test_packing import GROUPS, sees
from tests.families import SERVED, UNSERVED, VOCABULARY, alone, family, random_pairs
from tests.helpers import house_style

uncompiled = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
# What a layer may ask for besides plain attention.
KINDS = {
    "plain": (None, None, False),
    "window": (3, None, False),
    "window of one": (1, None, False),
    "softcap": (None, 1.5, False),
    "sinks": (None, None, True),
    "all": (3, 1.5, True),
}


@pytest.fixture(scope="module")
def real_pairs() -> list[TokenPair]:
    """Two of the demo's, 100 and 240 tokens long, so of several blocks."""
    tokenizer = AutoTokenizer.from_pretrained(FIXTURES / "tokenizers" / "llama3")
    prepare_tokenizer(tokenizer)
    return house_style(tokenizer, 5)[3:]


def packed(lm, pairs: list[TokenPair], last_token: str = "dropped") -> torch.Tensor:
    return logps.pair_logps(lm, pack(pairs, last_token=last_token))


def losses(policy: torch.Tensor, around: torch.Tensor) -> torch.Tensor:
    """DPO against a reference close to the policy: none of the losses is flat, so every gradient counts."""
    noise = torch.randn(around.shape, generator=torch.Generator().manual_seed(1))
    return preference_loss("sigmoid", policy, around + noise, torch.ones_like(policy), beta=0.5)


def outcome(lm, found: torch.Tensor, around: torch.Tensor):
    """(log-probs, loss, gradients by parameter)."""
    lm.zero_grad()
    loss = losses(found, around).mean()
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in lm.named_parameters() if p.grad is not None}
    assert len(gradients) > 10
    return found.detach(), loss.detach(), gradients


def assert_same(one, other, rel: float = 1e-5) -> None:
    """Log-probs to 1e-5; `rel` is for what hangs on their differences, the loss and its gradients."""
    assert one[0].dtype == other[0].dtype
    torch.testing.assert_close(one[0], other[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(one[1], other[1], rtol=rel, atol=0)
    assert one[2].keys() == other[2].keys()
    for name, gradient in one[2].items():
        assert (gradient - other[2][name]).norm() <= rel * other[2][name].norm(), name


def rel(name: str) -> float:
    return 5e-5 if name == "gpt-oss" else 1e-5  # it is in float32, where log-probs of -600 are 1e-4 off


def tensors(layout: Layout, sinks: bool, heads: int = 4, key_heads: int = 2, dim: int = 3):
    draw = torch.Generator().manual_seed(5)
    shapes = [(heads, layout.tokens, dim), (key_heads, layout.tokens, dim), (key_heads, layout.tokens, dim)]
    found = [torch.randn(shape, generator=draw, dtype=torch.float64).requires_grad_() for shape in shapes]
    return *found, torch.randn(heads, generator=draw, dtype=torch.float64).requires_grad_() if sinks else None


def formula(query, key, value, sinks, groups, window, softcap, scaling) -> torch.Tensor:
    """Softmax attention over the whole row at once, with a mask from the rule."""
    key, value = (tensor.repeat_interleave(len(query) // len(key), 0) for tensor in (key, value))
    scores = query @ key.transpose(1, 2) * scaling
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~sees(groups, window), float("-inf"))
    if sinks is not None:
        column = sinks[:, None, None].expand(-1, scores.shape[1], 1)
        return torch.cat([scores, column], dim=-1).softmax(-1)[..., :-1] @ value
    return scores.softmax(-1) @ value


@pytest.mark.parametrize("block", [2, 128])
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_is_the_formula(monkeypatch, kind, block):
    monkeypatch.setattr(attention, "BLOCK_QUERIES", block)
    window, softcap, sinks = KINDS[kind]
    layout = Layout(GROUPS)
    inputs = tensors(layout, sinks)
    found = attention._BlockAttention.apply(*inputs, layout, 0.7, window, softcap)
    torch.testing.assert_close(found, formula(*inputs, GROUPS, window, softcap, 0.7), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_a_layer_are_those_of_small_steps(monkeypatch, kind):
    monkeypatch.setattr(attention, "BLOCK_QUERIES", 2)
    window, softcap, sinks = KINDS[kind]
    layout = Layout(GROUPS)
    inputs = [tensor for tensor in tensors(layout, sinks, dim=2) if tensor is not None]

    def attend(*given):
        query, key, value, *rest = given
        return attention._BlockAttention.apply(query, key, value, *(rest or [None]), layout, 0.7, window, softcap)

    assert torch.autograd.gradcheck(attend, inputs)


@uncompiled
@pytest.mark.parametrize(("heads", "key_heads"), [(4, 2), (6, 2), (3, 3)])  # flex shares keys by powers of two only
@pytest.mark.parametrize("kind", KINDS)
def test_flex_attention_is_the_formula(kind, heads, key_heads):
    window, softcap, sinks = KINDS[kind]
    layout = Layout(GROUPS)
    inputs = [tensor if tensor is None else tensor.detach() for tensor in tensors(layout, sinks, heads, key_heads)]
    with torch.no_grad():
        found = attention._flex(*inputs, layout, 0.7, window, softcap, run=flex_attention)
    torch.testing.assert_close(found, formula(*inputs, GROUPS, window, softcap, 0.7), rtol=1e-10, atol=1e-10)


def test_probabilities_are_kept_wide_in_16_bits():
    """Scores of bfloat16 tensors are rounded once, on the way out, and not at every step."""
    layout = Layout(((40, (30, 30)),))
    inputs = [tensor.detach().bfloat16() for tensor in tensors(layout, sinks=False)[:3]]
    found = attention._BlockAttention.apply(*inputs, None, layout, 0.7, None, None)
    expected = formula(*(tensor.double() for tensor in inputs), None, layout.groups, None, None, 0.7)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), expected, rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("name", SERVED)
def test_random_pairs_give_the_numbers_of_each_answer_alone(name):
    lm, pairs = family(name), random_pairs()
    apart = alone(lm, pairs)
    expected = outcome(lm, apart, apart.detach())
    with packed_attention(lm):
        for last_token in ("dropped", "kept"):
            assert_same(outcome(lm, packed(lm, pairs, last_token), apart.detach()), expected, rel(name))


@pytest.mark.parametrize("name", SERVED)
def test_real_pairs_give_the_numbers_of_each_answer_alone(name, real_pairs):
    """Of more tokens than a block of queries has, so windows and prompts reach over its edge."""
    assert max(len(pair.rejected_ids) for pair in real_pairs) > attention.BLOCK_QUERIES
    lm = family(name, vocabulary=2006)
    apart = alone(lm, real_pairs)
    expected = outcome(lm, apart, apart.detach())
    with packed_attention(lm):
        assert_same(outcome(lm, packed(lm, real_pairs), apart.detach()), expected, rel(name))


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt-oss"])
def test_the_size_of_a_block_changes_nothing(monkeypatch, name):
    lm, pairs = family(name), random_pairs(1)
    apart = alone(lm, pairs)
    expected = outcome(lm, apart, apart.detach())
    for size in (1, 3, 5):
        monkeypatch.setattr(attention, "BLOCK_QUERIES", size)
        with packed_attention(lm):
            assert_same(outcome(lm, packed(lm, pairs), apart.detach()), expected, rel(name))


@pytest.mark.parametrize("name", SERVED)
def test_gradient_checkpointing_changes_nothing(name):
    lm, pairs = family(name), random_pairs()
    with packed_attention(lm):
        found = packed(lm, pairs)
        around = found.detach()
        plain = outcome(lm, found, around)
        lm.train()
        lm.activation_checkpointing_enable({"use_reentrant": False})
        batch = pack(pairs)
        checkpointed = outcome(lm, logps.pair_logps(lm, batch), around)
    assert len(batch.layout.windows) == 4, "the two layers weren't computed again: nothing is shown"
    assert_same(checkpointed, plain, 1e-6)


@uncompiled
@pytest.mark.parametrize("name", SERVED)
def test_flex_attention_gives_the_same_numbers(monkeypatch, name):
    lm, pairs = family(name), random_pairs()
    with torch.no_grad(), packed_attention(lm):
        blocks = packed(lm, pairs)
        used = []
        monkeypatch.setattr(attention, "_flex_runs_on", lambda query: used.append(query) or True)
        monkeypatch.setattr(attention, "_compiled_flex", lambda: flex_attention)
        torch.testing.assert_close(packed(lm, pairs), blocks, rtol=1e-5, atol=0)
    assert len(used) == 2


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_neither_order_nor_company_nor_the_side_of_an_answer_changes_its_number(name):
    lm, pairs = family(name), random_pairs()
    first = pairs[1]
    other = TokenPair(first.prompt_ids, first.chosen_ids[:2] + first.chosen_ids[3:] + [9], first.rejected_ids, "other")
    swapped = [TokenPair(pair.prompt_ids, pair.rejected_ids, pair.chosen_ids, pair.where) for pair in pairs]
    with torch.no_grad(), packed_attention(lm):
        together = packed(lm, pairs)
        single = torch.cat([packed(lm, [pair]) for pair in pairs])
        for same in (packed(lm, pairs[::-1]).flip(0), single, packed(lm, swapped).flip(1)):
            torch.testing.assert_close(same, together, rtol=1e-6, atol=0)
        moved = (together - packed(lm, [pairs[0], other, *pairs[2:]])).abs() > 1e-9
    assert moved.nonzero().tolist() == [[1, 0]], "a changed answer of the same length moves its own number alone"


def test_windows_count_positions_and_not_places():
    """A rejected answer stands far from its prompt in the row, and sees as much of it as the chosen one does."""
    lm = family("mistral")
    prompt, answer = list(range(3, 12)), [20, 21, 22, 23]
    near = TokenPair(prompt, answer, [30] * 3, "near")
    far = TokenPair(prompt, [30] * 40, answer, "far")
    with torch.no_grad(), packed_attention(lm):
        torch.testing.assert_close(packed(lm, [far])[0, 1], packed(lm, [near])[0, 0], rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*product(SERVED, [torch.float32, torch.bfloat16]), *product(UNSERVED, [torch.float32])],
)
def test_families_that_are_served_are_told_from_the_others(name, dtype):
    lm = family(name, spread=0.1, dtype=dtype)
    before = lm.config._attn_implementation
    reason = why_not_packed(lm)
    assert reason is None if name in SERVED else UNSERVED[name][1] in reason
    assert lm.config._attn_implementation == before


def test_dropout_in_attention_is_seen_in_the_settings():
    lm = family("llama")
    lm.config.attention_dropout = 0.1
    assert why_not_packed(lm) == "has dropout in its attention"


def test_a_model_that_keeps_its_window_to_itself_is_noticed():
    """Longer than the pairs that are tried, so no number tells."""
    lm = family("llama")
    lm.config.sliding_window = 512  # and no layer asks for it
    assert why_not_packed(lm) == "doesn't pass its sliding window on"


def test_a_model_that_counts_places_is_noticed():
    """As ALiBi does: the position ids that it is given don't reach its attention."""
    lm = family("llama", spread=0.1)
    real = lm.base_model.forward

    def forward(*args, position_ids=None, **more):
        return real(*args, **more)

    lm.base_model.forward = forward
    assert why_not_packed(lm) == "gives an answer other hidden states than it has in a row of its own"


def test_a_model_in_which_neighbours_are_seen_is_noticed():
    """As a state-space layer lets them be: what stands before in the row is carried along."""
    lm = family("llama", spread=0.1)

    def carry(module, inputs, output):
        return output + 0.2 * output.cumsum(dim=1)

    lm.base_model.layers[1].mlp.register_forward_hook(carry)
    assert why_not_packed(lm) == "gives an answer other hidden states than it has in a row of its own"


@pytest.mark.parametrize("before", ["eager", "sdpa"])
def test_the_models_own_attention_comes_back(before):
    lm = family("llama")
    lm.set_attn_implementation(before)
    ids = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))
    expected = lm(input_ids=ids).logits
    with packed_attention(lm):
        assert lm.config._attn_implementation == attention.NAME
        with packed_attention(lm):
            pass
        assert lm.config._attn_implementation == attention.NAME
    assert lm.config._attn_implementation == before
    with pytest.raises(RuntimeError, match="out of luck"), packed_attention(lm):
        raise RuntimeError("out of luck")
    assert lm.config._attn_implementation == before
    assert torch.equal(lm(input_ids=ids).logits, expected)


def test_rows_that_are_not_packed_and_dropout_are_refused():
    lm = family("llama")
    with packed_attention(lm), pytest.raises(ValueError, match="this attention needs a packed batch"):
        lm(input_ids=torch.tensor([[3, 4, 5]]))
    lm.config.attention_dropout = lm.base_model.layers[0].self_attn.attention_dropout = 0.1
    lm.train()
    with packed_attention(lm), pytest.raises(ValueError, match="dropout in attention"):
        packed(lm, random_pairs())
