"""The KTO step against TRL's KTOTrainer, the KL estimate of a whole step, and the stage."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from trl import KTOConfig, KTOTrainer

import qalign.model.reference
from qalign.config.recipe import Lora, Model
from qalign.config.stages import KTO, Source
from qalign.data.collate import MicroBatchLimit
from qalign.data.formats import preferences
from qalign.data.store.sequences import TokenLabelled
from qalign.errors import UserError
from qalign.kto import balance_in_words
from qalign.model.base import Role, load
from qalign.model.reference import CachedReferenceLogps, ReferenceLogps
from qalign.train.trainers.policy import LabelTrainer, mismatched
from tests.helpers import TEST, house_style, metrics, plain_config, summary
from tests.reward_runs import run_stage, write_recipe
from tests.train.test_pair_trainers import scramble as scramble_all

LORA = Lora(r=4, alpha=8)


def labelled(tokenizer, count: int) -> list[TokenLabelled]:
    """Real answers of the demo: good ones and bad ones of other prompts in turn."""
    pairs = house_style(tokenizer, count)
    return [
        TokenLabelled(pair.prompt_ids, pair.chosen_ids if good else pair.rejected_ids, good, pair.where)
        for pair, good in zip(pairs, goods(count), strict=True)
    ]


def goods(count: int) -> list[bool]:
    return [number % 3 != 1 for number in range(count)]


@pytest.fixture
def base(tiny_base):
    """The tiny model with a policy that does something."""
    tiny_base.add_adapter(Role.POLICY, LORA)
    scramble_all(tiny_base.model)
    return tiny_base


def trainer_of(base, folder, rows, *, micro=1000, chosen=None, eval_rows=None, references=None, **values):
    settings = KTO.model_validate({"data": "unused.jsonl", **(chosen or {})})
    config = plain_config(KTOConfig, folder, **values)
    return LabelTrainer(
        base, settings, references or ReferenceLogps(), config, MicroBatchLimit(pairs=micro), rows, eval_rows
    )


def one_step(trainer, rows) -> dict[str, torch.Tensor]:
    """The gradients of one step, by weight."""
    trainer.model.zero_grad()
    trainer.create_optimizer()
    with trainer.base.packed_attention():
        trainer.training_step(trainer.model, rows, len(rows))
    return {name: weight.grad.clone() for name, weight in trainer.base.trained_weights(Role.POLICY).items()}


def trl_trainer(spec: Model, count: int, folder, chosen: dict, max_length: int = 256) -> KTOTrainer:
    """TRL's trainer with its own data preparation: the demo's good and bad answers in one batch, KL rows included."""
    base = load(spec)
    rows, _ = preferences((Source(path=TEST),), "train", count, seed=0)
    examples = [
        {"prompt": [*row.prompt], "completion": [row.chosen if good else row.rejected], "label": good}
        for row, good in zip(rows, goods(count), strict=True)
    ]
    plain = {{"loss": "loss_type"}.get(key, key): value for key, value in chosen.items()}
    made = {"per_device_train_batch_size": count, "max_length": max_length}
    theirs = KTOTrainer(
        base.lm, args=plain_config(KTOConfig, folder, **made, **plain),
        peft_config=LoraConfig(r=LORA.r, lora_alpha=LORA.alpha, target_modules="all-linear", task_type="CAUSAL_LM"),
        train_dataset=Dataset.from_list(examples), processing_class=base.tokenizer,
    )  # fmt: skip
    for parameter in theirs.model.parameters():  # TRL casts a quantised base's adapter to bfloat16
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    scramble_all(theirs.model)
    return theirs


def rows_of(theirs: KTOTrainer) -> list[TokenLabelled]:
    """The rows of TRL's data set as ours."""
    names = ("prompt_ids", "completion_ids", "label")
    return [TokenLabelled(*(row[name] for name in names), f"row {n}") for n, row in enumerate(theirs.train_dataset)]


def ours_and_theirs(spec: Model, count: int, folder, chosen: dict):
    """(loss, metrics, gradients) of a batch by qalign, in micro-batches of 3, and by TRL; adapters scrambled alike."""
    theirs, base = trl_trainer(spec, count, folder, chosen), load(spec)
    rows, results = rows_of(theirs), []
    base.add_adapter(Role.POLICY, LORA)
    scramble_all(base.model)
    ours = trainer_of(base, folder, rows, micro=3, chosen=chosen)
    ours.create_optimizer()
    ours.model.train()
    with base.packed_attention():
        loss = ours.training_step(ours.model, rows, count)
    results.append(finished(ours, loss))
    theirs.model.train()
    loss = theirs.compute_loss(theirs.model, theirs.data_collator([*theirs.train_dataset]))
    loss.backward()
    results.append(finished(theirs, loss))
    return results


def finished(trainer, loss):
    trainer.log({"loss": loss.item()})
    grads = [parameter.grad for parameter in trainer.model.parameters() if parameter.requires_grad]
    return loss.item(), trainer.state.log_history[-1], grads


