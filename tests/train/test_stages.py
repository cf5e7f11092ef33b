"""What is true of every stage: what a run leaves, says and changes, what it refuses, and that it resumes to the same
numbers."""

import contextlib
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import qalign.model.base
import qalign.model.memory.forecast
import qalign.train.loop
from qalign.config.load import load as load_recipe
from qalign.config.stages import RL_STAGES
from qalign.errors import UserError
from qalign.model import lineage
from qalign.model.base import Role, load
from tests.conftest import ROOT
from tests.helpers import base_digest, metrics, slow, summary
from tests.reward_runs import plain_policy, run_stage, write_recipe
from tests.train.runs import CLOCK, EACH_STAGE, HELD_OUT, WEIGHTS, recipe_of

NAMES = {
    "sft": {"loss", "grad_norm", "learning_rate", "mean_token_accuracy", "epoch"},
    "reward": {"loss", "grad_norm", "learning_rate", "accuracy", "margin", "mean_reward", "epoch"},
    "dpo": {f"rewards/{name}" for name in ("chosen", "rejected", "accuracies", "margins")} | {
        "loss", "grad_norm", "learning_rate", "logps/chosen", "logps/rejected", "epoch"},
    "kto": {f"{name}/{side}" for name in ("rewards", "logps") for side in ("chosen", "rejected")} | {
        "loss", "grad_norm", "learning_rate", "kl", "rewards/margins", "epoch"},
    "ppo": {"objective/kl", "objective/scores", "objective/rlhf_reward", "policy/approxkl_avg", "loss/value_avg", "lr"},
    "grpo": {"objective/kl", "objective/scores", "policy/clipfrac_avg", "loss/kl_avg", "frac_reward_zero_std", "lr"},
}  # fmt: skip


