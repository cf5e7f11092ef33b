"""Rows longer than the base has positions: noticed at the beginning of every stage, refused by commands on a run."""

import json
import shutil

import pytest
import transformers as tf

from qalign import evaluate, score
from qalign.best_of import BestOfRun, best_of
from qalign.config.load import load as load_recipe
from qalign.errors import UserError
from qalign.model.loading import reach_of
from tests.helpers import train_recipe
from tests.reward_runs import run_stage, write_recipe

REACH = 64


def rope(kind: str, **keys) -> dict:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **keys}, "max_position_embeddings": 1000}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (tf.LlamaConfig(max_position_embeddings=300), 300),
        (tf.GPT2Config(n_positions=77), 77),
        (tf.OPTConfig(max_position_embeddings=78), 78),
        (tf.LlamaConfig(**rope("linear", factor=4.0)), 4000),
        (tf.LlamaConfig(**rope("dynamic", factor=2.0)), 2000),
        (tf.LlamaConfig(**rope("yarn", factor=4.0, original_max_position_embeddings=400)), 1600),
        (tf.LlamaConfig(**rope("yarn", factor=2.0, original_max_position_embeddings=500)), 1000),
        (tf.LlamaConfig(**rope("llama3", factor=8.0, original_max_position_embeddings=500, low_freq_factor=1.0,
                               high_freq_factor=4.0)), 1000),
        (tf.Gemma3Config(text_config={"max_position_embeddings": 90}), 90),
        (tf.FalconConfig(alibi=True), None),
        (tf.FalconConfig(alibi=False, max_position_embeddings=91), 91),
        (tf.BloomConfig(), None),
        (tf.MptConfig(max_seq_len=92), 92),
        (tf.MambaConfig(), None),
    ],
)  # fmt: skip
def test_how_far_a_base_reaches(config, expected):
    assert reach_of(config) == expected


@pytest.fixture(scope="module")
def short(tiny_folder, tmp_path_factory) -> str:
    """The tiny Llama, whose rotary positions end early."""
    folder = shutil.copytree(tiny_folder, tmp_path_factory.mktemp("short") / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": REACH}))
    return str(folder)


@pytest.fixture(scope="module")
def learned(tiny_folder, tmp_path_factory) -> str:
    """A tiny GPT-2, which has a table of positions."""
    folder = tmp_path_factory.mktemp("learned") / "model"
    tokenizer = tf.AutoTokenizer.from_pretrained(tiny_folder)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = tf.GPT2Config(n_positions=REACH, n_embd=32, n_layer=2, n_head=2, vocab_size=len(tokenizer), **ends)
    tf.GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def refused(path: str) -> str:
    with pytest.raises(UserError) as raised:
        run_stage(path)
    (line,) = raised.value.lines
    return line


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo"])
def test_every_stage_names_a_row_beyond_the_bases_reach(stage, tmp_path, short):
    line = refused(write_recipe(tmp_path, short, stage))
    assert line.startswith("model.max_length: /")
    assert "tokens, but '" in line
    assert f"can read {REACH} (" in line
    assert line.endswith("set it to 64, which shortens or refuses such rows")
    assert len(line) <= 300
    assert not (tmp_path / stage / "checkpoints").exists()


@pytest.mark.parametrize("stage", ["reward", "dpo"])
def test_learned_positions_too(stage, tmp_path, learned):
    assert f"can read {REACH} (" in refused(write_recipe(tmp_path, learned, stage))


def test_ppo_and_best_of_whose_answers_may_fill_max_length_refuse_it(tmp_path, short, write_jsonl):
    rows = write_jsonl("prompts.jsonl", [{"prompt": "Why?"}] * 4)
    (tmp_path / "reward.py").write_text("def f(completions):\n    return [0.0] * len(completions)\n")
    keys = {"data": rows, "reward": f"{tmp_path / 'reward.py'}:f", "limit": None, "max_new_tokens": 8, "max_steps": 1}
    keys |= {"batch_size": 4, "micro_batch_size": "auto", "samples_per_prompt": 2}
    path = write_recipe(tmp_path, short, "ppo", **keys)
    assert refused(path).startswith("model.max_length: 512 is beyond the 64 tokens that '")
    with pytest.raises(UserError, match=r"model\.max_length: 512 is beyond the 64 tokens"):
        best_of(recipe := load_recipe(path), BestOfRun(recipe, 2))
    assert run_stage(write_recipe(tmp_path, short, "ppo", **keys, model={"max_length": REACH})).complete


PAIR = {"prompt": "Why?", "chosen": "So.", "rejected": "No."}


@pytest.fixture
def runs(tmp_path, short, write_jsonl):
    """Runs on short pairs with a max_length beyond the base's reach. Gives the keys of their recipes."""
    keys = {"data": write_jsonl("pairs.jsonl", [PAIR] * 4), "max_steps": 1}
    for stage in ("dpo", "reward"):
        path = write_recipe(tmp_path, short, stage, **keys)
        assert train_recipe(load_recipe(path, stage=stage), stage=stage).complete
    return keys


def test_rows_that_fit_are_used_and_commands_on_a_run_refuse_others(
    runs, tmp_path, short, write_jsonl, capsys, monkeypatch
):
    monkeypatch.setattr("qalign.judge.measures.held_out.MAX_NEW_TOKENS", 4)
    held_out = write_jsonl("held_out.jsonl", [PAIR, PAIR | {"chosen": "word " * 100}])
    evaluate.report(load_recipe(write_recipe(tmp_path, short, "dpo", **runs, eval_data=held_out)))
    score.score(str(tmp_path / "reward"), held_out, None, None)
    said = capsys.readouterr().err
    assert said.count(f"refused: {held_out}:2: prompt and answer are") == 2
    assert said.count(f"over max_length {REACH}") == 2
    assert len((tmp_path / "held_out.scored.jsonl").read_text().splitlines()) == 1
