"""The reward trainer against TRL's, and reward models that can't be loaded."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
import trl
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from qalign.config.recipe import Lora, Model
from qalign.config.stages import Reward
from qalign.data.collate import MicroBatchLimit
from qalign.errors import UserError
from qalign.model.adapters import SCORE_HEAD
from qalign.model.base import Role, load, load_classifier
from qalign.train.pair_trainers import RewardModelTrainer
from tests.helpers import TRAIN, house_style, scramble
from tests.reward_runs import plain_reward_model


@pytest.fixture
def spec(tiny_folder) -> Model:
    return Model(base=tiny_folder, compute_dtype="float32", max_length=512)


@pytest.fixture
def start(spec, tmp_path) -> str:
    """A reward adapter that does something."""
    base = load_classifier(spec)
    base.add_adapter(Role.REWARD, Lora(r=4, alpha=8))
    scramble(base, Role.REWARD)
    base.save_adapter(Role.REWARD, tmp_path / "start")
    return str(tmp_path / "start")


@pytest.mark.parametrize(("margin", "centering"), [(False, 0.0), (True, 0.1)])
def test_the_loss_is_that_of_trls_reward_trainer(spec, start, tiny_folder, tmp_path, margin, centering):
    """Value and gradients of its own `compute_loss` on the same rows, padded, by plain PEFT."""
    base = load_classifier(spec)
    base.load_adapter(Role.REWARD, start, trainable=True)
    pairs = [replace(pair, margin=0.5 + n) for n, pair in enumerate(house_style(base.tokenizer, 4, path=TRAIN))]
    args = trl.RewardConfig(
        output_dir=str(tmp_path), bf16=False, use_cpu=True, activation_checkpointing=False, report_to="none",
        center_rewards_coefficient=centering or None, dataloader_pin_memory=False, max_length=None,
    )  # fmt: skip
    settings = Reward.model_validate({"data": "unused.jsonl", "margin": margin, "centering": centering})
    ours = RewardModelTrainer(base, settings, args, MicroBatchLimit(pairs=4), pairs)
    assert base.layout_in_words == "once a pair, packed without padding"
    with base.packed_attention():
        loss = ours.compute_loss(base.model, pairs)
        loss.backward()

    rows = [
        {"chosen_ids": p.prompt_ids + p.chosen_ids, "rejected_ids": p.prompt_ids + p.rejected_ids}
        | ({"margin": p.margin} if margin else {})
        for p in pairs
    ]
    theirs = trl.RewardTrainer(
        plain_reward_model(tiny_folder, Path(start), trainable=True), args=args,
        train_dataset=Dataset.from_list(rows), processing_class=base.tokenizer,
    )  # fmt: skip
    for parameter, wanted in zip(  # TRL casts the adapters of a quantised base to bfloat16
        trained_of(theirs.model), trained_of(plain_reward_model(tiny_folder, Path(start), trainable=True)), strict=True
    ):
        parameter.data = wanted.data
    theirs.model.eval()
    expected = theirs.compute_loss(theirs.model, theirs.data_collator(rows))
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    found, wanted = trained_of(base.model), trained_of(theirs.model)
    assert len(found) == len(wanted) == 2 * 7 * 2 + 1
    for one, other in zip(found, wanted, strict=True):
        assert (one.grad - other.grad).norm() <= 1e-4 * other.grad.norm() + 1e-7


def trained_of(model) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def test_an_adapter_without_its_head_is_refused_in_one_line(spec, start):
    file = Path(start) / "adapter_model.safetensors"
    weights = load_file(file)
    del weights[SCORE_HEAD]
    save_file(weights, file)
    for loaded in (load, load_classifier):
        with pytest.raises(UserError) as raised:
            loaded(spec).load_adapter(Role.REWARD, start, trainable=False)
        assert raised.value.lines == (f"{start}: this reward adapter has lost its score head; train it again",)


@pytest.mark.parametrize(
    ("family", "reason"),
    [("Roberta", "RobertaForSequenceClassification has no 'score' head"), ("Mamba", "can't be loaded: Unrecognized")],
)
def test_a_family_that_cannot_score_is_refused_in_one_line(tmp_path, tiny_folder, family, reason):
    config = getattr(transformers, f"{family}Config")(
        vocab_size=100, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, state_size=4
    )
    getattr(transformers, f"{family}ForCausalLM")(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(tmp_path)
    with pytest.raises(UserError) as raised:
        load_classifier(Model(base=str(tmp_path), compute_dtype="float32", quantization="none"))
    (line,) = raised.value.lines
    assert line.startswith("model.base: ")
    assert reason in line
