"""What the package `alpaca_eval` makes of annotations and of our files of answers.

python -m tests.judge.alpaca_eval_package figures FILE       writes its figures of `cases()` as JSON
python -m tests.judge.alpaca_eval_package evaluate FOLDER    prints what its `evaluate` says of our files in a folder

`alpaca_eval_figures.json` was written by the first one (alpaca_eval 0.6.6, scikit-learn 1.9.1). The package needs
`pkg_resources`, which newer versions of setuptools don't have. So `.ci/run` installs it, with an older one, into a
folder that only these processes see (CONTRIBUTING.md).
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

FIGURES = Path(__file__).with_name("alpaca_eval_figures.json")
REPOSITORY = Path(__file__).parents[2]
FOLDER = Path(sys.prefix) / "alpaca_eval"


def run(command: str, path: Path) -> str:
    """What a command of this module prints in a process that sees the package; the test is skipped without it."""
    if not (FOLDER / "alpaca_eval").is_dir():
        pytest.skip(f"alpaca_eval is not installed in {FOLDER}: see CONTRIBUTING.md")
    seen = {"PYTHONPATH": os.pathsep.join(map(str, (REPOSITORY, FOLDER))), "PYTHONWARNINGS": "ignore"}
    words = [sys.executable, "-m", __name__, command, str(path)]
    found = subprocess.run(words, capture_output=True, text=True, cwd=REPOSITORY, env=os.environ | seen)
    assert found.returncode == 0, found.stderr
    return found.stdout


def controlled_by_alpaca_eval(preferences, lengths_a, lengths_b) -> dict[str, float]:
    """Its metrics of the form without difficulties. A's answers are its `output_2`. It reads the difficulties from the
    hub all the same, so they are zeros here."""
    import pandas as pd
    from alpaca_eval.metrics import glm_winrate

    count = range(len(preferences))
    gamed = pd.DataFrame({"model": "x", "index": count, "instruction_difficulty": 0.0})
    annotations = pd.DataFrame({"preference": 1.0 + np.asarray(preferences), "index": count, "annotator": "judge"})
    annotations["output_1"] = ["b" * int(length) for length in lengths_b]
    annotations["output_2"] = ["a" * int(length) for length in lengths_a]
    annotations["generator_1"], annotations["generator_2"] = "B", "A"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "gamed.csv"
        gamed.to_csv(file, index=False)
        with mock.patch.object(glm_winrate, "hf_hub_download", return_value=str(file)):
            return glm_winrate.get_length_controlled_winrate(
                annotations, "length_controlled_minimal", save_weights_dir=None
            )


def cases() -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(preferences, lengths of A, lengths of B) by name."""
    draw = np.random.default_rng(18)
    found = {}
    for name, size in (("few", 23), ("some", 60), ("many", 150)):
        a, b = draw.integers(10, 1500, size), draw.integers(10, 1200, size)
        hidden = 1 / (1 + np.exp(-(a - b) / 600 - draw.normal(0.4, 1, size)))
        found[f"{name}, soft"] = hidden.round(4), a, b
        found[f"{name}, hard"] = (draw.random(size) < hidden).astype(float), a, b
        found[f"{name}, ties"] = np.where(draw.random(size) < 0.3, 0.5, draw.random(size) < hidden), a, b
    found["length alone"] = (a > b).astype(float), a, b
    found["length reversed, 10% noise"] = np.where(draw.random(size) < 0.1, a > b, a < b).astype(float), a, b
    found["length has no effect"] = (draw.random(size) < 0.7).astype(float), a, b
    found["always"] = np.ones(size), a, b
    return found


def write_figures(file: Path) -> None:
    kept = {}
    for name, (preferences, a, b) in cases().items():
        found = controlled_by_alpaca_eval(preferences, a, b)
        expected = {"win_rate": found["win_rate"] / 100, "controlled": found["length_controlled_winrate"] / 100}
        expected |= {"wins": int(found["n_wins"]), "losses": int(found["n_wins_base"]), "ties": int(found["n_draws"])}
        kept[name] = {"preferences": preferences.tolist(), "a": a.tolist(), "b": b.tolist(), "expected": expected}
    file.write_text(json.dumps(kept) + "\n")


def evaluate(folder: Path) -> dict[str, float]:
    """Its leaderboard's row of our side A, with our judgements as those it has already. It would ask a model for any
    that it doesn't find there, which fails offline."""
    from alpaca_eval.main import evaluate

    answers = {f"{side}_outputs": str(folder / f"{side}_outputs.json") for side in ("model", "reference")}
    (generator,) = {row["generator"] for row in json.loads(Path(answers["model_outputs"]).read_text())}
    (judge,) = {row["annotator"] for row in json.loads((folder / "annotations.json").read_text())}
    with tempfile.TemporaryDirectory() as place:
        cached, config, prompt = (Path(place) / name for name in ("annotations.json", "judges.yaml", "prompt.txt"))
        cached.write_text((folder / "annotations.json").read_text())
        prompt.write_text("{instruction} {output_1} {output_2}")
        config.write_text(
            json.dumps({judge: {"prompt_template": str(prompt), "fn_completions": "huggingface_api_completions"}})
        )
        board, _ = evaluate(
            **answers, annotators_config=str(config), caching_path=str(cached), fn_metric="get_winrate",
            sort_by="win_rate", precomputed_leaderboard=None, output_path=None, is_return_instead_of_print=True,
        )  # fmt: skip
    found = board.loc[generator]
    return {name: float(found[name]) for name in ("win_rate", "avg_length", "n_wins", "n_wins_base", "n_draws")}


if __name__ == "__main__":
    command, path = sys.argv[1], Path(sys.argv[2])
    if command == "figures":
        write_figures(path)
    else:
        print(json.dumps(evaluate(path)))
