"""The preference step against TRL's DPOTrainer, and the properties that a training loop must have."""

import math
from contextlib import nullcontext

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from trl import DPOTrainer

from qalign.config.recipe import Lora, Model
from qalign.config.stages import DPO
from qalign.data.collate import MicroBatchLimit
from qalign.data.store.sequences import TokenPair
from qalign.model.base import Role, load
from qalign.model.reference import ReferenceLogps
from qalign.train.trainers.policy import PreferenceTrainer
from tests.families import alone
from tests.helpers import SMOLLM2, house_style
from tests.helpers import dpo_config as config
from tests.train.runs import recorded_reads

LORA = Lora(r=4, alpha=8)
LN_2 = torch.tensor(2.0).log().item()  # in float32


@pytest.fixture
def base(tiny_base):
    """The tiny model with a policy that does something."""
    tiny_base.add_adapter(Role.POLICY, LORA)
    scramble(tiny_base.model)
    return tiny_base


def trainer_of(base, folder, pairs, *, micro=MicroBatchLimit(pairs=1000), chosen=None, eval_pairs=None, **values):  # noqa: B008
    """A trainer of ours: `chosen` goes into the recipe's section, the rest into TRL's config."""
    settings = DPO.model_validate({"data": "unused.jsonl", **(chosen or {})})
    return PreferenceTrainer(base, settings, ReferenceLogps(), config(folder, **values), micro, pairs, eval_pairs)


def pair_losses(trainer, pairs: list[TokenPair]) -> torch.Tensor:
    with trainer.base.packed_attention():
        return trainer.pair_losses(pairs)[0]


def scramble(model) -> None:
    """The same weights in any LoRA adapter of this shape, whatever its name."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert "lora_" in name
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.02


def ours_and_theirs(spec: Model, count: int, folder, chosen: dict):
    """(loss, metrics, gradients) of one batch by qalign and by TRL's DPOTrainer, adapters scrambled alike."""
    base, trl_base = load(spec), load(spec)
    pairs = house_style(base.tokenizer, count)
    base.add_adapter(Role.POLICY, LORA)
    scramble(base.model)
    ours = trainer_of(base, folder, pairs, chosen=chosen)
    plain = {key: chosen[key] for key in ("beta", "label_smoothing") if key in chosen}
    plain |= {"loss_type": [*ours.settings.losses], "loss_weights": [*ours.settings.losses.values()]}
    lora = LoraConfig(r=LORA.r, lora_alpha=LORA.alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    theirs = DPOTrainer(
        trl_base.lm, args=config(folder, **plain), peft_config=lora,
        train_dataset=Dataset.from_list([{"prompt": "unused", "chosen": "unused", "rejected": "not used"}]),
        processing_class=trl_base.tokenizer,
    )  # fmt: skip
    for parameter in theirs.model.parameters():  # TRL casts a quantised base's adapter to bfloat16
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    scramble(theirs.model)
    assert base.padding_reason is None
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    padded = theirs.data_collator([{name: getattr(pair, name) for name in names} for pair in pairs])
    results = []
    for trainer, inputs in ((ours, pairs), (theirs, padded)):
        trainer.model.train()
        with base.packed_attention() if trainer is ours else nullcontext():
            loss = trainer.compute_loss(trainer.model, inputs)
            loss.backward()
        trainer.log({"loss": loss.item()})
        grads = [parameter.grad for parameter in trainer.model.parameters() if parameter.requires_grad]
        results.append((loss.item(), trainer.state.log_history[-1], grads))
    return results


def assert_equals_trl(spec: Model, count: int, folder, rel: float = 1e-5, **chosen) -> None:
    """To 1e-5 each; a reward is a difference of log-probs, so as exact as these are in float32, but for two bits."""
    ours, theirs = ours_and_theirs(spec, count, folder, chosen)
    assert ours[0] == pytest.approx(theirs[0], rel=rel)
    for side in ("chosen", "rejected"):
        assert ours[1][f"logps/{side}"] == pytest.approx(theirs[1][f"logps/{side}"], rel=rel), side
    # TRL logs sums over tokens for IPO and length-normalised DPO, whose losses take means.
    compared = chosen["loss"] not in ["ipo", "sigmoid_norm"]
    assert not compared or ours[1]["rewards/accuracies"] == theirs[1]["rewards/accuracies"]
    logps = abs(theirs[1]["logps/chosen"]) + abs(theirs[1]["logps/rejected"])
    bits = 1e-6 + chosen.get("beta", 0.1) * 2.0**-22 * logps
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins") if compared else ():
        assert ours[1][name] == pytest.approx(theirs[1][name], rel=rel, abs=bits), name
    assert len(ours[2]) == len(theirs[2]) > 0
    for mine, other in zip(ours[2], theirs[2], strict=True):
        assert (mine - other).norm() <= rel * other.norm(), (mine.norm(), other.norm())
    assert any(grad.norm() > 0 for grad in ours[2])


@pytest.mark.parametrize(
    ("loss", "keys", "count"),
    [
        ("sigmoid", {}, 4),
        ("ipo", {}, 4),
        ("hinge", {}, 4),
        ("robust", {"label_smoothing": 0.2}, 4),
        ("sigmoid_norm", {"beta": 2.0}, 4),
        *((loss, {}, 4) for loss in ("bco_pair", "apo_zero", "apo_down", "aot", "aot_unpaired")),
        # TRL averages its SFT term over a batch's tokens, qalign over its pairs.
        ({"sigmoid": 1.0, "sft": 0.3}, {}, 1),
        ({"sigmoid": 0.8, "bco_pair": 0.2, "aot": 0.5, "sft": 1.0}, {}, 1),
        ({"hinge": 0.8, "bco_pair": 0.2, "aot": 0.5}, {}, 4),
    ],
)
def test_equals_trl_on_the_tiny_model(tiny_folder, tmp_path, loss, keys, count):
    assert_equals_trl(Model(base=tiny_folder, compute_dtype="float32"), count, tmp_path, loss=loss, **keys)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        ("sigmoid", lambda margin: math.log1p(math.exp(-margin))),
        ("sigmoid_norm", lambda margin: math.log1p(math.exp(-margin))),
        ("ipo", lambda margin: (margin / 0.7 - 1 / (2 * 0.7)) ** 2),
        ("hinge", lambda margin: max(0.0, 1 - margin)),
        ("simpo", lambda margin: math.log1p(math.exp(0.5 - margin))),
    ],
)
def test_the_logged_margin_is_the_one_in_the_loss(base, tmp_path, loss, expected):
    (pair,) = house_style(base.tokenizer, 1)
    trainer = trainer_of(base, tmp_path, [pair], chosen={"loss": loss, "beta": 0.7}, eval_pairs=[pair])
    found = trainer.evaluate()
    assert abs(found["eval_rewards/margins"]) > 1e-3
    assert found["eval_loss"] == pytest.approx(expected(found["eval_rewards/margins"]), rel=1e-5)


