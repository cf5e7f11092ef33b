"""Ensembles of reward models: each member is what it would be if it were trained alone on its resample, in one forward
pass or in several, in any micro-batches, resumed or not; and its folder is a plain adapter."""

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from qalign.config.load import load as load_recipe
from qalign.data.collate import MicroBatchLimit
from qalign.errors import Stopped, UserError
from qalign.losses.ensemble import member_seed, resample_counts
from qalign.model.adapters.members import Ensemble
from qalign.model.base import Base, Role, load
from qalign.model.logps import backbone
from qalign.score import score
from qalign.train.processes.world import ALONE
from qalign.train.run_folder import RunFolder, open_run
from qalign.train.trainers.adapter import CONFIGS
from qalign.train.trainers.reward import EnsembleTrainer, RewardModelTrainer
from tests.helpers import TEST, TRAIN, house_style, merge, metrics, refusal, slow, stopping_after, summary
from tests.reward_runs import plain_reward_model, plain_score, run_stage, write_recipe
from tests.train.processes import Idle

WEIGHTS = "adapter_model.safetensors"
MEMBERS = ("member_1", "member_2", "member_3")
ENSEMBLE = {"members": 3, "member_layers": 0.5}


@pytest.fixture
def recipe(tmp_path, tiny_folder):
    def write(name: str = "runs", **keys) -> str:
        return write_recipe(tmp_path / name, tiny_folder, **ENSEMBLE | keys)

    return write


@pytest.fixture(scope="module")
def finished(tiny_folder, tmp_path_factory) -> RunFolder:
    held_out = {"path": TEST, "limit": 10}
    path = write_recipe(tmp_path_factory.mktemp("ensemble"), tiny_folder, **ENSEMBLE, eval_data=held_out, eval_every=2)
    return run_stage(path)


def tensors(run: RunFolder) -> dict[str, torch.Tensor]:
    """Of all members."""
    files = {name: load_file(run.adapter / name / WEIGHTS) for name in MEMBERS}
    return {f"{member}.{name}": tensor for member, found in files.items() for name, tensor in found.items()}


def assert_same(one, other, **tolerance) -> None:
    assert one.keys() == other.keys()
    for name, found in one.items():
        torch.testing.assert_close(found, other[name], msg=name, **tolerance)


def test_each_member_is_what_it_would_be_alone_on_its_resample(recipe, tmp_path):
    """Three clipped optimiser steps, against a single adapter on the same layers that is trained on copies of the pairs
    of its resample."""
    path = recipe(trainer={"optim": "sgd", "max_grad_norm": 0.05}, learning_rate=0.9)
    run = run_stage(path)
    settings = load_recipe(path, stage="reward")
    for number, name in enumerate(MEMBERS, start=1):
        base = load(settings.model)
        torch.manual_seed(member_seed(settings.seed, number))
        base.add_adapter(Role.REWARD, settings.lora, 0.5)
        pairs = house_style(base.tokenizer, 12, path=TRAIN)
        counts = resample_counts(12, member_seed(settings.seed, number)).tolist()
        assert (sum(counts), min(counts)) == (12, 0)
        copies = {pair.where: count for pair, count in zip(pairs, counts, strict=True)}

        class OnItsResample(RewardModelTrainer):
            def pair_losses(self, pairs, copies=copies):
                loss, found = super().pair_losses(pairs)
                return loss * torch.tensor([copies[pair.where] for pair in pairs]), found

        args = CONFIGS["reward"](
            output_dir=str(tmp_path / "alone"), per_device_train_batch_size=4, gradient_accumulation_steps=1,
            num_train_epochs=1, learning_rate=0.9, lr_scheduler_type="cosine", warmup_steps=0.1, max_grad_norm=0.05,
            seed=settings.seed, bf16=False, use_cpu=True, report_to="none", activation_checkpointing=False, optim="sgd",
            remove_unused_columns=False, save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
        )  # fmt: skip
        OnItsResample(base, settings.reward, args, MicroBatchLimit(pairs=4), pairs).train()
        base.save_adapter(Role.REWARD, tmp_path / name)
        assert_same(load_file(tmp_path / name / WEIGHTS), load_file(run.adapter / name / WEIGHTS), rtol=0, atol=1e-5)
    moved = tensors(run)
    assert all((moved["member_1" + n[8:]] - t).abs().max() > 1e-4 for n, t in moved.items() if n.startswith("member_2"))


