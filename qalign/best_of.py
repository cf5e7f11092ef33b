"""Best of n: sample, score, keep the best. The cheap alternative to PPO, and online DPO when repeated.

    python -m qalign.best_of RECIPE [key=value …] [n=16] [--resume | --overwrite]

It reads the recipe's `ppo` section: prompts, reward, judge, sampling, and `start_from`, which is the policy that
samples. `<output>/best_of/` then holds `picks.jsonl` (prompt and best answer: SFT trains on it), `pairs.jsonl` (best
against worst: DPO trains on it) and `summary.json`. To repeat, train on the pairs and sample from what came of it:

    python -m qalign.dpo RECIPE dpo.data=runs/demo/best_of/pairs.jsonl output=runs/round2
    python -m qalign.best_of RECIPE ppo.start_from=runs/round2/dpo/adapter output=runs/round2

Only answers that ended by themselves are picked: a cut one would teach to stop in mid-sentence. On the held-out prompts
it measures what n buys, for every power of 2 up to n, at which KL, and draws that into PPO's report.
"""

import json
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from math import comb
from pathlib import Path

from qalign.cli import exit_code, stage_parser
from qalign.config.load import load
from qalign.config.recipe import Recipe
from qalign.errors import UserError
from qalign.reports import ppo_report
from qalign.reports.alarms import best_of_n_kl
from qalign.train.run_folder import RunFolder, print_table

PICKS, PAIRS, SUMMARY, SETTINGS = "picks.jsonl", "pairs.jsonl", "summary.json", "recipe.json"
ANSWERS_AT_ONCE = 64


def best_of(recipe: Recipe, n: int, typed: str, *, resume: bool, overwrite: bool) -> None:
    """Sample n answers to each prompt of a recipe's ppo section and keep the best, as data to train on."""
    from qalign.train.dataset import read_prompts

    run = RunFolder(recipe, "ppo", typed)
    folder = run.path.parent / "best_of"
    settings = {"n": n} | recipe.model_dump(mode="json")
    _claim(folder, run, settings, resume=resume, overwrite=overwrite)
    found = read_prompts(run)

    # Imported here, not above: torch takes seconds, and a bad recipe must not wait for it.
    from tqdm.auto import tqdm

    from qalign.model.lineage import adapter_hash
    from qalign.rl.rewards import combined, open_scorers

    scorers, judges = (open_scorers(recipe, key, run) for key in ("reward", "judge"))
    sample, encode = _sampler(recipe, run, n, scorers, judges)
    prompts, held_out, refused, counts = encode(found)
    parts = _parts(prompts, n)
    weights = [scorer.identity for scorer in (*scorers, *judges)] + [run.parent and adapter_hash(run.parent)]
    done = _begin(folder, settings | {"weights": weights}, resume=resume)
    with tqdm(total=len(prompts), desc=f"best of {n}", unit="prompt") as bar:
        for number, some in enumerate(parts):
            if number >= done:
                rows = sample(some, number)
                _keep(folder, number, rows, combined(scorers, rows)[0].tolist())
            bar.update(len(some))
    points = []
    if held_out:
        rows = [row for number, some in enumerate(_parts(held_out, n)) for row in sample(some, len(parts) + number)]
        proxy = combined(scorers, rows)[0].tolist()
        judge = combined(judges, rows)[0].tolist() if judges else None
        points = curve(proxy, judge, n)
    _finish(folder, n, points, counts, refused, typed)


