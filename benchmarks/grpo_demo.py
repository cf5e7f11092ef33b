"""Do GRPO and RLOO reach the maximum of a function reward, and in what time beside PPO?

    python benchmarks/grpo_demo.py --seeds 1 2 3

All three start from the base, whose answers rarely end, and learn from `recipes/rewards.py:short`, whose maximum is 1
(answers of at most two sentences that end). Minutes are the processor's, of the whole command, with loading and
evaluations; those until the goal are its share of the run's tokens. Runs of one seed follow each other.
Writes `benchmarks/results/grpo_demo.md` and `docs/grpo_demo.png`.
"""

import argparse
import os
import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.ppo_demo import COLOURS, KINDS, RECIPE, read_run  # noqa: E402
from benchmarks.processor import run  # noqa: E402
from qalign.train.run_folder import versions  # noqa: E402

RUNS = "runs/grpo_demo"
RECIPE_OF_GRPO = "recipes/smollm2_grpo.yaml"
COMMANDS = {
    "PPO": f"qalign.ppo {RECIPE} {KINDS['short']}",
    "GRPO": f"qalign.grpo {RECIPE_OF_GRPO}",
    "RLOO": f"qalign.grpo {RECIPE_OF_GRPO} grpo.advantage=rloo grpo.max_steps=18",
}
GOAL, SECONDS = 0.95, "demo_seconds.txt"


def output(kind: str, seed: int) -> str:
    return f"{RUNS}/{kind.lower()}-{seed}"


def read(kind: str, seed: int) -> tuple[list[dict], list[dict], dict]:
    """(iterations, evaluations, summary) of a run."""
    return read_run(folder(kind, seed))


def folder(kind: str, seed: int) -> Path:
    return ROOT / output(kind, seed) / ("ppo" if kind == "PPO" else "grpo")


def learn(kind: str, seed: int, threads: int) -> None:
    """Makes a run, and keeps its processor seconds."""
    words = [*COMMANDS[kind].split(), f"output={output(kind, seed)}", f"seed={seed}", "--overwrite"]
    seconds, _ = run(words, threads)
    (folder(kind, seed) / SECONDS).write_text(str(seconds))


def draw(seeds: list[int], file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.8), dpi=100, layout="constrained")
    panels = figure.subplots(1, len(COMMANDS), sharey=True)
    for axes, kind in zip(panels, COMMANDS, strict=True):
        for seed, colour in zip(seeds, COLOURS, strict=False):
            steps, points, _ = read(kind, seed)
            axes.plot(
                [line["step"] for line in steps],
                [line["objective/scores"] for line in steps],
                color=colour,
                label=f"seed {seed}",
            )
            axes.plot([line["step"] for line in points], [line["eval_proxy"] for line in points], "o", color=colour)
        axes.axhline(1, color="#8C8C8C", linestyle="--", linewidth=1)
        axes.set_title(kind, fontsize=12)
        axes.set_xlabel("iterations")
        axes.locator_params(axis="x", integer=True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=9, frameon=False, loc="lower right")
    panels[0].set_ylabel("mean reward (dots: held-out prompts)")
    figure.savefig(file)


def table(seeds: list[int]) -> list[str]:
    lines = [
        "| algorithm | seed | minutes | iterations | reward, first → last two iterations | first iteration at +0.95 | "
        "minutes until then | held-out reward | KL, nats an answer | answers that end |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for seed in seeds:
        for kind in COMMANDS:
            steps, points, _ = read(kind, seed)
            scores = [line["objective/scores"] for line in steps]
            minutes = float((folder(kind, seed) / SECONDS).read_text()) / 60
            reached = next((line for line in steps if line["objective/scores"] >= GOAL), None)
            share = reached["num_tokens"] / steps[-1]["num_tokens"] if reached else 0.0
            when = f"{reached['step']} | {minutes * share:.1f}" if reached else "never | –"
            first, last = points[0], points[-1]
            lines.append(
                f"| {kind} | {seed} | {minutes:.1f} | {len(steps)} | {scores[0]:+.2f} → "
                f"{sum(scores[-2:]) / 2:+.2f} | {when} | "
                f"{first['eval_proxy']:+.2f} → {last['eval_proxy']:+.2f} | "
                f"{last['eval_kl_nats']:.1f} | {first['eval_ended']:.0%} → {last['eval_ended']:.0%} |"
            )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--at-once", type=int, default=1, help="runs at the same time, which share the threads")
    parser.add_argument("--report", action="store_true", help="only write the report, from existing runs")
    args = parser.parse_args()
    threads = max(1, torch.get_num_threads() // args.at_once)
    if not args.report:
        jobs = [(kind, seed, threads) for seed in args.seeds for kind in COMMANDS]
        with ThreadPoolExecutor(args.at_once) as pool:
            list(pool.map(lambda job: learn(*job), jobs))
    draw(args.seeds, ROOT / "docs" / "grpo_demo.png")
    made_with = ", ".join(f"{name} {version}" for name, version in versions().items())
    text = [
        "# PPO, GRPO and RLOO on a function reward", "",
        f"By `python benchmarks/grpo_demo.py --at-once {args.at_once}`, {threads} threads a run, on {os.cpu_count()} "
        f"cores ({platform.machine()}). {made_with}.", "",
        *(f"    python -m {command} output=OUT seed=SEED" for command in COMMANDS.values()), "",
        *table(args.seeds), "",
    ]  # fmt: skip
    (ROOT / "benchmarks" / "results" / "grpo_demo.md").write_text("\n".join(text))
    print("\n".join(table(args.seeds)))


if __name__ == "__main__":
    main()
