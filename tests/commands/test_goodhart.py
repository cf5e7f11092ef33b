"""Over-optimisation: proxies learn from gold's labels, two optimisers work on them, and a stopped run goes on."""

import json
from itertools import combinations
from statistics import fmean, pstdev

import pytest
import yaml

from qalign import goodhart, reward
from qalign.config.load import load
from qalign.errors import Stopped, UserError
from qalign.goodhart import GoodhartRun, proxy_name
from qalign.judge.overoptimisation import by_gold, proxy_pairs
from qalign.rounds import Part
from tests.helpers import TRAIN

GOLD = """
def few(completions):
    return [-float(len(text)) for text in completions]

def same(completions):
    return [0.0 for _ in completions]

def ids(completion_ids):
    return [float(len(ids)) for ids in completion_ids]
"""


@pytest.fixture(scope="module")
def recipe_path(tmp_path_factory, tiny_folder) -> str:
    folder = tmp_path_factory.mktemp("goodhart")
    (folder / "mine.py").write_text(GOLD)
    recipe = {
        "model": {"base": tiny_folder, "compute_dtype": "float32", "max_length": 512},
        "lora": {"r": 4, "alpha": 8},
        "output": str(folder / "runs"),
        "reward": {"data": TRAIN, "limit": 8, "eval_data": {"path": TRAIN, "skip": 12, "limit": 4}, "batch_size": 4,
                   "learning_rate": 1e-3},
        "ppo": {
            "data": TRAIN, "limit": 4, "eval_data": [{"path": TRAIN, "skip": 6, "limit": 4}], "max_new_tokens": 8,
            "reward": "reward", "max_steps": 2, "eval_every": 1, "batch_size": 8, "value": "trunk", "on_alarm": "slow",
            "learning_rate": 1e-2,
        },
        "goodhart": {"pairs": 4, "best_of": 4, "members": 2, "seeds": [3], "epochs": 2},
    }  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return str(path)


def run_of(path: str, *overrides: str, resume: bool = False) -> GoodhartRun:
    run = GoodhartRun(load(path, list(overrides), "goodhart"), " ".join([path, *overrides]))
    with run.held():
        run.claim(resume=resume, overwrite=False)
        goodhart.goodhart(run.recipe, run)
    return run


@pytest.fixture(scope="module")
def stopped_once(recipe_path) -> tuple[GoodhartRun, list[str]]:
    """A whole run with a gold reward model that was stopped in its last part and resumed; the reward models that were
    trained meanwhile."""
    trained, real = [], reward.train

    def train(recipe, run):
        trained.append(run.name)
        real(recipe, run)

    def killed(self, step, *args, **kwargs):
        mark_whole(self, step, *args, **kwargs)
        if step == 1 and "ensemble" in self.name:
            raise Stopped(15)

    mark_whole = Part.mark_whole
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reward, "train", train)
        patch.setattr(Part, "mark_whole", killed)
        with pytest.raises(Stopped):
            run_of(recipe_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reward, "train", train)
        return run_of(recipe_path, resume=True), trained


def lines(file) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.mark.slow
def test_a_stopped_run_goes_on_where_it_was(stopped_once):
    run, trained = stopped_once
    assert trained == ["goodhart/gold/reward", "goodhart/seed_3/proxy_4/reward"], "each once"
    steps = [line["step"] for line in lines(run.path / "seed_3" / "ppo_4_ensemble" / "ppo" / "metrics.jsonl")]
    assert sorted(set(steps)) == [0, 1, 2]
    assert run.complete


@pytest.mark.slow
def test_proxies_learn_from_golds_labels_and_policies_from_proxies(stopped_once):
    run, _ = stopped_once
    places = ("gold/reward", "seed_3/proxy_4/reward", "seed_3/ppo_4_single/ppo", "seed_3/ppo_4_ensemble/ppo")
    kept = {place: yaml.safe_load((run.path / place / "recipe.yaml").read_text()) for place in places}
    gold, proxy, single, ensemble = kept.values()
    assert (gold["reward"]["members"], gold["reward"]["limit"], gold["seed"]) == (1, 8, 42)
    assert (proxy["reward"]["members"], proxy["reward"]["epochs"], proxy["seed"]) == (2, 2, 3)
    assert proxy["reward"]["data"][0]["path"] == str(run.path / "seed_3" / "pairs_4.jsonl")
    adapter = str(run.path / "seed_3" / "proxy_4" / "reward" / "adapter")
    assert (single["ppo"]["reward"][0]["source"], single["ppo"]["reward_combine"]) == (f"{adapter}/member_1", "mean")
    assert (ensemble["ppo"]["reward"][0]["source"], ensemble["ppo"]["reward_combine"]) == (adapter, "min")
    for each in (single, ensemble):
        assert each["ppo"]["judge"][0]["source"] == str(run.path / "gold" / "reward" / "adapter")
        assert (each["ppo"]["kl"], each["ppo"]["on_alarm"], each["seed"]) == ("none", "warn", 3)
    scored = lines(run.path / "pairs.scored.jsonl")
    for row, labelled in zip(scored, lines(run.path / "pairs.jsonl"), strict=True):
        better = "chosen" if row["reward_chosen"] > row["reward_rejected"] else "rejected"
        assert labelled["chosen"] == row[better]


