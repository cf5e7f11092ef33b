"""A step of SFT against TRL's `SFTTrainer`: loss, gradients and metrics; and what the head and the layers compute."""

import pytest
import torch
import transformers as tf
import trl

from qalign.config.recipe import Model
from qalign.data.collate import MicroBatchLimit
from qalign.data.store.sequences import IGNORED
from qalign.model import logps
from qalign.model.adapters import lora
from qalign.train.trainers.sft import SupervisedTrainer, _columns
from tests.train.talks import config, rows, scrambled

pytestmark = pytest.mark.usefixtures("one_thread")

ONE_BATCH = {"per_device_train_batch_size": 9}
WAYS = {
    "one batch": {},
    "three batches": {"micro": 3},
    "packed": {"micro": 2, "packing": True},
    "checkpointed": {"activation_checkpointing": True},
    "dft": {"loss_type": "dft"},
}
FAMILIES = ["llama", "mistral", "gemma2", "granite", "cohere", "gpt_oss", "lfm2", "stablelm"]


class Gradients(tf.TrainerCallback):
    """Keeps the gradients of the step, before the optimiser takes it."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def step_of(make, folder, **values) -> tuple[dict, dict]:
    """What the first step of a trainer logs, and its gradients."""
    kept = Gradients()
    plain = {"activation_checkpointing_kwargs": {"use_reentrant": False}, "router_aux_loss_coef": 0.0}
    trainer = make(config(folder, max_steps=1, max_grad_norm=0.0, **plain | values), kept)
    trainer.train()
    return next(entry for entry in trainer.state.log_history if "loss" in entry), kept.found


def steps_of_both(base, folder, way: str) -> list[tuple[dict, dict]]:
    """TRL's step on padded rows, all at once, and ours, from the same weights."""
    data, before = rows(base.tokenizer), {name: p.detach().clone() for name, p in base.model.named_parameters()}

    def trls(args, kept):
        columns = _columns(data)
        return trl.SFTTrainer(
            base.model, args, train_dataset=columns, processing_class=base.tokenizer, callbacks=[kept]
        )

    plain = {name: value for name, value in WAYS[way].items() if name == "loss_type"}
    found = [step_of(trls, folder, **ONE_BATCH, **plain)]
    for name, parameter in base.model.named_parameters():
        parameter.data.copy_(before[name])
    limit, values = limit_and_values(way)
    ours = lambda args, kept: SupervisedTrainer(base, args, limit, data, None, (kept,))  # noqa: E731
    return [*found, step_of(ours, folder, **values)]


def limit_and_values(way: str) -> tuple[MicroBatchLimit, dict]:
    values = ONE_BATCH | WAYS[way]
    return MicroBatchLimit(pairs=values.pop("micro", 9)), values


@pytest.mark.parametrize(
    ("family", "way"), [(name, "one batch") for name in FAMILIES] + [("gemma2", way) for way in list(WAYS)[1:]]
)
def test_loss_gradients_and_metrics_are_trls(family, way, kind_folder, tmp_path):
    base = scrambled(Model(base=kind_folder(family), quantization="none", compute_dtype="float32"))
    (expected, wanted), (found, gradients) = steps_of_both(base, tmp_path, way)
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert gradients.keys() == wanted.keys() != set()
    for name, gradient in gradients.items():
        assert (gradient - wanted[name]).norm() <= 1e-5 * wanted[name].norm() + 1e-9, name
    assert found["num_tokens"] == expected["num_tokens"]
    if "micro" not in WAYS[way]:  # TRL's metrics are means over micro-batches
        assert found["entropy"] == pytest.approx(expected["entropy"], rel=1e-5)
        assert found["mean_token_accuracy"] == pytest.approx(expected["mean_token_accuracy"], abs=1e-6)
    assert expected["mean_token_accuracy"] != 1


@pytest.mark.parametrize("way", ["one batch", "three batches", "packed"])
def test_the_head_runs_at_supervised_positions_and_nothing_on_padding(tiny_folder, tmp_path, way, monkeypatch):
    base = scrambled(Model(base=tiny_folder, compute_dtype="float32"))
    data, at_head, embedded, real = rows(base.tokenizer), [], [], logps.head_logits
    monkeypatch.setattr(logps, "head_logits", lambda lm, states: at_head.append(len(states)) or real(lm, states))
    count = lambda _module, inputs, _output: embedded.append(inputs[0].numel())  # noqa: E731
    limit, values = limit_and_values(way)
    trainer = SupervisedTrainer(base, config(tmp_path, max_steps=1, **values), limit, data, None)
    assert base.padding_reason is None  # found out by running a few tokens, before they are counted
    base.lm.get_input_embeddings().register_forward_hook(count)
    trainer.train()
    assert sum(at_head) == sum(label != IGNORED for row in data for label in row.labels[1:])
    assert sum(embedded) == sum(map(len, data)) < 9 * max(map(len, data))


@pytest.mark.parametrize("router", [0.0, 0.001], ids=["own head", "TRL's head"])
def test_adapters_compute_in_16_bits_where_the_base_does(kind_folder, tmp_path, router, monkeypatch):
    """As in every other stage, in training and in evaluation; their weights stay in 32 bits."""
    base = scrambled(Model(base=kind_folder("gpt_oss"), quantization="none", compute_dtype="bfloat16"))
    data, dtypes = rows(base.tokenizer), set()
    args = config(tmp_path, max_steps=1, bf16=True, router_aux_loss_coef=router, **ONE_BATCH)
    trainer = SupervisedTrainer(base, args, MicroBatchLimit(pairs=9), data, data)
    assert trainer.aux_loss_enabled is bool(router)
    add = lora._AddLowRank.apply
    monkeypatch.setattr(lora._AddLowRank, "apply", lambda *given: (dtypes.add(given[2].dtype), add(*given))[1])
    trainer.train()
    assert dtypes == {torch.bfloat16}
    dtypes.clear()
    trainer.evaluate()
    assert dtypes == {torch.bfloat16}
    assert {p.dtype for p in base.lm.parameters() if p.requires_grad} == {torch.float32}


def test_a_family_that_cannot_run_packed_rows_is_padded_and_noise_is_that_of_one_row(kind_folder, tmp_path):
    for family, noise, free in (("llama", None, True), ("llama", 5.0, False), ("stablelm", None, False)):
        base = scrambled(Model(base=kind_folder(family), quantization="none", compute_dtype="float32"))
        args = config(tmp_path, neftune_noise_alpha=noise, **ONE_BATCH)
        trainer = SupervisedTrainer(base, args, MicroBatchLimit(pairs=9), rows(base.tokenizer), None)
        batch = trainer.inputs_of(next(iter(trainer.get_train_dataloader())))
        assert ("layout" in batch, "attention_mask" in batch) == (free, not free)
        assert trainer.args.packing is False
