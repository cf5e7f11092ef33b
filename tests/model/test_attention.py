"""Packed rows give the log-probs, loss and gradients of each answer in a row of its own, for every family that can run
them; the other families are recognised."""

import shutil
from itertools import product

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention
from transformers import AutoTokenizer

from qalign.data.collate import Layout, pack
from qalign.data.store.sequences import TokenPair
from qalign.data.templates import prepare_template
from qalign.losses.preference import PreferenceLoss
from qalign.model import logps
from qalign.model.packing import attention
from qalign.model.packing.packing import Packing, packing_of
from tests.conftest import FIXTURES
from tests.data.test_packing import GROUPS, sees
from tests.families import HYBRIDS, SERVED, UNSERVED, VOCABULARY, alone, family, packed_attention, random_pairs
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
    prepare_template(tokenizer)
    return house_style(tokenizer, 5)[3:]


def packed(lm, pairs: list[TokenPair], last_token: str = "dropped") -> torch.Tensor:
    return logps.pair_logps(lm, pack(pairs, last_token=last_token))


def outcome(lm, found: torch.Tensor, around: torch.Tensor):
    """(log-probs, loss, gradients by parameter) of DPO with a reference close to the policy, where no loss is flat."""
    lm.zero_grad()
    noise = torch.randn(around.shape, generator=torch.Generator().manual_seed(1))
    loss = PreferenceLoss({"sigmoid": 1.0}, beta=0.5)(found, around + noise, torch.ones_like(found)).mean()
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


@pytest.mark.parametrize("block", [1, 2, 3, 128])
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


def compiled(run, layouts: list[Layout], softcap: float | None, sinks: bool) -> None:
    """Compiles attention with windows and without for the first layout, and runs all of them with that; in float32."""
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for layout, window in product(layouts, (None, 40)):
            shapes = [(2, layout.tokens, 16), (1, layout.tokens, 16), (1, layout.tokens, 16), (2,)]
            *inputs, each_head = (torch.randn(shape, generator=draw) for shape in shapes)
            inputs.append(each_head if sinks else None)
            found = attention._flex(*inputs, layout, 0.125, window, softcap, run=run)
            expected = attention._BlockAttention.apply(*inputs, Layout(layout.groups), 0.125, window, softcap)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("softcap", "sinks"), [(50.0, False), (None, True), (3.0, True)], ids=["Gemma 2", "gpt-oss", "both"]
)
def test_flex_attention_is_compiled_once_for_all_lengths_and_windows(softcap, sinks):
    """After eight compilations it would run uncompiled, with all scores in memory."""
    torch.compiler.reset()
    layouts = [Layout(((140 + 97 * n, (1 + 13 * n, 60 + 31 * n)), (150, (7 * n + 1, 12)))) for n in range(4)]
    blocks = [-(-layout.tokens // 128) for layout in layouts]
    assert blocks == [3, 4, 6, 7]  # PyTorch takes 1 for a constant, and a size that other dimensions have, too
    compiled(torch.compile(flex_attention, dynamic=True, backend="aot_eager"), layouts, softcap, sinks)


@pytest.mark.skipif(shutil.which("g++") is None, reason="PyTorch compiles for the CPU with it")
def test_a_soft_cap_has_a_lowering(monkeypatch):
    """As CUDA runs it, for any length; with sinks it needs what PyTorch doesn't lower for CPUs."""
    torch.compiler.reset()
    layouts = [Layout(((80 + 17 * n, (1 + 3 * n, 40 + n)), (30, (7 * n + 1, 12)))) for n in range(4)]
    for layout, window in product(layouts, (None, 40)):
        for tensor in layout.block_mask(window, torch.device("cpu")).as_tuple():
            if isinstance(
                tensor, torch.Tensor
            ):  # the number of blocks, which PyTorch's kernel for CPUs takes for another
                torch._dynamo.mark_static(tensor)
    compiled(torch.compile(flex_attention, dynamic=True), layouts, 50.0, sinks=False)


def test_probabilities_are_kept_wide_in_16_bits():
    """Scores of bfloat16 tensors are rounded once, on the way out, and not at every step."""
    layout = Layout(((40, (30, 30)),))
    inputs = [tensor.detach().bfloat16() for tensor in tensors(layout, sinks=False)[:3]]
    found = attention._BlockAttention.apply(*inputs, None, layout, 0.7, None, None)
    expected = formula(*(tensor.double() for tensor in inputs), None, layout.groups, None, None, 0.7)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), expected, rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("kind", ["random", "real"])
@pytest.mark.parametrize("name", SERVED)
def test_packed_pairs_give_the_numbers_of_each_answer_alone(name, kind, real_pairs):
    """Real pairs have more tokens than a block of queries, so windows and prompts cross its edge."""
    assert max(len(pair.rejected_ids) for pair in real_pairs) > attention.BLOCK_QUERIES
    vocabulary, pairs = (VOCABULARY, random_pairs()) if kind == "random" else (2006, real_pairs)
    lm = family(name, vocabulary)
    apart = alone(lm, pairs)
    expected = outcome(lm, apart, apart.detach())
    with packed_attention(lm):
        for last_token in ("dropped", "kept"):
            assert_same(outcome(lm, packed(lm, pairs, last_token), apart.detach()), expected, rel(name))


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
    assert len(batch.layout.calls) == 2 * lm.config.num_hidden_layers, (
        "the layers weren't computed again: nothing is shown"
    )
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
    assert len(used) == lm.config.num_hidden_layers


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*product([*SERVED, *HYBRIDS], [torch.float32, torch.bfloat16]), *product(UNSERVED, [torch.float32])],
)
def test_families_that_are_served_are_told_from_the_others(name, dtype):
    lm = family(name, spread=0.1, dtype=dtype)
    before = lm.config._attn_implementation
    reason = packing_of(lm).reason
    assert UNSERVED[name][1] in reason if name in UNSERVED else reason is None
    assert lm.config._attn_implementation == before


def ignores_positions(lm) -> None:
    """As ALiBi does: the position ids that it is given don't reach its attention."""
    real = lm.base_model.forward
    lm.base_model.forward = lambda *args, position_ids=None, **more: real(*args, **more)


def sees_neighbours(lm) -> None:
    """What stands before in the row is carried along, outside of all layers."""
    real = lm.base_model.forward

    def forward(*args, **more):
        output = real(*args, **more)
        output.last_hidden_state = output.last_hidden_state + 0.2 * output.last_hidden_state.cumsum(dim=1)
        return output

    lm.base_model.forward = forward


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        # No layer asks for the window, which is longer than the pairs that are tried, so no number tells.
        (lambda lm: setattr(lm.config, "sliding_window", 512), "doesn't pass its sliding window on"),
        (ignores_positions, "gives an answer other hidden states than it has in a row of its own"),
        (sees_neighbours, "gives an answer other hidden states than it has in a row of its own"),
    ],
    ids=["window", "positions", "neighbours"],
)
def test_a_model_that_would_go_wrong_in_a_packed_row_is_noticed(change, reason):
    lm = family("llama", spread=0.1)
    change(lm)
    assert packing_of(lm).reason == reason


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
    with packed_attention(lm), pytest.raises(ValueError, match="isn't told where the texts of a packed row begin"):
        lm(input_ids=torch.tensor([[3, 4, 5]]))
    lm.config.attention_dropout = lm.base_model.layers[0].self_attn.attention_dropout = 0.1
    lm.train()
    with Packing().open(lm), pytest.raises(ValueError, match=r"^has dropout in attention"):
        packed(lm, random_pairs())
