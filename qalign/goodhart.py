"""Goodhart's law: optimise proxies of a gold reward, and see where gold falls (Gao et al. 2023, arXiv:2210.10760).

    python -m qalign.goodhart RECIPE [key=value …] [--resume | --overwrite]

The recipe's section `goodhart` names the gold reward: a reward model that learns from all pairs of the section
`reward`, or a function. Gold labels the pairs; for each seed and size, a proxy learns from a few of them, a share of
which is turned round. Two optimisers work on it, and neither sees gold: best-of-n, and PPO (the section `ppo`) without
a KL price. Both are measured on the held-out prompts of `ppo`. Each proxy is an ensemble; its first member alone is the
single proxy beside it (Coste et al. 2023, arXiv:2310.02743).

The folder `<output>/goodhart/` holds `gold`, `seed_1/proxy_32`, `seed_1/ppo_32_single` and so on, in each a run like
those of the commands, `seed_1/answers.jsonl`, all that best-of-n chose from, `goodhart.json` and `goodhart.png`.
"""

import argparse
import json
import os
import shlex
import signal
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from statistics import fmean, pstdev
from typing import TYPE_CHECKING, Any, cast

from qalign import ppo, reward
from qalign.best_of import ANSWERS_PER_PART, curve
from qalign.cli import run_parsed, stage_parser, work_in
from qalign.config.atomic import write_rows, write_whole
from qalign.config.load import load
from qalign.config.paths import function_of
from qalign.config.recipe import Recipe
from qalign.config.stages import PPO, Goodhart, Reward
from qalign.data.formats import Preference, preferences, prompts
from qalign.errors import UserError
from qalign.judge.overoptimisation import (
    METHODS,
    Point,
    Track,
    as_row,
    by_gold,
    draw,
    pooled,
    proxy_pairs,
    scored_by_function,
)
from qalign.reports.ppo_report import read_points
from qalign.rounds import Part, free_memory, words_with, work_on_part
from qalign.score import score
from qalign.train.checkpoints import read_metrics
from qalign.train.dataset import read_rows, rows_under
from qalign.train.run_folder import RunFolder, print_table

if TYPE_CHECKING:  # its import takes seconds
    from qalign.rl.rollout_batch import SampledAnswers

JSON, PICTURE, ANSWERS = "goodhart.json", "goodhart.png", "answers.jsonl"
LABELLED = {"data": "pairs", "eval_data": "held_out_pairs"}  # files, as gold sees them
NEEDED = {"reward": "how reward models are trained, and on which pairs", "ppo": "prompts, sampling and optimiser"}
# PPO goes where the proxy leads, and no alarm stops it.
FREE = {"ppo.kl": "none", "ppo.kl_coefficient": PPO.model_fields["kl_coefficient"].default, "ppo.kl_target": None}
FREE |= {"ppo.on_alarm": "warn"}


class GoodhartRun(RunFolder):
    """`<output>/goodhart/`, with the settings of the sections `goodhart`, `reward` and `ppo`."""

    def __init__(self, recipe: Recipe, command_line: str = "RECIPE"):
        super().__init__(recipe, "ppo", command_line, "goodhart")
        self.asked = cast(Goodhart, recipe.goodhart)

    @property
    def further(self) -> str:
        return "for other settings, choose another `output`"

    def differences(self) -> dict[str, tuple[object, object]]:
        parts = (RunFolder(self.recipe, name, self.command_line, self.name) for name in ("reward", "goodhart"))
        return super().differences() | {key: pair for part in parts for key, pair in part.differences().items()}

    def part(self, stage: str, name: str, values: dict[str, Any]) -> Part:
        """The run of a stage in this folder, with other values for some keys of the recipe."""
        words = words_with(self, **values)
        return Part(load(words[0], words[1:], stage), stage, shlex.join(words), f"{self.name}/{name}/{stage}", self)

    @property
    def gold(self) -> str:
        """The source of the gold reward, as `ppo.judge` takes it."""
        return (
            self.asked.gold
            if function_of(self.asked.gold)
            else os.path.abspath(self.path / "gold" / "reward" / "adapter")
        )

    def proxies(self, seed: int) -> dict[tuple[int, int], dict[str, Any]]:
        """What sets each of a seed's proxies as the reward of PPO, by its number of pairs and of members."""
        found: dict[tuple[int, int], dict[str, Any]] = {}
        for pairs in self.asked.pairs:
            adapter = os.path.abspath(self.path / f"seed_{seed}" / f"proxy_{pairs}" / "reward" / "adapter")
            if self.asked.members > 1:
                found[pairs, 1] = {"ppo.reward": f"{adapter}/member_1", "ppo.reward_combine": "mean"}
                found[pairs, self.asked.members] = {"ppo.reward": adapter, "ppo.reward_combine": self.asked.combine}
            else:
                found[pairs, 1] = {"ppo.reward": adapter, "ppo.reward_combine": "mean"}
        return found


