"""What scores answers: adapters, models of their own and functions, alone and together; and what is refused."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from qalign.config.recipe import Lora, Recipe
from qalign.data.collate import MicroBatchLimit
from qalign.data.store.sequences import TokenAnswers
from qalign.errors import Stopped, UserError
from qalign.model.adapters.files import SCORE_HEAD
from qalign.model.base import Role
from qalign.model.lineage import WEIGHTS
from qalign.rl.rewards import FunctionScorer, Scorers, combined, open_scorers, value_start
from qalign.train.run_folder import RunFolder
from tests.conftest import FIXTURES, ROOT
from tests.helpers import scramble
from tests.reward_runs import plain_reward_model, plain_score
from tests.rl.conftest import answers, change_json

LIMIT = MicroBatchLimit(pairs=2)


@pytest.fixture
def opened(tiny_folder, tmp_path):
    """The scorers of a reward, not loaded."""

    def make(reward, **more) -> Scorers:
        ppo = {"data": "unused.jsonl", "reward": reward, "max_new_tokens": 16, **more}
        model = {"base": tiny_folder, "compute_dtype": "float32", "max_length": 256}
        recipe = Recipe.model_validate({"model": model, "output": str(tmp_path / "runs"), "ppo": ppo})
        return open_scorers(recipe, RunFolder(recipe, "ppo", "my.yaml"))

    return make


@pytest.fixture
def attached(opened, tiny_base):
    """The scorers of a reward, loaded and attached to the tiny base."""

    def make(reward, **more) -> Scorers:
        scorers = opened(reward, **more)
        scorers.load_models(tiny_base)
        scorers.attach(tiny_base, LIMIT)
        return scorers

    return make


# --- adapters --------------------------------------------------------------------------------------------------------


def test_an_adapter_scores_as_plain_peft_does(attached, reward_run, tiny_folder, rows):
    (scorer,) = attached(str(reward_run.path)).reward
    found = scorer.scores(rows)
    plain = plain_reward_model(tiny_folder, reward_run.adapter)
    with torch.no_grad():
        expected = [[plain_score(plain, row.tokens.prompt_ids + a).item() for a in row.tokens.answers] for row in rows]
    assert torch.allclose(found, torch.tensor(expected), atol=1e-4)
    assert found.unique().numel() == 4


def test_scores_do_not_depend_on_padding_or_company(attached, reward_run, rows):
    (scorer,) = attached(str(reward_run.adapter)).reward
    one_by_one = torch.cat([scorer.scores([row]) for row in rows])
    assert torch.allclose(scorer.scores(rows), one_by_one, atol=1e-5)
    assert torch.allclose(scorer.scores(rows[::-1]).flip(0), one_by_one, atol=1e-5)


@pytest.mark.parametrize("end", [[], [77]])
def test_an_answer_that_was_cut_or_ended_with_eos_is_read_at_an_end_of_turn(
    end, attached, reward_run, tiny_base, rows, monkeypatch
):
    """As the reward model was trained; at other tokens its head says nothing that it learned."""
    turn_end = tiny_base.tokenizer.convert_tokens_to_ids("<|eot_id|>")
    monkeypatch.setattr("qalign.rl.scorers.stop_ids_of", lambda *_: (turn_end, 77))
    (scorer,) = attached(str(reward_run.path)).reward
    other = [
        replace(row, tokens=TokenAnswers(row.tokens.prompt_ids, tuple(a[:-1] + end for a in row.tokens.answers)))
        for row in rows
    ]
    assert torch.allclose(scorer.scores(other), scorer.scores(rows), atol=1e-5)


def test_rewards_of_one_name_are_told_apart(opened, reward_run, tmp_path):
    for place in ("a", "b", "judge"):
        shutil.copytree(reward_run.path, tmp_path / place / "demo" / "reward")
    sources = [str(tmp_path / place / "demo" / "reward") for place in ("a", "b", "judge")]
    scorers = opened(sources[:2], judge=sources[2], eval_data="unused.jsonl")
    assert len({scorer.name for scorer in scorers.reward}) == 2
    assert [judge.name for judge in scorers.judge] == ["demo"]


def test_the_recipes_own_reward_run_must_be_there(opened, reward_run, tmp_path):
    with pytest.raises(UserError, match=r"^ppo\.reward: .*runs/reward; run python -m qalign\.reward my\.yaml first$"):
        opened("reward")
    shutil.copytree(reward_run.path, tmp_path / "runs" / "reward")
    (scorer,) = opened("reward").reward
    assert scorer.folders == [tmp_path / "runs" / "reward" / "adapter"]


def test_several_are_added_up_with_their_weights(attached, reward_run, tiny_base, rows, tmp_path):
    other = shutil.copytree(reward_run.adapter, tmp_path / "other" / "adapter")
    weights = load_file(other / WEIGHTS)
    save_file({**weights, SCORE_HEAD: -3 * weights[SCORE_HEAD]}, other / WEIGHTS)
    (other / "lineage.json").unlink()  # it has the hash of the weights as they were trained
    (tmp_path / "mine.py").write_text("def length(completions):\n    return [len(text) for text in completions]\n")
    function = {"source": f"{tmp_path / 'mine.py'}:length", "weight": 2.0}
    scorers = attached([str(reward_run.path), {"source": str(other), "weight": 0.5}, function]).reward
    total, means = combined(scorers, rows)
    first, second, third = (scorer.scores(rows) for scorer in scorers)
    assert torch.allclose(second, -3 * first, atol=1e-5)
    assert third.tolist() == [[8.0, 36.0], [9.0, 4.0]]
    assert torch.allclose(total, first - 1.5 * first + 2 * third, atol=1e-5)
    assert means["length"] == 57 / 4
    assert tiny_base.adapters == ["reward", "reward_2"]
    assert value_start(scorers) is scorers[0]
    assert value_start(scorers[2:]) is None


SPOILT = [
    ("was trained on the base", lambda folder, _: change_json(folder / "lineage.json", base="meta-llama/Llama-3.1-8B")),
    ("lost its score head", lambda folder, weights: save_file(weights, folder / WEIGHTS)),
    (
        "gives no scores",
        lambda folder, weights: (
            change_json(folder / "adapter_config.json", task_type="CAUSAL_LM", modules_to_save=None),
            save_file(weights, folder / WEIGHTS),
        ),
    ),
    (
        "expected one label",
        lambda folder, weights: save_file({**weights, SCORE_HEAD: torch.zeros(3, 64)}, folder / WEIGHTS),
    ),
    (
        "hidden size 80, ",
        lambda folder, weights: (
            (folder / "lineage.json").unlink(),
            save_file({**weights, SCORE_HEAD: torch.zeros(1, 80)}, folder / WEIGHTS),
        ),
    ),
    ("is missing or damaged", lambda folder, _: os.truncate(folder / WEIGHTS, 1000)),
    (
        "is a pickle",
        lambda folder, weights: ((folder / WEIGHTS).unlink(), torch.save(weights, folder / "adapter_model.bin")),
    ),
]


@pytest.mark.parametrize(("message", "spoil"), SPOILT)
def test_adapters_that_do_not_fit_are_refused_before_the_model_loads(message, spoil, opened, reward_run, tmp_path):
    folder = shutil.copytree(reward_run.adapter, tmp_path / "spoilt")
    spoil(folder, {name: tensor for name, tensor in load_file(folder / WEIGHTS).items() if name != SCORE_HEAD})
    assert_refused(lambda: opened(str(folder)), message)


def assert_refused(work, message: str) -> None:
    """One line that begins with the key."""
    with pytest.raises(UserError) as refused:
        work()
    assert message in str(refused.value)
    assert str(refused.value).startswith("ppo.reward: ")
    assert "\n" not in str(refused.value)


# --- functions -------------------------------------------------------------------------------------------------------


@pytest.fixture
def function(tmp_path):
    """A scorer of the function `score` in a file with this text."""

    def make(text: str) -> FunctionScorer:
        (tmp_path / "mine.py").write_text(text)
        return FunctionScorer("ppo.reward", f"{tmp_path / 'mine.py'}:score", 1.0)

    return make


def test_a_function_is_given_what_it_names(function, tiny_base):
    rows = answers(tiny_base.tokenizer, answer=["Because.", "Elbe"], level=[1, 2])
    scorer = function(
        "seen = {}\n"
        "def score(prompts, completions, answer, ended, completion_ids):\n"
        "    seen.update(locals())\n"
        "    return [float(a == c) for a, c in zip(answer, completions)]\n"
    )
    assert scorer.scores(rows).tolist() == [[1.0, 0.0], [0.0, 1.0]]
    seen = scorer.function.__globals__["seen"]
    assert seen["prompts"][2] == [{"role": "user", "content": "Name a river."}]
    assert seen["completions"] == ["Because.", "It depends on what you mean by that.", "The Elbe.", "Elbe"]
    assert seen["answer"] == ["Because.", "Because.", "Elbe", "Elbe"]
    assert seen["ended"] == [True] * 4
    assert seen["completion_ids"] == [answer for row in rows for answer in row.tokens.answers]
    scorer = function("def score(prompts, completions, **row):\n    return row['level']\n")
    assert scorer.scores(rows).tolist() == [[1.0, 1.0], [2.0, 2.0]], "with keywords it is given everything"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return [1 / (text != 'Elbe') for text in completions]", "ZeroDivisionError on an answer to rows.jsonl:2"),
        ("return (1 / (text != 'Elbe') for text in completions)", "ZeroDivisionError on an answer to rows.jsonl:2"),
        ("return [0.0] * 3", "3 scores for 4 answers, the first to rows.jsonl:1"),
        ("return None", "gave None"),
        ("import asyncio; return asyncio.sleep(0)", "gave <coroutine object sleep"),
        ("return [10**400, 0, 0, 0]", "an answer to rows.jsonl:1; expected a finite number"),
        ("return [0, 0, float('nan'), 0]", "gave nan for an answer to rows.jsonl:2"),
        ("return [0, 0, float('inf'), 0]", "gave inf for an answer to rows.jsonl:2"),
        ("return ['1', 0, 0, 0]", "gave '1' for an answer to rows.jsonl:1"),
        ("return [None, 0, 0, 0]", "gave None for an answer to rows.jsonl:1"),
    ],
)
def test_a_function_that_fails_names_the_row(body, message, function, rows):
    scorer = function(f"def score(completions):\n    {body}\n")
    assert_refused(lambda: scorer.scores(rows), message)


def test_the_columns_that_functions_take_are_known_before_they_are_called(function):
    some, every = function("def score(completions, answer): ..."), function("def score(**columns): ...")
    columns = ("answer", "topic", "no name")
    assert list(filter(Scorers([some], []).takes, columns)) == ["answer"]
    assert list(filter(Scorers([], [every]).takes, columns)) == ["answer", "topic"]


def test_a_function_that_does_not_say_what_it_takes_is_one_line():
    with pytest.raises(UserError, match=r"^ppo.reward: 'numpy:add' doesn't say which parameters it takes"):
        FunctionScorer("ppo.reward", "numpy:add", 1.0)


def test_tensors_and_numbers_of_numpy_are_numbers_and_the_users_stop_is_no_error(function, rows):
    numbers = "[numpy.float32(1.5), torch.tensor(2.0), True, numpy.int64(4)]"
    scorer = function(f"import numpy, torch\ndef score(completions):\n    return {numbers}\n")
    assert scorer.scores(rows).tolist() == [[1.5, 2.0], [1.0, 4.0]]
    scorer = function("from qalign.errors import Stopped\ndef score(completions):\n    raise Stopped(2)\n")
    with pytest.raises(Stopped):
        scorer.scores(rows)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def score(:\n", "SyntaxError"),
        ("import nothing_of_this_name\n", "ModuleNotFoundError: No module named 'nothing_of_this_name'"),
        ("score = 3\n", "is int, expected a function"),
        ("other = 3\n", "AttributeError"),
        ("async def score(completions):\n    return [0.0]\n", "is async"),
        ("class Judge:\n    async def __call__(self, **_):\n        return [0.0]\nscore = Judge()\n", "is async"),
    ],
)
def test_what_is_no_function_is_one_line(text, message, function):
    assert_refused(lambda: function(text), message)
    assert FunctionScorer("ppo.reward", "statistics:mean", 1.0).function([1, 3]) == 2, "an installed module's"


def test_the_demos_own_reward(tiny_base):
    texts = [("a", ("One. Two.", "One. Two! Three?")), ("b", ("1.\n2.\n3.\n4.\n5.\n6.\n7.", "No end"))]
    rows = answers(tiny_base.tokenizer, texts)
    rows[1] = replace(rows[1], ended=(True, False))
    scorer = FunctionScorer("ppo.reward", f"{ROOT / 'recipes' / 'rewards.py'}:short", 1.0)
    assert scorer.scores(rows).tolist() == [[1.0, 0.5], [-1.0, -1.0]]


def test_rewards_of_one_name_are_told_apart_without_their_folders(opened, tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.py").write_text("def score(completions):\n    return [1.0] * len(completions)\n")
    found = opened([{"source": f"{tmp_path / name}.py:score"} for name in ("a", "b")]).reward
    assert [scorer.name for scorer in found] == ["1: score", "2: score"]


# --- a model of its own ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> Path:
    """A sequence classifier with another tokenizer than the base's."""
    folder = tmp_path_factory.mktemp("classifier")
    tokenizer = AutoTokenizer.from_pretrained(FIXTURES / "tokenizers" / "zephyr")
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_labels=1, initializer_range=0.1, pad_token_id=tokenizer.unk_token_id,
    )  # fmt: skip
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_model_of_its_own_scores_as_transformers_does_in_its_own_layout(attached, classifier, tiny_base, rows):
    (scorer,) = attached(str(classifier)).reward
    assert tiny_base.adapters == []
    found = scorer.scores(rows)
    tokenizer = AutoTokenizer.from_pretrained(classifier)
    for row, scores in zip(rows, found, strict=True):
        for text, score in zip(row.texts, scores, strict=True):
            turns = [*row.prompt.turns, {"role": "assistant", "content": text}]
            ids = tokenizer.apply_chat_template(turns, return_tensors="pt", return_dict=True).input_ids
            with torch.no_grad():
                assert scorer.model(ids).logits.item() == pytest.approx(score.item(), abs=1e-4)
    plain = AutoModelForSequenceClassification.from_pretrained(classifier)
    assert torch.equal(scorer.model.score.weight, plain.score.weight), "the head is not quantised"
    assert scorer.model.model.layers[0].mlp.up_proj.weight.dtype == torch.uint8
    assert scorer.bytes < 0.7 * plain.get_memory_footprint()


