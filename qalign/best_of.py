"""Best of n: sample n answers to each prompt, score them, keep the best. A cheap alternative to PPO.

    python -m qalign.best_of RECIPE [key=value …] [n=16] [--resume | --overwrite]

It reads the recipe's `ppo` section: prompts, reward, judge, sampling, and `start_from`, the policy that samples. It
writes `picks.jsonl` (prompt and best answer, for SFT), `pairs.jsonl` (best and worst answer, for DPO) and
`summary.json` to `<output>/best_of/`. Repeated with the policy that was trained on the pairs, it is online DPO:

    python -m qalign.dpo RECIPE dpo.data=runs/demo/best_of/pairs.jsonl output=runs/demo_2
    python -m qalign.best_of RECIPE ppo.start_from=runs/demo_2/dpo/adapter output=runs/demo_2

Only answers that ended with a stop token are picked: a cut one would teach a model to stop in mid-sentence. On the
held-out prompts it measures the reward and the KL of every power of 2 up to n, and draws them into PPO's report.
"""

import argparse
import json
import re
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from itertools import count, takewhile
from math import comb
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from qalign.cli import run_parsed, stage_parser
from qalign.config.atomic import LEFTOVER, write_whole
from qalign.config.load import load
from qalign.config.paths import expanded
from qalign.config.recipe import Recipe
from qalign.config.stages import SFT_RUN
from qalign.data.formats import prompts
from qalign.errors import UserError, short
from qalign.model import origin
from qalign.reports import ppo_report
from qalign.reports.alarms import best_of_n_kl
from qalign.train.dataset import read_rows
from qalign.train.lock import locked
from qalign.train.run_folder import RunFolder, print_table

if TYPE_CHECKING:  # its import takes seconds
    from qalign.rl.rollout_batch import SampledAnswers

PICKS, PAIRS, SUMMARY, SETTINGS = "picks.jsonl", "pairs.jsonl", "summary.json", "recipe.json"
ANSWERS_PER_PART = 64
MOST = 1024  # answers to a prompt

Item = TypeVar("Item")


def best_of(recipe: Recipe, n: int, command_line: str, *, resume: bool, overwrite: bool) -> None:
    """Sample n answers to each prompt of a recipe's ppo section and keep the best, as data to train on."""
    run = RunFolder(recipe, "ppo", command_line)
    folder = run.path.parent / "best_of"
    settings = {"n": n} | recipe.model_dump(mode="json")
    _claim(folder, run, settings, resume=resume, overwrite=overwrite)
    found = read_rows(run, prompts)

    # Imported here, not above: torch takes seconds, and a bad recipe must not wait for it.
    from tqdm.auto import tqdm

    from qalign.data.collate import MicroBatchLimit
    from qalign.model.lineage import adapter_hash
    from qalign.rl.ppo_setup import set_up
    from qalign.rl.rewards import combined

    setup = set_up(run, found, trainable=False)
    setup.scorers.attach(setup.base, MicroBatchLimit(tokens=2 * recipe.model.max_length))
    reward, judge = setup.scorers.reward, setup.scorers.judge

    hashes = [scorer.identity for scorer in (*reward, *judge)] + [run.parent and adapter_hash(run.parent)]
    done = _begin(folder, settings | {"weights": hashes}, resume=resume)
    parts, seed = _parts(setup.rows.train, n), recipe.seed * 1_000_003
    with tqdm(total=len(setup.rows.train), desc=f"best of {n}", unit="prompt") as bar:
        for number, group in enumerate(parts):
            if number >= done:
                rows = setup.sample(group, n, seed + number)
                _write_part(folder, number, rows, combined(reward, rows)[0].tolist())
            bar.update(len(group))
    points = []
    if setup.rows.held_out:
        held_out = enumerate(_parts(setup.rows.held_out, n), start=len(parts))
        rows = [row for number, group in held_out for row in setup.sample(group, n, seed + number)]
        rewarded = combined(reward, rows)[0].tolist()
        points = curve(rewarded, combined(judge, rows)[0].tolist() if judge else None, n)
    refused = [asdict(row) for row in setup.rows.refused]
    _finish(folder, run, {"n": n, "prompts": setup.rows.counts, "held_out": points, "refused": refused})


def _claim(folder: Path, run: RunFolder, settings: dict[str, Any], *, resume: bool, overwrite: bool) -> None:
    """Refuses a folder that this run may not write to, before anything is loaded. Deletes nothing yet."""
    run.check_inputs(folder, overwrite=overwrite)
    if all(file.is_dir() or LEFTOVER.fullmatch(file.name) for file in folder.rglob("*")):
        return  # there is none, or it was cut short as it began
    if not (folder / SETTINGS).is_file():
        raise UserError(f"{folder}: holds files that are no run of best_of's; choose another `output`")
    if not (resume or overwrite):
        raise UserError(f"{folder}: holds a run; --resume continues it, --overwrite starts again")
    if resume and not settings.items() <= _settings_of(folder).items():
        raise UserError(f"{folder}: --resume needs the recipe and n that it began with; --overwrite starts again")