def goodhart(recipe: Recipe, run: GoodhartRun) -> None:
    """Optimise proxies of a gold reward, and measure where gold falls."""
    rows = {key: rows_under(key, cast(Reward, recipe.reward), recipe.seed, preferences)[0] for key in LABELLED}
    if (most := max(run.asked.pairs)) > len(rows["data"]):
        raise UserError(f"goodhart.pairs: {most} is more than the {len(rows['data'])} pairs of reward.data; lower it")
    parts = list(_parts(run, rows))
    run.begin([])
    run.rewind()
    done = {line["part"] for line in read_metrics(run.metrics)}
    _print_header(run, len(parts), len(done))
    for number, (name, work) in enumerate(parts, start=1):
        if name not in done:
            print(f"\n== {number} of {len(parts)}: {name}", flush=True)
            work()
            for each in (signal.SIGINT, signal.SIGTERM):  # the part had handlers of its own
                signal.signal(each, run.stop)
            run.log({"step": number, "part": name})
            run.mark_whole(number, 0)
    _finish(run)


def _print_header(run: GoodhartRun, parts: int, done: int) -> None:
    asked, settings = run.asked, cast(PPO, run.settings)
    ensemble = f"one, and the {asked.combine} of {asked.members}" if asked.members > 1 else "one"
    lines = {
        "gold": asked.gold if function_of(asked.gold) else "a reward model trained on all pairs",
        "proxies": f"of {', '.join(map(str, asked.pairs))} pairs, {asked.flipped:.0%} turned round; {ensemble}",
        "best of n": f"n to {asked.best_of}",
        "PPO": f"{settings.max_steps or 'all'} iterations without KL price, measured every {settings.eval_every}",
        "seeds": ", ".join(map(str, asked.seeds)),
        "parts": f"{parts}, {done} of them done",
    }
    print_table(f"{run.path}: over-optimisation of a reward", lines.items())


def _parts(run: GoodhartRun, rows: dict[str, Sequence[Preference]]) -> Iterator[tuple[str, Callable[[], None]]]:
    """(name, work) of all parts in their order."""
    if not function_of(run.asked.gold):
        yield (
            "gold",
            lambda: work_on_part(
                run.part("reward", "gold", {"reward.members": 1, "reward.member_layers": None}), reward.train
            ),
        )
    yield "labels", partial(_label, run, rows)
    for seed in run.asked.seeds:
        for pairs in run.asked.pairs:
            yield f"seed_{seed}/proxy_{pairs}", partial(_train_proxy, run, seed, pairs)
        yield f"seed_{seed}/{ANSWERS}", partial(_sample, run, seed)
        for (pairs, members), values in run.proxies(seed).items():
            yield (
                _ppo_name(seed, pairs, members),
                partial(_train_policy, run, seed, _ppo_name(seed, pairs, members), values),
            )


def _ppo_name(seed: int, pairs: int, members: int) -> str:
    return f"seed_{seed}/ppo_{pairs}_{'single' if members == 1 else 'ensemble'}"


def _label(run: GoodhartRun, rows: dict[str, Sequence[Preference]]) -> None:
    """Writes all pairs with gold's scores. Ties, which only a function gives, are left out."""
    for key, name in LABELLED.items():
        plain = [as_row(row) for row in rows[key]]
        file, scored = run.path / f"{name}.jsonl", run.path / f"{name}.scored.jsonl"
        write_rows(file, plain)
        scored.unlink(missing_ok=True)
        if not plain:
            write_whole(scored, "")
        elif function_of(run.asked.gold):
            write_rows(scored, scored_by_function(run.asked.gold, rows[key], plain))
        else:
            score(run.gold, str(file), str(scored), None)
            free_memory()
        found = [json.loads(line) for line in scored.read_text(encoding="utf-8").splitlines()]
        labelled = [by_gold(row) for row in found if row["reward_margin"]]
        if plain and len(labelled) < (max(run.asked.pairs) if key == "data" else 1):
            fix = "lower goodhart.pairs, or take a gold that tells answers apart"
            raise UserError(
                f"goodhart.gold: scores only {len(labelled)} of {len(plain)} pairs of reward.{key} apart; {fix}"
            )
        write_rows(file, labelled)


