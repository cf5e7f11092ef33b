"""The files, functions and adapters that a recipe names: what is missing is found at once, the rest is located."""

from pathlib import Path

import pytest

from qalign.config.load import dump, load
from qalign.config.paths import absolute, looks_local, package_file
from qalign.config.stages import STAGES, Source
from tests.config.conftest import GOOD, with_stages

REWARDS = """\
import math as maths
from statistics import mean

length = lambda completions: [len(text) for text in completions]

try:
    def fast(completions): ...
except ImportError:
    fast = None

def short(completions):
    inside = 1
    return [1.0 / len(text) for text in completions]

class Judge:
    def within(self): ...
"""


def make_adapter(place: Path) -> None:
    place.mkdir(parents=True)
    (place / "adapter_config.json").touch()


@pytest.fixture
def scorers(folder) -> Path:
    """The current directory with functions, a reward run, a model, and a folder that is neither."""
    (folder / "rewards.py").write_text(REWARDS)
    make_adapter(folder / "runs" / "a" / "reward" / "adapter")
    (folder / "model").mkdir()
    (folder / "model" / "config.json").touch()
    (folder / "empty").mkdir()
    (folder / "notes.txt").touch()
    return folder


# --- data, base, chat template, start --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "local"),
    [
        ("pairs.jsonl", True), ("gone.jsonl", True), ("gone.jsonl.gz", True), ("org/gone.parquet", True),
        ("gone.gguf", True), ("./gone", True), ("../gone", True), ("/gone", True), ("~/gone", True),
        (r"C:\data\gone", True),
        ("runs/gone/reward", True),  # a hub id has one slash at most
        ("org/name", False), ("imdb", False), ("x" * 300, False),  # too long to be a path
    ],
)  # fmt: skip
def test_a_local_path_is_told_from_a_hub_id(folder, path, local):
    assert looks_local(path) is local


@pytest.mark.parametrize(
    ("line", "words", "text"),
    [
        (5, "data: there is no file 'piars.jsonl'; did you mean 'pairs.jsonl'?",
         GOOD.replace("pairs.jsonl", "piars.jsonl")),
        (2, "base: there is no 'gone.gguf'", GOOD.replace("org/model", "gone.gguf")),
        (2, "base: there is no './gone'", GOOD.replace("org/model", "./gone")),
        (2, "'no_such_package' is not installed", GOOD.replace("org/model", "package:no_such_package/model.gguf")),
        (2, "'a.b' is not installed", GOOD.replace("org/model", "package:a.b/model.gguf")),
        (2, "no file 'cli.pz'; did you mean 'cli.py'?", GOOD.replace("org/model", "package:qalign/cli.pz")),
        (2, "no file 'gone/model.gguf'", GOOD.replace("org/model", "package:qalign/gone/model.gguf")),
        (3, "chat_template: there is no file 'gone.jinja'",
         GOOD.replace("org/model", "org/model\n  chat_template: gone.jinja")),
        *((5 + 2 * number, "data: there is no file 'gone.jsonl'",
           with_stages().replace(f"{stage}:\n  data: pairs", f"{stage}:\n  data: gone"))
          for number, stage in enumerate(STAGES)),
        *((6 + 2 * number, "start_from: 'empty' is neither 'sft' nor a PEFT adapter folder",
           with_stages(**{stage: "start_from: empty"})) for number, stage in enumerate(STAGES)),
    ],
)  # fmt: skip
def test_what_is_missing_is_found_before_anything_is_loaded(only_problem, scorers, line, words, text):
    only_problem(line, words, text)


def test_each_missing_source_of_a_list_is_found_at_its_own_line(problems, folder):
    text = """\
model: {base: org/model}
output: x
dpo:
  data: &rows
  - pairs.jsonl
  - ./gone
  - {path: gone.csv, limit: 5}
  - org/on-the-hub
  - limit: 5
    path: gone.parquet
sft: {data: *rows}
"""

    assert problems(text) == [
        "recipe.yaml:6: data: there is no file './gone'",  # once for both stages, where the alias's rows are written
        "recipe.yaml:6: data: there is no file './gone'",
        "recipe.yaml:7: data: there is no file 'gone.csv'",
        "recipe.yaml:7: data: there is no file 'gone.csv'",
        "recipe.yaml:10: data: there is no file 'gone.parquet'",
        "recipe.yaml:10: data: there is no file 'gone.parquet'",
    ]


def test_the_file_of_a_package_is_found_without_importing_it(folder, monkeypatch):
    (folder / "heavy" / "weights").mkdir(parents=True)
    (folder / "heavy" / "__init__.py").write_text("raise RuntimeError('imported')")
    (folder / "heavy" / "weights" / "model.gguf").touch()
    monkeypatch.syspath_prepend(folder)

    assert package_file("package:heavy/weights/model.gguf") == folder / "heavy" / "weights" / "model.gguf"