def test_a_classifier_without_a_pad_token_reads_the_end(attached, classifier, rows, tmp_path):
    """Padded with EOS, it would read the token before an EOS that the template puts at the end."""
    folder = shutil.copytree(classifier, tmp_path / "padless")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    change_json(folder / "config.json", pad_token_id=None)
    (scorer,), (other,) = (attached(str(source)).reward for source in (folder, classifier))
    assert scorer.tokenizer.pad_token_id != scorer.tokenizer.eos_token_id
    assert torch.allclose(scorer.scores(rows), other.scores(rows), atol=1e-5)


def test_a_model_that_cannot_score_is_one_line(attached, classifier, rows, tmp_path):
    assert_refused(lambda: attached("someone/no-such-model"), "'someone/no-such-model' can't be fetched: ")
    folder = shutil.copytree(classifier, tmp_path / "labels")
    LlamaForSequenceClassification(LlamaConfig.from_pretrained(classifier, num_labels=2)).save_pretrained(folder)
    assert_refused(lambda: attached(str(folder)), "has 2 labels")
    scorers = attached(str(classifier)).reward
    scorers[0].tokenizer.chat_template = "{{ raise_exception('no such role') }}"
    assert_refused(lambda: combined(scorers, rows), "refuses it: no such role")


# --- the roles stay apart --------------------------------------------------------------------------------------------