def _sampler(recipe: Recipe, run: RunFolder, n: int, scorers: list, judges: list):
    """(from prompts and the number of their part to answered rows, from rows as read to prompts as ids)."""
    from qalign.data.collate import MicroBatchLimit
    from qalign.model import lineage
    from qalign.model.base import Role
    from qalign.model.base import load as load_base
    from qalign.model.generation import Sampling, end_ids, engine
    from qalign.model.loading import check_reach
    from qalign.rl.rewards import attach, load_models, sampled_answers
    from qalign.train.dataset import encode_prompts

    settings, model, parent = recipe.ppo, recipe.model, run.parent
    check_reach(model)
    base = load_base(model)
    role = Role.BASE
    if parent:
        lineage.check("ppo.start_from", parent, base.lineage("ppo"))
        base.load_adapter(Role.POLICY, parent, trainable=False)
        role = Role.POLICY
    micro = MicroBatchLimit(tokens=2 * model.max_length)
    load_models([*scorers, *judges], base)
    attach(scorers, base, Role.REWARD, micro)
    attach(judges, base, Role.JUDGE, micro)
    sampling = Sampling(
        settings.max_new_tokens, settings.temperature, end_ids(base.tokenizer, model.chat_template_kwargs)
    )
    source = engine(settings.engine, base, model.max_length)

    def sample(prompts: list, part: int) -> list:
        seed = recipe.seed * 1_000_003 + part
        found = source.generate(base, role, [ids for _, ids in prompts], sampling, each=n, seed=seed)
        return [
            sampled_answers(base.tokenizer, prompt, ids, answers, sampling)
            for (prompt, ids), answers in zip(prompts, found, strict=True)
        ]

    return sample, lambda found: encode_prompts(run, base.tokenizer, found)


def _claim(folder: Path, run: RunFolder, settings: dict, *, resume: bool, overwrite: bool) -> None:
    """Makes sure, before anything is loaded, that this run may write here. Deletes nothing yet."""
    run.check_inputs(folder)
    if not folder.exists():
        return
    if not (folder / SETTINGS).is_file():
        raise UserError(f"{folder}: holds files that are no run of best_of's; choose another `output`")
    if not (resume or overwrite):
        raise UserError(f"{folder}: holds a run; --resume goes on with it, --overwrite starts anew")
    if resume and not settings.items() <= _began_with(folder).items():
        raise UserError(f"{folder}: --resume needs the recipe and n it began with; --overwrite starts anew")


def _began_with(folder: Path) -> dict:
    return json.loads((folder / SETTINGS).read_text(encoding="utf-8"))


def _begin(folder: Path, settings: dict, *, resume: bool) -> int:
    """Makes the folder ready: only now does `--overwrite` delete the old run. Returns how many parts are done already.

    Args:
        settings: the recipe's, n, and the hashes of all adapters that sample or score.
    """
    if resume and folder.exists():
        if _began_with(folder) != settings:
            raise UserError(f"{folder}: the policy or a reward was trained again since this run began; use --overwrite")
        return sum(1 for _ in _whole_parts(folder))
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / SETTINGS).write_text(json.dumps(settings), encoding="utf-8")
    return 0