@contextlib.contextmanager
def bases_kept():
    """Gathers the bases that stages load meanwhile."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(qalign.train.loop, "load", lambda spec, **more: found.append(load(spec, **more)) or found[-1])
        yield found


@pytest.fixture(scope="module")
def sft_adapter(tiny_folder, tmp_path_factory) -> Path:
    return run_stage(write_recipe(tmp_path_factory.mktemp("parent"), tiny_folder, "sft")).adapter


@pytest.fixture(scope="module", params=EACH_STAGE)
def finished(request, tiny_folder, sft_adapter, tmp_path_factory):
    """A run of each stage that started from an adapter: (run, what it printed, the base that it left in memory)."""
    keys = {"start_from": str(sft_adapter), "eval_data": HELD_OUT, "eval_every": 2, "save_every": 1}
    path = recipe_of(tmp_path_factory.mktemp(request.param), tiny_folder, request.param, **keys)
    said = io.StringIO()
    with contextlib.redirect_stdout(said), bases_kept() as bases:
        run = run_stage(path)
    return run, said.getvalue(), bases[0]


def test_a_run_leaves_what_it_promises(finished):
    run, _, _ = finished
    assert {file.name for file in run.path.iterdir()} >= {"adapter", "recipe.yaml", "metrics.jsonl", "summary.json"}
    assert {file.name for file in run.adapter.iterdir()} >= {
        WEIGHTS, "adapter_config.json", "tokenizer.json", "chat_template.jinja", "README.md", "lineage.json",
    }  # fmt: skip
    assert load_recipe(str(run.path / "recipe.yaml")) == run.recipe
    assert sorted(file.name for file in run.checkpoints.iterdir()) == ["checkpoint-2", "checkpoint-3"]
    assert all((file / "manifest.json").is_file() for file in run.checkpoints.iterdir())
    assert not [file for file in run.path.rglob("*") if file.name.startswith(".")], "temporary files are gone"
    facts = summary(run)
    assert facts["steps"] == 3
    assert {"used": 12, "held_out": 4, "refused": 0}.items() <= facts["rows"].items()
    assert {"tokens", "tokens_per_second", "train_seconds", "wall_seconds", "peak_bytes", "versions"} <= set(facts)
    assert facts["resumed_from"] is None


def test_every_step_and_every_evaluation_is_logged(finished):
    run, _, _ = finished
    logged = metrics(run)
    steps = [line for line in logged if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3]
    evaluated = [line["step"] for line in logged if any(name.startswith("eval_") for name in line)]
    assert evaluated == ([0, 2, 3] if run.stage in RL_STAGES else [2, 3])
    assert NAMES[run.stage] <= set(steps[0]), "dashboards for TRL go on working"
    assert steps[-1]["num_tokens"] == summary(run)["tokens"] > steps[0]["num_tokens"] > 0


def test_rows_and_ids_in_files_train_the_same_numbers(finished, sft_adapter, tiny_folder, tmp_path, monkeypatch):
    run, _, _ = finished
    monkeypatch.setattr("qalign.data.store.rows.SMALL", 0)
    monkeypatch.setattr("qalign.data.store.tokens.AT_ONCE", 5)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    keys = {"start_from": str(sft_adapter), "eval_data": HELD_OUT, "eval_every": 2, "save_every": 1}

    other = run_stage(recipe_of(tmp_path, tiny_folder, run.stage, **keys))

    assert len([*tmp_path.glob("cache/qalign/tokens/*/ids/tokens.arrow")]) == 2, "data and eval_data"
    lines = ([{k: v for k, v in line.items() if not k.startswith(CLOCK)} for line in metrics(r)] for r in (run, other))
    assert next(lines) == next(lines)
    assert summary(run)["rows"] == summary(other)["rows"]
    weights, others = (load_file(r.adapter / WEIGHTS) for r in (run, other))
    assert all(torch.equal(weight, others[name]) for name, weight in weights.items())


def test_the_header_says_what_is_trained_on_what_and_against_what(finished, sft_adapter):
    run, said, _ = finished
    reference = f"reference      the base with a frozen copy of the adapter {sft_adapter}"
    has_reference = run.stage in ("dpo", "kto", *RL_STAGES)
    assert (reference in said) == has_reference
    if has_reference:
        assert summary(run)["reference"] in reference
    follows = {"sft": "export", "reward": "score", "ppo": "best_of", "grpo": "page"}.get(run.stage, "evaluate")
    words = (f"qalign {run.stage} → {run.path}", "nf4, computing in float32 on cpu", f"starting from {sft_adapter}")
    for word in (*words, "12 used, 4 held out", "3, each of 4", "2 at a time", str(run.adapter),
                 f"python -m qalign.{follows}"):  # fmt: skip
        assert (word if word != "2 at a time" or run.stage not in RL_STAGES else "1 at a time") in said, word


def test_the_header_names_the_columns_that_were_read_and_those_that_nobody_reads(finished):
    run, said, _ = finished
    read = {"sft": "messages, prompt, chosen", "ppo": "prompt, chosen", "grpo": "prompt, chosen"}.get(
        run.stage, "prompt, chosen, rejected"
    )
    unread = {"sft": "topic, rejected", "ppo": "topic, rejected", "grpo": "topic, rejected"}.get(run.stage, "topic")
    lines = [" ".join(line.split()) for line in said.splitlines()]
    assert lines.count(f"data columns read: {read}") == 1
    assert lines.count(f"columns not used: {unread}") == 1


def test_the_adapter_says_where_it_comes_from(finished, sft_adapter, tiny_folder):
    run, _, base = finished
    kept = lineage.read(run.adapter)
    assert (kept.stage, kept.base, kept.parent) == (run.stage, tiny_folder, str(sft_adapter))
    assert kept.parent_hash == lineage.adapter_hash(sft_adapter)
    assert (kept.quantization, kept.compute_dtype) == ("nf4", "float32")
    assert kept.special_tokens == {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
    lineage.check("dpo.start_from", run.adapter, base.lineage("dpo"))


def test_training_moves_the_adapter_alone_and_in_float32(finished, sft_adapter):
    """The base stays what it is, and so does the adapter that the run started from, on the disk and in memory."""
    run, _, base = finished
    loaded = load(run.recipe.model)
    if run.stage == "reward":
        loaded.lm.set_output_embeddings(None)  # as no answer is given
    assert base_digest(base) == base_digest(loaded)
    before, after = (load_file(folder / WEIGHTS) for folder in (sft_adapter, run.adapter))
    assert {weight.dtype for weight in after.values()} == {torch.float32}
    assert set(before) <= set(after)
    assert all(not torch.equal(before[name], after[name]) for name in before), "every weight was trained"
    kept = {name: tensor for name, tensor in base.model.state_dict().items() if ".reference." in name}
    assert bool(kept) == (run.stage in ("dpo", "kto", *RL_STAGES))
    for name, tensor in kept.items():
        assert torch.equal(tensor, before[name.replace(".reference", "")]), name


def test_plain_peft_loads_the_adapter_and_gives_the_same_logits(finished):
    run, _, base = finished
    if run.stage == "reward":
        pytest.skip("test_reward.py compares its scores")
    ids = torch.arange(30, 60)[None]
    base.model.eval()
    with torch.no_grad():
        plain = plain_policy(run.adapter)(input_ids=ids).logits
        for role in (Role.POLICY, Role.BASE):
            with base.acting_as(role) as lm:
                assert torch.equal(lm(input_ids=ids).logits, plain) == (role is Role.POLICY)


@pytest.mark.parametrize("stage", EACH_STAGE)
def test_a_misspelt_column_is_reported_before_torch_is_imported(stage, tiny_folder, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"promt": "Why?", "chosne": "a", "rejectde": "b", "masseges": []}\n' * 3)
    path = recipe_of(tmp_path / "runs", tiny_folder, stage, data=str(rows))
    code = (
        f"import sys, qalign.{stage} as stage\n"
        "try: stage.main(sys.argv[1:])\n"
        "except SystemExit as end: print(end.code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.stdout.split() == ["2", "False"], done.stderr
    assert f"{stage}.data: 3 of 3 rows were refused" in done.stderr
    assert f"{rows}:1: " in done.stderr
    assert "promt" in done.stderr, "the row's own keys are named"
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("stage", EACH_STAGE)
def test_refused_rows_are_listed_and_too_many_leave_the_old_run_alone(stage, tiny_folder, tmp_path):
    good = {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]}
    good |= {"prompt": "Why?", "chosen": "Because.", "rejected": "No."} if stage != "sft" else {}
    lines = [json.dumps(good)] * 30
    lines[6] = '{"prompt": "cut off'
    lines[20] = json.dumps({"prompt": "word " * 600, "chosen": "yes", "rejected": "no"})
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(lines))
    keys = {"data": str(data), "limit": None, "max_steps": 1}
    with pytest.raises(UserError, match=rf"{stage}\.data: 2 of 30 rows were refused \(7%") as raised:
        run_stage(recipe_of(tmp_path / "strict", tiny_folder, stage, **keys))
    assert [line.split(": ")[0].strip() for line in raised.value.lines[1:]] == [f"{data}:7", f"{data}:21"]

    path = Path(recipe_of(tmp_path / "lenient", tiny_folder, stage, **keys))
    path.write_text(path.read_text() + "max_refused_share: 0.1\n")
    run = run_stage(str(path))
    listed = [json.loads(line) for line in (run.path / "rejected_rows.jsonl").read_text().splitlines()]
    assert [row["where"] for row in listed] == [f"{data}:7", f"{data}:21"]
    assert {"used": 28, "refused": 2}.items() <= summary(run)["rows"].items()

    data.write_text("not JSON\n" * 30)
    with pytest.raises(UserError, match=rf"{stage}\.data: 30 of 30 rows were refused"):
        run_stage(str(path), overwrite=True)
    assert run.complete
    assert len((run.path / "rejected_rows.jsonl").read_text().splitlines()) == 2
    assert len((run.path / "rejected_rows.last_try.jsonl").read_text().splitlines()) == 30


@pytest.mark.parametrize(
    ("stage", "keys"),
    [
        ("dpo", {}), slow("reward", {"centering": 0.05}), slow("sft", {}),
        slow("kto", {"epochs": 1}),
    ],
)  # fmt: skip
def test_micro_batches_do_not_change_the_curve(stage, keys, tiny_folder, tmp_path, monkeypatch, capsys):
    """Seven rows in steps of four: the last step of each epoch has three, in any number of parts. (Of KTO's fourteen
    answers, two.)"""
    monkeypatch.setitem(qalign.model.memory.forecast.BUSY_TOKENS, "cpu", 400)  # `auto`: two or three pairs
    keys = {"limit": 7, "epochs": 2, "learning_rate": 1e-3, **keys}
    ways = (4, 2, 1, "auto")
    runs = [run_stage(write_recipe(tmp_path / f"{n}", tiny_folder, stage, micro_batch_size=n, **keys)) for n in ways]
    assert "up to 400 tokens at a time" in capsys.readouterr().out
    # TRL averages two of its figures over micro-batches.
    unlike = {"tokens_per_second"} | ({"entropy", "mean_token_accuracy"} if stage == "sft" else set())
    first, *others = (metrics(run) for run in runs)
    assert [line["step"] for line in first] == [1, 2, 3, 4]
    for lines in others:
        for line, expected in zip(lines, first, strict=True):
            for name in set(line) - unlike:
                assert line[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-5), name
    adapter, *adapters = (load_file(run.adapter / WEIGHTS) for run in runs)
    for weights in adapters:
        torch.testing.assert_close(weights, adapter, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo", "kto"])
def test_evaluating_while_training_does_not_move_a_number(stage, tiny_folder, tmp_path):
    ways = {"plain": {}, "measured": {"eval_data": HELD_OUT, "eval_every": 1}}
    runs = [run_stage(write_recipe(tmp_path / name, tiny_folder, stage, **keys)) for name, keys in ways.items()]
    one, other = (load_file(run.adapter / WEIGHTS) for run in runs)
    assert all(torch.equal(one[name], other[name]) for name in one)