def test_a_path_is_looked_up_from_here_and_then_in_the_recipes_folder(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder / "project"))
    beside = folder / "project"
    make_adapter(beside / "adapter")
    (beside / "rows").mkdir()
    for name in ("model.gguf", "chat.jinja", "train.jsonl", "test.jsonl", "pairs.jsonl"):
        (beside / name).touch()
    stages = "".join(f"{stage}: {{data: rows, start_from: adapter}}\n" for stage in ("sft", "reward"))
    (beside / "recipe.yaml").write_text(f"""\
model: {{base: model.gguf, chat_template: chat.jinja}}
output: runs/x
dpo:
  data: [train.jsonl, {{path: pairs.jsonl, weight: 2.0}}, rows, org/on-the-hub, ~/test.jsonl]
  eval_data: test.jsonl
{stages}""")

    recipe = load("project/recipe.yaml")

    assert (recipe.model.base, recipe.model.chat_template) == ("project/model.gguf", "project/chat.jinja")
    assert recipe.dpo.data == (
        Source(path="project/train.jsonl"),
        Source(path="pairs.jsonl", weight=2.0),  # there is one here too
        Source(path="project/rows"),
        Source(path="org/on-the-hub"),
        Source(path=f"{beside}/test.jsonl"),
    )
    assert recipe.dpo.eval_data == (Source(path="project/test.jsonl"),)
    assert (recipe.sft.start_from, recipe.reward.start_from) == ("project/adapter", "project/adapter")
    assert recipe.output == "runs/x"


def test_sft_and_reward_are_the_runs_and_not_folders_of_that_name(read, folder):
    make_adapter(folder / "sft")
    make_adapter(folder / "reward")

    runs = read(with_stages(reward="start_from: sft", dpo="start_from: sft", ppo="start_from: sft"))
    assert (runs.reward.start_from, runs.dpo.start_from, runs.ppo.start_from) == ("sft", "sft", "sft")
    assert runs.ppo.reward[0].source == "reward"

    folders = read(with_stages(sft="start_from: ./sft", ppo="reward: ./reward"))
    assert (folders.sft.start_from, folders.ppo.reward[0].source) == ("./sft", "./reward")
    assert read(dump(folders)) == folders


# --- rewards and judges ----------------------------------------------------------------------------------------------

NEITHER = "no finished reward run (adapter_config.json) and no model (config.json)"


@pytest.mark.parametrize("key", ["reward", "judge"])
@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("rewards.py:shrot", "rewards.py has no function 'shrot'; did you mean 'short'?"),
        ("rewards:lenght", "rewards has no function 'lenght'; did you mean 'length'?"),
        ("rewards.py:inside", "rewards.py has no function 'inside'"),
        ("rewards.py:within", "rewards.py has no function 'within'"),
        ("json:laods", "json has no function 'laods'; did you mean 'loads'?"),
        ("json.decoder:JSONDecodr", "json.decoder has no function 'JSONDecodr'; did you mean 'JSONDecoder'?"),
        ("gone.py:short", "there is no file 'gone.py' to take the function 'short' from"),
        ("no_such.module:short", "there is no module 'no_such.module' to take the function 'short' from"),
        ("json.gone:short", "there is no module 'json.gone'"),
        (".rewards:short", "there is no module '.rewards'"),
        ("rewards.py", "'rewards.py' names no function; write rewards.py:FUNCTION"),
        ("./gone", "there is no './gone'"),
        ("~/gone", "there is no '~/gone'"),
        ("runs/gone/reward", "there is no 'runs/gone/reward'"),
        ("./empty", f"'./empty' has {NEITHER}"),
        ("runs", f"'runs' has {NEITHER}"),
        ("notes.txt", f"'notes.txt' has {NEITHER}"),
    ],
)
def test_a_reward_that_is_not_there_is_found_before_anything_is_loaded(only_problem, scorers, key, source, words):
    setting = f"reward: {source}" if key == "reward" else f"judge: {source}\n  eval_data: pairs.jsonl"

    only_problem(12, f"{key}: {words}", with_stages(ppo=setting))


def test_each_reward_of_a_list_is_found_at_its_own_line(problems, scorers):
    rewards = "reward:\n  - reward\n  - runs/a/gone\n  - rewards.py:short\n  - weight: 2.0\n    source: ./gone"

    found = problems(with_stages(ppo=f"{rewards}\n  judge: {{source: empty}}\n  eval_data: pairs.jsonl"))

    assert [line.partition(": ")[0] for line in found] == [f"recipe.yaml:{number}" for number in (14, 17, 18)]


