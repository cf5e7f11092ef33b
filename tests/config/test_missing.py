"""What a recipe names and can't be used is found before anything is loaded: files, functions, adapters, outputs."""

import os

import pytest

from qalign.config.load import load
from qalign.config.missing import output_problem
from qalign.config.stages import RL_STAGES, STAGES
from qalign.errors import UserError
from tests.config.conftest import GOOD, PPO_AT, line_of, make_adapter, with_stages


@pytest.mark.parametrize(
    ("line", "words", "text"),
    [
        (5, "dpo.data: there is no file 'piars.jsonl', looked up in … ; did you mean 'pairs.jsonl'?",
         GOOD.replace("pairs.jsonl", "piars.jsonl")),
        (2, "model.base: there is no file 'gone.gguf'", GOOD.replace("org/model", "gone.gguf")),
        (2, "model.base: there is no file or folder './gone'", GOOD.replace("org/model", "./gone")),
        (2, "'no_such_package' is not installed", GOOD.replace("org/model", "package:no_such_package/model.gguf")),
        (2, "'a.b' is not installed", GOOD.replace("org/model", "package:a.b/model.gguf")),
        (2, "no file 'cli.pz'; did you mean 'cli.py'?", GOOD.replace("org/model", "package:qalign/cli.pz")),
        (2, "no file 'gone/model.gguf'", GOOD.replace("org/model", "package:qalign/gone/model.gguf")),
        (3, "chat_template: there is no file 'gone.jinja'",
         GOOD.replace("org/model", "org/model\n  chat_template: gone.jinja")),
        *((line_of(stage, with_stages()) + 1, f"{stage}.data: there is no file 'gone.jsonl'",
           with_stages().replace(f"{stage}:\n  data: pairs", f"{stage}:\n  data: gone")) for stage in STAGES),
        *((line_of(stage, with_stages()) + 2, "start_from: 'empty' is neither 'sft' nor a PEFT adapter folder",
           with_stages(**{stage: "start_from: empty"})) for stage in STAGES),
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

    assert [line.partition(", looked up in")[0] for line in problems(text)] == [
        "recipe.yaml:6: dpo.data: there is no file or folder './gone'",
        "recipe.yaml:6: sft.data: there is no file or folder './gone'",  # at the same line, through the alias
        "recipe.yaml:7: dpo.data: there is no file 'gone.csv'",
        "recipe.yaml:7: sft.data: there is no file 'gone.csv'",
        "recipe.yaml:10: dpo.data: there is no file 'gone.parquet'",
        "recipe.yaml:10: sft.data: there is no file 'gone.parquet'",
    ]


@pytest.fixture
def odd(folder):
    """The current directory with what is neither a readable file nor a folder."""
    os.mkfifo(folder / "pipe.jsonl")
    (folder / "loop.jsonl").symlink_to("loop.jsonl")
    (folder / "nowhere.jsonl").symlink_to("gone.jsonl")
    (folder / "file").touch()
    (folder / "rows").mkdir()
    (folder / "rows.py").mkdir()
    return folder


@pytest.mark.parametrize("key", ["dpo.data", "dpo.eval_data", "model.base", "model.chat_template", "dpo.start_from"])
@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("pipe.jsonl", "'pipe.jsonl' is neither"),  # reading it would never end
        ("/dev/zero", "'/dev/zero' is neither"),
        ("loop.jsonl", "'loop.jsonl'"),
        ("nowhere.jsonl", "'nowhere.jsonl'"),
        ("pairs.jsonl/rows.jsonl", "'pairs.jsonl/rows.jsonl'"),
        ("~nosuchuser/rows.jsonl", "'~nosuchuser/rows.jsonl'"),
        ('"a\\0b.jsonl"', r"'a\x00b.jsonl'"),
        (f"./{'n' * 300}.jsonl", "'./nnn"),
        (f"./{'n/' * 5000}.jsonl", "'./n/n"),
        ("a b", "'a b'"),
        ("+", "'+'"),
        ('"\\e[31m"', r"'\x1b[31m'"),
        ("x" * 200, "xxx'"),
    ],
)
def test_a_path_that_can_not_be_used_is_one_line_in_every_key(problems, odd, key, path, words):
    (line,) = problems(GOOD, f"{key}={path}")

    assert line.startswith(f"command line: {key}: ")
    assert words in line
    assert len(line) <= 300
    assert line.isprintable()


def test_a_chat_template_is_a_file_and_a_function_is_in_one(problems, odd):
    (line,) = problems(GOOD, "model.chat_template=rows")
    assert line == "command line: model.chat_template: 'rows' is a folder, and a file is needed"

    (line,) = problems(with_stages(), "ppo.reward=rows.py:short", stage="ppo")
    assert line.startswith("command line: ppo.reward: there is no file 'rows.py' to take the function 'short' from")


