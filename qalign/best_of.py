"""Best of n: sample n answers to each prompt, score them, keep the best. A cheap alternative to PPO.

    python -m qalign.best_of RECIPE [key=value …] [n=16] [rounds=1] [--resume | --overwrite]

It reads the recipe's `ppo` section: prompts, reward, judge, sampling, and `start_from`, the policy that samples. It
writes `picks.jsonl` (prompt and best answer, for SFT), `pairs.jsonl` (best and worst answer, for DPO) and
`summary.json` to `<output>/best_of/`. With `rounds=3` it is online preference learning: it trains DPO on the pairs,
samples again from the policy that was trained, and so on, as `qalign/rounds.py` says.

Only answers that ended with a stop token are picked: a cut one would teach a model to stop in mid-sentence. On the
held-out prompts it measures the reward and the KL of every power of 2 up to n, and draws them into PPO's report.

Several processes (`torchrun`) sample a part of the prompts each at a time, to the same answers as one.
"""

import argparse
import json
import re
import shlex
from collections.abc import Sequence
from itertools import count
from math import comb
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qalign.cli import program, run_parsed, stage_parser, work_in
from qalign.config.atomic import write_rows, write_whole
from qalign.config.load import load
from qalign.config.recipe import Recipe
from qalign.config.stages import SFT_RUN
from qalign.data.formats import prompts
from qalign.errors import UserError, short
from qalign.reports import ppo_report
from qalign.reports.alarms import best_of_n_kl
from qalign.train.checkpoints import METRICS, read_metrics, step_of
from qalign.train.dataset import read_rows
from qalign.train.processes.world import current, dealt
from qalign.train.run_folder import RunFolder, print_table

if TYPE_CHECKING:  # its import takes seconds
    from qalign.rl.ppo_setup import EncodedPrompt, Setup
    from qalign.rl.rollout_batch import SampledAnswers

PICKS, PAIRS = "picks.jsonl", "pairs.jsonl"
ANSWERS_PER_PART = 64
CHECKPOINTS = 10  # of a run
MOST, MOST_ROUNDS = 1024, 100  # answers to a prompt


class BestOfRun(RunFolder):
    """`<output>/best_of/`: a run of the section `ppo`, whose `metrics.jsonl` has what was kept of each part; with
    several `rounds`, the folder that holds them."""

    number = 0  # of the round that this run is a part of; 0 for one that stands alone
    zeros: "list[list[float] | None] | None" = None  # of ensembles, as `scorers_state` returns them; None: not set yet

    def __init__(self, recipe: Recipe, n: int, command_line: str = "RECIPE", rounds: int = 1, name: str = "best_of"):
        super().__init__(recipe, "ppo", command_line, name)
        self.n, self.rounds = n, rounds

    @property
    def command(self) -> str:
        more = f" rounds={self.rounds}" if self.rounds > 1 else ""
        return f"{program('best_of')} {self.command_line} n={self.n}{more}"

    @property
    def further(self) -> str:
        return "for more answers, choose another `output`"

    def differences(self) -> dict[str, tuple[object, object]]:
        began = read_metrics((self.last_checkpoint() or self.path) / METRICS)
        first = next((line for line in began if "n" in line), {"n": self.n, "rounds": self.rounds})
        pairs = {"n": (first["n"], self.n), "rounds": (first.get("rounds", 1), self.rounds)}
        found = super().differences() | {name: (was, now) for name, (was, now) in pairs.items() if was != now}
        if self.rounds > 1:  # which train with the section `dpo`
            found |= RunFolder(self.recipe, "dpo", self.command_line, self.name).differences()
        return found


