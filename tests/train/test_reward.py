"""The reward stage on a tiny model: its report, its loss against TRL's trainer and an independent Bradley-Terry, reward
models that can't be loaded, and the saved folder in the hands of plain PEFT."""

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import trl
from datasets import Dataset
from peft import get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from qalign.config.stages import Reward
from qalign.data.collate import MicroBatchLimit
from qalign.data.tokenize import pad_for_scores
from qalign.errors import UserError
from qalign.model.adapters.files import SCORE_HEAD
from qalign.model.adapters.members import answer_scores
from qalign.model.base import Role, load
from qalign.model.loading import guard_4bit
from qalign.score import score
from qalign.train.trainers.reward import RewardModelTrainer
from tests.helpers import SMOLLM2, TEST, TRAIN, house_style, metrics, summary
from tests.reward_runs import bradley_terry, plain_reward_model, plain_score, run_stage, write_recipe

pytestmark = pytest.mark.pictures

ADAPTER_FILE = "adapter_model.safetensors"


@pytest.fixture
def recipe(tmp_path, tiny_folder):
    """Writes a recipe of the reward stage; keyword arguments go into that section."""

    def write(output: str = "runs", **keys) -> str:
        return write_recipe(tmp_path / output, tiny_folder, **keys)

    return write


@pytest.fixture(scope="module")
def finished(tiny_folder, tmp_path_factory):
    """A run whose head and adapter have moved; tests only read it."""
    held_out = {"path": TEST, "limit": 10}
    return run_stage(write_recipe(tmp_path_factory.mktemp("finished"), tiny_folder, eval_data=held_out, eval_every=2))


@pytest.fixture
def start(finished, tmp_path) -> str:
    """A copy of that run's adapter, to go on from or to break."""
    return str(shutil.copytree(finished.adapter, tmp_path / "start"))


def scored_rows(count: int = 6) -> list[dict]:
    """Real pairs with raters' scores, whose differences are 0.5, 1, 1.5 …"""
    rows = [json.loads(line) for line in Path(TRAIN).read_text().splitlines()[:count]]
    return [row | {"score_chosen": 4 + n / 2, "score_rejected": 3.5} for n, row in enumerate(rows)]


