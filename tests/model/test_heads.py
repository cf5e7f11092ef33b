"""Scores are read at the end of the answer's turn, whatever stands around it and whoever else sits on the base."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from qalign.config.recipe import Lora, Model
from qalign.data.tokenize import end_of_turn_id
from qalign.model.base import Role, load, load_classifier
from qalign.model.heads import ScalarHead, end_scores
from qalign.model.scoring import score_sequences
from tests.conftest import FIXTURES
from tests.helpers import house_style, scramble

IDS = torch.arange(20, 60).view(2, 20)
LORA = Lora(r=4, alpha=8)


@pytest.fixture
def spec(tiny_folder):
    return Model(base=tiny_folder, compute_dtype="float32")


def reward_folder(spec, folder) -> str:
    """A reward adapter that does something, saved by the classifier it was made on."""
    classifier = reward_classifier(spec)
    classifier.save_adapter(Role.REWARD, folder)
    return str(folder)


def reward_classifier(spec):
    torch.manual_seed(1)
    classifier = load_classifier(spec)
    classifier.add_adapter(Role.REWARD, LORA)
    scramble(classifier, Role.REWARD)
    return classifier


@pytest.fixture(scope="module")
def adapter(tiny_folder, tmp_path_factory) -> str:
    return reward_folder(Model(base=tiny_folder, compute_dtype="float32"), tmp_path_factory.mktemp("reward") / "a")


def policy_folder(spec, folder) -> str:
    base = load(spec)
    base.add_adapter(Role.POLICY, LORA)
    scramble(base)
    base.save_adapter(Role.POLICY, folder)
    return str(folder)


def answers(tokenizer, count: int = 4) -> list[list[int]]:
    """Real sequences of several lengths, each with its end of turn."""
    pairs = house_style(tokenizer, count)
    found = [pair.prompt_ids + ids for pair in pairs for ids in (pair.chosen_ids, pair.rejected_ids)]
    assert {ids[-1] for ids in found} == {end_of_turn_id(tokenizer, {})}
    return found


def padded(sequences: list[list[int]], pad: int, side: str):
    """(ids, mask) by hand."""
    longest = max(map(len, sequences))
    rows, masks = [], []
    for ids in sequences:
        padding = [pad] * (longest - len(ids))
        rows.append(padding + ids if side == "left" else ids + padding)
        real = [1] * len(ids)
        masks.append([0] * len(padding) + real if side == "left" else real + [0] * len(padding))
    return torch.tensor(rows), torch.tensor(masks)


def logits(base, role=Role.POLICY) -> torch.Tensor:
    with torch.no_grad(), base.acting_as(role) as lm:
        return lm(input_ids=IDS).logits


def test_the_last_real_token_is_read_with_positions_counted_from_the_first():
    """A backbone whose hidden state is (id, position), and a head that makes 100 id + position of it."""

    def backbone(*, input_ids, position_ids, **_):
        return SimpleNamespace(last_hidden_state=torch.stack([input_ids, position_ids], dim=-1).float())

    head = nn.Linear(2, 1, bias=False)
    head.weight.data = torch.tensor([[100.0, 1.0]])
    ids = torch.tensor([[5, 6, 7, 0, 0], [0, 0, 8, 9, 0], [1, 2, 3, 4, 5], [9, 9, 9, 9, 4]])
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]])
    # The second row ends with the id that pads: it is no padding there.
    assert end_scores(SimpleNamespace(base_model=backbone), head, ids, mask).tolist() == [702, 2, 504, 400]


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


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["language model", "classifier"])
def test_the_score_is_read_at_the_end_of_turn_also_where_that_pads(spec, adapter, kind, side):
    """Llama's template has pad = end of turn. The hidden states are computed one row at a time, without padding."""
    base = (load if kind == "language model" else load_classifier)(spec)
    base.load_adapter(Role.REWARD, adapter, trainable=False)
    sequences = answers(base.tokenizer)
    end = end_of_turn_id(base.tokenizer, {})
    head = reward_classifier(spec).lm.score.modules_to_save[Role.REWARD].weight.detach()[0]
    at_end, before = [], []
    for ids in sequences:
        with torch.no_grad(), base.acting_as(Role.REWARD) as lm:
            hidden = lm.base_model(input_ids=torch.tensor([ids])).last_hidden_state[0]
        at_end.append((hidden[-1].double() @ head.double()).item())
        before.append((hidden[-2].double() @ head.double()).item())
    found = base.scores(Role.REWARD, *padded(sequences, end, side)).tolist()
    assert found == pytest.approx(at_end, abs=1e-5)
    assert min(abs(one - other) for one, other in zip(at_end, before, strict=True)) > 1e-3


