"""A step of the trainer gives the same loss and gradients whether pairs are packed or padded."""

import pytest
import torch
from transformers import AutoTokenizer

from qalign.config.recipe import DPO, Lora, Model
from qalign.data.collate import MicroBatchLimit
from qalign.losses.preference import PreferenceLoss
from qalign.model.base import Role, load
from qalign.model.reference import ReferenceLogps
from qalign.train.trainers.policy import PreferenceTrainer
from tests.conftest import FIXTURES
from tests.families import HYBRIDS, SERVED, UNSERVED, alone, family, random_pairs
from tests.helpers import dpo_config, scramble


def small_base(name: str, folder):
    """A family as qalign loads it, with a policy that does something."""
    tokenizer = AutoTokenizer.from_pretrained(FIXTURES / "tokenizers" / "llama3")
    family(name, len(tokenizer) + 10, dtype=torch.float32, spread=0.1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    base = load(Model(base=str(folder), compute_dtype="float32", quantization="none"))
    base.add_adapter(Role.POLICY, Lora(r=4))
    scramble(base, scale=0.1)
    return base


@pytest.mark.parametrize("name", ["llama", "mistral", "falcon", "stablelm", "llama4", "jamba", "lfm2"])
def test_a_step_of_the_trainer_is_the_same_whichever_way_pairs_are_run(name, tmp_path):
    base = small_base(name, tmp_path / "model")
    if name in SERVED:
        assert base.layout_in_words == "once a pair, packed without padding"
    elif name in HYBRIDS:
        wanted = f"once a pair, packed without padding (but in {HYBRIDS[name][1]}, a row an answer)"
        assert base.layout_in_words == wanted
    else:
        assert base.layout_in_words.startswith(f"twice a pair, padded: {type(base.lm).__name__} ")
        assert UNSERVED[name][1] in base.layout_in_words
    pairs = random_pairs(vocabulary=2000)
    with torch.no_grad(), base.acting_as(Role.REFERENCE) as lm:
        reference = alone(lm, pairs)
    with base.acting_as(Role.POLICY) as lm:
        policy = alone(lm, pairs)
        assert (policy - reference).abs().max() > 0.1
        expected = PreferenceLoss({"sigmoid": 1.0}, beta=0.1)(policy, reference, torch.ones_like(policy)).mean()
        expected.backward()
    gradients = {n: p.grad.clone() for n, p in base.model.named_parameters() if p.grad is not None}
    base.model.zero_grad()
    settings = DPO.model_validate({"data": "unused.jsonl"})
    args = dpo_config(tmp_path, per_device_train_batch_size=len(pairs))
    trainer = PreferenceTrainer(base, settings, ReferenceLogps(), args, MicroBatchLimit(pairs=3), pairs)
    with base.packed_attention():
        found = trainer.training_step(base.model, pairs, len(pairs))
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    assert len(gradients) > 10
    for parameter_name, parameter in base.model.named_parameters():
        if parameter_name in gradients:
            wanted = gradients[parameter_name]
            assert (parameter.grad - wanted).norm() <= 1e-4 * wanted.norm() + 1e-7, parameter_name


def test_dropout_of_an_adapter_says_nothing_against_packed_rows(tiny_folder):
    """PEFT makes an adapter's dropout in training mode; the model is tried before a trainer sees it."""
    base = load(Model(base=tiny_folder, compute_dtype="float32"))
    base.add_adapter(Role.POLICY, Lora(r=4, dropout=0.5))
    scramble(base)
    modes = [module.training for module in base.model.modules()]
    assert any(modes)
    assert base.padding_reason is None
    assert [module.training for module in base.model.modules()] == modes
