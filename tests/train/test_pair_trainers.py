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
from qalign.data.tokenize import TokenPair
from qalign.errors import UserError
from qalign.model.base import Role, load
from qalign.model.reference import ReferenceLogps
from qalign.train.pair_trainers import PreferenceTrainer
from tests.families import alone
from tests.helpers import SMOLLM2, house_style
from tests.helpers import dpo_config as config

LORA = Lora(r=4, alpha=8)
LN_2 = torch.tensor(2.0).log().item()  # in float32


def settings(**values) -> DPO:
    return DPO.model_validate({"data": "unused.jsonl", **values})


def trainer_of(base, folder, pairs, *, micro=MicroBatchLimit(pairs=1000), chosen=None, eval_pairs=None, **values):  # noqa: B008
    """A trainer of ours: `chosen` goes into the recipe's section, the rest into TRL's config."""
    args = config(folder, **values)
    return PreferenceTrainer(base, settings(**(chosen or {})), ReferenceLogps(), args, micro, pairs, eval_pairs)


def pair_losses(trainer, pairs: list[TokenPair]) -> torch.Tensor:
    with trainer.base.packed_attention():
        return trainer.pair_losses(pairs)[0]


def trl_batch(pairs: list[TokenPair], pad_token_id: int) -> dict:
    """As TRL's own collator gives them: all chosen rows, then all rejected ones, padded on the right."""
    rows = [(p.prompt_ids, p.chosen_ids) for p in pairs] + [(p.prompt_ids, p.rejected_ids) for p in pairs]
    longest = max(len(prompt) + len(answer) for prompt, answer in rows)
    left = [longest - len(prompt) - len(answer) for prompt, answer in rows]
    batch = {
        "input_ids": [prompt + answer + [pad_token_id] * n for (prompt, answer), n in zip(rows, left, strict=True)],
        "attention_mask": [[1] * (longest - n) + [0] * n for n in left],
        "completion_mask": [
            [0] * len(prompt) + [1] * len(answer) + [0] * n for (prompt, answer), n in zip(rows, left, strict=True)
        ],
    }
    return {name: torch.tensor(values) for name, values in batch.items()}


