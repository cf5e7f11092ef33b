"""The whole command on a tiny model: the run folder, stopping and resuming, and what stays as it was."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, BitsAndBytesConfig

import qalign.model.base
import qalign.model.memory
from qalign.config.load import load as load_recipe
from qalign.errors import UserError
from qalign.model.base import Role, load
from qalign.model.loading import guard_4bit
from tests.conftest import FIXTURES, ROOT
from tests.families import family
from tests.helpers import TEST, digest, metrics, train, train_recipe


def test_a_run_leaves_what_it_promises(recipe_file, capsys):
    run = train(recipe_file(eval_data=TEST, eval_every=3, save_every=2))
    names = {file.name for file in run.path.iterdir()}
    assert {"adapter", "recipe.yaml", "metrics.jsonl", "checkpoints", "summary.json"} <= names
    assert load_recipe(str(run.path / "recipe.yaml")) == run.recipe
    adapter = {file.name for file in run.adapter.iterdir()}
    assert {
        "adapter_model.safetensors",
        "adapter_config.json",
        "tokenizer.json",
        "chat_template.jinja",
        "README.md",
    } <= adapter

    logged = metrics(run)
    steps = [line["step"] for line in logged if "loss" in line]
    assert steps == [1, 2, 3, 4, 5, 6]  # 24 pairs, 4 a step: the first and the last are there
    assert logged[0]["loss"] == pytest.approx(0.6931472, abs=1e-6)
    assert [line["step"] for line in logged if "eval_loss" in line] == [3, 6]

    summary = json.loads(run.summary.read_text())
    assert summary["steps"] == 6
    assert summary["rows"] == {"used": 24, "held_out": 72, "refused": 0, "shortened": 0}
    assert summary["reference"] == "the base with adapters off"
    assert summary["tokens"] == logged[-1].get("num_tokens", logged[-2].get("num_tokens")) > 0
    assert {"wall_seconds", "tokens_per_second", "peak_bytes", "versions"} <= set(summary)

    said = capsys.readouterr().out
    for word in (
        "nf4",
        "24 used",
        "the base with adapters off",
        "6, each of 4 pairs, 2 at a time",
        "once a pair, packed without padding",
        str(run.adapter),
    ):
        assert word in said, word
    assert f"python -m qalign.evaluate {run.command_line}" in said


def test_the_first_and_the_last_step_are_always_logged(recipe_file):
    run = train(recipe_file(trainer={"logging_steps": 100}, save_every=100))
    assert [line["step"] for line in metrics(run)] == [1, 6]


def test_a_checkpoint_is_logged_too_so_that_a_resumed_run_logs_the_same_means(recipe_file):
    run = train(recipe_file(trainer={"logging_steps": 100}, save_every=4))
    assert [line["step"] for line in metrics(run)] == [1, 4, 6]


def test_the_best_checkpoint_can_be_the_one_that_is_kept(recipe_file):
    """Trainer's own `load_best_model_at_end` finds the policy in a checkpoint (here the highest loss is "best")."""
    keys = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    run = train(recipe_file(eval_data=TEST, eval_every=1, save_every=1, max_steps=4, trainer=keys))
    losses = {line["step"]: line["eval_loss"] for line in metrics(run) if "eval_loss" in line}
    best = max(losses, key=losses.get)
    assert best != 4, "the last step must not be the best, or this shows nothing"
    kept, checkpoint = (
        load_file(folder / "adapter_model.safetensors")
        for folder in (run.adapter, run.checkpoints / f"checkpoint-{best}")
    )
    assert all(torch.equal(kept[name], checkpoint[name]) for name in kept)