def best_of(recipe: Recipe, run: BestOfRun) -> None:
    """Sample n answers to each prompt of a recipe's ppo section and keep the best, as data to train on."""
    read = read_rows(run, prompts)

    # Imported here, not above: torch takes seconds, and a bad recipe must not wait for it.
    from qalign.data.collate import MicroBatchLimit
    from qalign.model.memory.forecast import Plan
    from qalign.rl.ppo_setup import set_up
    from qalign.rl.rewards import check_unchanged, restore_scorers
    from qalign.train.loop import Session

    setup = set_up(run, read, trainable=False)
    session = Session(run, setup.base, setup.rows)
    session.planned = Plan(2 * recipe.model.max_length, 0)
    session.micro = MicroBatchLimit(tokens=session.planned.tokens)
    setup.scorers.attach(setup.base, session.micro)
    session.world.same({"n": run.n, "rounds": run.rounds})
    session.begin()
    scorers = setup.scorers.all
    if session.checkpoint:
        logged = session.world.first(lambda: read_metrics(run.metrics))
        check_unchanged(scorers, logged[0]["scorers"])
        run.zeros = logged[-1].get("zeros", run.zeros)
    elif session.world.is_first:
        of_rounds = {"rounds": run.rounds} if run.rounds > 1 else {}
        run.log({"step": 0, "n": run.n, **of_rounds, "scorers": [scorer.identity for scorer in scorers]})
    if run.zeros:
        restore_scorers(scorers, run.zeros)

    size = max(1, ANSWERS_PER_PART // run.n)  # prompts that are sampled together
    held_out = [] if run.number else setup.rows.held_out  # rounds are measured between them
    parts = [
        (rows[start : start + size], rows is held_out)
        for rows in (setup.rows.train, held_out)
        for start in range(0, len(rows), size)
    ]
    steps = f"{len(parts):,}, each of {run.n} answers to {size} prompts"
    session.print_header(steps, trainable="nothing: the policy only samples")
    _sample(run, setup, parts, step_of(session.checkpoint) if session.checkpoint else 0)
    session.world.first(lambda: _finish(run, setup.rows.counts))


def _sample(run: BestOfRun, setup: "Setup", parts: "list[tuple[Sequence[EncodedPrompt], bool]]", done: int) -> None:
    """Samples answers to the prompts of all parts that are left, and logs what is kept of each: of training prompts the
    picks and pairs, of held-out ones all scores. The number of a part seeds it, so that a resumed run repeats it."""
    from tqdm.auto import tqdm

    from qalign.model.decoding.vllm_server import EngineFailed
    from qalign.rl.rewards import RewardFailed, combined, scorers_state
    from qalign.train.callbacks import end_part

    def answers(part: "tuple[int, tuple[Sequence[EncodedPrompt], bool]]") -> "list[SampledAnswers]":
        number, (group, _) = part
        drawn = max(0, run.number - 1) * len(parts) + number
        return setup.sample(group, run.n, run.recipe.seed * 1_000_003 + drawn)

    reward, judge, left = setup.scorers.reward, setup.scorers.judge, [*enumerate(parts)][done:]
    run.stop.patient = True
    try:
        with tqdm(total=len(parts), initial=done, desc=f"best of {run.n}", unit="part") as bar:
            for (number, (_, is_held_out)), rows in zip(left, dealt(left, answers), strict=True):
                scores = combined(reward, rows)[0].tolist()
                judged = combined(judge, rows)[0].tolist() if is_held_out and judge else None
                found = {"proxy": scores, "judge": judged} if is_held_out else kept(rows, scores)
                zeros = scorers_state(setup.scorers.all)
                bar.update()
                done = number + 1
                line = {"step": done, **found, **({"zeros": zeros} if any(zeros) else {})}
                end_part(run, line, len(parts), CHECKPOINTS)
    except (RewardFailed, EngineFailed):  # keeps what was sampled before
        if done:
            current().first(lambda: run.mark_whole(done, 0))
        raise
    run.stop.patient = False


def kept(rows: "list[SampledAnswers]", scores: list[list[float]]) -> dict[str, Any]:
    """The picks and pairs of one part."""
    picks, pairs, without = [], [], 0
    for row, given in zip(rows, scores, strict=True):
        ended = [(score, text) for score, text, end in zip(given, row.texts, row.ended, strict=True) if end and text]
        if not ended:
            without += 1
            continue
        (best, chosen), (worst, rejected) = max(ended, key=lambda pair: pair[0]), min(ended, key=lambda pair: pair[0])
        asked: dict[str, Any] = {"prompt": list(row.prompt.turns)}
        asked |= {"tools": list(row.prompt.tools)} if row.prompt.tools else {}
        picks.append({**asked, "completion": chosen, "reward": best, "where": row.prompt.where})
        if best > worst and chosen.strip() != rejected.strip():
            pair = {**asked, "chosen": chosen, "rejected": rejected}
            pairs.append(pair | {"score_chosen": best, "score_rejected": worst, "where": row.prompt.where})
    return {"picks": picks, "pairs": pairs, "without": without}


def curve(proxy: Sequence[Sequence[float]], judge: Sequence[Sequence[float]] | None, n: int) -> list[dict[str, Any]]:
    """The expected scores of the best of 1, 2, 4 … n answers, over every choice of k of the n that were sampled.

    Args:
        proxy: reward `(prompts, n)`, by which the best answer is chosen.
        judge: scores of the judge for the same answers; None without a judge.
    """
    orders = [sorted(range(n), key=scores.__getitem__) for scores in proxy]

    def expected(scores: Sequence[Sequence[float]] | None, k: int) -> float | None:
        if scores is None:
            return None
        # The share of all sets of k answers whose best is the answer of this rank.
        weights = [comb(rank, k - 1) / comb(n, k) for rank in range(n)]
        of_prompts = [
            sum(weight * given[answer] for weight, answer in zip(weights, order, strict=True))
            for given, order in zip(scores, orders, strict=True)
        ]
        return sum(of_prompts) / len(of_prompts)

    sizes = sorted({2**power for power in range(n.bit_length())} | {n})
    return [
        {"n": k, "kl_nats": best_of_n_kl(k), "proxy": expected(proxy, k), "judge": expected(judge, k)} for k in sizes
    ]


def _finish(run: BestOfRun, counts: dict[str, int]) -> None:
    """Writes what was kept and the summary, draws the report, and prints where everything is."""
    parts = read_metrics(run.metrics)
    picks, pairs, proxy, judge = (
        [row for part in parts for row in part.get(name) or ()] for name in ("picks", "pairs", "proxy", "judge")
    )
    for name, rows in ((PICKS, picks), (PAIRS, pairs)):
        write_rows(run.path / name, rows)
    without, points = sum(part.get("without", 0) for part in parts), curve(proxy, judge or None, run.n) if proxy else []
    facts = {"n": run.n, "prompts": counts, "picks": len(picks), "pairs": len(pairs), "held_out": points}
    facts |= {"prompts_without_an_ended_answer": without}
    write_whole(run.summary, json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
    picture = ppo_report.redraw(run.path.parent)
    none = f"; {without} prompts have no answer that ended by itself and says something" if without else ""
    lines = [("picks", f"{len(picks)} in {run.path / PICKS}{none}"), ("pairs", f"{len(pairs)} in {run.path / PAIRS}")]
    for point in points:
        judged = "" if point["judge"] is None else f", judge {point['judge']:+.3f}"
        scores = f"held-out reward {point['proxy']:+.3f}{judged}, KL at most {point['kl_nats']:.2f} nats"
        lines.append((f"best of {point['n']}", scores))
    lines += [("report", f"{picture}: best of n next to PPO")] if picture else []
    if not run.number:
        lines.append(("next", _next(run, run.path / PAIRS, len(picks), len(pairs))))
    print_table("done", lines)


def _next(run: RunFolder, file: Path, picks: int, pairs: int) -> str:
    """What to do next: the command that trains on the pairs in `file`, from the policy that sampled them, with an
    output of its own; or why there are none."""
    dpo, words = run.recipe.dpo, shlex.split(run.command_line)
    if not (picks and pairs):
        return nothing_to_train_on(picks)
    if dpo is None:
        return f"add a dpo section to {words[0]}, with data: {file}"
    output = run.path.parent
    another = next(place for k in count(2) if not (place := output.with_name(f"{output.name}_{k}")).exists())
    own = [f"dpo.data={file}", f"output={another}"]
    start = run.parent or (str(RunFolder(run.recipe, SFT_RUN).adapter) if dpo.start_from == SFT_RUN else None)
    if start:  # `sft` would be looked for in the new output
        own.append(f"dpo.start_from={start}")
    replaced = {word.partition("=")[0] for word in own}
    kept = [word for word in words if word.partition("=")[0] not in replaced]
    return f"{program('dpo')} {shlex.join([*kept, *own])}"


def nothing_to_train_on(picks: int) -> str:
    """Why there is no pair, and what helps."""
    if not picks:
        return "nothing to train on: raise ppo.max_new_tokens, or let ppo.start_from name a model that ends its answers"
    return "no pair to train on: the reward tells no answers to a prompt apart; look at ppo.reward, or raise n"


def _split(words: list[str], name: str, default: int, least: int, most: int) -> tuple[int, list[str]]:
    """(The number that `name=` gives, the other words.)"""
    given = [word for word in words if word.startswith(f"{name}=")]
    text = given[-1].removeprefix(f"{name}=") if given else str(default)
    if not re.fullmatch("[0-9]{1,4}", text) or not least <= int(text) <= most:
        expected = f"expected a whole number from {least} to {most}, such as {name}={default}"
        raise UserError(f"command line: {name} is {short(text)}; {expected}")
    return int(text), [word for word in words if word not in given]


def main(words: Sequence[str] | None = None) -> None:

    def work(args: argparse.Namespace) -> None:
        n, others = _split(args.overrides, "n", 16, 2, MOST)
        rounds, overrides = _split(others, "rounds", 1, 1, MOST_ROUNDS)
        run = BestOfRun(
            load(args.recipe, overrides, "ppo", command="best_of"), n, shlex.join([args.recipe, *overrides]), rounds
        )
        if rounds == 1:
            return work_in(run, args, best_of)
        from qalign.rounds import learn_online  # it imports this module

        work_in(run, args, learn_online)

    run_parsed(stage_parser("best_of", best_of.__doc__), work, words, shared=True)


if __name__ == "__main__":
    main()