def _train_proxy(run: GoodhartRun, seed: int, pairs: int) -> None:
    """An ensemble of reward models on few pairs, some of them turned round; it is tested on gold's labels."""
    all_pairs, held_out = (run.path / f"{name}.jsonl" for name in LABELLED.values())
    rows = [json.loads(line) for line in all_pairs.read_text(encoding="utf-8").splitlines()]
    file = run.path / f"seed_{seed}" / f"pairs_{pairs}.jsonl"
    file.parent.mkdir(exist_ok=True)
    write_rows(file, proxy_pairs(rows, pairs, run.asked.flipped, seed))
    values: dict[str, Any] = {"seed": seed, "reward.data": os.path.abspath(file), "reward.split": "train"}
    values |= dict.fromkeys(("reward.limit", "reward.holdout", "reward.start_from"), None)
    values["reward.eval_data"] = os.path.abspath(held_out) if held_out.stat().st_size else None
    values |= {"reward.members": run.asked.members, "reward.margin": False}
    given = {"reward.epochs": run.asked.epochs, "reward.learning_rate": run.asked.learning_rate}
    values |= {key: value for key, value in given.items() if value is not None}
    work_on_part(run.part("reward", f"seed_{seed}/proxy_{pairs}", values), reward.train)


def _train_policy(run: GoodhartRun, seed: int, name: str, values: dict[str, Any]) -> None:
    """PPO on a proxy; gold is its judge."""
    values = {"seed": seed, **FREE, **values, "ppo.judge": run.gold}
    work_on_part(run.part("ppo", name, values), ppo.train)