def test_training_moves_the_policy_alone(recipe_file, monkeypatch):
    bases = []
    real = qalign.model.base.load
    monkeypatch.setattr(qalign.model.base, "load", lambda spec: bases.append(real(spec)) or bases[-1])
    path = recipe_file(max_steps=3)
    before = real(load_recipe(path).model)
    before.add_adapter(Role.POLICY, load_recipe(path).lora)
    train(path)
    (after,) = bases
    assert digest(after) == digest(before)
    moved = [p for n, p in after.model.named_parameters() if ".lora_B.policy." in n]
    assert all(p.abs().max() > 0 for p in moved)  # LoRA's B begins at zero


def test_going_on_from_an_adapter(recipe_file, monkeypatch):
    """Step 1 is ln 2 again, the reference is the first run's adapter, and it stays what it was, in memory too."""
    first = train(recipe_file(max_steps=4))
    start = (first.adapter / "adapter_model.safetensors").read_bytes()
    path = recipe_file("second.yaml", output="again", max_steps=4, start_from=str(first.adapter))
    bases, real = [], qalign.model.base.load
    monkeypatch.setattr(qalign.model.base, "load", lambda spec: bases.append(real(spec)) or bases[-1])
    before = real(load_recipe(path).model)
    before.load_adapter(Role.POLICY, str(first.adapter), trainable=True)
    before.load_reference(str(first.adapter))
    second = train(path)
    assert digest(bases[0]) == digest(before)
    assert metrics(second)[0]["loss"] == pytest.approx(0.6931472, abs=1e-6)
    assert json.loads(second.summary.read_text())["reference"].endswith(str(first.adapter))
    assert (first.adapter / "adapter_model.safetensors").read_bytes() == start
    assert (second.adapter / "adapter_model.safetensors").read_bytes() != start


def test_the_adapter_loads_with_plain_peft_and_gives_the_same_logits(recipe_file):
    run = train(recipe_file(max_steps=4))
    base = load(run.recipe.model)
    base.load_adapter(Role.POLICY, str(run.adapter), trainable=False)
    ids = torch.arange(30, 60)[None]
    with torch.no_grad(), base.acting_as(Role.POLICY) as lm:
        expected = lm(input_ids=ids).logits
    quantised = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    plain = peft.AutoPeftModelForCausalLM.from_pretrained(
        run.adapter, quantization_config=quantised, dtype=torch.float32
    )
    guard_4bit(plain)
    with torch.no_grad():
        assert torch.equal(plain.eval()(input_ids=ids).logits, expected)


@pytest.mark.parametrize("loss", ["ipo", "hinge", "robust", "sigmoid_norm", "apo_zero", "simpo", "orpo"])
def test_every_loss_trains(recipe_file, loss):
    extra = {"label_smoothing": 0.1} if loss == "robust" else {}
    run = train(recipe_file(loss=loss, limit=8, epochs=6, learning_rate=5e-3, **extra))
    lines = metrics(run)
    assert lines[-1]["rewards/margins"] > lines[0]["rewards/margins"] + 0.01
    free = loss in ("simpo", "orpo")
    assert json.loads(run.summary.read_text())["reference"].startswith("none" if free else "the base")


def test_micro_batches_by_tokens_give_the_curve_of_those_by_pairs(recipe_file, capsys, monkeypatch):
    monkeypatch.setitem(qalign.model.memory.BUSY_TOKENS, "cpu", 400)  # two or three pairs
    by_pairs = train(recipe_file("pairs.yaml", output="pairs", limit=10, micro_batch_size=2))
    by_tokens = train(recipe_file("tokens.yaml", output="tokens", limit=10, micro_batch_size="auto"))
    assert "up to 400 tokens at a time" in capsys.readouterr().out
    assert [line["step"] for line in metrics(by_pairs)] == [1, 2, 3]
    for one, other in zip(metrics(by_tokens), metrics(by_pairs), strict=True):
        for name in ("loss", "grad_norm", "rewards/margins", "num_tokens"):
            assert one[name] == pytest.approx(other[name], rel=1e-4, abs=1e-5), name


