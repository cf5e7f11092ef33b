"""Log-probs against the plain way: full logits, log_softmax, gather, in float64."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from qalign import logps
from qalign.batch import PairCollator
from qalign.errors import UserError
from qalign.tokens import TokenPair


def random_pairs(count: int, seed: int = 0) -> list[TokenPair]:
    """Unequal lengths, a one-token answer, and answers that begin alike."""
    generator = torch.Generator().manual_seed(seed)

    def ids(length: int) -> list[int]:
        return torch.randint(10, 1900, (length,), generator=generator).tolist()

    pairs = [TokenPair(ids(5 + number), ids(3 + 4 * number), ids(9), f"row {number}") for number in range(count - 2)]
    same = ids(6)
    return [*pairs, TokenPair(ids(7), ids(1), ids(20), "one token"), TokenPair(ids(4), same + ids(2), same, "alike")]


@pytest.fixture
def model(tiny_folder):
    return AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float64)


def plain(lm, batch) -> torch.Tensor:
    logits = lm(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    each = logits.log_softmax(-1).gather(2, batch["input_ids"][:, 1:, None])[..., 0]
    return each * batch["completion_mask"][:, 1:]


def test_equals_the_full_softmax(model):
    batch = PairCollator(0)(random_pairs(5))
    torch.testing.assert_close(logps.completion_logps(model, batch), plain(model, batch), rtol=1e-12, atol=1e-12)


def test_gradients_equal_the_full_softmax(model, monkeypatch):
    monkeypatch.setattr(logps, "_CHUNK_ELEMENTS", 7 * model.config.vocab_size)  # several chunks, the last one partial
    model.lm_head.requires_grad_(False)
    batch = PairCollator(0)(random_pairs(5))
    weights = torch.randn(10, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    grads = []
    for way in (logps.completion_logps, plain):
        model.zero_grad()
        (way(model, batch).sum(1) * weights).sum().backward()
        grads.append(model.model.layers[0].self_attn.q_proj.weight.grad.clone())
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-10, atol=1e-12)


def test_padding_and_company_change_nothing(model):
    pairs = random_pairs(5)
    together = logps.pair_logps(model, PairCollator(0)(pairs))
    alone = torch.cat([logps.pair_logps(model, PairCollator(7)([pair])) for pair in pairs])
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-10)


def test_chosen_comes_first(model):
    pair = random_pairs(3)[0]
    swapped = TokenPair(pair.prompt_ids, pair.rejected_ids, pair.chosen_ids, "swapped")
    one, other = (logps.pair_logps(model, PairCollator(0)([p])) for p in (pair, swapped))
    torch.testing.assert_close(one, other.flip(1))
    assert logps.pair_lengths(PairCollator(0)([pair])).tolist() == [[len(pair.chosen_ids), len(pair.rejected_ids)]]


def test_full_logits_are_never_held(model, monkeypatch):
    """No tensor of (completion tokens x vocabulary) is made when chunks are small."""
    monkeypatch.setattr(logps, "_CHUNK_ELEMENTS", 4 * model.config.vocab_size)
    seen, real = [], logps.head_logits
    monkeypatch.setattr(logps, "head_logits", lambda lm, hidden: seen.append(len(hidden)) or real(lm, hidden))
    batch = PairCollator(0)(random_pairs(4))
    logps.pair_logps(model, batch)
    assert max(seen) == 4
    assert sum(seen) == int(batch["completion_mask"].sum())


def family(name: str):
    """A tiny random model of a family with something special behind its head or in its attention."""
    import transformers as tf

    small = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0,
    }  # fmt: skip
    config = {
        "gemma2": lambda: tf.Gemma2Config(**small, head_dim=8, sliding_window=4, final_logit_softcapping=5.0),
        "cohere": lambda: tf.CohereConfig(**small, logit_scale=0.25),
        "granite": lambda: tf.GraniteConfig(**small, logits_scaling=4.0),
        "mistral": lambda: tf.MistralConfig(**small, sliding_window=4),
        "qwen3": lambda: tf.Qwen3Config(**small, head_dim=8),
    }[name]()
    torch.manual_seed(0)
    return tf.AutoModelForCausalLM.from_config(config).double().eval()


@pytest.mark.parametrize("name", ["gemma2", "cohere", "granite", "mistral", "qwen3"])
def test_families(name):
    lm = family(name)
    logps.check_head(lm)
    ids = torch.randint(1, 64, (4, 12), generator=torch.Generator().manual_seed(2))
    ones = torch.ones_like(ids)
    batch = {
        "input_ids": ids,
        "attention_mask": ones,
        "completion_mask": ones.clone().index_fill(1, torch.arange(5), 0),
    }
    torch.testing.assert_close(logps.completion_logps(lm, batch), plain(lm, batch), rtol=1e-9, atol=1e-9)


def test_an_unknown_head_is_noticed():
    lm = family("qwen3")
    original = lm.forward

    def forward(*args, **kwargs):
        output = original(*args, **kwargs)
        output.logits = output.logits * 1.5
        return output

    lm.forward = forward
    with pytest.raises(UserError, match="the head of Qwen3ForCausalLM does more than qalign knows"):
        logps.check_head(lm)
