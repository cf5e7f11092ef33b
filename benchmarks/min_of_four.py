"""Does the lowest score of four reward models hold a judge's score where PPO on one of them lets it sink?

    python benchmarks/min_of_four.py --seeds 1 2 3

For each seed, an ensemble of four learns from 24 of the demo's pairs, a quarter of them turned round. PPO without a KL
price then trains on its first member alone, and again on the lowest of the four scores, for as many iterations. No
policy trains on the judge, the share of common English words in an answer (`recipes/rewards.py:plain`). Runs that exist
are kept, so the command can be stopped and repeated. Writes `benchmarks/results/min_of_four.md`.
"""

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from qalign.judge.overoptimisation import proxy_pairs  # noqa: E402
from qalign.reports.alarms import EvalPoint  # noqa: E402
from qalign.reports.ppo_report import read_points  # noqa: E402
from qalign.train.run_folder import versions  # noqa: E402

RECIPE = "recipes/smollm2_demo.yaml"
DATA = ROOT / "recipes" / "data" / "house_style_train.jsonl"
PAIRS, FLIPPED = 24, 0.25
MODEL = "model.quantization=none"  # without a GPU it samples in half the time
REWARD = (
    f"qalign.reward {RECIPE} {MODEL} reward.limit=null reward.epochs=3 reward.members=4 reward.learning_rate=1.0e-3"
)
PPO = (
    f"qalign.ppo {RECIPE} {MODEL} ppo.judge=recipes/rewards.py:plain ppo.start_from=null ppo.kl=none "
    "ppo.on_alarm=warn ppo.max_steps=18 ppo.eval_every=3 ppo.max_new_tokens=20 ppo.missing_eos_penalty=0"
)
KINDS = {"one member": "ppo.reward={0}/member_1", "min of four": "ppo.reward={0} ppo.reward_combine=min"}


def commands(out: Path, seed: int) -> dict[str, tuple[Path, str]]:
    """The runs of a seed in their order: (folder, command)."""
    place = out / f"seed_{seed}"
    found = {"reward": (place / "reward", f"{REWARD} output={place} seed={seed} reward.data={place}/pairs.jsonl")}
    for kind, words in KINDS.items():
        folder = place / kind.replace(" ", "_")
        found[kind] = folder / "ppo", f"{PPO} {words.format(place / 'reward')} output={folder} seed={seed}"
    return found


def run(out: Path, seed: int) -> None:
    """Does what is left of a seed."""
    file = out / f"seed_{seed}" / "pairs.jsonl"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        rows = [json.loads(line) for line in DATA.read_text(encoding="utf-8").splitlines()][:150]
        file.write_text("".join(json.dumps(row) + "\n" for row in proxy_pairs(rows, PAIRS, FLIPPED, seed)))
    for folder, command in commands(out, seed).values():
        if not (folder / "summary.json").is_file():
            more = ["--resume"] if (folder / "recipe.yaml").is_file() else []
            environment = os.environ | {"HF_HUB_OFFLINE": "1"}
            subprocess.run([sys.executable, "-m", *shlex.split(command), *more], cwd=ROOT, env=environment, check=True)


def report(out: Path, seeds: list[int]) -> list[str]:
    """A line for each seed, kind and evaluation, and the means over the seeds at the end."""
    found = {(seed, kind): read_points(commands(out, seed)[kind][0]) for seed in seeds for kind in KINDS}
    lines = ["| seed | trained on | iteration | reward | judge | KL, nats | alarm |", "|---|---|---|---|---|---|---|"]
    for (seed, kind), (points, alarms) in found.items():
        for point in points:
            alarm = "; ".join(alarms.get(point.step, ()))[:60]
            shown = f"{point.proxy:+.2f} | {judge(point):.3f} ± {error(point):.3f} | {point.kl_nats:.1f} | {alarm}"
            lines.append(f"| {seed} | {kind} | {point.step} | {shown} |")
    lines += [
        "",
        "Means over the seeds, before and after:",
        "",
        "| trained on | judge before | after | KL after, nats |",
    ]
    lines.append("|---|---|---|---|")
    for kind in KINDS:
        ends = [(points[0], points[-1]) for (_, name), (points, _) in found.items() if name == kind]
        before, after = (statistics.fmean(judge(each) for each in side) for side in zip(*ends, strict=True))
        far = statistics.fmean(last.kl_nats for _, last in ends)
        lines.append(f"| {kind} | {before:.3f} | {after:.3f} | {far:.1f} |")
    return lines


def judge(point: EvalPoint) -> float:
    return point.judge or 0.0


def error(point: EvalPoint) -> float:
    """The standard error of the judge's mean."""
    return (point.judge_std or 0.0) / point.answers**0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "min_of_four")
    args = parser.parse_args()
    for seed in args.seeds:
        run(args.out, seed)
    made_with = ", ".join(f"{name} {version}" for name, version in versions().items())
    shown = [f"    python -m {command}" for _, command in commands(Path("OUT"), 1).values()]
    found = report(args.out, args.seeds)
    text = [
        "# PPO on one reward model and on the lowest score of four", "",
        f"By `python benchmarks/min_of_four.py --seeds {' '.join(map(str, args.seeds))}`, on {os.cpu_count()} cores "
        f"({platform.machine()}). {made_with}.", "", *shown, "",
        f"Each ensemble learned from {PAIRS} of the demo's first 150 pairs, a quarter of them turned round.",
        "The judge is the share of common English words in an answer; no policy trains on it. Means over 24 held-out",
        "prompts, with their standard errors.", "", *found, "",
    ]  # fmt: skip
    (ROOT / "benchmarks" / "results" / "min_of_four.md").write_text("\n".join(text), encoding="utf-8")
    print("\n".join(found))


if __name__ == "__main__":
    main()