@pytest.mark.parametrize(
    ("source", "found"),
    [
        *((run, "runs/a/reward/adapter") for run in ("runs/a", "runs/a/reward", "./runs/a/reward/adapter")),
        *((source,) * 2 for source in ("reward", "model", "org/on-the-hub", "gpt2")),
        *((source,) * 2 for source in ("json:loads", "json.decoder:JSONDecoder", "math:sqrt")),
        *((f"rewards.py:{name}",) * 2 for name in ("short", "length", "fast", "mean", "maths", "Judge")),
        ("./rewards.py:short", "rewards.py:short"),
    ],
)
def test_a_reward_that_is_there_is_taken(read, scorers, source, found):
    recipe = read(with_stages(ppo=f"reward: {source}"))

    assert [reward.source for reward in recipe.ppo.reward] == [found]
    assert read(dump(recipe)) == recipe


def test_a_reward_is_looked_up_from_here_and_then_in_the_recipes_folder(folder):
    beside = folder / "project"
    make_adapter(beside / "other" / "reward" / "adapter")
    make_adapter(beside / "plain")
    (beside / "rewards.py").write_text(REWARDS)
    (beside / "tools").mkdir()
    (beside / "tools" / "style.py").write_text(REWARDS)
    (beside / "recipe.yaml").write_text(
        with_stages(ppo="reward: [other, plain, rewards.py:short, rewards:short, tools.style:short]")
    )

    assert [reward.source for reward in load("project/recipe.yaml").ppo.reward] == [
        "project/other/reward/adapter",
        "project/plain",
        "project/rewards.py:short",
        "project/rewards.py:short",  # as a file: Python can't import by name what is beside a recipe
        "project/tools/style.py:short",
    ]


def test_the_functions_of_a_module_are_found_without_importing_it_or_its_package(
    read, only_problem, folder, monkeypatch
):
    (folder / "heavy" / "deep").mkdir(parents=True)
    for package in ("heavy", "heavy/deep"):
        (folder / package / "__init__.py").write_text("raise RuntimeError('imported')\ndef here(): ...\n")
    (folder / "heavy" / "rewards.py").write_text("raise RuntimeError('imported')\n" + REWARDS)
    monkeypatch.syspath_prepend(folder)

    for source in ("heavy:here", "heavy.deep:here", "heavy.rewards:short"):
        assert read(with_stages(ppo=f"reward: {source}")).ppo.reward[0].source == source
    only_problem(12, "no function 'shrot'; did you mean 'short'?", with_stages(ppo="reward: heavy.rewards:shrot"))


@pytest.mark.parametrize(
    "text",
    ["from json import *\n", "def __getattr__(name): ...\n", "def broken(:\n", "x = '\0'\n"],
    ids=["star import", "made when asked for", "not Python", "a null"],
)
def test_a_function_that_only_importing_would_find_is_taken(read, folder, text):
    (folder / "rewards.py").write_text(text)

    assert read(with_stages(ppo="reward: rewards.py:score")).ppo.reward[0].source == "rewards.py:score"


@pytest.mark.parametrize(
    ("reward", "judge"),
    [
        ("runs/a", "runs/a/reward"), ("runs/a/reward/adapter", "./runs/a"), ("model", "./model"),
        ("rewards.py:short", "rewards:short"), ("./rewards.py:short", "rewards.py:short"),
        ("reward", "runs/x/reward"), ("reward", "./runs/x/reward/adapter"), ("runs/x", "reward"),  # output is runs/x
    ],
)  # fmt: skip
def test_a_judge_that_is_the_reward_under_another_name_is_refused(only_problem, scorers, reward, judge):
    make_adapter(scorers / "runs" / "x" / "reward" / "adapter")
    text = with_stages(ppo=f"reward: {reward}\n  judge: ['json:loads', '{judge}']\n  eval_data: pairs.jsonl")

    only_problem(13, f"judge: '{judge}' is what the policy trains on, as '{reward}'", text)


def test_a_judge_of_its_own_is_taken(read, scorers):
    for reward, judge in (("rewards.py:short", "rewards.py:length"), ("reward", "runs/a/reward"), ("m/one", "m/two")):
        recipe = read(with_stages(ppo=f"reward: {reward}\n  judge: {judge}\n  eval_data: pairs.jsonl"))
        assert len(recipe.ppo.judge) == 1


def test_what_a_run_keeps_means_the_same_in_any_directory(read, folder):
    (folder / "rewards.py").write_text("def short(): ...\n")
    (folder / "json").mkdir()
    make_adapter(folder / "other" / "adapter")
    text = with_stages(
        dpo="start_from: other/adapter", ppo="reward: [reward, 'rewards.py:short', 'json:loads', other, org/model]"
    )

    kept = absolute(read(text))

    assert [reward.source for reward in kept.ppo.reward] == [
        "reward",
        f"{folder}/rewards.py:short",
        "json:loads",  # a module keeps its name, even where a folder has it too
        f"{folder}/other/adapter",
        "org/model",
    ]
    assert (kept.dpo.start_from, kept.dpo.data[0].path) == (f"{folder}/other/adapter", f"{folder}/pairs.jsonl")
    assert (kept.output, kept.model.base) == (f"{folder}/runs/x", "org/model")
    assert absolute(kept) == kept