def assert_equals_trl(spec: Model, count: int, folder, rel: float = 1e-5, **chosen) -> dict:
    ours, theirs = ours_and_theirs(spec, count, folder, chosen)
    assert ours[0] == pytest.approx(theirs[0], rel=rel)
    for name in ("logps/chosen", "logps/rejected"):
        assert ours[1][name] == pytest.approx(theirs[1][name], rel=rel), name
    bits = 1e-6 + 2.0**-22 * (abs(theirs[1]["logps/chosen"]) + abs(theirs[1]["logps/rejected"]))
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", *(["kl"] if "kl" in ours[1] else [])):
        assert ours[1][name] == pytest.approx(theirs[1][name], rel=rel, abs=bits), name
    assert ours[1]["num_tokens"] == theirs[1]["num_tokens"]
    assert len(ours[2]) == len(theirs[2]) > 0
    for mine, other in zip(ours[2], theirs[2], strict=True):
        assert (mine - other).norm() <= rel * other.norm(), (mine.norm(), other.norm())
    assert any(grad.norm() > 0 for grad in ours[2])
    return ours[1]


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"beta": 0.05, "desirable_weight": 1.3, "undesirable_weight": 0.7},
        {"loss": "apo_zero_unpaired", "beta": 0.3},
    ],
)
def test_equals_trl_on_the_tiny_model(tiny_folder, tmp_path, keys):
    logged = assert_equals_trl(Model(base=tiny_folder, compute_dtype="float32"), 7, tmp_path, **keys)
    assert ("kl" in logged) == ("loss" not in keys)


def test_the_kl_rows_are_those_of_trl(tiny_folder, tmp_path):
    """With a length to which some of them are cut."""
    theirs = trl_trainer(Model(base=tiny_folder, compute_dtype="float32"), 5, tmp_path, {})
    rows, wanted = rows_of(theirs), [*theirs.train_dataset]
    assert [row.answers for row in mismatched(rows, 10_000)] == [(row["KL_completion_ids"],) for row in wanted]
    length = max(len(row.prompt_ids) for row in rows) + 3
    theirs.data_collator.max_length = length
    padded = theirs.data_collator(wanted)
    found = [sum(map(len, (row.prompt_ids, *row.answers))) for row in mismatched(rows, length)]
    assert found == padded["KL_attention_mask"].sum(dim=1).tolist()
    assert length in found
    assert [row.prompt_ids for row in mismatched(rows, length)] == [row.prompt_ids for row in rows]


def test_micro_batches_change_neither_the_estimate_nor_a_gradient(base, tmp_path):
    rows = labelled(base.tokenizer, 7)
    found = []
    for micro in (7, 3, 1):
        trainer = trainer_of(base, tmp_path, rows, micro=micro)
        found.append((one_step(trainer, rows), float(trainer.kl)))
    (whole, kl), *others = found
    assert kl > 1e-3, "else the estimate would not count"
    for grads, other in others:
        assert other == pytest.approx(kl, rel=1e-5)
        torch.testing.assert_close(grads, whole, rtol=1e-4, atol=1e-7)


def test_the_estimate_takes_a_forward_without_gradients_and_none_is_taken_without_it(base, tmp_path):
    """A step of 6 rows in two micro-batches: each prompt once with its own and once with another answer."""
    rows, tokens = labelled(base.tokenizer, 6), []
    assert base.padding_reason is None  # asked first: it is found out with a few forwards

    def note(module, args, named):
        tokens.append((torch.is_grad_enabled(), named["input_ids"].numel()))

    base.lm.base_model.register_forward_pre_hook(note, with_kwargs=True)
    for loss, passes in (("kto", 2), ("apo_zero_unpaired", 0)):
        tokens.clear()
        one_step(trainer_of(base, tmp_path, rows, micro=3, chosen={"loss": loss}), rows)
        with_gradients = [count for gradients, count in tokens if gradients]
        assert len(with_gradients) == 2
        assert sum(with_gradients) == sum(map(len, rows)) - len(rows)  # packed; the last token predicts nothing
        assert len(tokens) == 2 + 2 + 2 * passes  # policy and reference on own answers, and both on others'


def test_the_first_loss_is_a_half(tiny_base, tmp_path):
    tiny_base.add_adapter(Role.POLICY, LORA)
    rows = labelled(tiny_base.tokenizer, 6)
    trainer = trainer_of(tiny_base, tmp_path, rows, micro=2, max_steps=1, per_device_train_batch_size=6)
    trainer.train()
    first = trainer.state.log_history[0]
    assert (first["loss"], first["kl"], first["rewards/margins"]) == (0.5, 0.0, 0.0)


