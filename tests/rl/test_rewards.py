"""What scores answers: adapters, models of their own and functions, alone and together; and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from qalign.config.recipe import Model, Recipe
from qalign.data.collate import MicroBatchLimit
from qalign.data.formats import Prompt
from qalign.data.tokenize import TokenAnswers, encode_prompt
from qalign.errors import Stopped, UserError
from qalign.model.adapters import SCORE_HEAD
from qalign.model.base import Role, load
from qalign.model.generation import Sampling
from qalign.model.scoring import score_sequences
from qalign.rl.rewards import (
    FunctionScorer,
    SampledAnswers,
    attach,
    combined,
    load_models,
    open_scorers,
    sampled_answers,
    value_start,
)
from qalign.train.run_folder import RunFolder
from tests.conftest import FIXTURES, ROOT
from tests.helpers import scramble
from tests.reward_runs import plain_reward_model, plain_score, run_stage, write_recipe

MICRO = MicroBatchLimit(pairs=2)
TEXTS = [("Why?", ("Because.", "It depends on what you mean by that.")), ("Name a river.", ("The Elbe.", "Elbe"))]


@pytest.fixture(scope="module")
def reward_run(tiny_folder, tmp_path_factory) -> RunFolder:
    """A reward model of the tiny base."""
    return run_stage(write_recipe(tmp_path_factory.mktemp("rewards") / "runs", tiny_folder))


@pytest.fixture
def recipe(tiny_folder, tmp_path):
    def make(reward, **more) -> Recipe:
        ppo = {"data": "unused.jsonl", "reward": reward, "max_new_tokens": 16, **more}
        model = {"base": tiny_folder, "compute_dtype": "float32", "max_length": 256}
        return Recipe.model_validate({"model": model, "output": str(tmp_path / "runs"), "ppo": ppo})

    return make


def opened(recipe: Recipe, key: str = "reward"):
    return open_scorers(recipe, key, RunFolder(recipe, "ppo", "my.yaml"))


def answers(tokenizer, texts=TEXTS, **columns) -> list[SampledAnswers]:
    """Prompts with texts as if they had been sampled; each ends by itself."""
    rows = []
    for number, (question, found) in enumerate(texts, start=1):
        turns = ({"role": "user", "content": question},)
        ids = encode_prompt(tokenizer, list(turns), {})
        end = tokenizer.convert_tokens_to_ids("<|eot_id|>")
        sampled = [[*tokenizer(text, add_special_tokens=False).input_ids, end] for text in found]
        prompt = Prompt(turns, f"rows.jsonl:{number}", {name: values[number - 1] for name, values in columns.items()})
        rows.append(sampled_answers(tokenizer, prompt, ids, sampled, Sampling(99, 1.0, (end,))))
    return rows


@pytest.fixture
def rows(tiny_base) -> list[SampledAnswers]:
    return answers(tiny_base.tokenizer)


# --- adapters --------------------------------------------------------------------------------------------------------


def test_an_adapter_scores_as_plain_peft_does(recipe, reward_run, tiny_base, tiny_folder, rows):
    (scorer,) = scorers = opened(recipe(str(reward_run.path)))
    attach(scorers, tiny_base, Role.REWARD, MICRO)
    found = scorer.scores(rows)
    plain = plain_reward_model(tiny_folder, reward_run.adapter)
    with torch.no_grad():
        expected = [[plain_score(plain, row.tokens.prompt_ids + a).item() for a in row.tokens.answers] for row in rows]
    assert torch.allclose(found, torch.tensor(expected), atol=1e-4)
    assert found.unique().numel() == 4


def test_scores_do_not_depend_on_padding_or_company(recipe, reward_run, tiny_base, rows):
    scorers = opened(recipe(str(reward_run.adapter)))
    attach(scorers, tiny_base, Role.REWARD, MICRO)
    one_by_one = torch.cat([scorers[0].scores([row]) for row in rows])
    assert torch.allclose(scorers[0].scores(rows), one_by_one, atol=1e-5)
    assert torch.allclose(scorers[0].scores(rows[::-1]).flip(0), one_by_one, atol=1e-5)
    sequences = [row.tokens.prompt_ids + answer for row in rows for answer in row.tokens.answers]
    assert score_sequences(tiny_base, sequences) == pytest.approx(one_by_one.flatten().tolist(), abs=1e-5)


def test_a_cut_answer_is_read_at_an_end_of_turn_too(recipe, reward_run, tiny_base, tiny_folder, rows):
    """As the reward model was trained; elsewhere its head says nothing that it learned."""
    (scorer,) = scorers = opened(recipe(str(reward_run.path)))
    attach(scorers, tiny_base, Role.REWARD, MICRO)
    cut = [
        SampledAnswers(
            r.prompt, TokenAnswers(r.tokens.prompt_ids, tuple(a[:-1] for a in r.tokens.answers)), r.texts, (False,) * 2
        )
        for r in rows
    ]
    assert torch.allclose(scorer.scores(cut), scorer.scores(rows), atol=1e-5)


def test_an_answer_that_ends_with_eos_is_read_at_the_end_of_turn(recipe, reward_run, tiny_base, rows, monkeypatch):
    monkeypatch.setattr("qalign.rl.rewards.stop_ids_of", lambda *_: (tiny_base.tokenizer.eos_token_id, 77))
    (scorer,) = scorers = opened(recipe(str(reward_run.path)))
    attach(scorers, tiny_base, Role.REWARD, MICRO)
    other = [
        SampledAnswers(
            r.prompt,
            TokenAnswers(r.tokens.prompt_ids, tuple([*a[:-1], 77] for a in r.tokens.answers)),
            r.texts,
            r.ended,
        )
        for r in rows
    ]
    assert torch.allclose(scorer.scores(other), scorer.scores(rows), atol=1e-5)


def test_rewards_of_one_name_are_told_apart(recipe, reward_run, tmp_path):
    for place in ("a", "b"):
        shutil.copytree(reward_run.path, tmp_path / place / "demo" / "reward")
    sources = [str(tmp_path / place / "demo" / "reward") for place in ("a", "b")]
    assert len({scorer.name for scorer in opened(recipe(sources))}) == 2
    (judge,) = opened(recipe(sources[0], judge=str(shutil.copytree(reward_run.path, tmp_path / "judge" / "reward")),
                             eval_data="unused.jsonl"), "judge")  # fmt: skip
    assert judge.name == "judge"


def test_the_recipes_own_reward_run_must_be_there(recipe, reward_run, tmp_path):
    with pytest.raises(UserError) as refused:
        opened(recipe("reward"))
    assert str(refused.value) == (
        f"ppo.reward: there is no finished reward run in {tmp_path / 'runs' / 'reward'}; "
        "run python -m qalign.reward my.yaml first"
    )
    shutil.copytree(reward_run.path, tmp_path / "runs" / "reward")
    (scorer,) = opened(recipe("reward"))
    assert scorer.folder == tmp_path / "runs" / "reward" / "adapter"


def test_several_are_added_up_with_their_weights(recipe, reward_run, tiny_base, rows, tmp_path):
    other = shutil.copytree(reward_run.adapter, tmp_path / "other" / "adapter")
    weights = load_file(other / "adapter_model.safetensors")
    weights[SCORE_HEAD] = -3 * weights[SCORE_HEAD]
    save_file(weights, other / "adapter_model.safetensors")
    (tmp_path / "mine.py").write_text("def length(completions):\n    return [len(text) for text in completions]\n")
    sources = [str(reward_run.path), {"source": str(other), "weight": 0.5}, f"{tmp_path / 'mine.py'}:length"]
    scorers = opened(recipe([*sources[:2], {"source": sources[2], "weight": 2.0}]))
    attach(scorers, tiny_base, Role.REWARD, MICRO)
    total, means = combined(scorers, rows)
    first, second, third = (scorer.scores(rows) for scorer in scorers)
    assert torch.allclose(second, -3 * first, atol=1e-5)
    assert third.tolist() == [[8.0, 36.0], [9.0, 4.0]]
    assert torch.allclose(total, first - 1.5 * first + 2 * third, atol=1e-5)
    assert means["length"] == 57 / 4
    assert tiny_base.adapters == ["reward", "reward_2"]
    assert value_start(scorers) is scorers[0]
    assert value_start(scorers[2:]) is None


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ("another base", "was trained on the base"),
        ("no head", "gives no scores"),
        ("causal", "gives no scores (its task is CAUSAL_LM); expected a reward adapter, SEQ_CLS"),
        ("wide", "was trained on a base of hidden size 80, "),
        ("labels", "has 3 labels; a reward has one"),
        ("torn", "is no adapter in safetensors"),
        ("pickle", "is no adapter in safetensors"),
    ],
)
def test_adapters_that_do_not_fit_are_refused_before_the_model_loads(
    spoil, message, recipe, reward_run, tmp_path, monkeypatch
):
    folder = shutil.copytree(reward_run.adapter, tmp_path / "spoilt")
    file = folder / "adapter_model.safetensors"
    weights = load_file(file)
    match spoil:
        case "another base":
            line = json.loads((folder / "lineage.json").read_text()) | {"base": "meta-llama/Llama-3.1-8B"}
            (folder / "lineage.json").write_text(json.dumps(line))
        case "no head":
            save_file({name: tensor for name, tensor in weights.items() if name != SCORE_HEAD}, file)
        case "causal":
            config = json.loads((folder / "adapter_config.json").read_text()) | {"task_type": "CAUSAL_LM"}
            (folder / "adapter_config.json").write_text(json.dumps(config))
        case "wide":
            (folder / "lineage.json").unlink()
            save_file(weights | {SCORE_HEAD: torch.zeros(1, 80)}, file)
        case "labels":
            save_file(weights | {SCORE_HEAD: torch.zeros(3, 64)}, file)
        case "torn":
            file.write_bytes(file.read_bytes()[:1000])
        case "pickle":
            file.unlink()
            torch.save(weights, folder / "adapter_model.bin")
    monkeypatch.setattr("qalign.model.base.load", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(UserError) as refused:
        opened(recipe(str(folder)))
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


def test_a_function_with_keywords_is_given_everything(function, tiny_base):
    rows = answers(tiny_base.tokenizer, answer=["Because.", "Elbe"], level=[1, 2])
    scorer = function("def score(prompts, completions, **row):\n    return row['level']\n")
    assert scorer.scores(rows).tolist() == [[1.0, 1.0], [2.0, 2.0]]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "return [1 / (text != 'Elbe') for text in completions]",
            "raised ZeroDivisionError on an answer to rows.jsonl:2: division by zero",
        ),
        ("return [0.0] * 3", "gave 3 scores for 4 answers, the first to rows.jsonl:1"),
        ("return None", "gave None; expected a list with a number an answer"),
        (
            "return (1 / (text != 'Elbe') for text in completions)",
            "raised ZeroDivisionError on an answer to rows.jsonl:2: division by zero",
        ),
        ("return [10**400, 0, 0, 0]", f"gave {10**400} for an answer to rows.jsonl:1; expected a finite number"),
        (
            "return [float('nan') if text == 'The Elbe.' else 0 for text in completions]",
            "gave nan for an answer to rows.jsonl:2; expected a finite number",
        ),
        ("return [0, 0, float('inf'), 0]", "gave inf for an answer to rows.jsonl:2; expected a finite number"),
        ("return ['1', 0, 0, 0]", "gave '1' for an answer to rows.jsonl:1; expected a finite number"),
        ("return [None, 0, 0, 0]", "gave None for an answer to rows.jsonl:1; expected a finite number"),
    ],
)
def test_a_function_that_fails_names_the_row(body, message, function, rows):
    scorer = function(f"def score(completions):\n    {body}\n")
    with pytest.raises(UserError) as refused:
        scorer.scores(rows)
    assert str(refused.value) == f"ppo.reward: {scorer.source} {message}"


def test_a_function_does_not_swallow_the_users_stop(function, rows):
    scorer = function("from qalign.errors import Stopped\ndef score(completions):\n    raise Stopped(2)\n")
    with pytest.raises(Stopped):
        scorer.scores(rows)


def test_tensors_and_numbers_of_numpy_are_numbers(function, rows):
    scorer = function(
        "import numpy, torch\n"
        "def score(completions):\n    return [numpy.float32(1.5), torch.tensor(2.0), True, numpy.int64(4)]\n"
    )
    assert scorer.scores(rows).tolist() == [[1.5, 2.0], [1.0, 4.0]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def score(:\n", "SyntaxError"),
        ("import nothing_of_this_name\n", "ModuleNotFoundError: No module named 'nothing_of_this_name'"),
        ("score = 3\n", "is int, expected a function"),
        ("other = 3\n", "AttributeError"),
    ],
)
def test_what_is_no_function_is_one_line(text, message, function):
    with pytest.raises(UserError) as refused:
        function(text)
    assert str(refused.value).startswith("ppo.reward: ")
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_function_of_an_installed_module():
    scorer = FunctionScorer("ppo.reward", "statistics:mean", 1.0)
    assert scorer.function([1, 3]) == 2


def test_the_demos_own_reward(tiny_base):
    texts = [("a", ("One. Two.", "One. Two! Three?")), ("b", ("1.\n2.\n3.\n4.\n5.\n6.\n7.", "No end"))]
    rows = answers(tiny_base.tokenizer, texts)
    last = rows[1]
    rows[1] = SampledAnswers(last.prompt, last.tokens, last.texts, (True, False))
    scorer = FunctionScorer("ppo.reward", f"{ROOT / 'recipes' / 'rewards.py'}:short", 1.0)
    assert scorer.scores(rows).tolist() == [[1.0, 0.5], [-1.0, -1.0]]


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


def test_a_model_of_its_own_scores_as_transformers_does_in_its_own_layout(recipe, classifier, tiny_base, rows):
    (scorer,) = scorers = opened(recipe(str(classifier)))
    assert load_models(scorers, tiny_base) == scorer.bytes
    attach(scorers, tiny_base, Role.REWARD, MICRO)
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


def test_a_model_with_several_labels_is_refused(recipe, classifier, tiny_base, tmp_path):
    folder = shutil.copytree(classifier, tmp_path / "labels")
    LlamaForSequenceClassification(LlamaConfig.from_pretrained(classifier, num_labels=2)).save_pretrained(folder)
    with pytest.raises(UserError, match="has 2 labels; a reward has one"):
        load_models(opened(recipe(str(folder))), tiny_base)


def test_a_template_that_refuses_a_prompt_names_it(recipe, classifier, tiny_base, rows):
    (scorer,) = scorers = opened(recipe(str(classifier)))
    load_models(scorers, tiny_base)
    scorer.tokenizer.chat_template = "{{ raise_exception('no such role') }}"
    with pytest.raises(UserError, match=r"the template of .* refuses rows\.jsonl:1: no such role"):
        combined(scorers, rows)


def test_a_classifier_without_a_pad_token_reads_the_end(recipe, classifier, tiny_base, rows, tmp_path):
    """Padded with EOS, it would read the token before an EOS that the template puts at the end."""
    folder = shutil.copytree(classifier, tmp_path / "padless")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"pad_token_id": None}))
    (scorer,) = scorers = opened(recipe(str(folder)))
    load_models(scorers, tiny_base)
    assert scorer.tokenizer.pad_token_id != scorer.tokenizer.eos_token_id
    (other,) = others = opened(recipe(str(classifier)))
    load_models(others, tiny_base)
    assert torch.allclose(scorer.scores(rows), other.scores(rows), atol=1e-5)


def test_a_model_that_cannot_be_had_is_one_line(recipe, tiny_base):
    with pytest.raises(UserError, match=r"^ppo\.reward: the model 'someone/no-such-model' can't be loaded: "):
        load_models(opened(recipe("someone/no-such-model")), tiny_base)


# --- the roles stay apart --------------------------------------------------------------------------------------------


def test_policy_value_reward_and_judge_share_one_base_and_nothing_else(recipe, reward_run, tiny_folder, rows):
    base = load(Model(base=tiny_folder, compute_dtype="float32", max_length=256))
    from qalign.config.recipe import Lora

    base.add_adapter(Role.POLICY, Lora(r=4))
    scorers = opened(recipe(str(reward_run.path), eval_data="unused.jsonl"))
    attach(scorers, base, Role.REWARD, MICRO)
    attach(opened(recipe(str(reward_run.path))), base, Role.JUDGE, MICRO)
    base.load_adapter(Role.VALUE, str(reward_run.adapter), trainable=True)
    before = scorers[0].scores(rows)
    with torch.no_grad(), base.packed_attention(), base.acting_as(Role.VALUE) as lm:
        batch = base.batch([row.tokens for row in rows], last_token="kept")
        hidden = lm.base_model(**batch.inputs, use_cache=False).last_hidden_state.flatten(0, 1)
        assert torch.equal(base.values(hidden[batch.last_tokens]).view(2, 2), before), (
            "the value model begins as the reward's"
        )
    trained = {name.split(".")[-2] for name, p in base.model.named_parameters() if p.requires_grad}
    assert trained == {"policy", "value"}
    scramble(base, Role.POLICY)
    scramble(base, Role.VALUE)
    for weight in base.trained_weights(Role.VALUE).values():
        weight.data.zero_()
    assert torch.equal(scorers[0].scores(rows), before)


def test_answers_are_kept_together_with_their_prompt():
    row = TokenAnswers([1, 2], ([3], [4, 5, 6]))
    assert len(row) == 5