def test_a_family_that_cannot_share_prompts_says_so_and_trains(recipe_file, tmp_path, capsys):
    tokenizer = AutoTokenizer.from_pretrained(FIXTURES / "tokenizers" / "llama3")
    family("falcon", len(tokenizer), dtype=torch.float32, spread=0.1).save_pretrained(tmp_path / "falcon")
    tokenizer.save_pretrained(tmp_path / "falcon")
    run = train(recipe_file(model={"base": str(tmp_path / "falcon")}, limit=8, epochs=4, learning_rate=1e-2))
    said = capsys.readouterr().out
    assert "twice a pair, padded: FalconForCausalLM uses transformers' AttentionInterface in 0 of 2 layers" in said
    lines = metrics(run)
    assert lines[0]["loss"] == pytest.approx(0.6931472, abs=1e-6)
    assert lines[-1]["rewards/margins"] > lines[0]["rewards/margins"] + 0.01


@pytest.mark.parametrize("name", ["hh_harmless.jsonl.gz", "alpaca_eval_prefs.jsonl.gz", "dpo_en_demo.json"])
def test_real_data_trains(recipe_file, shared_data, name):
    run = train(recipe_file(data=str(shared_data / name), limit=12, max_steps=3, model={"max_length": 2048}))
    assert [line["step"] for line in metrics(run)] == [1, 2, 3]


def test_bad_rows_are_named_listed_and_counted(recipe_file, write_jsonl):
    good = [{"prompt": f"question {n}?", "chosen": f"yes {n}", "rejected": f"no {n}"} for n in range(1000)]
    rows = [json.dumps(row) for row in good]
    rows[730] = '{"prompt": "cut off'
    rows[99] = json.dumps({"prompt": "q?", "chosen": "", "rejected": "no"})
    rows[199] = json.dumps({"prompt": "q?", "chosen": "same", "rejected": "same "})
    rows[299] = json.dumps({"prompt": "word " * 600, "chosen": "yes", "rejected": "no"})
    turns = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    rows[399] = json.dumps({"prompt": turns, "chosen": "yes", "rejected": "no"})
    data = write_jsonl("rows.jsonl", rows)
    run = train(recipe_file(data=data, limit=None, max_steps=1))
    listed = [json.loads(line) for line in (run.path / "rejected_rows.jsonl").read_text().splitlines()]
    reasons = {row["where"]: row["reason"] for row in listed}
    assert set(reasons) == {f"{data}:{line}" for line in (100, 200, 300, 400, 731)}
    assert reasons[f"{data}:731"].startswith("not valid JSON")
    assert reasons[f"{data}:100"] == "chosen: the answer is empty"
    assert reasons[f"{data}:200"] == "chosen and rejected are the same answer"
    assert reasons[f"{data}:300"].startswith("the prompt fills max_length: ")
    assert reasons[f"{data}:400"] == "turn 2 of the prompt is the user's, expected the assistant's"
    assert json.loads(run.summary.read_text())["rows"]["refused"] == 5


@pytest.mark.true_model
def test_the_demo_learns_on_the_true_model(tmp_path):
    """A few steps of the demo's own recipe: SmolLM2 in NF4, in the precision this machine picks."""
    words = [
        "dpo.start_from=null",
        "dpo.sft_weight=0.5",
        "dpo.max_steps=6",
        "dpo.batch_size=4",
        "dpo.limit=24",
        f"output={tmp_path}",
        "dpo.eval_data=",
    ]
    recipe = load_recipe(str(ROOT / "recipes" / "smollm2_demo.yaml"), words, "dpo")
    lines = metrics(train_recipe(recipe))
    assert lines[0]["rewards/margins"] == 0
    assert lines[-1]["rewards/margins"] > 0.1
    assert lines[-1]["rewards/accuracies"] >= 0.75  # of four pairs: one may be close enough for bfloat16 to decide


