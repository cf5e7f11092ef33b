"""The files, functions and adapters that a recipe names are located. (What is missing: test_missing.py.)"""

import pytest

from qalign.config.load import dump, load
from qalign.config.paths import absolute, looks_local, package_file
from qalign.config.stages import Source
from tests.config.conftest import PPO_AT, REWARDS, make_adapter, with_stages

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


def test_the_file_of_a_package_is_found_without_importing_it(folder, monkeypatch):
    (folder / "heavy" / "weights").mkdir(parents=True)
    (folder / "heavy" / "__init__.py").write_text("raise RuntimeError('imported')")
    (folder / "heavy" / "weights" / "model.gguf").touch()
    monkeypatch.syspath_prepend(folder)

    assert package_file("package:heavy/weights/model.gguf") == folder / "heavy" / "weights" / "model.gguf"


def test_a_path_is_looked_up_in_the_recipes_folder_and_then_here(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder / "project"))
    beside = folder / "project"
    make_adapter(beside / "adapter")
    (beside / "rows").mkdir()
    for name in ("model.gguf", "chat.jinja", "train.jsonl", "test.jsonl", "pairs.jsonl"):
        (beside / name).touch()
    (folder / "here.jsonl").touch()
    stages = "".join(f"{stage}: {{data: rows, start_from: adapter}}\n" for stage in ("sft", "reward"))
    (beside / "recipe.yaml").write_text(f"""\
model: {{base: model.gguf, chat_template: chat.jinja}}
output: runs/x
dpo:
  data: [train.jsonl, {{path: pairs.jsonl, weight: 2.0}}, here.jsonl, rows, org/on-the-hub, ~/test.jsonl]
  eval_data: test.jsonl
{stages}""")

    recipe = load("project/recipe.yaml")

    assert (recipe.model.base, recipe.model.chat_template) == ("project/model.gguf", "project/chat.jinja")
    assert recipe.dpo.data == (
        Source(path="project/train.jsonl"),
        Source(path="project/pairs.jsonl", weight=2.0),  # there is one here too
        Source(path="here.jsonl"),
        Source(path="project/rows"),
        Source(path="org/on-the-hub"),
        Source(path=f"{beside}/test.jsonl"),
    )
    assert recipe.dpo.eval_data == (Source(path="project/test.jsonl"),)
    assert (recipe.sft.start_from, recipe.reward.start_from) == ("project/adapter", "project/adapter")
    assert recipe.output == "runs/x"


def test_a_path_of_the_command_line_is_looked_up_here_and_then_in_the_recipes_folder(folder):
    (folder / "project").mkdir()
    for name in ("pairs.jsonl", "beside.jsonl"):
        (folder / "project" / name).touch()
    (folder / "project" / "recipe.yaml").write_text(
        "model: {base: org/model}\noutput: x\ndpo: {data: {path: pairs.jsonl}}\n"
    )

    def data(*overrides: str) -> list[str]:
        return [source.path for source in load("project/recipe.yaml", overrides).dpo.data]

    assert data() == data("dpo.data.limit=5") == ["project/pairs.jsonl"]
    assert data("dpo.data=pairs.jsonl") == data("dpo.data.path=pairs.jsonl") == data("dpo={data: pairs.jsonl}")
    assert data("dpo.data=[pairs.jsonl, beside.jsonl]") == ["pairs.jsonl", "project/beside.jsonl"]


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
    only_problem(PPO_AT + 2, "'shrot'; did you mean 'short'?", with_stages(ppo="reward: heavy.rewards:shrot"))


@pytest.mark.parametrize(
    "text",
    ["from json import *\n", "def __getattr__(name): ...\n", "def broken(:\n", "x = '\0'\n"],
    ids=["star import", "made when asked for", "not Python", "a null"],
)
def test_a_function_that_only_importing_would_find_is_taken(read, folder, text):
    (folder / "rewards.py").write_text(text)

    assert read(with_stages(ppo="reward: rewards.py:score")).ppo.reward[0].source == "rewards.py:score"


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
