"""The SFT stage on a tiny model, where it differs from the other stages (`test_stages.py`), and kinds of adapters."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from qalign.config.recipe import Model
from qalign.config.stages import Source
from qalign.data.collate import MicroBatchLimit
from qalign.data.formats import dialogues
from qalign.data.tokenize import encode_dialogues
from qalign.model.base import Base, Role, load
from qalign.train.run_folder import RunFolder
from qalign.train.trainers.sft import SupervisedTrainer
from tests.helpers import SMOLLM2, metrics, summary
from tests.reward_runs import plain_policy, run_stage, write_recipe
from tests.train.runs import assert_same_run
from tests.train.talks import LORA, SUPERVISED, TALKS, config, mean_loss, rows, turns, write_talks
from tests.train.test_stages import bases_kept

IDS = torch.arange(30, 60)[None]


pytestmark = pytest.mark.usefixtures("one_thread")


# --- the stage -------------------------------------------------------------------------------------------------------


def stage(folder: Path, tiny_folder: str, **keys) -> tuple[RunFolder, Base]:
    """A finished run of the stage and the model that it left in memory."""
    folder.mkdir(exist_ok=True)
    talks = write_talks(folder)
    with bases_kept() as bases:
        run = run_stage(write_recipe(folder / "run", tiny_folder, "sft", data=talks, **keys))
    return run, bases[0]


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits


@pytest.fixture(scope="module")
def finished(tiny_folder, tmp_path_factory) -> tuple[RunFolder, Base]:
    return stage(tmp_path_factory.mktemp("finished"), tiny_folder, epochs=2.0)


def test_going_on_from_an_adapter(finished, tiny_folder, tmp_path):
    first, trained = finished
    keys = {"batch_size": 9, "micro_batch_size": 3, "max_steps": 1, "warmup_ratio": 0.0}

    second, _ = stage(tmp_path, tiny_folder, start_from=str(first.adapter), **keys)

    assert metrics(second)[0]["loss"] == pytest.approx(mean_loss(trained, rows(trained.tokenizer)), rel=1e-5)


def test_a_packed_run_sees_the_same_tokens_in_fewer_rows(finished, tiny_folder, tmp_path, capsys):
    (padded, _), keys = finished, {"max_length": 96}
    packed, _ = stage(tmp_path, tiny_folder, packing=True, batch_size=2, micro_batch_size=1, epochs=2.0, model=keys)
    of_both = [summary(run) for run in (padded, packed)]
    assert of_both[0]["tokens"] == of_both[1]["tokens"]
    assert of_both[0]["supervised_tokens"] == of_both[1]["supervised_tokens"] == SUPERVISED
    assert of_both[1]["steps"] == 2 * math.ceil(math.ceil(of_both[1]["tokens"] / 2 / 96) / 2)
    assert f"9 sequences in {of_both[1]['steps']} rows" in capsys.readouterr().out


def test_a_packed_run_with_noise_resumes_to_the_same_numbers(tiny_folder, tmp_path):
    keys = {"epochs": 2.0, "save_every": 2, "model": {"max_length": 96}, "lora": {"dropout": 0.1}, "packing": True}
    keys |= {"neftune_alpha": 5.0, "batch_size": 1, "micro_batch_size": 1}
    whole, _ = stage(tmp_path / "whole", tiny_folder, **keys)
    cut, _ = stage(tmp_path / "cut", tiny_folder, **keys)
    steps = summary(whole)["steps"]
    assert steps > 4
    cut.summary.unlink()
    last = cut.last_checkpoint()
    if last.name == f"checkpoint-{steps}":
        shutil.rmtree(last)
    resumed = run_stage(str(tmp_path / "cut" / "run" / "sft.yaml"), resume=True)
    assert int(summary(resumed)["resumed_from"].rpartition("-")[2]) < steps
    assert_same_run(resumed, whole)


def test_a_long_dialogue_is_counted_once_as_shortened(tiny_folder, tmp_path):
    """Each answer of its later turns gives a sequence of its own; with weight 2 a row is used twice."""
    long = turns(["Are you well? " * 4, "I am fine. " * 4] * 12)
    data = tmp_path / "long.jsonl"
    data.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in (long, turns(TALKS[0]))))
    keys = {"data": {"path": str(data), "weight": 2.0}, "model": {"max_length": 96}, "max_steps": 1}
    run = run_stage(write_recipe(tmp_path / "run", tiny_folder, "sft", **keys))
    assert summary(run)["rows"] == {"used": 4, "held_out": 0, "refused": 0, "shortened": 2}


# --- kinds of adapters -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lora",
    [{"rslora": True}, {"dora": True}, {"init": "loftq"}, {"init": "loftq", "r": 100}],  # wider than its layers
    ids=["rslora", "dora", "loftq", "loftq with more ranks than a layer has"],
)
def test_each_kind_of_adapter_trains_on_nf4_and_reloads_to_the_same_logits(tiny_folder, tmp_path, lora):
    keys = {"batch_size": 9, "micro_batch_size": 9, "max_steps": 3, "warmup_ratio": 0.0}
    run, base = stage(tmp_path, tiny_folder, lora=lora, **keys)
    first, *_, last = (line["loss"] for line in metrics(run))
    assert last < first
    again = load(run.recipe.model)
    again.load_adapter(Role.POLICY, str(run.adapter), trainable=False)
    for reloaded in (again.model, plain_policy(run.adapter)):
        torch.testing.assert_close(logits(reloaded), logits(base.model), rtol=1e-5, atol=1e-5)


# --- the true model --------------------------------------------------------------------------------------------------


@pytest.mark.true_model
def test_smollm2_learns_real_instructions(shared_data, tmp_path, one_thread):
    """The stage on NF4 weights in the precision that this machine picks, and its loss in bfloat16, where a step would
    take minutes on most CPUs, against their full logits in float32."""
    torch.set_num_threads(one_thread)
    whole = json.loads((shared_data / "alpaca_en_demo.json").read_text(encoding="utf-8"))
    data = tmp_path / "short.json"  # three rows that take a few dozen tokens each
    data.write_text(json.dumps([row for row in whole if 40 < len(row["output"]) < 120][:3]))
    chosen, _ = dialogues((Source(path=str(data)),), "train", None, 0)
    base = load(Model(base=SMOLLM2, compute_dtype="float32"))
    sequences, refused = encode_dialogues(base.template, chosen, 256)
    assert (len(sequences), refused) == (3, [])
    expected = mean_loss(base, sequences)
    del base

    keys = {"batch_size": 3, "micro_batch_size": 3, "max_steps": 3, "scheduler": "constant", "learning_rate": 5e-4}
    model = {"compute_dtype": "auto", "max_length": 256}
    found = [line["loss"] for line in metrics(run_stage(
        write_recipe(tmp_path / "run", SMOLLM2, "sft", data=str(data), model=model, **keys)
    ))]  # fmt: skip
    assert found[0] == pytest.approx(expected, abs=5e-2)  # in bfloat16 it was 0.026 off
    assert found[-1] < found[0] - 0.1  # 0.13 in bfloat16, above 0.2 in float32

    in_bfloat16 = load(Model(base=SMOLLM2, compute_dtype="bfloat16"))
    in_bfloat16.add_adapter(Role.POLICY, LORA)
    args = config(tmp_path, bf16=True, max_length=256, per_device_eval_batch_size=3)
    trainer = SupervisedTrainer(in_bfloat16, args, MicroBatchLimit(pairs=3), sequences, sequences)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, abs=5e-2)