def test_at_the_first_step_every_pair_is_a_tie(tiny_base, tmp_path):
    tiny_base.add_adapter(Role.POLICY, LORA)
    trainer = trainer_of(tiny_base, tmp_path, house_style(tiny_base.tokenizer, 3), max_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["rewards/accuracies"] == 0.5


@pytest.mark.true_model
def test_equals_trl_on_smollm2(tmp_path):
    """float32 through 30 layers, packed against padded: 1.1e-5 was seen."""
    assert_equals_trl(Model(base=SMOLLM2, compute_dtype="float32"), 2, tmp_path, rel=3e-5, loss="sigmoid")


@pytest.mark.parametrize(
    ("model", "dtype"),
    [("tiny", "float32"), ("tiny", "bfloat16"), pytest.param(SMOLLM2, "auto", marks=pytest.mark.true_model)],
)
def test_first_loss_is_ln_2(tiny_folder, tmp_path, model, dtype):
    """SmolLM2 as the demo runs it: in bfloat16 where the CPU has it."""
    base = load(Model(base=tiny_folder if model == "tiny" else model, compute_dtype=dtype))
    base.add_adapter(Role.POLICY, LORA)
    pairs = house_style(base.tokenizer, 6 if model == "tiny" else 2)
    trainer = trainer_of(base, tmp_path, pairs)
    base.model.train()
    assert pair_losses(trainer, pairs).tolist() == [LN_2] * len(pairs)


def test_dropout_is_the_training_policys_alone(tiny_folder, tmp_path):
    """While no gradients are taken it has none, so what is measured is what was trained."""
    base = load(Model(base=tiny_folder, compute_dtype="float32"))
    base.add_adapter(Role.POLICY, Lora(r=4, dropout=0.5))
    scramble(base.model)
    trainer = trainer_of(base, tmp_path, house_style(base.tokenizer, 4))
    base.model.train()
    one, other = (pair_losses(trainer, trainer.train_dataset) for _ in range(2))
    assert not torch.equal(one, other)
    with torch.no_grad():
        one, other = (pair_losses(trainer, trainer.train_dataset) for _ in range(2))
        assert torch.equal(one, other)
        base.model.eval()
        assert torch.equal(pair_losses(trainer, trainer.train_dataset), one)


def test_training_and_evaluation_read_packed_rows_as_what_they_are_and_count_each_pair_once(base, tmp_path):
    """Seven pairs, in evaluation five and two in a batch, at most three at a time: the means over all pairs of what
    each answer has on its own."""
    pairs = house_style(base.tokenizer, 7)
    with torch.no_grad(), base.acting_as(Role.POLICY) as lm:
        expected = dict(zip(("logps/chosen", "logps/rejected"), alone(lm, pairs).mean(dim=0).tolist(), strict=True))
    trainer = trainer_of(
        base, tmp_path, pairs, micro=MicroBatchLimit(pairs=3), eval_pairs=pairs, max_steps=1,
        per_device_train_batch_size=7, per_device_eval_batch_size=5, learning_rate=0.0,
    )  # fmt: skip
    held_out = trainer.evaluate()
    with torch.no_grad():
        single = [pair_losses(trainer, [pair]).item() for pair in pairs]
    trainer.train()
    (logged,) = (entry for entry in trainer.state.log_history if "loss" in entry)
    for name, value in {**expected, "loss": sum(single) / 7}.items():
        assert logged[name] == pytest.approx(value, rel=1e-5 if name == "loss" else 1e-6), name
        assert held_out[f"eval_{name}"] == pytest.approx(value, rel=1e-5 if name == "loss" else 1e-6), name
    assert set(held_out) >= {"eval_rewards/accuracies", "eval_rewards/margins"}


def test_a_switch_between_forward_and_backward_is_noticed(base, tmp_path):
    pairs = house_style(base.tokenizer, 2)
    trainer = trainer_of(base, tmp_path, pairs)
    base.model.train()
    with base.packed_attention():
        loss = trainer.compute_loss(trainer.model, pairs)
        with base.acting_as(Role.REFERENCE):
            pass
        with pytest.raises(RuntimeError, match="the role was changed"):
            loss.backward()


def test_after_training_and_after_a_failure_the_model_takes_plain_rows(base, tmp_path):
    before = base.lm.config._attn_implementation
    trainer = trainer_of(base, tmp_path, house_style(base.tokenizer, 2), max_steps=1)
    trainer.train()
    assert base.lm.config._attn_implementation == before
    trainer.pair_losses = lambda inputs: 1 / 0
    for run in (trainer.train, trainer.evaluate):
        with pytest.raises((ZeroDivisionError, ValueError)):
            run()
        assert base.lm.config._attn_implementation == before


def test_a_step_reads_its_pairs_once_and_runs_them_in_micro_batches(base, tmp_path):
    pairs = house_style(base.tokenizer, 7)
    trainer = trainer_of(
        base, tmp_path, pairs, micro=MicroBatchLimit(pairs=2), per_device_train_batch_size=5, num_train_epochs=1
    )
    seen, real = [], trainer.pair_losses
    trainer.pair_losses = lambda inputs: seen.append(inputs) or real(inputs)
    trainer.train()
    assert [len(some) for some in seen] in ([1, 2, 2, 2], [2, 1, 2, 2], [2, 2, 1, 2])  # five, then two
    assert sorted(pair.where for some in seen for pair in some) == sorted(pair.where for pair in pairs)
    assert trainer.state.global_step == 2


@pytest.mark.parametrize("micro", [1, 5])
def test_a_step_waits_for_the_gpu_once_however_many_micro_batches_it_has(base, tmp_path, monkeypatch, micro):
    """Reading a tensor waits until all that was launched before it is done."""
    pairs = house_style(base.tokenizer, 5)
    trainer = trainer_of(base, tmp_path, pairs, micro=MicroBatchLimit(pairs=micro), max_steps=1)
    trainer.create_optimizer()
    with base.packed_attention():
        reads = recorded_reads(monkeypatch)
        trainer.training_step(trainer.model, pairs, len(pairs))
    assert reads == ["tolist"]