def test_cached_log_probs_of_the_reference_change_no_number(base, tmp_path, monkeypatch):
    """Those of the KL rows too; a later run computes none again."""
    monkeypatch.setattr(qalign.model.reference, "cache_folder", lambda: tmp_path / "cache")  # it begins empty
    rows = labelled(base.tokenizer, 6)
    in_step = one_step(trainer_of(base, tmp_path, rows), rows)
    for computed in (12, 0):
        references = CachedReferenceLogps(base, None, answers=1)
        references._unverified = False  # what is read is computed once more, to verify it
        cached = one_step(trainer_of(base, tmp_path, rows, references=references), rows)
        assert references.computed == computed
        references.save()
        torch.testing.assert_close(cached, in_step)


def test_held_out_figures_are_means_over_the_answers_of_a_label(base, tmp_path):
    rows = labelled(base.tokenizer, 7)
    trainer = trainer_of(base, tmp_path, rows, micro=2, eval_rows=rows, per_device_eval_batch_size=7)
    found = trainer.evaluate()
    with torch.no_grad(), base.packed_attention():
        loss, metrics = trainer.pair_losses(rows)
    good = torch.tensor([row.desirable for row in rows])
    assert found["eval_loss"] == pytest.approx(loss.mean().item(), rel=1e-5)
    for name in ("rewards", "logps"):
        chosen, rejected = metrics[f"{name}/chosen"], metrics[f"{name}/rejected"]
        assert found[f"eval_{name}/chosen"] == pytest.approx(chosen[good].mean().item(), rel=1e-4, abs=1e-6)
        assert found[f"eval_{name}/rejected"] == pytest.approx(rejected[~good].mean().item(), rel=1e-4, abs=1e-6)
    margin = found["eval_rewards/chosen"] - found["eval_rewards/rejected"]
    assert found["eval_rewards/margins"] == pytest.approx(margin)


@pytest.mark.parametrize(
    ("weights", "counts", "said"),
    [
        ({}, (10, 10), None),
        ({}, (40, 30), None),  # 4:3
        ({"undesirable_weight": 3}, (30, 10), None),
        ({}, (10, 30), "set kto.desirable_weight between 3.00 and 4.00"),
        ({}, (30, 10), "set kto.undesirable_weight between 2.25 and 3.00"),  # 30 / (10 × 3) = 1, 30 / (10 × 2.25) = 4/3
        ({"desirable_weight": 2, "undesirable_weight": 3}, (10, 30), "set kto.desirable_weight between 9.00 and 12.00"),
    ],
)
def test_the_header_names_the_weights_that_balance_the_labels(weights, counts, said):
    words = balance_in_words(KTO(data="a.jsonl", **weights), *counts)
    assert words.startswith(f"{counts[0]} good, {counts[1]} bad, with weights ")
    assert words.endswith(said) if said else "set" not in words


def test_a_run_on_rows_of_every_kind(tiny_folder, tmp_path, write_jsonl, capsys):
    """Labels, pairs and votes in one file; a bad label is named, a tie counted; held-out figures are in the summary."""
    rows = [{"prompt": f"What is {n}?", "completion": f"It is {n}.", "label": n % 2 == 0} for n in range(8)]
    rows += [{"prompt": f"And {n}?", "chosen": "Yes.", "rejected": "No, no."} for n in range(30)]
    rows += [{"prompt": "A tie?", "no_pair": "a vote for 'tie'"}]
    rows += [{"prompt": "And?", "completion": "Perhaps.", "label": "perhaps"}]
    data, held_out = write_jsonl("rows.jsonl", rows), {"path": TEST, "limit": 3}
    path = write_recipe(tmp_path / "run", tiny_folder, "kto", data=data, eval_data=held_out, limit=None, max_steps=4)
    run = run_stage(path)
    said = capsys.readouterr().out
    assert "34 good, 34 bad, with weights 1 and 1\n" in said
    assert "38 used, 3 held out, 1 refused, 0 shortened, 1 left out" in said
    assert f"next           python -m qalign.evaluate {path}" in said
    assert (
        "label: expected true or false (or 1 and 0, good and bad), found 'perhaps'"
        in said + (run.path / "rejected_rows.jsonl").read_text()
    )
    found = summary(run)
    assert (found["desirable"], found["undesirable"]) == (34, 34)
    (line,) = (line for line in metrics(run) if "eval_loss" in line)
    assert line["step"] == 4
    assert {name: line[name] for name in found["measured"] if name in line} == found["measured"]
    assert {"eval_loss", "eval_kl", "eval_rewards/chosen", "eval_rewards/rejected", "eval_rewards/margins"} <= set(line)
    steps = [line for line in metrics(run) if "loss" in line]
    assert any("rewards/chosen" in line and "rewards/rejected" in line for line in steps), "rows are drawn at random"


def test_answers_of_one_label_alone_are_refused(tiny_folder, tmp_path, write_jsonl):
    data = write_jsonl("rows.jsonl", [{"prompt": f"{n}?", "completion": "Yes", "label": 1} for n in range(5)])
    with pytest.raises(UserError, match=r"^kto\.data: all 5 answers are good; KTO needs bad ones too"):
        run_stage(write_recipe(tmp_path, tiny_folder, "kto", data=data, limit=None))