@pytest.mark.parametrize(
    "way", ["micro-batches", slow("a pass each"), slow("checkpointed"), "a pass each, checkpointed"]
)
def test_how_a_step_is_run_changes_no_number(way, recipe, monkeypatch):
    expected = run_stage(recipe("expected"))
    keys = {"micro_batch_size": 4} if way == "micro-batches" else {"checkpointed_layers": 9 * ("checkpointed" in way)}
    if "a pass each" in way:
        monkeypatch.setattr(Ensemble, "_why_apart", lambda _: "for the test")
    run = run_stage(recipe("other", **keys))
    assert_same(tensors(run), tensors(expected), rtol=0, atol=2e-5)
    for one, other in zip(metrics(run), metrics(expected), strict=True):
        assert {k: v for k, v in one.items() if k != "tokens_per_second"} == pytest.approx(
            {k: v for k, v in other.items() if k != "tokens_per_second"}, abs=1e-4
        )


def test_the_layers_below_the_members_run_once_and_keep_nothing(finished):
    """A third of the tokens in the first half of the layers, without gradients."""
    base = load(finished.recipe.model)
    for name in MEMBERS:
        base.load_adapter(name, str(finished.adapter / name), trainable=True)
    ensemble, seen = Ensemble(base, MEMBERS), []
    for layer in backbone(base.lm).layers:
        layer.register_forward_hook(lambda *given: seen.append((given[2].shape[1], given[2].requires_grad)))
    with base.packed_attention(), ensemble.open():
        ensemble.pair_scores(house_style(base.tokenizer, 2))
    tokens = seen[0][0]
    assert seen == [(tokens, False)] * (len(seen) // 2) + [(3 * tokens, True)] * (len(seen) // 2)


def test_a_run_reports_where_members_disagree(finished, capsys):
    facts = summary(finished)["trust"]
    members = facts["members"]
    assert len(members["accuracy"]) == 3
    assert 0 <= members["disagreement"] <= 1
    assert sum(group["pairs"] for group in members["by_agreement"]) == facts["pairs"] == 10
    assert all(len(pair["gaps"]) == 3 and TEST in pair["where"] for pair in members["most_disputed"])
    assert {"loss", "eval_loss"} <= {key for line in metrics(finished) for key in line}
    assert (finished.path / "reward_report.png").is_file()


@pytest.mark.parametrize("name", MEMBERS)
def test_a_member_is_a_plain_adapter_by_itself(name, finished, tiny_folder, tmp_path):
    folder = finished.adapter / name
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS"
    assert f'folder = "{folder}"' in (folder / "README.md").read_text()
    plain = plain_reward_model(tiny_folder, folder)
    base = load(finished.recipe.model)
    pairs = house_style(base.tokenizer, 2)
    with torch.no_grad():
        expected = [plain_score(plain, pair.prompt_ids + ids).item() for pair in pairs for ids in pair.answers]
    score(str(finished.path / name), TEST, str(tmp_path / "scored.jsonl"), 2)
    rows = [json.loads(line) for line in (tmp_path / "scored.jsonl").read_text().splitlines()]
    found = [row[key] for row in rows for key in ("reward_chosen", "reward_rejected")]
    assert found == pytest.approx(expected, abs=1e-4)
    assert "reward_spread" not in rows[0]


def test_score_prints_the_mean_and_the_spread(finished, tmp_path, capsys):
    each = {}
    for name in (*MEMBERS, "."):
        score(str(finished.path / name), TEST, str(tmp_path / f"{name}.jsonl"), 5)
        each[name] = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
    assert "apart (standard deviation), at most" in capsys.readouterr().out
    for row, *alone in zip(each["."], *(each[name] for name in MEMBERS), strict=True):
        for key in ("reward_chosen", "reward_rejected", "reward_margin"):
            assert row[key] == pytest.approx(sum(one[key] for one in alone) / 3, abs=1e-5)
        margins = torch.tensor([one["reward_margin"] for one in alone])
        assert row["reward_spread"] == pytest.approx(margins.std(correction=0).item(), abs=1e-5)


def test_merge_takes_a_member(finished, capsys):
    said = refusal(capsys, merge, str(finished.path), "dequantized", None)
    assert f"is an ensemble of 3 members, and a model can hold one; name one of them, such as {finished.path}" in said
    merge(str(finished.path / "member_2"), "dequantized", None)
    assert (finished.path / "merged-dequantized-member_2" / "model.safetensors").is_file()
    with pytest.raises(UserError, match=r"the ensemble has no member_7; did you mean"):
        open_run(str(finished.path / "member_7"))


@pytest.mark.slow
def test_a_stopped_run_resumes_to_the_same_numbers(recipe):
    keys = {"lora": {"dropout": 0.1}, "limit": 16, "save_every": 1}
    whole = run_stage(recipe("whole", **keys))
    path = recipe("stopped", **keys)
    with stopping_after(2), pytest.raises(Stopped):
        run_stage(path)
    checkpoint = RunFolder(load_recipe(path), "reward").last_checkpoint()
    assert {place.name for place in Path(checkpoint).iterdir() if place.is_dir()} == set(MEMBERS)
    resumed = run_stage(path, resume=True)
    assert_same(tensors(resumed), tensors(whole), rtol=0, atol=0)
    assert [line["loss"] for line in metrics(resumed)] == [line["loss"] for line in metrics(whole)]


def test_a_run_that_was_killed_before_its_summary_needs_no_step(recipe, monkeypatch):
    whole = run_stage(path := recipe(save_every=1))
    expected = tensors(whole)
    whole.summary.unlink()
    monkeypatch.setattr(Base, "pair_scores", None)
    assert_same(tensors(run_stage(path, resume=True)), expected, rtol=0, atol=0)


def test_adapters_that_are_more_than_lora_are_run_one_after_the_other(recipe, capsys):
    run = run_stage(recipe(lora={"dora": True}))
    assert "a forward pass each: the adapters are more than LoRA on linear layers" in capsys.readouterr().out
    assert len(tensors(run)) > 3


def test_the_best_checkpoint_of_all_members_is_taken(recipe):
    keys = {"load_best_model_at_end": True, "metric_for_best_model": "loss"}
    run = run_stage(
        recipe(
            eval_data={"path": TEST, "limit": 4}, eval_every=1, save_every=1, limit=16, learning_rate=0.3, trainer=keys
        )
    )
    losses = [line["eval_loss"] for line in metrics(run) if "eval_loss" in line]
    assert losses.index(min(losses)) < 3, "the last one must not be the best"
    assert summary(run)["trust"]["pairs"] == 4
    base = load(run.recipe.model)
    for name in MEMBERS:
        base.load_adapter(name, str(run.adapter / name), trainable=False)
    with torch.no_grad(), base.packed_attention(), (ensemble := Ensemble(base, MEMBERS)).open():
        scores = ensemble.pair_scores(house_style(base.tokenizer, 4))
    loss = -torch.nn.functional.logsigmoid(scores[:, 0] - scores[:, 1]).mean().item()
    assert loss == pytest.approx(min(losses), abs=1e-4)


@pytest.mark.parametrize(("world", "restored"), [(ALONE, [*MEMBERS]), (Idle(), [])])
def test_only_the_first_process_looks_for_the_best_checkpoint(world, restored, monkeypatch):
    """What another one knows is from the checkpoint that it resumed, which may have been deleted since."""
    monkeypatch.setattr(RewardModelTrainer, "train", lambda self: None)
    trainer, found = object.__new__(EnsembleTrainer), []
    trainer.world, trainer.args = world, SimpleNamespace(load_best_model_at_end=True)
    trainer.state = SimpleNamespace(best_model_checkpoint="checkpoint-1")
    trainer.ensemble = SimpleNamespace(open=nullcontext, roles=MEMBERS)
    trainer.base = SimpleNamespace(restore_adapter=lambda role, folder: found.append(role))
    trainer.train()
    assert found == restored