@pytest.mark.parametrize("name", ["llama3", "zephyr", "mistral_v03"])
def test_transformers_own_pooling_reads_the_same_token(tmp_path, name):
    """The classifier's pad token is chosen for it; with the tokenizer's usual pad = end of turn it reads another."""
    tokenizer = AutoTokenizer.from_pretrained(FIXTURES / "tokenizers" / name)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, initializer_range=0.1,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    base = reward_classifier(Model(base=str(tmp_path), compute_dtype="float32", quantization="none"))
    sequences = answers(base.tokenizer)
    lm, pad, end = base.lm, base.tokenizer.pad_token_id, end_of_turn_id(base.tokenizer, {})
    assert pad != end
    assert lm.config.pad_token_id == pad
    ids, mask = padded(sequences, pad, "right")
    expected = base.scores(Role.REWARD, ids, mask)
    with torch.no_grad():
        pooled = lm(input_ids=ids, attention_mask=mask).logits[:, 0]
        lm.config.pad_token_id = end
        misread = lm(input_ids=torch.where(mask == 1, ids, end), attention_mask=mask).logits[:, 0]
    torch.testing.assert_close(pooled, expected, rtol=0, atol=1e-5)
    assert ((misread - expected).abs() > 1e-3).all()


def test_scores_do_not_depend_on_padding_batch_or_order(spec, adapter):
    """The same answers alone, together, padded left or right, and among others in any order."""
    base = load(spec)
    base.load_adapter(Role.REWARD, adapter, trainable=False)
    sequences = answers(base.tokenizer, 10)
    alone = [base.scores(Role.REWARD, torch.tensor([ids]), torch.ones(1, len(ids), dtype=int)) for ids in sequences]
    expected = torch.cat(alone).tolist()
    assert len(set(expected)) == 20
    for pad in (0, base.tokenizer.pad_token_id):
        for side in ("left", "right"):
            assert base.scores(Role.REWARD, *padded(sequences, pad, side)).tolist() == pytest.approx(expected, abs=1e-5)
    assert score_sequences(base, sequences) == pytest.approx(expected, abs=1e-5)
    backwards = score_sequences(base, sequences[::-1])
    assert backwards == pytest.approx(expected[::-1], abs=1e-5)
    assert score_sequences(base, sequences[3:4]) == pytest.approx(expected[3:4], abs=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_reward_adapter_scores_alike_on_a_language_model_and_on_the_classifier(spec, tmp_path, dtype):
    """In one and the same batch: to the last bit, in bfloat16 too."""
    spec = spec.model_copy(update={"compute_dtype": dtype})
    folder = reward_folder(spec, tmp_path / "reward")
    classifier, causal = load_classifier(spec), load(spec)
    for base in (classifier, causal):
        base.load_adapter(Role.REWARD, folder, trainable=False)
    ids, mask = padded(answers(causal.tokenizer), 0, "right")
    found = causal.scores(Role.REWARD, ids, mask)
    assert found.dtype == torch.float32
    assert torch.equal(found, classifier.scores(Role.REWARD, ids, mask))
    assert torch.equal(found, reward_classifier(spec).scores(Role.REWARD, ids, mask))  # as it was before saving


def test_bfloat16_moves_scores_by_its_rounding_and_no_more(spec, tmp_path):
    """Seen where scores have a standard deviation of 0.22: from float32 0.019 apart on average and 0.050 at most; by
    batch and padding 0.0028 at most, as other shapes add up in another order."""
    folder = reward_folder(spec, tmp_path / "reward")
    exact, rounded = (load(spec.model_copy(update={"compute_dtype": dtype})) for dtype in ("float32", "bfloat16"))
    for base in (exact, rounded):
        base.load_adapter(Role.REWARD, folder, trainable=False)
    sequences = answers(exact.tokenizer, 12)
    expected, found = (torch.tensor(score_sequences(base, sequences)) for base in (exact, rounded))
    assert expected.std() > 0.2
    assert 0 < (found - expected).abs().max() < 0.1
    assert (found - expected).abs().mean() < 0.04
    alone = torch.tensor([score_sequences(rounded, [ids])[0] for ids in sequences])
    left = rounded.scores(Role.REWARD, *padded(sequences, 0, "left"))
    for other in (alone, left):
        torch.testing.assert_close(other, found, rtol=0, atol=0.01)


def test_the_roles_on_one_base_do_not_disturb_each_other(spec, adapter, tmp_path):
    """Policy, reference and reward model: each is to the bit what it is alone."""
    policy = policy_folder(spec, tmp_path / "policy")
    sequences = answers(load(spec).tokenizer)
    alone, scorer = load(spec), load(spec)
    base_logits = logits(alone, Role.BASE)
    alone.load_adapter(Role.POLICY, policy, trainable=True)
    policy_logits = logits(alone)
    scorer.load_adapter(Role.REWARD, adapter, trainable=False)
    expected = score_sequences(scorer, sequences)

    together = load(spec)
    together.load_adapter(Role.POLICY, policy, trainable=True)
    together.load_reference(policy)
    together.load_adapter(Role.REWARD, adapter, trainable=False)
    assert score_sequences(together, sequences) == expected
    assert torch.equal(logits(together), policy_logits)
    assert torch.equal(logits(together, Role.REFERENCE), policy_logits)
    scramble(together, scale=0.2)  # the policy goes on; neither its reference nor the reward model moves
    assert not torch.equal(logits(together), policy_logits)
    assert torch.equal(logits(together, Role.REFERENCE), policy_logits)
    assert score_sequences(together, sequences) == expected
    assert torch.equal(logits(together, Role.BASE), base_logits)


def test_the_reward_model_may_come_first(spec, adapter, tmp_path):
    policy = policy_folder(spec, tmp_path / "policy")
    alone = load(spec)
    alone.load_adapter(Role.POLICY, policy, trainable=True)
    together = load(spec)
    together.load_adapter(Role.REWARD, adapter, trainable=False)
    together.load_adapter(Role.POLICY, policy, trainable=True)
    assert torch.equal(logits(together), logits(alone))
    scorer = load(spec)
    scorer.load_adapter(Role.REWARD, adapter, trainable=False)
    sequences = answers(scorer.tokenizer)
    assert score_sequences(together, sequences) == score_sequences(scorer, sequences)


def test_scoring_leaves_everything_as_it_was_also_amid_training(spec, adapter):
    base = load(spec)
    base.add_adapter(Role.POLICY, LORA)
    base.load_adapter(Role.REWARD, adapter, trainable=False)
    with base.acting_as(Role.POLICY):
        pass
    base.model.train()
    base.model.base_model.model.model.layers[0].eval()  # unusual mixes must come back too
    next(p for n, p in base.model.named_parameters() if ".lora_A.policy." in n).requires_grad_(False)

    def state():
        return (
            base.role,
            base.model.active_adapter,
            [parameter.requires_grad for parameter in base.model.parameters()],
            [module.training for module in base.model.modules()],
        )

    def gradient() -> torch.Tensor:
        base.model.zero_grad()
        base.lm(input_ids=IDS, labels=IDS).loss.backward()
        return torch.cat([p.grad.flatten() for n, p in base.model.named_parameters() if ".lora_B.policy." in n])

    before, first = state(), gradient()
    scores = base.scores(Role.REWARD, IDS, torch.ones_like(IDS))
    assert not scores.requires_grad
    assert state() == before
    assert first.norm() > 0
    assert torch.equal(gradient(), first)
    assert not any(p.grad is not None for n, p in base.model.named_parameters() if ".reward." in n)


def test_a_scoring_role_has_no_dropout(spec, tmp_path):
    classifier = load_classifier(spec)
    classifier.add_adapter(Role.REWARD, Lora(r=4, dropout=0.5))
    scramble(classifier, Role.REWARD)
    classifier.model.train()
    first, second = (classifier.scores(Role.REWARD, IDS, torch.ones_like(IDS)) for _ in range(2))
    assert torch.equal(first, second)
    with torch.no_grad():
        one, other = (classifier.lm(input_ids=IDS).logits for _ in range(2))
    assert not torch.equal(one, other)  # in training it is there


def test_reward_and_policy_may_adapt_different_layers(spec, adapter, tmp_path):
    """The policy here adapts one kind of layer, the reward model all: what the one lacks stays the base's."""
    base = load(spec)
    base.add_adapter(Role.POLICY, Lora(r=2, targets=["q_proj"]))
    scramble(base)
    alone = logits(base)
    base.load_adapter(Role.REWARD, adapter, trainable=False)
    scorer = load(spec)
    scorer.load_adapter(Role.REWARD, adapter, trainable=False)
    sequences = answers(base.tokenizer)
    assert score_sequences(base, sequences) == score_sequences(scorer, sequences)
    assert torch.equal(logits(base), alone)