def _sample(run: GoodhartRun, seed: int) -> None:
    """Samples n answers of the initial policy to each held-out prompt and scores them by gold and by all proxies."""
    proxies = run.proxies(seed)
    values = {"seed": seed, **FREE, "ppo.judge": run.gold}
    values |= {"ppo.reward": [each["ppo.reward"] for each in proxies.values()]}
    values |= {"ppo.reward_combine": run.asked.combine if run.asked.members > 1 else "mean"}
    now = run.part("ppo", "answers", values)
    read = read_rows(now, prompts)

    from qalign.data.collate import MicroBatchLimit
    from qalign.rl.ppo_setup import set_up
    from qalign.rl.rewards import combined

    setup = set_up(now, read, trainable=False)
    setup.scorers.attach(setup.base, MicroBatchLimit(tokens=2 * run.recipe.model.max_length))
    rows: list[SampledAnswers] = []
    size, asked = max(1, ANSWERS_PER_PART // run.asked.best_of), setup.rows.held_out
    for start in range(0, len(asked), size):
        rows += setup.sample(asked[start : start + size], run.asked.best_of, seed * 1_000_003 + start)
        print(f"best of {run.asked.best_of}: {len(rows)} of {len(asked)} prompts sampled", flush=True)
    names = ["gold", *(proxy_name(*key) for key in proxies)]
    scorers = [setup.scorers.judge, *([each] for each in setup.scorers.reward)]
    scores = {name: combined(scorer, rows)[0].tolist() for name, scorer in zip(names, scorers, strict=True)}
    found = [
        {"prompt": list(row.prompt.turns), "answers": list(row.texts), "ended": list(row.ended),
         **{name: given[number] for name, given in scores.items()}}
        for number, row in enumerate(rows)
    ]  # fmt: skip
    write_rows(run.path / f"seed_{seed}" / ANSWERS, found)
    del setup, scorers
    free_memory()


def tracks(run: GoodhartRun) -> Iterator[Track]:
    """What every proxy came to, by both optimisers, from the files of the parts. Gains are over the mean of all answers
    that best-of-n chose from, which the initial policy gave; PPO's proxies are shifted to begin at 0, as an ensemble's
    scores have a zero of their own in each run."""
    for seed in run.asked.seeds:
        text = (run.path / f"seed_{seed}" / ANSWERS).read_text(encoding="utf-8")
        rows = [json.loads(line) for line in text.splitlines()]
        gold = [row["gold"] for row in rows]
        zero, unit = _mean_and_deviation(gold)
        for pairs, members in run.proxies(seed):
            proxy = [row[proxy_name(pairs, members)] for row in rows]
            middle, scale = _mean_and_deviation(proxy)
            best = [
                Point(point["kl_nats"], (point["proxy"] - middle) / scale, (point["judge"] - zero) / unit)
                for point in curve(proxy, gold, run.asked.best_of)
            ]
            yield Track("best_of", seed, pairs, members, tuple(best))
            evaluations, alarms = read_points(run.path / _ppo_name(seed, pairs, members) / "ppo")
            first = evaluations[0].proxy
            policy = [
                Point(point.kl_nats, (point.proxy - first) / scale, (cast(float, point.judge) - zero) / unit)
                for point in evaluations
            ]
            step, said = next(iter(alarms.items()), (None, []))
            at = next((point.kl_nats for point in evaluations if point.step == step), None)
            yield Track("rl", seed, pairs, members, tuple(policy), at, said[0] if said else None)


def _mean_and_deviation(scores: Sequence[Sequence[float]]) -> tuple[float, float]:
    every = [score for given in scores for score in given]
    return fmean(every), pstdev(every) or 1.0


def _finish(run: GoodhartRun) -> None:
    """Writes goodhart.json, the picture and the summary, and says what came out."""
    found = list(tracks(run))
    draw(found, run.asked.combine, run.path / PICTURE)
    laws: list[dict[str, Any]] = []
    shown: list[tuple[str, str]] = []
    for method, words in METHODS.items():
        for pairs, members in dict.fromkeys((track.pairs, track.members) for track in found):
            some = [track for track in found if (track.method, track.pairs, track.members) == (method, pairs, members)]
            law = pooled(some)
            facts = {"method": method, "pairs": pairs, "members": members, "law": law and law.facts}
            laws.append(facts | {"alarms": sum(track.alarm is not None for track in some), "seeds": len(some)})
            shown.append((words if members == 1 else "", f"{proxy_name(pairs, members)}: {in_words(some)}"))
    facts = {"gold": run.gold, "laws": laws, "tracks": [track.facts for track in found]}
    text = json.dumps(facts, indent=1, ensure_ascii=False) + "\n"
    write_whole(run.path / JSON, text)
    write_whole(run.summary, json.dumps({"wall_seconds": run.wall_seconds, "laws": laws}, indent=1) + "\n")
    shown += [("figures", str(run.path / JSON)), ("picture", str(run.path / PICTURE))]
    print_table("done: gold, in standard deviations from the initial policy's mean", shown)


def in_words(some: Sequence[Track]) -> str:
    """What the seeds' tracks of one proxy and one optimiser came to, means over the seeds."""
    peak, last = fmean(track.peak.gold for track in some), fmean(track.points[-1].gold for track in some)
    kl, end = fmean(track.peak.kl_nats for track in some), fmean(track.points[-1].kl_nats for track in some)
    proxy = fmean(track.points[-1].proxy for track in some)
    said = f"gold {peak:+.2f} at its peak (KL {kl:.1f}), {last:+.2f} at the end (KL {end:.1f}), proxy {proxy:+.2f}"
    alarmed = [track.alarm_kl_nats for track in some if track.alarm_kl_nats is not None]
    at = f", at KL {', '.join(f'{kl:.1f}' for kl in alarmed)}" if alarmed else ""
    return said + (f"; alarms in {len(alarmed)} of {len(some)} runs{at}" if some[0].method == "rl" else "")


def proxy_name(pairs: int, members: int) -> str:
    return f"proxy of {pairs} pairs, {'single' if members == 1 else f'{members} members'}"


def main(words: Sequence[str] | None = None) -> None:

    def work(args: argparse.Namespace) -> None:
        line = shlex.join([args.recipe, *args.overrides])
        recipe = load(args.recipe, args.overrides, "goodhart")
        for name, what in NEEDED.items():
            if getattr(recipe, name) is None:
                raise UserError(f"goodhart: needs the section '{name}:' too, for {what}; add it to {args.recipe}")
            load(args.recipe, args.overrides, name)  # the files that it names
        settings = cast(PPO, recipe.ppo)
        if not settings.has_held_out:
            raise UserError("ppo.eval_data: is missing; goodhart measures on held-out prompts; add it, or ppo.holdout")
        if settings.eval_every is None:
            fix = "set it to about a tenth of the iterations"
            raise UserError(f"ppo.eval_every: is missing, and goodhart measures how gold rises and falls; {fix}")
        work_in(GoodhartRun(recipe, line), args, goodhart)

    run_parsed(stage_parser("goodhart", goodhart.__doc__), work, words)


if __name__ == "__main__":
    main()
