"""The SFT trainer: its loss against full logits, packed rows that don't see each other, NEFTune."""

import math

import datasets
import pytest
import torch
import trl

from qalign.config.recipe import Model
from qalign.data.collate import Layout, MicroBatchLimit
from qalign.data.store.sequences import IGNORED, TokenDialogue
from qalign.errors import UserError
from qalign.model.base import Base
from qalign.train.trainers.sft import SupervisedTrainer, packed
from tests.reward_runs import run_stage, write_recipe
from tests.train.runs import recorded_reads
from tests.train.talks import KINDS, config, logps_alone, mean_loss, rows, scrambled, write_talks

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def spec(tiny_folder) -> Model:
    return Model(base=tiny_folder, compute_dtype="float32", max_length=96)


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


# --- packing ---------------------------------------------------------------------------------------------------------


def packer(base: Base, folder) -> SupervisedTrainer:
    values = {"packing": True, "per_device_train_batch_size": 2, "per_device_eval_batch_size": 2}
    return SupervisedTrainer(base, config(folder, **values), MicroBatchLimit(pairs=2), rows(base.tokenizer), None)


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split", "wrapped"])
def test_full_rows_are_those_that_trl_packs(strategy, tmp_path):
    """TRL packs a thousand rows at a time; here are more, of which some are longer than a full row."""
    lengths = [1 + number * 7919 % 23 for number in range(2100)]
    ids = [[*range(number, number + length)] for number, length in enumerate(lengths)]
    some = [TokenDialogue(each, [IGNORED, *each[1:]], f"row {n}") for n, each in enumerate(ids)]
    columns = {"input_ids": ids, "labels": [row.labels for row in some]}
    expected = trl.pack_dataset(datasets.Dataset.from_dict(columns), 20, strategy)

    found = packed(some, config(tmp_path, max_length=20, packing_strategy=strategy))

    assert [*found] == [*expected]


@torch.no_grad()
def difference_by_packing(base: Base, trainer: SupervisedTrainer, *, apart: bool = True) -> float:
    """The most by which packing changes the log-prob of any supervised token; each row must be there once. `apart` may
    be False for what it would be if packed dialogues were one."""
    left = {tuple(row.ids): row for row in rows(base.tokenizer)}
    assert len(trainer.train_dataset) < len(left) - 2, "too little was packed to show anything"
    most = 0.0
    base.model.eval()
    for batch in map(trainer.inputs_of, trainer.get_train_dataloader()):
        tokens, starts = batch["input_ids"].shape[1], [start for (start,) in batch["layout"].starts]
        assert len(starts) > 2
        batch |= {} if apart else {"layout": Layout(((tokens, ()),))}
        del batch["learned"]
        with base.packed_attention():
            found = base.model(**batch, use_cache=False, fused_lm_head=True).log_probs[0].double()
        for start, end in zip(starts, [*starts[1:], tokens], strict=True):
            row = left.pop(tuple(batch["input_ids"][0, start:end].tolist()))
            learned = torch.tensor(row.labels[1:]) != IGNORED
            most = max(most, (found[start : end - 1][learned] - logps_alone(base, row)).abs().max().item())
    assert not left
    return most


@pytest.mark.parametrize("kind", KINDS)
def test_packed_dialogues_do_not_see_each_other(kind_folder, tmp_path, kind):
    quantization = "nf4" if kind == "llama" else "none"
    base = scrambled(Model(base=kind_folder(kind), quantization=quantization, compute_dtype="float32"))
    assert base.padding_reason is None
    trainer = packer(base, tmp_path)
    assert difference_by_packing(base, trainer) < 1e-5
    assert difference_by_packing(base, trainer, apart=False) > 1e-3, "the test would not notice"


def test_a_family_that_cannot_run_packed_rows_is_refused(kind_folder, tmp_path):
    folder, talks = kind_folder("stablelm"), write_talks(tmp_path)
    keys = {"data": talks, "model": {"quantization": "none"}, "max_steps": 1}
    with pytest.raises(UserError, match=r"^sft.packing: StableLmForCausalLM .*; set it to false$"):
        run_stage(write_recipe(tmp_path / "packed", folder, "sft", packing=True, **keys))
    assert run_stage(write_recipe(tmp_path / "padded", folder, "sft", **keys)).complete


