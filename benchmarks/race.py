"""DPO, KTO, best of n in rounds, GRPO and PPO in the same time: what does each reach, and at what distance?

    python benchmarks/race.py --seconds 90 --seeds 1 2 3

All start from one SFT adapter of the demo model and take about as many steps as one thread takes in the same time; DPO
and KTO run a second time for a tenth of it. Two short runs of each say what a step takes. What a run takes besides,
such as loading, isn't counted: of a small model's run it is a third, of a large one's little. The time is the
processor's, which is a clock's where nothing else runs, so that other work on the machine disturbs little. Then each
answers the same held-out prompts. The reward is a function; the judge is a reward model that no run trains on. Three
scenes:

- near: the pairs are the SFT model's own answers, labelled by the reward (answers of at most two sentences);
- uncovered: the pairs are about something else than the reward (house style, while the reward asks for short words);
- stale: the pairs are other writers' answers, labelled by the same reward as in `near`.

Runs that exist are kept, so the command can be stopped and repeated.
Writes `benchmarks/results/race.md` and `docs/race.png`.
"""

import argparse
import json
import platform
import statistics
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.processor import run  # noqa: E402
from qalign.config.load import load  # noqa: E402
from qalign.train.run_folder import versions  # noqa: E402
from recipes.rewards import short  # noqa: E402

DEMO, TRAIN, TEST = (ROOT / "recipes" / name for name in (
    "smollm2_demo.yaml", "data/house_style_train.jsonl", "data/house_style_test.jsonl"))  # fmt: skip
SCENES = {"near": "short", "uncovered": "short_words", "stale": "short"}  # and the reward of each
TITLES = {
    "near": "near: pairs of the model's own answers", "uncovered": "uncovered: no pair shows what is wanted",
    "stale": "stale: pairs of other writers",
}  # fmt: skip
SOURCES = {"short": ROOT / "recipes" / "rewards.py", "short_words": Path(__file__)}
METHODS = {"DPO": "dpo", "KTO": "kto", "rounds": "best_of", "GRPO": "grpo", "PPO": "ppo"}  # and the command
QUICK = ("DPO", "KTO")  # which run for a tenth of the time too
COLOURS = {"DPO": "#4C72B0", "KTO": "#55A868", "rounds": "#8172B3", "GRPO": "#DD8452", "PPO": "#C44E52"}
MODEL = {"quantization": "none"}  # without a GPU it samples in half the time, as 4 bits do on one
HEADER = "| scene | method | seconds | steps | reward | judge | KL, nats an answer | tokens | end |"


def short_words(completions: list[str], ended: list[bool]) -> list[float]:
    """The share of words of at most five letters, from -1 (none) to 1 (all); -1 for an answer that was cut or has
    fewer than five words."""
    found = []
    for text, end in zip(completions, ended, strict=True):
        words = [word for word in (word.strip(".,;:!?\"'()*") for word in text.split()) if word]
        share = sum(len(word) <= 5 for word in words) / max(1, len(words))
        found.append(2 * share - 1 if end and len(words) >= 5 else -1.0)
    return found


def sections(scene: str, pairs: Path, out: Path) -> dict[str, Any]:
    """The recipe of a scene."""
    demo = yaml.safe_load(DEMO.read_text())
    sft = str(out / "start" / "sft" / "adapter")
    preferences = {"data": str(pairs), "batch_size": 8, "epochs": 1000, "learning_rate": 2e-4, "start_from": sft}
    sampled = {  # the learning rates are those of the demo recipes
        "learning_rate": 3e-4, "scheduler": "constant_with_warmup", "start_from": sft,
        "data": {"path": str(TRAIN)}, "limit": 60, "eval_data": {"path": str(TEST), "limit": 48},
        "batch_size": 16, "samples_per_prompt": 4, "max_new_tokens": 48, "temperature": 1.0,
        "reward": f"{SOURCES[SCENES[scene]]}:{SCENES[scene]}",
        "judge": str(out / "judge" / "reward"), "missing_eos_penalty": 1.0, "mini_batches": 2, "update_epochs": 2,
    }  # fmt: skip
    return {
        "model": demo["model"] | MODEL,
        "dpo": preferences, "kto": preferences | {"batch_size": 16},
        "ppo": sampled | {"value": "trunk", "gae_lambda": 0.95, "kl_coefficient": 0.1},
        "grpo": sampled | {"kl": "none"},
    }  # fmt: skip


