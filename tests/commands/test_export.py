"""`qalign.export`: the measured distance to the trained model, and what is refused before anything is kept."""

import json
import math

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from qalign.convert.fidelity import Fidelity, Trained, load_exported
from qalign.export import ROWS, export, main, measured_rows, options
from qalign.model.base import Role, load
from qalign.train.run_folder import RunFolder, open_run
from tests.helpers import TEST, leaving, refusal
from tests.reward_runs import run_stage, write_recipe

STRONG = {"learning_rate": 4e-2, "scheduler": "constant", "warmup_ratio": 0.0, "limit": 4, "batch_size": 2}


@pytest.fixture(scope="module")
def runs(tiny_folder, tmp_path_factory):
    """An SFT and a reward run, and where they were merged; tests only read them."""
    folder, found = tmp_path_factory.mktemp("runs"), {}
    for stage in ("sft", "reward"):
        run = run_stage(write_recipe(folder, tiny_folder, stage, eval_data=TEST, **STRONG))
        export(options().parse_args([str(run.path), "--to", "merged", "--force"]))
        found[stage] = run
    return found


def test_a_policy_is_measured_token_by_token_on_its_own_greedy_answers(runs):
    """The KL divergence in float64 from the logits of transformers' own forward, for every row by itself."""
    run = runs["sft"]
    rows, words = measured_rows(run, None)
    assert (len(rows), words) == (ROWS, "held-out prompts")
    trained, merged = Trained(run, rows[:3]), load_exported(run.path / "merged-dequantized")
    bare = AutoModelForCausalLM.from_pretrained(run.recipe.model.base).eval()  # what the adapter learned is lost
    base = load(run.recipe.model)
    base.load_adapter(Role.POLICY, str(run.adapter), trainable=False)
    measured = []
    for lm in (merged, bare):
        kls, same = [], 0
        for prompt, answer in trained.rows:
            ids, at = torch.tensor([prompt + answer]), slice(len(prompt) - 1, -1)
            with torch.no_grad(), base.acting_as(Role.POLICY) as policy:
                p, q = (one(input_ids=ids).logits[0, at].double().log_softmax(-1) for one in (policy, lm))
            assert p.argmax(-1).tolist() == answer  # what the trained model says greedily
            kls += [sum((pi.exp() * (pi - qi)).tolist()) for pi, qi in zip(p, q, strict=True)]
            same += q.argmax(-1).tolist() == answer
        found = trained.compare(lm)
        assert found.tokens == len(kls) == sum(len(answer) for _, answer in trained.rows)
        assert (found.rows, found.same) == (3, same)
        assert found.kl_nats == pytest.approx(sum(kls) / len(kls), rel=1e-2)
        measured.append(found.kl_nats)
    assert 0 < measured[0] < measured[1] / 10


def test_a_reward_model_is_measured_by_which_answer_it_prefers(runs):
    run = runs["reward"]
    rows, words = measured_rows(run, None)
    assert words == "held-out pairs"
    trained, lm = Trained(run, rows[:4]), load_exported(run.path / "merged-dequantized", is_reward=True)
    assert type(lm) is type(AutoModelForSequenceClassification.from_pretrained(run.path / "merged-dequantized"))
    found = trained.compare(lm)
    kls = []
    for number in range(0, 8, 2):
        before = [score.item() for score in trained.outputs[number : number + 2]]
        after = [
            lm(input_ids=torch.tensor([prompt + answer])).logits[0, 0].item()
            for prompt, answer in trained.rows[number : number + 2]
        ]
        p, q = (1 / (1 + math.exp(two - one)) for one, two in (before, after))
        kls.append(p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q)))
    assert found.kl_nats == pytest.approx(sum(kls) / 4, rel=1e-3, abs=1e-7)
    assert (found.rows, found.is_reward) == (4, True)
    lm.score.weight.data.neg_()
    assert trained.compare(lm).same == 4 - found.same


def test_a_model_that_is_too_far_away_is_not_kept(runs, tmp_path, capsys):
    run, place = runs["sft"], tmp_path / "out" / "merged"
    words = [str(run.path), "--to", "merged", "--output", str(place)]
    line = refusal(capsys, lambda: export(options().parse_args([*words, "--max-kl", "0"])))
    assert line.startswith("--max-kl: the exported model is 0.")
    assert "--force" in line
    assert not list(tmp_path.glob("out/*"))
    assert leaving(main, *words, "--max-kl", "0", "--force") == 0
    said = capsys.readouterr().out
    assert "nats a token from the trained model" in said
    assert (place / "model.safetensors").is_file()
    assert not Fidelity(0.04, 1, 1, 1, False).check(0.05, force=False)
    for bad in (0.06, math.nan):
        with pytest.raises(Exception, match=r"more than 0\.05"):
            Fidelity(bad, 1, 1, 1, False).check(0.05, force=False)


def test_which_prompts_it_is_measured_on(runs, tmp_path, capsys):
    run = open_run(str(runs["sft"].path))
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"Why {n}?"}) + "\n" for n in range(20)))
    rows, words = measured_rows(run, str(file))
    assert (len(rows), words) == (ROWS, f"prompts of {file}")
    without = run.recipe.model_copy(update={"sft": run.settings.model_copy(update={"eval_data": None})})
    rows, words = measured_rows(RunFolder(without, "sft"), None)
    assert "as none are held out" in words
    assert len(rows) <= 4  # the run's own limit

    copied = tmp_path / "runs" / "sft"
    copied.mkdir(parents=True)
    for name in ("recipe.yaml", "summary.json"):
        (copied / name).write_bytes((run.path / name).read_bytes())
    recipe = yaml.safe_load((copied / "recipe.yaml").read_text())
    recipe["sft"]["eval_data"][0]["path"] = str(tmp_path / "gone.jsonl")
    (copied / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    words = [str(copied), "--to", "merged"]
    assert "--prompts FILE" in refusal(capsys, lambda: export(options().parse_args(words)))


@pytest.mark.parametrize("bound", ["-1", "nan", "inf"])
def test_a_bound_that_is_none(runs, bound, capsys):
    words = [str(runs["sft"].path), "--to", "merged", f"--max-kl={bound}"]
    assert refusal(capsys, lambda: export(options().parse_args(words))).startswith("--max-kl: ")