def test_a_run_reports_on_held_out_pairs_and_says_so(finished, recipe, capsys):
    facts = summary(finished)
    assert facts["trust"]["pairs"] == 10
    assert {"accuracy", "accuracy_interval", "length_judge", "calibration"} <= set(facts["trust"])
    assert facts["pooling"] == "the last token that is not <|begin_of_text|>: the end of the answer's turn"
    assert facts["warning"] is None or "reward model" in facts["warning"]
    assert json.loads((finished.adapter / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS"
    with Image.open(finished.path / "reward_report.png") as picture:
        assert picture.size == (1200, 900)
    assert {"loss", "accuracy", "margin", "mean_reward", "grad_norm", "num_tokens"} <= set(metrics(finished)[0])
    pairs = house_style(load(finished.recipe.model).tokenizer, 12, path=TRAIN)
    answers = sum(len(pair.chosen_ids) + len(pair.rejected_ids) for pair in pairs)
    assert facts["tokens"] == answers + 2 * sum(len(pair.prompt_ids) for pair in pairs)

    run_stage(recipe(centering=0.01, max_steps=1, eval_data={"path": TEST, "limit": 6}))
    said = capsys.readouterr().out
    head = "64 weights, unquantised, in float32, read at the end of the answer's turn"
    for words in ("Bradley-Terry, centred with 0.01", head, "whether to trust it, on 6 held-out pairs"):
        assert words in said, words


@pytest.mark.parametrize(("margin", "centering"), [(False, 0.0), (True, 0.0), (False, 0.1), (True, 0.1)])
def test_the_loss_and_its_gradient_are_bradley_terrys(recipe, write_jsonl, start, tiny_folder, margin, centering):
    """All pairs in one plain SGD step, and the same by transformers, PEFT and the formula, a sequence at a time."""
    rows = scored_rows(4)
    path = recipe(
        data=write_jsonl("scored.jsonl", rows), limit=None, margin=margin, centering=centering, start_from=start,
        max_steps=1, learning_rate=0.1, scheduler="constant", warmup_ratio=0.0,
        trainer={"optim": "sgd", "max_grad_norm": 0.0},
    )  # fmt: skip
    run = run_stage(path)
    plain = plain_reward_model(tiny_folder, Path(start), trainable=True)
    pairs = house_style(load(run.recipe.model).tokenizer, 4, path=TRAIN)
    losses = []
    for number, pair in enumerate(pairs):
        chosen, rejected = (plain_score(plain, pair.prompt_ids + ids) for ids in pair.answers)
        wanted = 0.5 * (number + 1) if margin else 0.0
        losses.append(bradley_terry(chosen.item(), rejected.item(), wanted, centering))
        loss = -torch.nn.functional.logsigmoid(chosen - rejected - wanted) + centering * (chosen + rejected) ** 2
        (loss / 4).backward()
    (logged,) = metrics(run)
    assert logged["loss"] == pytest.approx(sum(losses) / 4, abs=1e-5)
    gradients = {
        name.replace(".default", "").replace("modules_to_save.", ""): parameter.grad
        for name, parameter in plain.named_parameters()
        if parameter.requires_grad
    }
    before, after = (load_file(Path(folder) / ADAPTER_FILE) for folder in (start, run.adapter))
    assert set(before) == set(after) == set(gradients)
    for name, gradient in gradients.items():
        torch.testing.assert_close(after[name], before[name] - 0.1 * gradient, rtol=1e-4, atol=1e-6, msg=name)
    assert gradients[SCORE_HEAD].norm() > 0.01
    norm = math.sqrt(sum(gradient.square().sum().item() for gradient in gradients.values()))
    assert logged["grad_norm"] == pytest.approx(norm, rel=1e-4)


@pytest.mark.parametrize(("margin", "centering"), [(False, 0.0), (True, 0.1)])
def test_the_loss_is_that_of_trls_reward_trainer(finished, start, tiny_folder, tmp_path, margin, centering):
    """Value and gradients of its own `compute_loss` on the same rows, padded, by plain PEFT."""
    base = load(finished.recipe.model)
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
    plain = plain_reward_model(tiny_folder, Path(start), trainable=True)
    base.tokenizer.pad_token = pad_for_scores(base.template)
    weights = [parameter.data.clone() for parameter in trained_of(plain)]
    theirs = trl.RewardTrainer(plain, args=args, train_dataset=Dataset.from_list(rows), processing_class=base.tokenizer)
    for parameter, wanted in zip(trained_of(theirs.model), weights, strict=True):
        parameter.data = wanted  # TRL casts the adapters of a quantised base to bfloat16
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


def test_the_held_out_loss_is_the_mean_over_pairs(recipe, start, tiny_folder):
    """Seven pairs in batches of two: the last batch is short, and counts by its pairs."""
    held_out = {"path": TEST, "limit": 7}
    run = run_stage(recipe(start_from=start, max_steps=1, learning_rate=1e-12, eval_data=held_out, eval_every=1))
    plain = plain_reward_model(tiny_folder, Path(start))
    losses, right = [], []
    for pair in house_style(load(run.recipe.model).tokenizer, 7):
        with torch.no_grad():
            chosen, rejected = (plain_score(plain, pair.prompt_ids + ids).item() for ids in pair.answers)
        losses.append(bradley_terry(chosen, rejected))
        right.append(chosen > rejected)
    (logged,) = (line for line in metrics(run) if "eval_loss" in line)
    assert logged["eval_loss"] == pytest.approx(sum(losses) / 7, abs=1e-5)
    trust = summary(run)["trust"]
    assert trust["mean_log_loss"] == pytest.approx(sum(losses) / 7, abs=1e-5)
    assert trust["accuracy"] == pytest.approx(sum(right) / 7)


def test_a_margin_needs_the_raters_scores_of_every_row(recipe, write_jsonl):
    rows = scored_rows(6)
    good = write_jsonl("good.jsonl", rows[:4])
    del rows[2]["score_rejected"]
    rows[4]["score_chosen"] = "5"  # a number as text, as a CSV has it
    data = write_jsonl("scored.jsonl", rows)
    with pytest.raises(UserError, match=r"reward\.data: 1 of 6 rows were refused \(17%") as raised:
        run_stage(recipe(data=data, margin=True))
    assert [re.findall(r":(\d): .*`margin: true`", line) for line in raised.value.lines[1:]] == [["3"]]
    with pytest.raises(UserError, match=r"reward\.eval_data: 72 of 72 rows were refused"):
        run_stage(recipe(data=good, margin=True, eval_data=TEST))
    run = run_stage(recipe("lenient", data=data, margin=False, max_steps=1))  # without it nobody asks for scores
    assert summary(run)["rows"]["used"] == 6


@pytest.mark.parametrize("micro", [1, 4, "auto"])
def test_a_loss_that_is_not_finite_names_its_row(recipe, write_jsonl, micro):
    """A margin beyond float32 makes one pair's loss infinite; the others of its micro-batch are not to blame."""
    rows = scored_rows(4)
    rows[2]["score_chosen"] = 1e39
    data = write_jsonl("scored.jsonl", rows)
    with pytest.raises(UserError, match="step 1: the loss is not finite on ") as raised:
        run_stage(recipe(data=data, margin=True, micro_batch_size=micro))
    (line,) = raised.value.lines
    assert re.findall(r"scored\.jsonl:(\d+)", line) == ["3"]


def test_the_same_seed_gives_the_same_run_whether_or_not_the_base_is_cached(recipe, tmp_path, monkeypatch):
    """The head is drawn while loading, which takes another way the first time."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    cold, warm = (run_stage(recipe(name, max_steps=1)) for name in ("cold", "warm"))
    one, other = (load_file(run.adapter / ADAPTER_FILE) for run in (cold, warm))
    assert all(torch.equal(one[name], other[name]) for name in one)
    third = recipe("third", max_steps=1)
    Path(third).write_text(Path(third).read_text() + "seed: 43\n")
    assert not torch.equal(load_file(run_stage(third).adapter / ADAPTER_FILE)[SCORE_HEAD], one[SCORE_HEAD])


def test_it_goes_on_from_an_sft_adapter_with_a_head_of_its_own_or_from_a_reward_adapter(tmp_path, tiny_folder):
    """Hardly a step: the adapter is still SFT's, the head is new; the second time both are kept."""
    runs = [run_stage(write_recipe(tmp_path / "runs", tiny_folder, "sft", max_steps=2))]
    for output, start in (("runs", "sft"), ("again", str(tmp_path / "runs" / "reward" / "adapter"))):
        path = write_recipe(tmp_path / output, tiny_folder, start_from=start, max_steps=1, learning_rate=1e-12)
        runs.append(run_stage(path))
    sft, first, second = (load_file(run.adapter / ADAPTER_FILE) for run in runs)
    assert set(first) - set(sft) == {SCORE_HEAD}
    for name, tensor in sft.items():
        torch.testing.assert_close(first[name], tensor, rtol=0, atol=1e-9)
    assert 0.05 < first[SCORE_HEAD].std() < 0.25  # 64 draws of N(0, 1/65): 0.124
    torch.testing.assert_close(second, first)


def test_an_adapter_without_its_head_is_refused_in_one_line(finished, start):
    file = Path(start) / ADAPTER_FILE
    weights = load_file(file)
    del weights[SCORE_HEAD]
    save_file(weights, file)
    with pytest.raises(UserError) as raised:
        load(finished.recipe.model).load_adapter(Role.REWARD, start, trainable=False)
    assert raised.value.lines == (f"{start}: this reward adapter has lost its score head; train it again",)


def by_its_readme(adapter: Path):
    """The model that the README's own snippet loads."""
    snippet = re.search(r"```python\n(.*?)```", (adapter / "README.md").read_text(), re.DOTALL).group(1)
    assert str(adapter) in snippet
    assert "qalign" not in snippet.replace(str(adapter), "")
    names = {}
    loading = snippet.partition("\nturns = ")[0]  # its own forward would repack the weights before they are guarded
    exec(compile(loading, "adapter/README.md", "exec"), names)
    guard_4bit(names["model"])
    saved, loaded = load_file(adapter / ADAPTER_FILE), get_peft_model_state_dict(names["model"])
    assert set(loaded) == set(saved)
    assert all(torch.equal(loaded[name], saved[name]) for name in saved)
    return names["model"].eval()


def test_the_readmes_own_snippet_loads_it_with_plain_peft_to_the_same_scores(finished):
    plain = by_its_readme(finished.adapter)
    base = load(finished.recipe.model)
    base.load_adapter(Role.REWARD, str(finished.adapter), trainable=False)
    pairs = house_style(base.tokenizer, 8)
    sequences = [pair.prompt_ids + ids for pair in pairs for ids in pair.answers]
    expected = answer_scores(base, Role.REWARD, pairs, MicroBatchLimit(pairs=4)).flatten().tolist()
    assert max(expected) - min(expected) > 0.1
    with torch.no_grad():
        alone = [plain_score(plain, ids).item() for ids in sequences]
        rows = [{"input_ids": ids} for ids in sequences]
        tokenizer = AutoTokenizer.from_pretrained(finished.adapter, padding_side="right")
        together = plain(**tokenizer.pad(rows, return_tensors="pt")).logits[:, 0].tolist()
    assert alone == pytest.approx(expected, abs=1e-4)
    assert together == pytest.approx(expected, abs=1e-4)  # padded as the folder's own tokenizer pads
    assert plain.config.pad_token_id == tokenizer.pad_token_id


@pytest.mark.true_model
def test_smollm2_learns_from_judged_answers_and_plain_peft_agrees(shared_data, tmp_path):
    """A few steps with the judge's margins on AlpacaEval's short rows, then scores of HH's dialogues, in float32. Seen:
    scores from -5.0 to -4.0, plain PEFT's at most 0.000003 away."""
    judged, dialogues = (str(shared_data / f"{name}.jsonl.gz") for name in ("alpaca_eval_prefs", "hh_harmless"))
    path = write_recipe(
        tmp_path, SMOLLM2, data={"path": judged, "limit": 24}, eval_data={"path": judged, "limit": 15}, limit=None,
        margin=True, batch_size=2, max_steps=3, learning_rate=1e-3, model={"max_length": 350},
    )  # fmt: skip
    Path(path).write_text(Path(path).read_text() + "max_refused_share: 1.0\n")
    run = run_stage(path)
    facts = summary(run)
    assert (facts["rows"]["used"], facts["steps"]) == (5, 3)
    assert facts["trust"]["margin_source"] == "raters"
    assert all(math.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in metrics(run))

    target = tmp_path / "scored.jsonl"
    score(str(run.path), dialogues, str(target), 4)
    found = [json.loads(line) for line in target.read_text().splitlines()]
    plain = by_its_readme(run.adapter)
    pairs = house_style(AutoTokenizer.from_pretrained(run.adapter), 4, path=dialogues)
    with torch.no_grad():
        expected = [plain_score(plain, pair.prompt_ids + ids).item() for pair in pairs for ids in pair.answers]
    assert [row[f"reward_{side}"] for row in found for side in ("chosen", "rejected")] == pytest.approx(
        expected, abs=1e-4
    )