@pytest.mark.slow
def test_figures_are_those_of_the_parts(stopped_once):
    run, _ = stopped_once
    answers = lines(run.path / "seed_3" / "answers.jsonl")
    assert [len(row["answers"]) for row in answers] == [4] * 4
    facts = json.loads((run.path / "goodhart.json").read_text())
    found = {(track["method"], track["members"]): track for track in facts["tracks"]}
    assert set(found) == {("best_of", 1), ("best_of", 2), ("rl", 1), ("rl", 2)}
    gold = [score for row in answers for score in row["gold"]]
    for (method, members), track in found.items():
        if method == "best_of":  # the mean over all choices of 2 of the 4 answers, by the proxy
            name = proxy_name(4, members)
            best = [row["gold"][max(pair, key=row[name].__getitem__)]
                    for row in answers for pair in combinations(range(4), 2)]  # fmt: skip
            assert track["points"][1]["gold"] == pytest.approx((fmean(best) - fmean(gold)) / pstdev(gold))
            assert [round(point["kl_nats"], 4) for point in track["points"]] == [0, 0.1931, 0.6363]
        else:
            place = run.path / "seed_3" / f"ppo_4_{'single' if members == 1 else 'ensemble'}" / "ppo"
            logged = [line for line in lines(place / "metrics.jsonl") if "eval_judge" in line]
            judged = [(line["eval_judge"] - fmean(gold)) / pstdev(gold) for line in logged]
            assert [point["gold"] for point in track["points"]] == pytest.approx(judged)
            assert [point["kl_nats"] for point in track["points"]] == [line["eval_kl_nats"] for line in logged]
            assert track["points"][0]["proxy"] == 0.0
    assert (run.path / "goodhart.png").stat().st_size > 10_000
    assert len(facts["laws"]) == 4


@pytest.mark.slow
def test_a_run_with_other_settings_is_another_run(stopped_once, recipe_path):
    with pytest.raises(UserError, match=r"goodhart\.flipped"):
        run_of(recipe_path, "goodhart.flipped=0.1", resume=True)
    with pytest.raises(UserError, match=r"reward\.learning_rate"):
        run_of(recipe_path, "reward.learning_rate=0.1", resume=True)


def test_pairs_of_a_proxy():
    rows = [{"chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(40)]
    few, more = proxy_pairs(rows, 10, 0.25, seed=1), proxy_pairs(rows, 20, 0.25, seed=1)
    assert [sum(row["chosen"].startswith("bad") for row in some) for some in (few, more)] == [2, 5], "2.5 rounds to 2"
    numbers = [{row["chosen"].split()[1] for row in some} for some in (few, more)]
    assert [len(each) for each in numbers] == [10, 20]
    assert numbers[0] < numbers[1]
    assert proxy_pairs(rows, 10, 0.25, seed=2) != few
    assert not any(row["chosen"].startswith("bad") for row in proxy_pairs(rows, 40, 0.0, seed=1))


def test_gold_labels_a_pair():
    row = {"prompt": "p", "chosen": "a", "rejected": "b", "reward_chosen": 1.0, "reward_rejected": 2.0}
    assert by_gold({**row, "reward_margin": -1.0}) == {"prompt": "p", "chosen": "b", "rejected": "a"}
    assert by_gold({**row, "reward_margin": 1.0}) == {"prompt": "p", "chosen": "a", "rejected": "b"}


def labelled_by(path: str, name: str, tmp_path) -> GoodhartRun:
    function = path.replace("recipe.yaml", f"mine.py:{name}")
    run = GoodhartRun(load(path, [f"goodhart.gold={function}", f"output={tmp_path}"], "goodhart"), path)
    rows = {key: goodhart.rows_under(key, run.recipe.reward, 1, goodhart.preferences)[0] for key in goodhart.LABELLED}
    run.path.mkdir()
    goodhart._label(run, rows)
    return run


def test_a_function_labels_pairs_too(recipe_path, tmp_path):
    run = labelled_by(recipe_path, "few", tmp_path)
    rows = lines(run.path / "pairs.jsonl")
    assert len(rows) == 8
    assert all(len(row["chosen"]) < len(row["rejected"]) for row in rows)
    assert run.gold.endswith("mine.py:few")


@pytest.mark.parametrize(("name", "said"), [("same", "scores only 0 of 8 pairs"), ("ids", "completion_ids")])
def test_a_gold_that_labels_nothing_is_refused(recipe_path, tmp_path, name, said):
    with pytest.raises(UserError, match=f"goodhart.gold.*{said}"):
        labelled_by(recipe_path, name, tmp_path)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("goodhart=", "goodhart"),
        ("reward=", "the section 'reward:'"),
        ("ppo.eval_data=", "ppo.eval_data: is missing"),
        ("ppo.eval_every=", "ppo.eval_every: is missing"),
        ("goodhart.pairs=9", "goodhart.pairs: 9 is more than the 8 pairs"),
        ("goodhart.pairs=[4, 4]", "goodhart.pairs: 4 is there more than once"),
        ("goodhart.pairs=[]", "goodhart.pairs"),
        ("goodhart.flipped=0.5", "goodhart.flipped is 0.5"),
        ("goodhart.gold=reward", "goodhart.gold: 'reward' is neither 'pairs' nor a function"),
        ("goodhart.gold=mine.py:fwe", "did you mean 'few'"),
        ("goodhart.proxies=3", "unknown key 'proxies' in goodhart"),
    ],
)
def test_bad_input_is_one_line(recipe_path, tmp_path, capsys, override, said):
    with pytest.raises(SystemExit) as end:
        goodhart.main([recipe_path, f"output={tmp_path}", override])
    assert end.value.code == 2
    told = capsys.readouterr().err
    assert said in told
    assert "Traceback" not in told
