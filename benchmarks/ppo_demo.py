"""Does PPO learn on the demo? Two rewards, several seeds each; curves and a table.

    python benchmarks/ppo_demo.py --seeds 1 2 3

`short` is a function that rewards answers of at most two sentences that end. `reward model` is the demo's own, with a
judge that was trained on other rows with another seed. The first run starts from the base, whose answers rarely end,
the second from the SFT model. SFT, reward model and judge are trained first if they are missing. Writes the table
`benchmarks/results/ppo_demo.md` and the figure `docs/ppo_demo.png`.
"""

import argparse
import json
import os
import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.processor import run  # noqa: E402
from qalign.train.run_folder import versions  # noqa: E402

RECIPE = "recipes/smollm2_demo.yaml"
RUNS = "runs/ppo_demo"
FIRST = [
    f"qalign.sft {RECIPE} output={RUNS}",
    f"qalign.reward {RECIPE} output={RUNS}",
    f"qalign.reward {RECIPE} output={RUNS}/judge seed=7 reward.data.skip=150",
]
# `short` has no judge: its function is exactly what is wanted.
KINDS = {
    "short": "ppo.start_from=null ppo.batch_size=16 ppo.samples_per_prompt=4 ppo.gae_lambda=0.95 "
    "ppo.reward=recipes/rewards.py:short ppo.judge=null ppo.value=trunk "
    "ppo.temperature=1.0 ppo.max_new_tokens=40 ppo.kl_coefficient=0.1 ppo.max_steps=14 ppo.eval_every=7 "
    "ppo.missing_eos_penalty=1.0 ppo.reward_scaling=running",
    "reward model": f"ppo.start_from={RUNS}/sft/adapter ppo.reward={RUNS}/reward ppo.judge={RUNS}/judge/reward",
}
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7")


def output(kind: str, seed: int) -> str:
    return f"{RUNS}/{kind.replace(' ', '_')}-{seed}"


def read(kind: str, seed: int) -> tuple[list[dict], list[dict], dict]:
    """(iterations, evaluations, summary) of a run."""
    return read_run(ROOT / output(kind, seed) / "ppo")


def read_run(folder: Path) -> tuple[list[dict], list[dict], dict]:
    """As `read`, of a run folder."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    points = [line for line in lines if "eval_proxy" in line]
    return [line for line in lines if "loss" in line], points, json.loads((folder / "summary.json").read_text())


def draw(seeds: list[int], file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.2), dpi=100, layout="constrained")
    panels = figure.subplots(1, 3)
    titles = (
        "Function: short answers that end",
        "Reward model, on training prompts",
        "Held-out: reward (solid), judge (dotted)",
    )
    for axes, title in zip(panels, titles, strict=True):
        axes.set_title(title, fontsize=12)
        axes.set_xlabel("PPO iterations")
        axes.locator_params(axis="x", integer=True)
        axes.spines[["top", "right"]].set_visible(False)
    for seed, colour in zip(seeds, COLOURS, strict=False):
        for axes, kind in zip(panels, KINDS, strict=False):
            steps, _, _ = read(kind, seed)
            x = [line["step"] for line in steps]
            axes.plot(x, [line["objective/scores"] for line in steps], color=colour, label=f"seed {seed}")
        _, points, _ = read("reward model", seed)
        x, first = [line["step"] for line in points], points[0]
        for name, style in (("proxy", "-"), ("judge", ":")):
            gains = [(point[f"eval_{name}"] - first[f"eval_{name}"]) / first[f"eval_{name}_std"] for point in points]
            panels[2].plot(x, gains, style, color=colour, marker="o", label=f"seed {seed}" if style == "-" else None)
    panels[2].axhline(1, color="#8C8C8C", linestyle="--", linewidth=1)
    panels[2].set_ylabel("gain, in standard deviations of the reference's scores")
    panels[0].set_ylabel("mean reward")
    for axes in panels:
        axes.legend(fontsize=9, frameon=False, loc="upper left")
    figure.savefig(file)


def table(seeds: list[int]) -> list[str]:
    lines = [
        "| reward | seed | minutes | training reward, first → last two iterations | held-out reward | held-out judge "
        "(its deviation at the start) | KL, nats an answer | answers that end | alarms |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for kind in KINDS:
        for seed in seeds:
            steps, points, summary = read(kind, seed)
            scores = [line["objective/scores"] for line in steps]
            first, last = points[0], points[-1]
            judge = "none"
            if first["eval_judge"] is not None:
                gain = (last["eval_judge"] - first["eval_judge"]) / first["eval_judge_std"]
                judge = f"{first['eval_judge']:+.2f} → {last['eval_judge']:+.2f} ({first['eval_judge_std']:.2f}): "
                judge += f"{gain:+.2f} deviations"
            reward_gain = (last["eval_proxy"] - first["eval_proxy"]) / first["eval_proxy_std"]
            lines.append(
                f"| {kind} | {seed} | {summary['wall_seconds'] / 60:.1f} | {scores[0]:+.2f} → "
                f"{sum(scores[-2:]) / 2:+.2f} | {first['eval_proxy']:+.2f} → {last['eval_proxy']:+.2f}: "
                f"{reward_gain:+.2f} deviations | {judge} | "
                f"{last['eval_kl_nats']:.1f} | {first['eval_ended']:.0%} → {last['eval_ended']:.0%} | "
                f"{', '.join(map(str, summary['alarm_steps'])) or 'none'} |"
            )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--at-once", type=int, default=1, help="runs at the same time, which share the threads")
    parser.add_argument("--only", choices=KINDS, help="run one kind of reward only")
    parser.add_argument("--report", action="store_true", help="only write the report, from existing runs")
    args = parser.parse_args()
    threads = max(1, torch.get_num_threads() // args.at_once)
    if not args.report:
        for line, folder in zip(FIRST, ("sft", "reward", "judge/reward"), strict=True):
            if not (ROOT / RUNS / folder / "summary.json").is_file():
                run([*line.split(), "--overwrite"], torch.get_num_threads())
        jobs = [
            f"qalign.ppo {RECIPE} output={output(kind, seed)} seed={seed} {KINDS[kind]} --overwrite"
            for kind in KINDS if args.only in (None, kind) for seed in args.seeds
        ]  # fmt: skip
        with ThreadPoolExecutor(args.at_once) as pool:
            list(pool.map(lambda line: run(line.split(), threads), jobs))
    draw(args.seeds, ROOT / "docs" / "ppo_demo.png")
    made_with = ", ".join(f"{name} {version}" for name, version in versions().items())
    commands = [f"    python -m {line}" for line in FIRST]
    commands += [f"    python -m qalign.ppo {RECIPE} output=OUT seed=SEED {words}" for words in KINDS.values()]
    text = [
        "# PPO on the demo", "",
        f"By `python benchmarks/ppo_demo.py --at-once {args.at_once}`, {threads} threads a run, on {os.cpu_count()} "
        f"cores ({platform.machine()}). {made_with}.", "", *commands, "", *table(args.seeds), "",
    ]  # fmt: skip
    (ROOT / "benchmarks" / "results" / "ppo_demo.md").write_text("\n".join(text))
    print("\n".join(table(args.seeds)))


if __name__ == "__main__":
    main()
