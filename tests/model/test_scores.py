"""Scores are read at the end of the answer's turn, however answers are batched and whichever roles share the base."""

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification
from safetensors.torch import load_file
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer

from qalign.config.recipe import Lora, Model
from qalign.data.collate import MicroBatchLimit
from qalign.data.store.sequences import TokenPair
from qalign.data.templates import ChatTemplate
from qalign.data.tokenize import end_of_turn_id, pad_for_scores
from qalign.model.adapters.files import SCORE_HEAD, WEIGHTS
from qalign.model.adapters.members import answer_scores
from qalign.model.base import Role, load
from qalign.model.logps import ScalarHead
from tests.conftest import FIXTURES
from tests.families import family
from tests.helpers import house_style, scramble
from tests.model.conftest import gradient, logits, state

LORA = Lora(r=4, alpha=8)


def reward_model(spec):
    base = load(spec)
    torch.manual_seed(1)
    base.add_adapter(Role.REWARD, LORA)
    scramble(base, Role.REWARD)
    return base


@pytest.fixture(scope="module")
def adapter(tiny_folder, tmp_path_factory) -> str:
    """A reward adapter that does something."""
    folder = tmp_path_factory.mktemp("reward") / "a"
    reward_model(Model(base=tiny_folder, compute_dtype="float32")).save_adapter(Role.REWARD, folder)
    return str(folder)


def with_reward(spec, adapter: str):
    base = load(spec)
    base.load_adapter(Role.REWARD, adapter, trainable=False)
    return base


def pairs_of(tokenizer, count: int = 4) -> list[TokenPair]:
    """Real pairs of several lengths, each answer with its end of turn."""
    pairs = house_style(tokenizer, count)
    assert {answer[-1] for pair in pairs for answer in pair.answers} == {end_of_turn_id(ChatTemplate(tokenizer))}
    return pairs


def scores(base, pairs: list[TokenPair], at_once: int = 4) -> torch.Tensor:
    return answer_scores(base, Role.REWARD, pairs, MicroBatchLimit(pairs=at_once))


def test_a_fresh_head_is_small_and_computes_in_its_own_precision():
    torch.manual_seed(0)
    head = ScalarHead(40_000)
    assert head.weight.std().item() == pytest.approx(40_001**-0.5, rel=0.02)  # 40,000 draws: 0.35% is one sigma
    assert head.weight.mean().item() == pytest.approx(0, abs=5 * 40_001**-0.5 / 200)
    hidden = torch.randn(3, 40_000).to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        found = head(hidden)
    assert found.dtype == torch.float32
    expected = hidden.double() @ head.weight.double().T
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)  # bfloat16 would be 4e-3 off


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_the_score_is_read_at_the_end_of_turn_also_where_that_pads(spec, adapter, layout):
    """Llama's template has pad = end of turn. The hidden states are computed one row at a time, without padding."""
    base = with_reward(spec, adapter)
    if layout == "padded":
        base.__dict__["padding_reason"] = "to see whether it matters"
    assert base.tokenizer.pad_token_id == end_of_turn_id(base.template)
    head = load_file(f"{adapter}/{WEIGHTS}")[SCORE_HEAD][0].double()
    pairs = pairs_of(base.tokenizer)
    at_end, before = torch.zeros(2, len(pairs), 2)
    for row, pair in enumerate(pairs):
        for column, answer in enumerate(pair.answers):
            with torch.no_grad(), base.acting_as(Role.REWARD) as lm:
                hidden = lm.base_model(input_ids=torch.tensor([pair.prompt_ids + answer])).last_hidden_state[0]
            at_end[row, column], before[row, column] = hidden[-1].double() @ head, hidden[-2].double() @ head
    torch.testing.assert_close(scores(base, pairs), at_end, rtol=0, atol=1e-5)
    assert (at_end - before).abs().min() > 1e-3


@pytest.mark.parametrize("name", ["llama3", "zephyr", "mistral_v03"])
def test_transformers_own_pooling_reads_the_same_token(tmp_path, name):
    """By plain PEFT. The saved pad token is chosen for it; with the usual pad = end of turn it reads another."""
    tokenizer = AutoTokenizer.from_pretrained(FIXTURES / "tokenizers" / name)
    family("llama", len(tokenizer), spread=0.1, dtype=torch.float32).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    base = reward_model(Model(base=str(tmp_path), compute_dtype="float32", quantization="none"))
    pairs = pairs_of(base.tokenizer)
    base.save_adapter(Role.REWARD, tmp_path / "a")
    pad, end = tokenizer.convert_tokens_to_ids(pad_for_scores(base.template)), end_of_turn_id(base.template)
    assert pad != end
    lm = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "a", num_labels=1, pad_token_id=pad)
    expected = scores(base, pairs).flatten()
    rows = [torch.tensor(pair.prompt_ids + answer) for pair in pairs for answer in pair.answers]
    ids = pad_sequence(rows, batch_first=True, padding_value=pad)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    with torch.no_grad():
        pooled = lm(input_ids=ids, attention_mask=mask).logits[:, 0]
        lm.config.pad_token_id = end
        misread = lm(input_ids=torch.where(mask == 1, ids, end), attention_mask=mask).logits[:, 0]
    torch.testing.assert_close(pooled, expected, rtol=0, atol=1e-5)
    assert ((misread - expected).abs() > 1e-3).all()


