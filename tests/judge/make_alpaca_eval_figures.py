"""Writes `alpaca_eval_figures.json`: annotations, and what `alpaca_eval` makes of them.

python -m tests.judge.make_alpaca_eval_figures     with alpaca_eval 0.6.6, scikit-learn 1.9.1 and pandas installed
"""

import json
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np

FIGURES = Path(__file__).with_name("alpaca_eval_figures.json")


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


if __name__ == "__main__":
    kept = {}
    for name, (preferences, a, b) in cases().items():
        found = controlled_by_alpaca_eval(preferences, a, b)
        expected = {"win_rate": found["win_rate"] / 100, "controlled": found["length_controlled_winrate"] / 100}
        expected |= {"wins": int(found["n_wins"]), "losses": int(found["n_wins_base"]), "ties": int(found["n_draws"])}
        kept[name] = {"preferences": preferences.tolist(), "a": a.tolist(), "b": b.tolist(), "expected": expected}
    FIGURES.write_text(json.dumps(kept) + "\n")