def scramble(model) -> None:
    """The same weights in any LoRA adapter of this shape, whatever its name."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert "lora_" in name
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.02


def ours_and_theirs(base, trl_base, pairs, folder, trl_loss: list[str], trl_weights, **chosen):
    """(loss, metrics, gradients) of one batch by qalign and by TRL's DPOTrainer, adapters scrambled alike."""
    base.add_adapter(Role.POLICY, LORA)
    scramble(base.model)
    ours = trainer_of(base, folder, pairs, chosen=chosen)
    trl_args = config(
        folder, loss_type=trl_loss, loss_weights=trl_weights, beta=chosen.get("beta", 0.1),
        label_smoothing=chosen.get("label_smoothing", 0.0),
    )  # fmt: skip
    lora = LoraConfig(r=LORA.r, lora_alpha=LORA.alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    rows = Dataset.from_list([{"prompt": "unused", "chosen": "unused", "rejected": "not used"}])
    theirs = DPOTrainer(
        trl_base.lm, args=trl_args, train_dataset=rows, processing_class=trl_base.tokenizer, peft_config=lora
    )
    for parameter in theirs.model.parameters():  # TRL casts a quantised base's adapter to bfloat16
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    scramble(theirs.model)
    assert base.padding_reason is None
    results = []
    for trainer, inputs in ((ours, pairs), (theirs, trl_batch(pairs, base.tokenizer.pad_token_id))):
        trainer.model.train()
        with base.packed_attention() if trainer is ours else nullcontext():
            loss = trainer.compute_loss(trainer.model, inputs)
            loss.backward()
        trainer.log({"loss": loss.item()})
        grads = [parameter.grad for parameter in trainer.model.parameters() if parameter.requires_grad]
        results.append((loss.item(), trainer.state.log_history[-1], grads))
    return results


def assert_same(ours, theirs, rel: float = 1e-5, beta: float = 0.1) -> None:
    """To 1e-5 each; a reward is a difference of log-probs, so as exact as these are in float32, but for two bits."""
    assert ours[0] == pytest.approx(theirs[0], rel=rel)
    for side in ("chosen", "rejected"):
        assert ours[1][f"logps/{side}"] == pytest.approx(theirs[1][f"logps/{side}"], rel=rel), side
    assert ours[1]["rewards/accuracies"] == theirs[1]["rewards/accuracies"]
    bits = 1e-6 + beta * 2.0**-22 * (abs(theirs[1]["logps/chosen"]) + abs(theirs[1]["logps/rejected"]))
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
        assert ours[1][name] == pytest.approx(theirs[1][name], rel=rel, abs=bits), name
    assert len(ours[2]) == len(theirs[2]) > 0
    for mine, other in zip(ours[2], theirs[2], strict=True):
        assert (mine - other).norm() <= rel * other.norm(), (mine.norm(), other.norm())
    assert any(grad.norm() > 0 for grad in ours[2])


TRL_LOSSES = [
    ({"loss": "sigmoid"}, ["sigmoid"], None),
    ({"loss": "ipo"}, ["ipo"], None),
    ({"loss": "hinge"}, ["hinge"], None),
    ({"loss": "robust", "label_smoothing": 0.2}, ["robust"], None),
    ({"loss": "sigmoid_norm", "beta": 2.0}, ["sigmoid_norm"], None),
    ({"loss": "apo_zero"}, ["apo_zero"], None),
]


@pytest.mark.parametrize(("chosen", "trl_loss", "weights"), TRL_LOSSES, ids=lambda value: str(value)[:20])
def test_equals_trl_on_the_tiny_model(tiny_folder, tmp_path, chosen, trl_loss, weights):
    spec = Model(base=tiny_folder, compute_dtype="float32")
    base = load(spec)
    pairs = house_style(base.tokenizer, 4)
    results = ours_and_theirs(base, load(spec), pairs, tmp_path, trl_loss, weights, **chosen)
    assert_same(*results, beta=chosen.get("beta", 0.1))


def test_sft_term_equals_trl_on_one_pair(tiny_folder, tmp_path):
    """TRL averages its SFT term over a batch's tokens, qalign over its pairs: the same for one pair."""
    spec = Model(base=tiny_folder, compute_dtype="float32")
    base = load(spec)
    pairs = house_style(base.tokenizer, 1)
    results = ours_and_theirs(base, load(spec), pairs, tmp_path, ["sigmoid", "sft"], [1.0, 0.3], sft_weight=0.3)
    assert_same(*results)


@pytest.mark.true_model
def test_equals_trl_on_smollm2(tmp_path):
    spec = Model(base=SMOLLM2, compute_dtype="float32")
    base = load(spec)
    results = ours_and_theirs(base, load(spec), house_style(base.tokenizer, 2), tmp_path, ["sigmoid"], None)
    assert_same(*results, rel=3e-5)  # float32 through 30 layers, packed against padded: 1.1e-5 was seen


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


def trained(tiny_folder, folder, dtype="float32", start_from=None, **values) -> list[dict]:
    """What a few steps on the tiny model log."""
    torch.manual_seed(0)
    base = load(Model(base=tiny_folder, compute_dtype=dtype))
    if start_from:
        base.load_adapter(Role.POLICY, start_from, trainable=True)
        base.load_reference(start_from)
    else:
        base.add_adapter(Role.POLICY, LORA)
    trainer = trainer_of(base, folder, house_style(base.tokenizer, 8), **values)
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def test_training_and_evaluation_read_packed_rows_as_what_they_are(tiny_base, tmp_path):
    """What a whole run logs of its first step, and of held-out pairs, is what each answer has on its own."""
    tiny_base.add_adapter(Role.POLICY, LORA)
    scramble(tiny_base.model)
    pairs = house_style(tiny_base.tokenizer, 4)
    with torch.no_grad(), tiny_base.acting_as(Role.POLICY) as lm:
        expected = dict(zip(("logps/chosen", "logps/rejected"), alone(lm, pairs).mean(dim=0).tolist(), strict=True))
    trainer = trainer_of(
        tiny_base, tmp_path, pairs, micro=MicroBatchLimit(pairs=3), eval_pairs=pairs, max_steps=1,
        per_device_train_batch_size=4, learning_rate=0.0,
    )  # fmt: skip
    held_out = trainer.evaluate()
    trainer.train()
    (logged,) = (entry for entry in trainer.state.log_history if "loss" in entry)
    for name, value in expected.items():
        assert logged[name] == pytest.approx(value, rel=1e-6), name
        assert held_out[f"eval_{name}"] == pytest.approx(value, rel=1e-6), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("from_adapter", [False, True])
def test_gradient_checkpointing_changes_nothing(tiny_folder, tmp_path, dtype, from_adapter):
    """In bfloat16 this is a GPU's default path: autocast, recomputation after the role's context was left."""
    start = None
    if from_adapter:
        base = load(Model(base=tiny_folder, compute_dtype="float32"))
        base.add_adapter(Role.POLICY, LORA)
        scramble(base.model)
        base.save_adapter(Role.POLICY, tmp_path / "start")
        start = str(tmp_path / "start")
    keys = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}}
    size = {"max_steps": 3, "per_device_train_batch_size": 4, "dtype": dtype, "start_from": start}
    plain, checkpointed = (
        trained(tiny_folder, tmp_path / str(number), **extra, **size) for number, extra in enumerate(({}, keys))
    )
    assert plain[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    for one, other in zip(plain, checkpointed, strict=True):
        assert one["grad_norm"] > 0
        for name in ("loss", "grad_norm", "logps/chosen"):
            assert one[name] == pytest.approx(other[name], rel=1e-5), name


def test_a_switch_between_forward_and_backward_is_noticed(tiny_base, tmp_path):
    tiny_base.add_adapter(Role.POLICY, LORA)
    pairs = house_style(tiny_base.tokenizer, 2)
    trainer = trainer_of(tiny_base, tmp_path, pairs)
    tiny_base.model.train()
    with tiny_base.packed_attention():
        loss = trainer.compute_loss(trainer.model, pairs)
        with tiny_base.acting_as(Role.REFERENCE):
            pass
        with pytest.raises(RuntimeError, match="the role was changed"):
            loss.backward()


def test_evaluation_counts_each_pair_once(tiny_base, tmp_path):
    """Seven pairs, five and two in a batch, at most three at a time: the mean of the pairs, not of the batches."""
    tiny_base.add_adapter(Role.POLICY, LORA)
    scramble(tiny_base.model)
    pairs = house_style(tiny_base.tokenizer, 7)
    trainer = trainer_of(
        tiny_base, tmp_path, pairs, micro=MicroBatchLimit(pairs=3), eval_pairs=pairs, per_device_eval_batch_size=5
    )
    found = trainer.evaluate()
    tiny_base.model.eval()
    with torch.no_grad():
        single = [pair_losses(trainer, [pair]).item() for pair in pairs]
    assert found["eval_loss"] == pytest.approx(sum(single) / 7, rel=1e-5)
    assert set(found) >= {"eval_rewards/accuracies", "eval_rewards/margins", "eval_logps/chosen"}


def test_a_loss_that_is_not_finite_names_its_rows(tiny_base, tmp_path):
    tiny_base.add_adapter(Role.POLICY, LORA)
    pairs = house_style(tiny_base.tokenizer, 3)
    trainer = trainer_of(tiny_base, tmp_path, pairs)
    real = trainer.pair_losses

    def one_nan(inputs):
        loss, metrics = real(inputs)
        return loss * torch.tensor([1.0, math.nan, 1.0]), metrics

    trainer.pair_losses = one_nan
    with (
        tiny_base.packed_attention(),
        pytest.raises(UserError, match=r"step 1: the loss is not finite on [^,]*house_style_test.jsonl:2;"),
    ):
        trainer.compute_loss(trainer.model, pairs)


def test_after_training_and_after_a_failure_the_model_takes_plain_rows(tiny_base, tmp_path):
    tiny_base.add_adapter(Role.POLICY, LORA)
    before = tiny_base.lm.config._attn_implementation
    trainer = trainer_of(tiny_base, tmp_path, house_style(tiny_base.tokenizer, 2), max_steps=1)
    trainer.train()
    assert tiny_base.lm.config._attn_implementation == before
    trainer.pair_losses = lambda inputs: 1 / 0
    for run in (trainer.train, trainer.evaluate):
        with pytest.raises((ZeroDivisionError, ValueError)):
            run()
        assert tiny_base.lm.config._attn_implementation == before


def test_a_step_reads_its_pairs_once_and_runs_them_in_micro_batches(tiny_base, tmp_path):
    tiny_base.add_adapter(Role.POLICY, LORA)
    pairs = house_style(tiny_base.tokenizer, 7)
    trainer = trainer_of(
        tiny_base, tmp_path, pairs, micro=MicroBatchLimit(pairs=2), per_device_train_batch_size=5, num_train_epochs=1
    )
    seen, real = [], trainer.pair_losses
    trainer.pair_losses = lambda inputs: seen.append(inputs) or real(inputs)
    trainer.train()
    assert [len(some) for some in seen] in ([1, 2, 2, 2], [2, 1, 2, 2], [2, 2, 1, 2])  # five, then two
    assert sorted(pair.where for some in seen for pair in some) == sorted(pair.where for pair in pairs)
    assert trainer.state.global_step == 2