@pytest.mark.skipif(os.getuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_found(only_problem, folder):
    (folder / "pairs.jsonl").chmod(0)

    only_problem(5, "dpo.data: 'pairs.jsonl' may not be read", GOOD)


def test_the_folders_that_were_looked_in_are_named(folder):
    (folder / "project").mkdir()
    (folder / "project" / "recipe.yaml").write_text(GOOD.replace("pairs", "gone"))

    with pytest.raises(UserError) as caught:
        load("project/recipe.yaml")

    (line,) = caught.value.lines
    assert line == (
        f"project/recipe.yaml:5: dpo.data: there is no file 'gone.jsonl', looked up in {folder}/project and {folder}"
    )


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_asks_for_its_own_files_only(read, problems, folder, stage):
    text = with_stages(ppo="reward: gone.py:f", grpo="reward: gone.py:f").replace("pairs.jsonl", "gone.jsonl")
    mine = text.replace(f"{stage}:\n  data: gone", f"{stage}:\n  data: pairs").replace("gone.py:f", "json:loads")

    assert read(mine, stage=stage).stages == STAGES
    assert [line.split()[1] for line in problems(text, stage=stage)] == [
        f"{stage}.data:", *([f"{stage}.reward:"] if stage in RL_STAGES else [])
    ]  # fmt: skip
    assert len(problems(text)) == len(STAGES) + 2  # all stages, one after the other
    assert "model.base" in problems(mine, "model.base=./gone", stage=stage)[0]


def test_what_only_needs_the_model_asks_for_no_rows(folder):
    (folder / "recipe.yaml").write_text(with_stages(ppo="reward: gone.py:f").replace("pairs.jsonl", "gone.jsonl"))

    assert load("recipe.yaml", files_of=("model",)).stages == STAGES


# --- output ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("~nosuchuser/x", "a user that this computer doesn't have"),
        ("a\0b", r"'a\x00b' has characters"), ("a\nb", "has characters"), ("\x1b[31m", "has characters"),
        (" ", "has characters"),
        ("/", "the root of the disk"), ("/..", "the root of the disk"),
        ("n" * 256, "too long"), ("n/" * 2000, "too long"), ("ü" * 128, "too long"),
        ("file", "is, or lies in, a file"), ("file/x/y", "is, or lies in, a file"),
        ("loop.jsonl", "a link that leads nowhere"), ("loop.jsonl/x", "a link that leads nowhere"),
        ("nowhere.jsonl/x", "a link that leads nowhere"), ("pipe.jsonl/x", "is, or lies in, a file"),
    ],
)  # fmt: skip
def test_an_output_that_can_not_be_a_folder_is_refused(odd, output, words):
    assert words in str(output_problem(output))


def test_an_output_is_refused_at_its_line(only_problem, odd):
    only_problem(3, "output: 'file/x' is, or lies in, a file", GOOD.replace("runs/x", "file/x"))
    only_problem("command line", "output: '~nosuchuser/x' is in the home of a user", GOOD, "output=~nosuchuser/x")


@pytest.mark.parametrize("output", ["runs/x", "rows", "rows/deeper/still", "~/x", ".", "..", "Größe №1", "link"])
def test_an_output_that_is_or_can_be_a_folder_is_taken(odd, output):
    (odd / "link").symlink_to("rows")

    assert output_problem(output) is None


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
        ("~nosuchuser/gone", "there is no '~nosuchuser/gone'"),
        ("a b", "'a b' is no reward run, no module:function and no hub id"),
        ("runs/gone/reward", "there is no 'runs/gone/reward'"),
        ("./empty", f"'./empty' has {NEITHER}"),
        ("runs", f"'runs' has {NEITHER}"),
        ("notes.txt", f"'notes.txt' has {NEITHER}"),
    ],
)
def test_a_reward_that_is_not_there_is_found_before_anything_is_loaded(only_problem, scorers, key, source, words):
    setting = f"reward: {source}" if key == "reward" else f"judge: {source}\n  eval_data: pairs.jsonl"

    only_problem(PPO_AT + 2, f"{key}: {words}", with_stages(ppo=setting))


def test_each_reward_of_a_list_is_found_at_its_own_line(problems, scorers):
    rewards = "reward:\n  - reward\n  - runs/a/gone\n  - rewards.py:short\n  - weight: 2.0\n    source: ./gone"

    found = problems(with_stages(ppo=f"{rewards}\n  judge: {{source: empty}}\n  eval_data: pairs.jsonl"))

    assert [line.partition(": ")[0] for line in found] == [
        f"recipe.yaml:{number}" for number in (PPO_AT + 4, PPO_AT + 7, PPO_AT + 8)
    ]


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

    only_problem(PPO_AT + 3, f"judge: '{judge}' is what the policy trains on, as '{reward}'", text)