def test_scores_do_not_depend_on_batch_or_order(spec, adapter):
    base = with_reward(spec, adapter)
    pairs = pairs_of(base.tokenizer, 10)
    alone = torch.cat([scores(base, [pair]) for pair in pairs])
    assert alone.unique().numel() == 20
    for at_once in (1, 3, 10):
        torch.testing.assert_close(scores(base, pairs, at_once), alone, rtol=0, atol=1e-5)
    torch.testing.assert_close(scores(base, pairs[::-1]).flip(0), alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_reward_adapter_scores_alike_after_it_was_saved(spec, tmp_path, dtype):
    """In one and the same batch: to the last bit, in bfloat16 too."""
    spec = spec.model_copy(update={"compute_dtype": dtype})
    trained = reward_model(spec)
    trained.save_adapter(Role.REWARD, tmp_path)
    loaded = with_reward(spec, str(tmp_path))
    pairs = pairs_of(loaded.tokenizer)
    found = scores(loaded, pairs)
    assert found.dtype == torch.float32
    assert torch.equal(found, scores(trained, pairs))


def test_bfloat16_moves_scores_by_its_rounding_and_no_more(spec, adapter):
    """Scores have a standard deviation over 0.2 here; seen were differences of 0.019 on average and 0.050 at most from
    float32, and of 0.0028 at most between batches, as other shapes are summed in another order."""
    exact, rounded = (
        with_reward(spec.model_copy(update={"compute_dtype": d}), adapter) for d in ("float32", "bfloat16")
    )
    pairs = pairs_of(exact.tokenizer, 12)
    expected, found = scores(exact, pairs), scores(rounded, pairs)
    assert expected.std() > 0.2
    assert 0 < (found - expected).abs().max() < 0.1
    assert (found - expected).abs().mean() < 0.04
    alone = torch.cat([scores(rounded, [pair]) for pair in pairs])
    torch.testing.assert_close(alone, found, rtol=0, atol=0.01)


@pytest.mark.parametrize("lora", [LORA, Lora(r=2, targets=["q_proj"])])  # the reward model adapts all kinds of layers
@pytest.mark.parametrize("reward_first", [False, True])
def test_the_roles_on_one_base_do_not_disturb_each_other(spec, adapter, tmp_path, reward_first, lora):
    """Policy, reference and reward model: each is to the bit what it is alone."""
    trained, alone = load(spec), load(spec)
    base_logits = logits(alone, Role.BASE)
    trained.add_adapter(Role.POLICY, lora)
    scramble(trained)
    trained.save_adapter(Role.POLICY, tmp_path)
    alone.load_adapter(Role.POLICY, str(tmp_path), trainable=True)
    policy_logits = logits(alone)
    pairs = pairs_of(alone.tokenizer)
    expected = scores(with_reward(spec, adapter), pairs)

    together = load(spec)
    if reward_first:
        together.load_adapter(Role.REWARD, adapter, trainable=False)
    together.load_adapter(Role.POLICY, str(tmp_path), trainable=True)
    together.load_reference(str(tmp_path))
    if not reward_first:
        together.load_adapter(Role.REWARD, adapter, trainable=False)
    assert torch.equal(scores(together, pairs), expected)
    assert torch.equal(logits(together), policy_logits)
    assert torch.equal(logits(together, Role.REFERENCE), policy_logits)
    scramble(together, scale=0.2)  # the policy is trained further; neither its reference nor the reward model moves
    assert not torch.equal(logits(together), policy_logits)
    assert torch.equal(logits(together, Role.REFERENCE), policy_logits)
    assert torch.equal(scores(together, pairs), expected)
    assert torch.equal(logits(together, Role.BASE), base_logits)


def test_scoring_leaves_everything_as_it_was_also_amid_training(spec, adapter):
    base = load(spec)
    base.add_adapter(Role.POLICY, LORA)
    base.load_adapter(Role.REWARD, adapter, trainable=False)
    base.train()
    base.model.base_model.model.model.layers[0].eval()  # an unusual mix of modes must come back too
    next(p for n, p in base.model.named_parameters() if ".lora_A.policy." in n).requires_grad_(False)
    before, first = state(base), gradient(base)
    assert not scores(base, pairs_of(base.tokenizer)).requires_grad
    assert state(base) == before
    assert first.norm() > 0
    assert torch.equal(gradient(base), first)
    assert not any(p.grad is not None for n, p in base.model.named_parameters() if ".reward." in n)


def test_a_scoring_role_has_no_dropout(spec):
    base = load(spec)
    base.add_adapter(Role.REWARD, Lora(r=4, dropout=0.5))
    scramble(base, Role.REWARD)
    base.train()
    pairs = pairs_of(base.tokenizer)
    assert torch.equal(scores(base, pairs), scores(base, pairs))
    with base.packed_attention():
        one, other = (base.pair_scores(Role.REWARD, pairs) for _ in range(2))
    assert not torch.equal(one, other)  # in training it has


def test_many_rows_are_packed_in_groups_and_keep_their_order(spec, adapter, monkeypatch):
    base = with_reward(spec, adapter)
    pairs = pairs_of(base.tokenizer, 9)
    together = scores(base, pairs)

    monkeypatch.setattr("qalign.data.collate.ROWS_PACKED_TOGETHER", 2)

    torch.testing.assert_close(scores(base, pairs), together)
