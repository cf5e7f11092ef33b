"""`python -m qalign.compare`: two sides answer the same prompts, and a judge says which is better."""

import json
import re
import shutil
from pathlib import Path

import pytest

from qalign.compare import main
from qalign.data.formats import Prompt
from qalign.data.tokenize import encode_prompt
from qalign.judge.comparison.answer_files import Compared, read_answers, write_files
from qalign.judge.comparison.dial import best_of, scaled
from qalign.judge.comparison.sides import sample, side_of
from qalign.judge.win_rate import win_rate
from qalign.model import lineage
from qalign.model.base import Base, Role
from qalign.model.generation import complete
from tests.chat_runs import finished_run
from tests.helpers import TEST, leaving
from tests.judge import alpaca_eval_package
from tests.reward_runs import run_stage, write_recipe

JUDGE = "def length(completions, **_):\n    return [len(text) for text in completions]\n"
FEW = ("--max-tokens", "6")


@pytest.fixture(scope="module")
def run(tiny_folder, tmp_path_factory):
    """A finished DPO run with a random adapter and held-out pairs."""
    return finished_run(tmp_path_factory.mktemp("compared") / "demo", tiny_folder)


@pytest.fixture(scope="module")
def reward(tiny_folder, tmp_path_factory):
    """A finished reward run."""
    return run_stage(write_recipe(tmp_path_factory.mktemp("judge"), tiny_folder, limit=4))


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder with a function that judges."""
    monkeypatch.chdir(tmp_path)
    Path("judge.py").write_text(JUDGE)
    return tmp_path


def ppo_recipe(base, reward) -> str:
    """A recipe of PPO with this reward run as its reward."""
    keys = {"reward": str(reward.adapter), "data": TEST, "eval_data": TEST, "max_new_tokens": 8}
    recipe = Path(write_recipe(Path("x"), base, "ppo", model={"max_length": 256}, **keys)).read_text()
    return recipe.replace("micro_batch_size: 2", "micro_batch_size: auto").replace("batch_size: 4", "batch_size: 8")


def rows_of(file) -> list[dict]:
    return [json.loads(line) for line in Path(file).read_text().splitlines()]


def answers(file: str, texts: dict[str, str], **names: str) -> str:
    keys = {"prompt": "prompt", "completion": "completion"} | names
    lines = (json.dumps({keys["prompt"]: q, keys["completion"]: a}) for q, a in texts.items())
    Path(file).write_text("\n".join(lines))
    return file


def line_of(capsys) -> str:
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


@pytest.mark.pictures
def test_a_run_against_its_base_on_its_held_out_prompts(run, here, capsys):
    assert leaving(main, str(run), "base", "--judge", "judge.py:length", "--limit", "6", *FEW, "--to", "out") == 0

    rows, figures = rows_of("out/annotations.jsonl"), json.loads(Path("out/compare.json").read_text())
    assert len(rows) == figures["pairs"] == 6
    asked = {row["prompt"] for row in rows_of(TEST)}
    assert {row["prompt"][-1]["content"] for row in rows} <= asked
    expected = [(len(row["a"]) > len(row["b"])) + (len(row["a"]) == len(row["b"])) / 2 for row in rows]
    assert [row["preference"] for row in rows] == expected
    assert figures["win_rate"] == pytest.approx(sum(expected) / 6)
    assert figures["wins"] + figures["ties"] + figures["losses"] == 6
    assert Path("out/compare.png").read_bytes().startswith(b"\x89PNG")
    assert "win rate" in capsys.readouterr().out


def test_sides_on_one_base_are_rows_of_one_batch_with_the_answers_that_each_gives_alone(run, tiny_base, monkeypatch):
    passes, role = [], Base.acting_as
    side, asked = side_of(str(run)), [
        Prompt(({"role": "user", "content": row["prompt"]},), "", {}) for row in rows_of(TEST)[:4]
    ]  # fmt: skip
    monkeypatch.setattr(Base, "acting_as", lambda self, name: passes.append(name) or role(self, name))
    handle = tiny_base.lm.register_forward_pre_hook(lambda *_, **__: passes.append("forward"))
    found = sample(tiny_base, {"a": side, "b": side_of("base")}, asked, max_new_tokens=6, temperature=0.0, seed=0)
    handle.remove()
    monkeypatch.undo()

    assert passes.count("forward") <= 2 + 6  # prompts are read once, then a pass a token: for both sides together
    ids = [encode_prompt(tiny_base.template, prompt.turns) for prompt in asked]
    for key, role_name in (("a", "side_a"), ("b", Role.BASE)):
        alone = complete(tiny_base, role_name, ids, max_new_tokens=6)
        assert [text for text, _ in found[key].values()] == alone
    assert [*found["a"].values()] != [*found["b"].values()]


def test_files_of_answers_in_any_shape(here):
    """AlpacaEval's as a list of JSON, Arena-Hard's with an object as the answer."""
    texts = {f"question {n}?": "word " * (n + 1) for n in range(4)}
    Path("a.json").write_text(json.dumps([{"instruction": q, "output": a, "generator": "x"} for q, a in texts.items()]))
    arena = [{"uid": q, "messages": [{"role": "user", "content": q}]} for q in texts]
    for row in arena:
        row["messages"].append({"role": "assistant", "content": {"answer": "two words"}})
    Path("b.jsonl").write_text("\n".join(map(json.dumps, arena)))

    assert leaving(main, "a.json", "b.jsonl", "--judge", "judge.py:length", "--to", "out") == 0

    figures = json.loads(Path("out/compare.json").read_text())
    assert (figures["a"], figures["b"], figures["wins"], figures["losses"]) == ("a", "b", 3, 1)
    assert figures["mean_length"] == [12.5, 9.0]


def test_prompts_that_only_one_file_answers_are_left_out_and_said_for_both(here, capsys):
    answers("a.jsonl", {"p": "one", "q": "one", "r": "one", "only a": "one"})
    answers("b.jsonl", {"only b": "two", "r": "two", "q": "two words", "only b too": "two"})
    with Path("b.jsonl").open("a") as file:
        file.write("\n" + json.dumps({"prompt": "q", "completion": "two words"}))

    assert leaving(main, "a.jsonl", "b.jsonl", "--judge", "judge.py:length", "--to", "out") == 0

    said = capsys.readouterr().out.splitlines()
    assert said[:3] == [
        "b.jsonl: 1 row left out: prompt and answer stand in an earlier one",
        "2 prompts of 6 left out: a.jsonl has no answer",
        "2 prompts of 6 left out: b.jsonl has no answer",
    ]
    assert [row["prompt"][0]["content"] for row in rows_of("out/annotations.jsonl")] == ["q", "r"]


def test_a_file_against_a_model_asks_the_prompts_of_the_file(run, here):
    answers("mine.jsonl", {"What is a prime?": "A number.", "And two?": "It is one."})

    assert leaving(main, "mine.jsonl", str(run), "--judge", "judge.py:length", *FEW, "--to", "out") == 0

    assert [row["prompt"][0]["content"] for row in rows_of("out/annotations.jsonl")] == ["What is a prime?", "And two?"]


def test_a_reward_run_judges_as_it_scores(run, reward, here):
    from qalign.score import score

    assert leaving(main, str(run), "base", "--judge", str(reward.path), "--limit", "5", *FEW, "--to", "out") == 0

    rows = rows_of("out/annotations.jsonl")
    pairs = [{"prompt": row["prompt"], "chosen": row["a"], "rejected": row["b"]} for row in rows]
    Path("pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    score(str(reward.path), "pairs.jsonl", "scored.jsonl", None)
    margins = [row["reward_margin"] for row in rows_of("scored.jsonl")]
    assert [row["preference"] for row in rows] == [1.0 if m > 0 else 0.5 if m == 0 else 0.0 for m in margins]


def test_the_base_as_labeller_gives_probabilities(run, here):
    assert leaving(main, str(run), "base", "--limit", "2", "--max-tokens", "3", "--to", "out") == 0

    found = [row["preference"] for row in rows_of("out/annotations.jsonl")]
    assert all(p is None or 0 < p < 1 for p in found)


def test_a_judge_that_a_side_was_trained_with_is_refused(run, reward, tiny_folder, here, capsys):
    """As its reward, or in the run that it started from."""
    trained = Path("rl") / "ppo"
    shutil.copytree(run, trained)
    (trained / "recipe.yaml").write_text(ppo_recipe(tiny_folder, reward))
    after = Path("next") / "dpo"
    shutil.copytree(run, after)
    text = (after / "recipe.yaml").read_text().replace("start_from: null", f"start_from: {trained / 'adapter'}")
    (after / "recipe.yaml").write_text(text)

    for side in (trained, after):
        assert leaving(main, str(side), "base", "--judge", str(reward.path), "--to", "out") == 2
        assert "was trained on the scores of" in line_of(capsys)


def test_the_rewards_behind_online_rounds_and_scaled_copies_are_known(run, reward, tiny_folder, here, capsys):
    """A best_of run with rounds is named by its folder or its adapter, and is that of its last round."""
    rounds, part = Path("rl") / "best_of", Path("rl") / "best_of" / "round_2"
    (part / "sampling").mkdir(parents=True)
    (part / "sampling" / "recipe.yaml").write_text(ppo_recipe(tiny_folder, reward))
    pairs = part / "sampling" / "pairs.jsonl"
    pairs.write_text(json.dumps({"prompt": "a?", "chosen": "b", "rejected": "c"}) + "\n")
    shutil.copytree(run, part / "dpo")
    text = (part / "dpo" / "recipe.yaml").read_text()
    (part / "dpo" / "recipe.yaml").write_text(
        re.sub(r"(  data:\n  - path: ).*", rf"\1{pairs.resolve()}", text, count=1)
    )
    shutil.copytree(part / "dpo" / "adapter", rounds / "adapter")
    shutil.copytree(part / "dpo" / "adapter", "copied/adapter")
    kept = json.loads(Path("copied/adapter/lineage.json").read_text())
    kept["parent"] = str((part / "dpo" / "adapter").resolve())
    Path("copied/adapter/lineage.json").write_text(json.dumps(kept))

    assert [side_of(str(place)).name for place in (rounds, rounds / "adapter")] == ["rl/best_of"] * 2
    for side in (rounds, rounds / "adapter", part / "dpo", Path("copied/adapter")):
        given = ("--prompts", TEST, "--recipe", str(part / "dpo" / "recipe.yaml"))
        assert leaving(main, str(side), "base", "--judge", str(reward.path), "--to", "out", *given) == 2
        assert "was trained on the scores of" in line_of(capsys)


def test_sides_of_one_name_are_told_apart(here):
    for folder in "xy":
        Path(folder).mkdir()
    words = [answers(f"{folder}/a.jsonl", {"p": folder * 3, "q": folder}) for folder in "xy"]
    assert leaving(main, *words, "--judge", "judge.py:length", "--to", "out") == 0
    assert [json.loads(Path("out/compare.json").read_text())[side] for side in "ab"] == words
    assert len([*Path("out/arena_hard/model_answer").iterdir()]) == 2


def test_a_judge_that_saw_the_prompts_is_refused(run, reward, here, capsys):
    data = reward.recipe.reward.data[0].path

    assert leaving(main, str(run), "base", "--judge", str(reward.path), "--prompts", data, "--limit", "9") == 2

    assert "was trained on answers to" in line_of(capsys)


def test_votes_of_the_page(run, here):
    weights = side_of(str(run)).weights
    sides = [{"weights": weights, "text": "of the run"}, {"weights": None, "text": "of the base"}]
    lines = [
        {"prompt": [{"role": "user", "content": f"q{n}"}], "vote": choice, "a": sides[n % 2], "b": sides[1 - n % 2]}
        for n, choice in enumerate(["a", "b", "tie", "b"])
    ]
    Path("votes.jsonl").write_text("\n".join(map(json.dumps, lines)))

    assert leaving(main, str(run), "base", "--judge", "votes.jsonl", "--to", "out") == 0

    figures = json.loads(Path("out/compare.json").read_text())
    assert (figures["wins"], figures["ties"], figures["losses"]) == (3, 1, 0)


def test_files_for_other_tools_say_the_same(tmp_path):
    def row(number: int) -> Compared:
        return Compared(
            Prompt(({"role": "user", "content": f"q{number}"},), "", {}), f"## a\n{number}", f"- b **x** {number}"
        )

    write_files(tmp_path, ("demo/dpo", "base"), "judge.py:length", [*map(row, range(4))], [1.0, 0.0, 0.5, None])

    alpaca = json.loads((tmp_path / "alpaca_eval" / "annotations.json").read_text())
    assert [each["preference"] for each in alpaca] == [2.0, 1.0, 1.5, None]
    assert (alpaca[0]["output_2"], alpaca[0]["generator_2"], alpaca[0]["generator_1"]) == (
        "## a\n0",
        "demo/dpo",
        "base",
    )
    games = [each["games"] for each in rows_of(tmp_path / "arena_hard/model_judgment/judge.py_length/demo_dpo.jsonl")]
    # The baseline is A in the first game and B in the second.
    expected = [("B>A", "A>B"), ("A>B", "B>A"), ("A=B", "A=B"), (None, None)]
    assert [tuple(game["score"] for game in each) for each in games] == expected
    (answer, *_) = rows_of(tmp_path / "arena_hard/model_answer/base.jsonl")
    assert answer["metadata"]["list_count"]["unordered"] == answer["metadata"]["bold_count"]["**"] == 1
    again, refused = read_answers(str(tmp_path / "arena_hard/model_answer/demo_dpo.jsonl"), None)
    assert ([text for _, text in again], refused) == ([f"## a\n{n}" for n in range(4)], [])


@pytest.mark.slow
def test_alpaca_eval_itself_reads_the_answers_and_judgements(here):
    """Its own `evaluate` pairs our files of answers, finds each pair among our judgements, and says the same."""
    lengths = {"one": (3, 1), "two": (2, 2), "three": (1, 4), "four": (5, 2), 'fünf\n\n"5"': (6, 5)}
    for number, file in enumerate(("a.jsonl", "b.jsonl")):
        answers(file, {prompt: "é " * sizes[number] + "." for prompt, sizes in lengths.items()})
    assert leaving(main, "a.jsonl", "b.jsonl", "--judge", "judge.py:length", "--to", "out") == 0
    figures = json.loads(Path("out/compare.json").read_text())

    found = json.loads(alpaca_eval_package.run("evaluate", here / "out" / "alpaca_eval"))

    assert (figures["wins"], figures["ties"], figures["losses"]) == (3, 1, 1)
    assert (found["n_wins"], found["n_draws"], found["n_wins_base"]) == (3, 1, 1)
    assert found["win_rate"] / 100 == pytest.approx(figures["win_rate"])
    assert found["avg_length"] == int(figures["mean_length"][0])


@pytest.mark.pictures
def test_the_dial_judges_mixtures_and_writes_the_best_scale_into_a_copy_of_the_adapter(run, here, capsys):
    """A judge of length likes another λ than 1 best, so there is an adapter to write."""
    words = ("--judge", "judge.py:length", "--limit", "6", "--max-tokens", "12")
    assert leaving(main, str(run), "base", "--dial", "0,0.5,1,2", *words, "--to", "out") == 0

    kept = json.loads(Path("out/dial.json").read_text())
    rates = {float(name): found["rate"] for name, found in kept["dials"].items()}
    assert [*rates] == [0, 0.5, 1, 2]
    assert rates[0] == 0.5  # the base against itself, at temperature 0
    assert all(row["a"] == row["b"] for row in rows_of("out/dial_0/annotations.jsonl"))
    assert leaving(main, str(run), "base", *words, "--to", "plain") == 0
    assert rates[1] == json.loads(Path("plain/compare.json").read_text())["win_rate"]
    assert rates[kept["best"]] == max(rates.values())
    assert Path("out/dial.png").read_bytes().startswith(b"\x89PNG")


def test_the_dial_by_a_reward_run_judges_the_scaled_adapter_too(run, reward, here):
    words = ("--judge", str(reward.path), "--limit", "4", "--max-tokens", "8", "--to", "out")
    assert leaving(main, str(run), "base", "--dial", "0.3,2", *words) == 0

    kept = json.loads(Path("out/dial.json").read_text())
    assert json.loads(Path("out/adapter/adapter_config.json").read_text())["lora_alpha"] == 8 * kept["best"]
    rows = rows_of("out/dial_adapter/annotations.jsonl")
    assert kept["adapter"]["rate"] == pytest.approx(sum(row["preference"] for row in rows) / len(rows))


def test_the_scale_of_an_adapter_is_written_and_loads(run, tiny_base, here):
    place = scaled(run / "adapter", 1.5, here)

    before, after = (json.loads((folder / "adapter_config.json").read_text()) for folder in (run / "adapter", place))
    assert after["lora_alpha"] == 1.5 * before["lora_alpha"]
    assert (lineage.read(place).parent, lineage.read(place).base) == (
        str(run / "adapter"),
        lineage.read(run / "adapter").base,
    )
    tiny_base.load_adapter("side_a", str(run / "adapter"), trainable=False)
    tiny_base.load_adapter("side_b", str(place), trainable=False)
    for one, other in zip(tiny_base.adapter_layers("side_a"), tiny_base.adapter_layers("side_b"), strict=True):
        assert other.scaling["side_b"] == 1.5 * one.scaling["side_a"]


def test_the_best_dial_is_the_nearest_to_1_of_equals():
    figures = {dial: win_rate(p, [1] * 4, [1] * 4) for dial, p in ((0.5, [1, 1, 0, 0]), (1.5, [1, 1, 1, 0]))}
    figures[2.0] = figures[1.5]

    assert best_of(figures) == 1.5


BAD = {
    "a dial of words": (("base", "a.jsonl", "--dial", "much"), "--dial: much is no list"),
    "a dial beyond bounds": (("base", "a.jsonl", "--dial", "0,9"), "--dial: 0,9 is no list"),
    "a dial on files": (("a.jsonl", "b.jsonl", "--dial", "--judge", "judge.py:length"), "give RUN base"),
    "no such side": (("nowhere", "base"), "there is no finished"),
    "the same side twice": (("base", "base"), "are the same"),
    "no such file": (("a.jsonl", "gone.jsonl", "--judge", "judge.py:length"), "gone.jsonl"),
    "other prompts": (
        ("a.jsonl", "other.jsonl", "--judge", "judge.py:length"),
        "other.jsonl: no prompt in common",
    ),
    "other prompts than are asked": (
        ("a.jsonl", "b.jsonl", "--judge", "judge.py:length", "--prompts", "other.jsonl"),
        "a.jsonl and b.jsonl: no answers to the 1 prompt of other.jsonl",
    ),
    "two answers to a prompt": (
        ("b.jsonl", "twice.jsonl", "--judge", "judge.py:length"),
        "twice.jsonl:1 and twice.jsonl:3: are different answers to one prompt (and 1 row more); keep one",
    ),
    "no answers in a file": (("a.jsonl", "empty.jsonl", "--judge", "judge.py:length"), "empty.jsonl"),
    "no base for the judge": (("a.jsonl", "b.jsonl"), "--recipe RECIPE"),
    "no such judge": (("a.jsonl", "b.jsonl", "--judge", "nobody"), "a judge is base, a finished reward run"),
    "no such function": (("a.jsonl", "b.jsonl", "--judge", "judge.py:nothing"), "can't be imported"),
    "no such file of a function": (("a.jsonl", "b.jsonl", "--judge", "gone.py:length"), "there is no file gone.py"),
    "no votes": (("a.jsonl", "b.jsonl", "--judge", "votes.jsonl"), "there is no file votes.jsonl"),
    "a folder of other things": (("a.jsonl", "b.jsonl", "--judge", "judge.py:length", "--to", "."), "other files"),
    "a limit of nothing": (("a.jsonl", "b.jsonl", "--limit", "0"), "--limit"),
    "a bad temperature": (("a.jsonl", "b.jsonl", "--temperature", "hot"), "--temperature"),
    "two answers in a row": (("pairs.jsonl", "b.jsonl", "--judge", "judge.py:length"), "pairs.jsonl"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(here, capsys, name):
    words, expected = BAD[name]
    answers("a.jsonl", {"q": "one"})
    answers("b.jsonl", {"q": "two words"})
    answers("other.jsonl", {"another question": "yes"})
    twice = [("q", "one"), ("other", "one"), ("q ", "two"), ("other", "two"), ("q", "one")]
    Path("twice.jsonl").write_text("\n".join(json.dumps({"prompt": q, "completion": a}) for q, a in twice))
    Path("empty.jsonl").write_text("")
    Path("pairs.jsonl").write_text(json.dumps({"prompt": "q", "chosen": "x", "rejected": "y"}))

    assert leaving(main, *words) == 2

    assert expected in capsys.readouterr().err.strip().splitlines()[-1]