def once(folder: Path, command: str, *words: object) -> float:
    """Processor seconds of a run; it is made if there is none."""
    file = folder / "race_seconds.json"
    if not file.is_file():
        seconds, _ = run([f"qalign.{command}", *words, "--overwrite"])
        file.write_text(json.dumps(seconds))
    return json.loads(file.read_text())


def pairs_of(scene: str, recipe: Path, out: Path) -> Path:
    """The file of a scene's pairs."""
    file = out / f"{scene}.jsonl"
    if scene == "near" and not file.is_file():
        once(out / "near_pairs" / "best_of", "best_of", recipe, f"output={out / 'near_pairs'}", "n=8", "ppo.judge=")
        file.write_bytes((out / "near_pairs" / "best_of" / "pairs.jsonl").read_bytes())
    if scene == "stale" and not file.is_file():
        rows = []
        for row in map(json.loads, TRAIN.read_text().splitlines()):
            answers = [row["chosen"], row["rejected"]]
            scores = short([_text(answer) for answer in answers], [True, True])
            if scores[0] != scores[1]:
                worse, better = sorted(range(2), key=scores.__getitem__)
                rows.append({"prompt": row["prompt"], "chosen": answers[better], "rejected": answers[worse]})
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return TRAIN if scene == "uncovered" else file


def _text(answer: Any) -> str:
    return answer if isinstance(answer, str) else answer[-1]["content"]


def train(method: str, recipe: Path, folder: Path, steps: int, seed: int) -> tuple[Path, float]:
    """(the adapter, processor seconds) of a run of `steps` optimiser steps, iterations or rounds."""
    command = METHODS[method]
    size = [f"{command}.max_steps={steps}"]
    if method == "rounds":
        size = [f"rounds={steps}", "n=4", "ppo.limit=40", "dpo.epochs=1"]
    if method not in QUICK:  # whose few held-out answers leave the time to training
        size.append(f"{'ppo' if method == 'rounds' else command}.eval_data.limit=8")
    place = folder / command
    return place / "adapter", once(place, command, recipe, f"output={folder}", f"seed={seed}", *size)


def step_time(method: str, recipe: Path, out: Path) -> tuple[float, float]:
    """(processor seconds of a step, those of a run besides its steps) of a method, from two short runs."""
    few = (2, 3) if method == "rounds" else (2, 6)
    spent = [train(method, recipe, out / f"try_{method}_{n}", n, 0)[1] for n in few]
    each = max(1e-3, (spent[1] - spent[0]) / (few[1] - few[0]))
    return each, spent[0] - few[0] * each


def measured(recipe: Path, adapter: Path, out: Path) -> dict[str, Any]:
    """Answers of a policy to the held-out prompts, by a scene's reward: reward, judge, KL from the SFT model, length,
    share that ends."""
    file = adapter.parent / f"race_{recipe.stem}.json"
    if not file.is_file():
        from qalign.best_of import BestOfRun
        from qalign.rounds import measure

        words = [f"output={out / 'measured'}"]
        there = BestOfRun(load(str(recipe), words, "ppo"), 2, f"{recipe} {words[0]}")
        there.path.mkdir(parents=True, exist_ok=True)
        point = measure(there, 0, str(adapter), str(out / "start" / "sft" / "adapter"))
        file.write_text(json.dumps(asdict(point)))
    return json.loads(file.read_text())