def test_policy_value_reward_and_judge_share_one_base_and_nothing_else(attached, reward_run, tiny_base, rows, tmp_path):
    base = tiny_base
    base.add_adapter(Role.POLICY, Lora(r=4))
    judge = shutil.copytree(reward_run.adapter, tmp_path / "judge")
    scorers = attached(str(reward_run.path), judge=str(judge), eval_data="unused.jsonl").reward
    base.load_adapter(Role.VALUE, str(reward_run.adapter), trainable=True)
    before = scorers[0].scores(rows)
    with torch.no_grad(), base.packed_attention(), base.acting_as(Role.VALUE) as lm:
        batch = base.batch([row.tokens for row in rows], last_token="kept")
        hidden = lm.base_model(**batch.inputs, use_cache=False).last_hidden_state.flatten(0, 1)
        assert torch.equal(base.head_scores(Role.VALUE, hidden[batch.last_tokens]).view(2, 2), before), (
            "the value model begins as the reward's"
        )
    trained = {name.split(".")[-2] for name, p in base.model.named_parameters() if p.requires_grad}
    assert trained == {"policy", "value"}
    scramble(base, Role.POLICY)
    scramble(base, Role.VALUE)
    for weight in base.trained_weights(Role.VALUE).values():
        weight.data.zero_()
    assert torch.equal(scorers[0].scores(rows), before)
