"""Does the lowest score of four reward models hold a judge's score where PPO on one of them lets it sink?

    python benchmarks/min_of_four.py --seeds 1 2 3

The runs are those of `qalign.goodhart` on `recipes/smollm2_goodhart.yaml`: for each seed an ensemble of four learns
from 32 pairs, a quarter of which is labelled the wrong way round. PPO without a KL price trains on its first member
alone, and again on the lowest of the four scores. The judge, on which no policy trains, is the function that labelled
the pairs. Goes on with runs that were stopped; `--report` only writes the report of the seeds that are finished. Writes
`benchmarks/results/min_of_four.md` and `docs/goodhart.png`.
"""

import argparse
import os
import platform
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from qalign.config.load import load  # noqa: E402
from qalign.goodhart import GoodhartRun, tracks  # noqa: E402
from qalign.judge.overoptimisation import METHODS, Track, draw, pooled  # noqa: E402
from qalign.reports.ppo_report import read_points  # noqa: E402
from qalign.train.run_folder import versions  # noqa: E402

RECIPE = "recipes/smollm2_goodhart.yaml"
KINDS = {1: "one member", 4: "min of four"}
BY_HAND = "## What it says, and other settings"  # from here on the report is written by hand, and stays


def policies(run: GoodhartRun) -> list[str]:
    """A line for each run of PPO, in the units of the scores."""
    lines = [
        "| seed | trained on | reward, before → after | judge before | highest (KL) | after (KL) | first alarm |",
        "|---|---|---|---|---|---|---|",
    ]
    for seed in run.asked.seeds:
        for kind, words in zip(("single", "ensemble"), KINDS.values(), strict=True):
            points, alarms = read_points(run.path / f"seed_{seed}" / f"ppo_{run.asked.pairs[0]}_{kind}" / "ppo")
            first, last, best = points[0], points[-1], max(points, key=lambda point: point.judge or 0.0)
            at = next((point.kl_nats for point in points if point.step in alarms), None)
            alarm = "none" if at is None else f"KL {at:.1f}"
            lines.append(
                f"| {seed} | {words} | {first.proxy:+.2f} → {last.proxy:+.2f} | {first.judge:.3f} | {best.judge:.3f} "
                f"({best.kl_nats:.1f}) | {last.judge:.3f} ({last.kl_nats:.1f}) | {alarm} |"
            )
    return lines


def laws(found: list[Track]) -> list[str]:
    lines = ["| optimiser | proxy | α | β | R² | KL at the law's peak |", "|---|---|---|---|---|---|"]
    for method, words in METHODS.items():
        for members, kind in KINDS.items():
            law = pooled([track for track in found if (track.method, track.members) == (method, members)])
            if law:
                figures = f"{law.alpha:+.2f} | {law.beta:+.2f} | {law.r_squared:.2f} | {law.peak_kl_nats:.1f}"
                lines.append(f"| {words} | {kind} | {figures} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--output", default="runs/min_of_four")
    parser.add_argument("--report", action="store_true", help="only write the report of these seeds' runs")
    args = parser.parse_args()
    words = [RECIPE, f"goodhart.seeds={args.seeds}".replace(" ", ""), f"output={args.output}"]
    run = GoodhartRun(load(str(ROOT / RECIPE), words[1:], "goodhart"))
    if not args.report and not run.complete:
        resume = ["--resume"] if (run.path / "recipe.yaml").is_file() else []
        command = [sys.executable, "-m", "qalign.goodhart", *words, *resume]
        subprocess.run(command, cwd=ROOT, env=os.environ | {"HF_HUB_OFFLINE": "1"}, check=True)
    found = list(tracks(run))
    draw(found, run.asked.combine, ROOT / "docs" / "goodhart.png")
    made_with = ", ".join(f"{name} {version}" for name, version in versions().items())
    text = [
        "# PPO on one reward model and on the lowest score of four", "",
        f"By `python benchmarks/min_of_four.py --seeds {' '.join(map(str, args.seeds))}`, on {os.cpu_count()} cores "
        f"({platform.machine()}). {made_with}.", "",
        f"    python -m qalign.goodhart {RECIPE} {words[1]}", "",
        f"Each reward model learned from {run.asked.pairs[0]} pairs, a quarter of them labelled the wrong way round.",
        "The judge is the function that labelled them, `recipes/rewards.py:plain`, the share of common English words",
        "in an answer; no policy trains on it. Means over 24 held-out prompts.", "",
        *policies(run), "",
        "The judge's gain against d = √KL, in standard deviations, fitted by the laws of Gao et al.:", "",
        *laws(found), "",
    ]  # fmt: skip
    file = ROOT / "benchmarks" / "results" / "min_of_four.md"
    _, mark, by_hand = file.read_text(encoding="utf-8").partition(BY_HAND) if file.is_file() else ("", "", "")
    file.write_text("\n".join(text) + ("\n" + mark + by_hand if mark else ""), encoding="utf-8")
    print("\n".join([*policies(run), "", *laws(found)]))


if __name__ == "__main__":
    main()