def _settings_of(folder: Path) -> dict[str, Any]:
    return _read(folder / SETTINGS, "--overwrite starts again")


def _read(file: Path, fix: str) -> dict[str, Any]:
    """A file that `write_whole` wrote; a `UserError` if it was damaged since."""
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise UserError(f"{file}: is damaged; {fix}") from None


def _begin(folder: Path, settings: dict[str, Any], *, resume: bool) -> int:
    """Prepares the folder; only now does `--overwrite` delete the old run. Returns the number of finished parts.
    `settings` are the recipe, n, and the hashes of all adapters that sample or score."""
    if resume and folder.exists():
        if _settings_of(folder) != settings:
            raise UserError(f"{folder}: the policy or a reward was trained again since this run began; use --overwrite")
        return len(_finished_parts(folder))
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "parts").mkdir(parents=True)
    write_whole(folder / SETTINGS, json.dumps(settings))
    return 0


def _parts(rows: list[Item], n: int) -> list[list[Item]]:
    """Prompts in groups that are sampled together and written as one file, so that a resumed run repeats them."""
    size = max(1, ANSWERS_PER_PART // n)
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _part_file(folder: Path, number: int) -> Path:
    return folder / "parts" / f"{number}.json"


def _finished_parts(folder: Path) -> list[Path]:
    return list(takewhile(Path.is_file, (_part_file(folder, number) for number in count())))


def _write_part(folder: Path, number: int, rows: "list[SampledAnswers]", scores: list[list[float]]) -> None:
    """Writes the picks and pairs of one part."""
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
    content = {"picks": picks, "pairs": pairs, "without": without}
    write_whole(_part_file(folder, number), json.dumps(content, ensure_ascii=False))


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


def _finish(folder: Path, run: RunFolder, facts: dict[str, Any]) -> None:
    """Joins the parts, writes the summary, draws the report, and prints where everything is."""
    parts = [_read(file, "delete it, then --resume makes it again") for file in _finished_parts(folder)]
    picks, pairs = ([row for part in parts for row in part[name]] for name in ("picks", "pairs"))
    for name, rows in ((PICKS, picks), (PAIRS, pairs)):
        write_whole(folder / name, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    without = sum(part["without"] for part in parts)
    facts |= {"picks": len(picks), "pairs": len(pairs), "prompts_without_an_ended_answer": without}
    write_whole(folder / SUMMARY, json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
    picture = ppo_report.redraw(folder.parent)
    none = f"; {without} prompts have no answer that ended by itself and says something" if without else ""
    lines = [("picks", f"{len(picks)} in {folder / PICKS}{none}"), ("pairs", f"{len(pairs)} in {folder / PAIRS}")]
    for point in facts["held_out"]:
        judged = "" if point["judge"] is None else f", judge {point['judge']:+.3f}"
        scores = f"held-out reward {point['proxy']:+.3f}{judged}, KL at most {point['kl_nats']:.2f} nats"
        lines.append((f"best of {point['n']}", scores))
    lines += [("report", f"{picture}: best of n next to PPO")] if picture else []
    lines.append(("next", _next(run, folder / PAIRS, len(picks), len(pairs))))
    print_table("done", lines)


def _next(run: RunFolder, file: Path, picks: int, pairs: int) -> str:
    """What to do next: the command that trains on the pairs in `file`, from the policy that sampled them, with an
    output of its own; or why there are none."""
    dpo, words = run.recipe.dpo, shlex.split(run.command_line)
    if not picks:
        return "nothing to train on: raise ppo.max_new_tokens, or let ppo.start_from name a model that ends its answers"
    if not pairs:
        return "no pair to train on: the reward tells no answers to a prompt apart; look at ppo.reward, or raise n"
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
    return f"python -m qalign.dpo {shlex.join([*kept, *own])}"


def _split_n(words: list[str]) -> tuple[int, list[str]]:
    """(n, the overrides of the recipe)."""
    given = [word for word in words if word.startswith("n=")]
    text = given[-1].removeprefix("n=") if given else "16"
    if not re.fullmatch("[0-9]{1,4}", text) or not 2 <= int(text) <= MOST:
        raise UserError(f"command line: n is {short(text)}; expected a whole number from 2 to {MOST}, such as n=16")
    return int(text), [word for word in words if word not in given]


def main(words: Sequence[str] | None = None) -> None:

    def work(args: argparse.Namespace) -> None:
        n, overrides = _split_n(args.overrides)
        recipe = load(args.recipe, overrides, "ppo")
        command_line = shlex.join([args.recipe, *overrides])
        with locked(expanded(recipe.output) / "best_of"):
            origin.check(recipe.model)
            best_of(recipe, n, command_line, resume=args.resume, overwrite=args.overwrite)

    run_parsed(stage_parser("best_of", best_of.__doc__), work, words)


if __name__ == "__main__":
    main()