def _parts(prompts: list, n: int) -> list[list]:
    size = max(1, ANSWERS_AT_ONCE // n)
    return [prompts[start : start + size] for start in range(0, len(prompts), size)]


def _whole_parts(folder: Path):
    """The files of the parts that were written to their end, in order."""
    number = 0
    while (file := folder / "parts" / f"{number}.json").is_file():
        yield file
        number += 1


def _keep(folder: Path, number: int, rows: list, scores: list[list[float]]) -> None:
    """A part's picks and pairs, written aside and then renamed: a part is there whole or not at all."""
    found = {"picks": [], "pairs": [], "without": 0}
    for row, given in zip(rows, scores, strict=True):
        ended = [(score, text) for score, text, end in zip(given, row.texts, row.ended, strict=True) if end and text]
        if not ended:
            found["without"] += 1
            continue
        (best, chosen), (worst, rejected) = max(ended, key=lambda pair: pair[0]), min(ended, key=lambda pair: pair[0])
        prompt = list(row.prompt.turns)
        found["picks"].append({"prompt": prompt, "completion": chosen, "reward": best, "where": row.prompt.where})
        if best > worst and chosen.strip() != rejected.strip():
            pair = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
            found["pairs"].append(pair | {"score_chosen": best, "score_rejected": worst, "where": row.prompt.where})
    (folder / "parts").mkdir(exist_ok=True)
    aside = folder / "parts" / f"{number}.part"
    aside.write_text(json.dumps(found, ensure_ascii=False), encoding="utf-8")
    aside.replace(aside.with_suffix(".json"))


def curve(proxy: Sequence[Sequence[float]], judge: Sequence[Sequence[float]] | None, n: int) -> list[dict]:
    """What the best of 1, 2, 4 … n answers gets, expected over which of the n were drawn.

    Args:
        proxy: scores `(prompts, n)` that choose.
        judge: scores of the same answers that are only looked at.

    Returns:
        `{"n", "kl_nats", "proxy", "judge"}` each.
    """
    points = []
    for k in sorted({2**power for power in range(n.bit_length()) if 2**power <= n} | {n}):
        # Of all sets of k, how many have the answer of this rank as their best.
        weights = [comb(rank, k - 1) / comb(n, k) for rank in range(n)]
        means = []
        for other in (proxy, judge):
            if other is None:
                means.append(None)
                continue
            orders = [sorted(range(n), key=scores.__getitem__) for scores in proxy]
            of_prompts = [
                sum(weight * scores[answer] for weight, answer in zip(weights, order, strict=True))
                for scores, order in zip(other, orders, strict=True)
            ]
            means.append(sum(of_prompts) / len(of_prompts))
        points.append(asdict(ppo_report.BestOf(k, best_of_n_kl(k), *means)))
    return points


def _finish(folder: Path, n: int, points: list[dict], counts: dict, refused: list, typed: str) -> None:
    parts = [json.loads(file.read_text(encoding="utf-8")) for file in _whole_parts(folder)]
    picks, pairs = ([row for part in parts for row in part[name]] for name in ("picks", "pairs"))
    for name, rows in ((PICKS, picks), (PAIRS, pairs)):
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / name).write_text("".join(lines), encoding="utf-8")
    facts = {"n": n, "prompts": counts, "picks": len(picks), "pairs": len(pairs)}
    facts |= {"prompts_without_an_ended_answer": sum(part["without"] for part in parts), "held_out": points}
    facts["refused"] = [asdict(row) for row in refused]
    (folder / SUMMARY).write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    picture = ppo_report.redraw(folder.parent)
    without = facts["prompts_without_an_ended_answer"]
    lines = [
        ("picks", f"{len(picks)} in {folder / PICKS}"),
        (
            "pairs",
            f"{len(pairs)} in {folder / PAIRS}" + (f"; {without} prompts got no answer that ended" if without else ""),
        ),
    ]
    for point in points:
        judged = "" if point["judge"] is None else f", judge {point['judge']:+.3f}"
        lines.append(
            (
                f"best of {point['n']}",
                f"held-out reward {point['proxy']:+.3f}{judged}, KL {point['kl_nats']:.2f} nats at most",
            )
        )
    lines += [("picture", f"{picture}: best of n beside PPO")] if picture else []
    print_table("done", [*lines, ("next", f"python -m qalign.dpo {typed} dpo.data={folder / PAIRS} output=ANOTHER")])


def _number(words: list[str]) -> tuple[int, list[str]]:
    """n, and the other words."""
    given = [word for word in words if word.startswith("n=")]
    others = [word for word in words if not word.startswith("n=")]
    text = given[-1].removeprefix("n=") if given else "16"
    if not text.isdigit() or int(text) < 2:
        raise UserError(f"command line: n is '{text}'; expected a whole number of at least 2, such as n=16")
    return int(text), others


def main() -> None:
    args = stage_parser("best_of", best_of.__doc__).parse_intermixed_args()

    def work() -> None:
        n, overrides = _number(args.overrides)
        recipe = load(args.recipe, overrides, "ppo")
        typed = shlex.join([args.recipe, *overrides])
        best_of(recipe, n, typed, resume=args.resume, overwrite=args.overwrite)

    sys.exit(exit_code(work))


if __name__ == "__main__":
    main()