# --- the loss --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "way",
    [
        {"micro": MicroBatchLimit(pairs=9)},
        {"micro": MicroBatchLimit(pairs=3)},
        {"micro": MicroBatchLimit(tokens=1)},
        {"micro": MicroBatchLimit(pairs=2), "packing": True},
    ],
    ids=["one batch", "three batches", "nine batches", "packed"],
)
def test_the_loss_of_a_step_is_the_mean_over_its_supervised_tokens(spec, tmp_path, way):
    base = scrambled(spec)
    expected = mean_loss(base, rows(base.tokenizer))
    args = config(tmp_path, max_steps=1, per_device_train_batch_size=9, packing="packing" in way)
    trainer = SupervisedTrainer(base, args, way["micro"], rows(base.tokenizer), None)
    trainer.train()
    assert losses(trainer) == pytest.approx([expected], rel=1e-5)


@pytest.mark.parametrize("micro", [1, 9])
def test_a_step_waits_for_the_gpu_once_however_many_micro_batches_it_has(spec, tmp_path, monkeypatch, micro):
    """Reading a tensor waits until all that was launched before it is done. Inputs are made on the CPU beforehand.
    (For padded rows transformers itself looks at the mask.)"""
    base = scrambled(spec)
    args = config(tmp_path, max_steps=1, per_device_train_batch_size=9)
    trainer = SupervisedTrainer(base, args, MicroBatchLimit(pairs=micro), rows(base.tokenizer), None)
    trainer.create_optimizer()
    (batch,) = trainer.get_train_dataloader()
    groups = trainer.micro_batches(batch)
    made = [trainer.inputs_of(group) for group in groups]
    monkeypatch.setattr(trainer, "inputs_of", lambda _rows: made.pop())
    with trainer.packed_attention():
        reads = recorded_reads(monkeypatch)
        trainer.training_step(trainer.model, batch, sum(row.supervised for row in batch))
    assert len(groups) == 9 // micro
    assert reads == ["tolist"]


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("micro", [1, 4])
def test_the_held_out_loss_is_the_mean_over_the_supervised_tokens_whatever_the_batch(spec, tmp_path, packing, micro):
    base = scrambled(spec)
    held_out = rows(base.tokenizer)
    args = config(tmp_path, packing=packing, per_device_eval_batch_size=5)
    trainer = SupervisedTrainer(base, args, MicroBatchLimit(pairs=micro), rows(base.tokenizer), held_out)
    found = trainer.evaluate()
    assert found["eval_loss"] == pytest.approx(mean_loss(base, held_out), rel=1e-5)


@pytest.mark.parametrize(("packing", "named"), [(False, {"talks:3"}), (True, {"talks:3", "talks:6"})])
def test_a_loss_that_is_not_finite_names_its_rows(spec, tmp_path, packing, named):
    base = scrambled(spec)
    sequences = [row for row in rows(base.tokenizer) if row.where in ("talks:3", "talks:6")]
    only_in_third = min({*sequences[0].ids} - {*sequences[1].ids})
    base.lm.get_input_embeddings().weight.data[only_in_third] = math.nan
    args = config(tmp_path, packing=packing, per_device_train_batch_size=1, num_train_epochs=1)
    with pytest.raises(UserError, match=r"^step [12]: the loss is not finite on talks:\d") as raised:
        SupervisedTrainer(base, args, MicroBatchLimit(pairs=1), sequences, None).train()
    (line,) = raised.value.lines
    assert {where for where in ("talks:3", "talks:6") if where in line} == named


# --- NEFTune ---------------------------------------------------------------------------------------------------------


def test_neftune_is_on_in_training_and_off_in_evaluation(spec, tmp_path):
    """At learning rate 0, so that the noise is all that can change a loss."""
    found = {}
    for alpha in (None, 5.0):
        base = scrambled(spec)
        args = config(
            tmp_path, neftune_noise_alpha=alpha, learning_rate=0.0, num_train_epochs=2, per_device_train_batch_size=9,
            per_device_eval_batch_size=9, eval_strategy="steps", eval_steps=1,
        )  # fmt: skip
        trainer = SupervisedTrainer(base, args, MicroBatchLimit(pairs=9), rows(base.tokenizer), rows(base.tokenizer))
        trainer.train()
        held_out = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
        found[alpha] = losses(trainer), held_out
        assert mean_loss(base, rows(base.tokenizer)) == pytest.approx(held_out[0], rel=1e-5)
    (quiet, expected), (noisy, held_out) = found.values()
    assert quiet[0] == pytest.approx(quiet[1], rel=1e-6)
    assert abs(noisy[0] - quiet[0]) > 1e-4
    assert abs(noisy[1] - noisy[0]) > 1e-4  # new noise each step
    assert held_out == pytest.approx(expected, rel=1e-6)
    assert len(held_out) == 2