@pytest.mark.parametrize("key", ["data", "eval_data"])
def test_rows_of_each_kind_are_checked_alone(recipe_file, write_jsonl, key):
    """No training row, or no held-out row, is told before a step is made and before an old run is deleted."""
    old = train(recipe_file(max_steps=1))
    bad = write_jsonl("bad.jsonl", [{"prompt": "q", "chosen": "", "rejected": "no"}])
    with pytest.raises(UserError, match=rf"dpo\.{key}: 1 of 1 rows were refused"):
        train(recipe_file(**{"eval_data": TEST, key: bad}), overwrite=True)
    assert old.complete


def test_a_value_that_trl_refuses_is_one_line(recipe_file):
    with pytest.raises(UserError, match=r"dpo.trainer: .*not_an_optimizer") as raised:
        train(recipe_file(trainer={"optim": "not_an_optimizer"}))
    assert len(raised.value.lines) == 1


# --- stopping and going on, in real processes ------------------------------------------------------------------------


def start(path: str, *words: str) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "qalign.dpo", path, *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def wait_for_step(run_folder, step: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        log = run_folder / "metrics.jsonl"
        if log.exists() and len(log.read_text().splitlines()) >= step:
            return
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.02)
    pytest.fail(f"no step {step} within two minutes")


def same_curve(lines: list[dict], expected: list[dict]) -> None:
    assert [line["step"] for line in lines] == [line["step"] for line in expected]
    for line, other in zip(lines, expected, strict=True):
        for name in ("loss", "rewards/margins", "logps/chosen", "learning_rate", "grad_norm", "num_tokens"):
            assert line[name] == pytest.approx(other[name], rel=1e-6, abs=1e-6), (line["step"], name)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_a_stopped_run_goes_on_to_the_same_numbers(recipe_file, tmp_path, number, code):
    keys = {"limit": None, "max_steps": 40, "save_every": 5, "batch_size": 4, "micro_batch_size": 4}
    whole = train(recipe_file("whole.yaml", output="whole", **keys))
    path, folder = recipe_file("stopped.yaml", output="stopped", **keys), tmp_path / "stopped" / "dpo"
    process = start(path)
    wait_for_step(folder, 8, process)
    process.send_signal(number)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == code, said
    reached = len((folder / "metrics.jsonl").read_text().splitlines())
    assert 8 <= reached < 40, "the run was not stopped midway"
    assert not (folder / "summary.json").exists()
    if number != signal.SIGKILL:
        assert f"checkpoint-{reached}" in said  # it was saved where it stopped
        assert "--resume" in said
        assert "Traceback" not in said
    with pytest.raises(UserError, match="holds a run that was stopped"):
        train(path)
    resumed = train(path, resume=True)
    same_curve(metrics(resumed), metrics(whole))
    one, other = (run.adapter / "adapter_model.safetensors" for run in (resumed, whole))
    torch.testing.assert_close(load_file(one), load_file(other), rtol=1e-5, atol=1e-7)


def test_a_checkpoint_cut_short_is_not_resumed_from(recipe_file):
    keys = {"max_steps": 6, "save_every": 2}
    whole = train(recipe_file("whole.yaml", output="whole", **keys))
    run = train(recipe_file("cut.yaml", output="cut", **keys))
    run.summary.unlink()
    shutil.rmtree(run.adapter)
    newest = run.checkpoints / "checkpoint-6"
    (newest / "whole").unlink()
    (newest / "optimizer.pt").write_bytes(b"half")
    again = train(recipe_file("cut.yaml", output="cut", **keys), resume=True)
    same_curve(metrics(again), metrics(whole))


def test_resuming_a_complete_run_says_so(recipe_file):
    path = recipe_file(max_steps=2)
    run = train(path)
    stamp = run.summary.stat().st_mtime_ns
    process = start(path, "--resume")
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 0
    assert "this run is complete" in said
    assert run.summary.stat().st_mtime_ns == stamp