def race(out: Path, seconds: float, seeds: list[int], scenes: list[str]) -> list[dict[str, Any]]:
    """A line for each scene, method, time and seed, and one for the SFT model in each scene."""
    lines, sft = [], out / "start" / "sft"
    model = [f"model.{key}={value}" for key, value in MODEL.items()]
    once(sft, "sft", DEMO, f"output={out / 'start'}", *model)
    once(out / "judge" / "reward", "reward", DEMO, f"output={out / 'judge'}", "seed=7", "reward.data.skip=150", *model)
    for scene in scenes:
        recipe = out / f"{scene}.yaml"
        recipe.write_text(yaml.safe_dump(sections(scene, out / f"{scene}.jsonl", out)))
        recipe.write_text(yaml.safe_dump(sections(scene, pairs_of(scene, recipe, out), out)))
        lines.append({"scene": scene, "method": "SFT", "seconds": 0, "steps": 0, "seed": 0}
                     | measured(recipe, sft / "adapter", out))  # fmt: skip
        for method in METHODS:
            place = out / (scene if method in QUICK else SCENES[scene])  # others know the reward alone, and no pairs
            each, besides = step_time(method, recipe, place)
            for share in (0.1, 1.0) if method in QUICK else (1.0,):
                steps = max(2 if method == "rounds" else 1, round(share * seconds / each))
                for seed in seeds:
                    folder = place / f"{method}_{steps}_{seed}"
                    adapter, spent = train(method, recipe, folder, steps, seed)
                    line = {"scene": scene, "method": method, "share": share, "seed": seed, "steps": steps}
                    line |= {"seconds": spent - besides} | measured(recipe, adapter, out)
                    lines.append(line)
                    print(row([line]), flush=True)
    return lines


def row(lines: list[dict[str, Any]]) -> str:
    """A row of the table: means over seeds, with the lowest and the highest reward."""
    mean = lambda name: statistics.fmean(line[name] for line in lines)  # noqa: E731
    rewards = [line["proxy"] for line in lines]
    apart = f" ({min(rewards):+.2f} to {max(rewards):+.2f})" if len(lines) > 1 else ""
    return (
        f"| {lines[0]['scene']} | {lines[0]['method']} | {mean('seconds'):.0f} | {mean('steps'):.0f} | "
        f"{mean('proxy'):+.2f}{apart} | {mean('judge'):+.2f} | {mean('kl_nats'):.1f} | {mean('length'):.0f} | "
        f"{mean('ended'):.0%} |"
    )


def groups(lines: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Lines of the same scene, method and time, over all seeds."""
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for line in lines:
        found.setdefault((line["scene"], line["method"], line.get("share")), []).append(line)
    return [*found.values()]


def draw(lines: list[dict[str, Any]], file: Path) -> None:
    """Reward against √KL, a panel for each scene; small dots took a tenth of the time."""
    from matplotlib.figure import Figure

    scenes = list(dict.fromkeys(line["scene"] for line in lines))
    figure, labels = Figure(figsize=(5 * len(scenes), 4.6), dpi=100, layout="constrained"), dict[str, Any]()
    for axes, scene in zip(figure.subplots(1, len(scenes), squeeze=False, sharey=True)[0], scenes, strict=True):
        for some in groups([line for line in lines if line["scene"] == scene]):
            method, share = some[0]["method"], some[0].get("share", 1.0)
            dots = axes.scatter([max(0.0, line["kl_nats"]) ** 0.5 for line in some], [line["proxy"] for line in some],
                                s=90 if share == 1 else 30, color=COLOURS.get(method, "black"), alpha=0.8)  # fmt: skip
            labels.setdefault(method if share == 1 else f"{method}, a tenth of the time", dots)
        axes.set_title(TITLES[scene], fontsize=13)
        axes.set_xlabel("√KL from the SFT model (nats an answer)")
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(labels.values(), labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.axes[0].set_ylabel("mean reward of held-out answers")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=90.0, help="processor time of a run's steps")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--scenes", nargs="+", choices=SCENES, default=list(SCENES))
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "race")
    args = parser.parse_args(words)
    out = args.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    lines = race(out, args.seconds, args.seeds, args.scenes)
    (out / "race.json").write_text(json.dumps(lines, indent=1))
    draw(lines, ROOT / "docs" / "race.png")
    made_with = ", ".join(f"{name} {version}" for name, version in versions().items())
    told = " ".join(sys.argv[1:] if words is None else words)
    text = [
        "# The same time for each: DPO, KTO, best of n in rounds, GRPO, PPO", "",
        f"By `python benchmarks/race.py {told}`, one thread of {platform.machine()}; seconds are the processor's, "
        f"for the steps alone. {made_with}.", "",
        HEADER, "|---" * 9 + "|", *map(row, groups(lines)), "",
    ]  # fmt: skip
    (ROOT / "benchmarks" / "results" / "race.md").write_text("\n".join(text))
    print("\n".join(text))


if __name__ == "__main__":
    main()
