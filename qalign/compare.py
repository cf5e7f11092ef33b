"""Which of two models answers better, by a judge: the win rate with its interval, raw and length-controlled.

    python -m qalign.compare A B [--judge JUDGE] [--prompts FILE] [--limit N] [--to FOLDER]

A and B are runs, adapter folders, `base`, or files of answers. Models on one base answer in one batch: the run's
held-out prompts, those of `--prompts`, or those of the other side's file. The judge is `base` (asked which answer is
better, in both orders), a reward run that neither side was trained on, a function `FILE.py:NAME` that scores answers,
the URL of an OpenAI-compatible server, or the page's `votes.jsonl`.

With `--dial`, A's logits are mixed with B's at several λ instead, and each mixture is judged against B.

Into the folder it writes `compare.json`, `compare.png`, `annotations.jsonl` (a line for each judgement, as it is given;
the same command goes on from them), and the answers as AlpacaEval and Arena-Hard read them.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from qalign.cli import Parser, program, run_parsed
from qalign.config.load import load as load_recipe
from qalign.config.paths import expanded, function_of
from qalign.config.recipe import Model
from qalign.config.stages import Source
from qalign.data.formats import Prompt, prompts
from qalign.errors import UserError, short
from qalign.evaluate import check_usable
from qalign.judge.comparison import dial
from qalign.judge.comparison.answer_files import Compared, by_prompt, file_name, read_answers
from qalign.judge.comparison.judges import (
    ANNOTATIONS,
    FunctionJudge,
    Judge,
    LabellerJudge,
    RewardJudge,
    UrlJudge,
    judged,
    votes_between,
)
from qalign.judge.comparison.report import FIGURES, finish
from qalign.judge.comparison.sides import (
    BASE,
    Answers,
    Bases,
    Side,
    check_function,
    check_judge,
    held_out,
    prompt_key,
    role_of,
    same_base,
    sample,
    side_of,
    told_apart,
)
from qalign.judge.win_rate import WinRate
from qalign.model import lineage, origin
from qalign.reports.plots import counted
from qalign.train.lock import locked
from qalign.train.run_folder import RunFolder, open_run

if TYPE_CHECKING:
    from qalign.model.base import Base

LIMIT, MAX_NEW_TOKENS = 200, 256


@dataclass(frozen=True)
class Named:
    """What `--judge` names, checked as far as possible without loading a model."""

    word: str
    kind: str  # base, reward, function, url, votes
    run: RunFolder | None = None


def compare(args: argparse.Namespace) -> None:
    """Compare two models, or files of answers, by a judge."""
    sides, judge = (side_of(args.a), side_of(args.b)), judge_of(args.judge)
    if sides[0].file == sides[1].file and sides[0].adapter == sides[1].adapter:
        raise UserError(f"{args.a} and {args.b}: are the same; name two sides that differ")
    sides = told_apart(sides, (args.a, args.b))
    if args.dial:
        dial.dials_of(args.dial)
        if not (sides[0].adapter and sides[1].is_model) or judge.kind == "votes":
            raise UserError(
                "--dial: mixes a run with the base or another adapter on it; give RUN base, and another judge"
            )
    folder = _folder(args, sides)
    with locked(folder):
        if judge.kind == "votes":
            rows, found = voted(judge, sides)
        else:
            asked, given = _asked(args, sides)
            models = _models(args, sides, judge)
            check(judge, sides, asked)
            for model in models.values():
                origin.check(model)
            bases = Bases()
            light = light_judge(judge, args.judge_model)  # before anything is sampled

            @cache
            def opened() -> Judge:
                return light or judge_on(bases.get(models["judge"], judge.run), judge)

            if args.dial:
                return _dial(args, folder, sides, asked, judge.word, models, bases, opened)
            rows = _answered(args, sides, asked, given, models, bases)
            found = judged(folder, opened(), rows)
        finish(folder, (sides[0].name, sides[1].name), judge.word, rows, found)


def judge_of(word: str) -> Named:
    """A `UserError` if a word names no judge."""
    if word.startswith(("http://", "https://")):
        return Named(word, "url")
    if word == BASE:
        return Named(word, "base")
    if function := function_of(word):
        if function[0].endswith(".py") and not expanded(function[0]).is_file():
            raise UserError(f"--judge: there is no file {function[0]}; a function is FILE.py:NAME")
        return Named(word, "function")
    if word.endswith(".jsonl"):
        if not expanded(word).is_file():
            raise UserError(f"--judge: there is no file {word}; the page writes votes.jsonl where it was started")
        return Named(word, "votes")
    try:
        return Named(word, "reward", open_run(word, ("reward",)))
    except UserError as error:
        kinds = "a judge is base, a finished reward run, FILE.py:NAME, a URL, or votes.jsonl"
        raise UserError(f"--judge: {error}; {kinds}") from None


def _folder(args: argparse.Namespace, sides: tuple[Side, Side]) -> Path:
    """Where the results go: a `UserError` if something else is there."""
    names = "_vs_".join(file_name(side.name) for side in sides)
    folder = expanded(args.to) if args.to else Path("runs") / "compare" / names
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; name a folder with --to")
    if (
        folder.is_dir()
        and any(folder.iterdir())
        and not any((folder / n).is_file() for n in (ANNOTATIONS, FIGURES, dial.FILE))
    ):
        raise UserError(f"{folder}: holds other files; name a folder of its own with --to")
    return folder


def _asked(args: argparse.Namespace, sides: tuple[Side, Side]) -> tuple[list[Prompt], dict[str, dict[str, str]]]:
    """(The prompts, the answers of each file by side and prompt.) A `UserError` if there are none, or a file answers
    others."""
    given: dict[str, dict[str, str]] = {}
    asked: list[Prompt] | None = None
    files = {key: side.file for key, side in zip("ab", sides, strict=True) if side.file}
    known: dict[str, Prompt] = {}
    for key, file in files.items():
        read, refused = read_answers(file, None)
        check_usable(file, len(read), refused, "; a row is a prompt and its answer")
        own, given[key] = by_prompt(file, read)
        known |= {each: row for each, row in own.items() if each not in known}
        asked = [*known.values()]
    if args.prompts:
        rows, refused = prompts((Source(path=args.prompts),), "train", None, 0)
        check_usable(args.prompts, len(rows), refused)
        asked = [*{prompt_key(row): row for row in rows}.values()]
    if asked is None:
        asked = next(filter(None, (held_out(side, args.limit or LIMIT) for side in sides)), None)
        if asked is None:
            raise UserError("neither side's run has held-out prompts; give some with --prompts FILE")
    answered = [row for row in asked if all(prompt_key(row) in texts for texts in given.values())]
    if not answered:
        of = f"no answers to the {counted(len(asked), 'prompt')} of {args.prompts}"
        words = of if args.prompts else "no prompt in common"
        raise UserError(f"{' and '.join(files.values())}: {words}; both sides must answer the same ones")
    for key, file in files.items():
        if left := sum(prompt_key(row) not in given[key] for row in asked):
            print(f"{counted(left, 'prompt')} of {len(asked):,} left out: {file} has no answer")
    limit = args.limit or (len(answered) if len(given) == 2 else LIMIT)
    return answered[:: max(1, len(answered) // limit)][:limit], given


def _models(args: argparse.Namespace, sides: tuple[Side, Side], judge: Named) -> dict[str, Model]:
    """How to load the base of each side that is a model, and of the judge: by `a`, `b`, `judge`."""
    recipe = load_recipe(args.recipe, files_of=("model",)) if args.recipe else None
    known = [side.run.recipe.model for side in sides if side.run] + ([recipe.model] if recipe else [])
    known += [judge.run.recipe.model] if judge.run else []
    found: dict[str, Model] = {}
    for key, side in zip("ab", sides, strict=True):
        if side.is_model:
            own = [side.run.recipe.model] if side.run else known
            if not own:
                raise UserError(f"{side.name}: nothing says how to load its base; give --recipe RECIPE")
            found[key] = own[0]
            if side.adapter:
                lineage.check_base(side.name, side.adapter, own[0].base, own[0].revision)
    if judge.kind in ("base", "reward"):
        own = [judge.run.recipe.model] if judge.run else known
        if not own:
            raise UserError("--judge: 'base' needs a model; give --recipe RECIPE, or another judge")
        found["judge"] = own[0]
    return found


def _answered(
    args: argparse.Namespace, sides: tuple[Side, Side], asked: list[Prompt], given: dict[str, dict[str, str]],
    models: dict[str, Model], bases: Bases,
) -> list[Compared]:  # fmt: skip
    """Both sides' answers to the prompts that fit both models."""
    answers: dict[str, Answers] = {
        key: {prompt: (text, True) for prompt, text in texts.items()} for key, texts in given.items()
    }
    how = {"max_new_tokens": args.max_tokens, "temperature": args.temperature, "seed": args.seed}
    wanted = [key for key, side in zip("ab", sides, strict=True) if side.is_model]
    while wanted:
        group = [key for key in wanted if same_base(models[key], models[wanted[0]])]
        wanted = [key for key in wanted if key not in group]
        of_group = {key: sides["ab".index(key)] for key in group}
        run = next((side.run for side in of_group.values() if side.run), None)
        answers |= sample(bases.get(models[group[0]], run), of_group, asked, **how)
    keys = [(row, prompt_key(row)) for row in asked]
    fit = [(row, answers["a"][key], answers["b"][key]) for row, key in keys if all(key in answers[s] for s in "ab")]
    if not fit:
        raise UserError("no prompt fits model.max_length; give shorter ones with --prompts")
    if left := len(asked) - len(fit):
        print(f"{counted(left, 'prompt')} of {len(asked):,} left out: too long for model.max_length")
    return [Compared(row, a[0], b[0], (a[1], b[1])) for row, a, b in fit]


def _dial(
    args: argparse.Namespace, folder: Path, sides: tuple[Side, Side], asked: list[Prompt], judge: str,
    models: dict[str, Model], bases: Bases, open_judge: Callable[[], Judge],
) -> None:  # fmt: skip
    """Side A at several λ against side B."""
    from qalign.model.decoding.mixture import Mixture

    if not all(same_base(models["a"], model) for model in models.values()):
        raise UserError("--dial: sides and judge must be on one base; a function or a URL can judge too")
    how = {"max_new_tokens": args.max_tokens, "temperature": args.temperature, "seed": args.seed}

    def rows_of(key: str, side: Side, mixture: Mixture | None = None) -> list[Compared]:
        found = sample(bases.get(models["a"], sides[0].run), {key: side}, asked, **how, mixture=mixture)[key]
        keys = ((row, prompt_key(row)) for row in asked)
        return [Compared(row, found[k][0], other[k][0], (found[k][1], other[k][1])) for row, k in keys if k in found]

    base = bases.get(models["a"], sides[0].run)
    other = sample(base, {"b": sides[1]}, asked, **how)["b"]
    mixtures = {value: Mixture(role_of(base, "b", sides[1]), value) for value in dial.dials_of(args.dial)}
    rows = {value: rows_of("a", sides[0], mixture) for value, mixture in mixtures.items()}
    opened = open_judge()
    figures = {}
    for value, some in rows.items():
        figures[value] = dial.measured(some, judged(folder / f"dial_{value:g}", opened, some))

    def judge_scaled(side: Side) -> WinRate:
        some = rows_of("scaled", side)
        return dial.measured(some, judged(folder / "dial_adapter", open_judge(), some))

    dial.finish(folder, sides, judge, figures, judge_scaled)


def check(judge: Named, sides: tuple[Side, Side], asked: list[Prompt]) -> None:
    """Raises a `UserError` if a judge can't judge two sides' answers: one of them was trained by it, it was trained on
    these prompts, or its votes are on others."""
    if judge.run:
        check_judge(judge.word, judge.run, sides, asked)
    elif judge.kind == "function":
        check_function(judge.word, sides)
    elif judge.kind == "votes":
        voted(judge, sides)


def light_judge(judge: Named, model: str) -> Judge | None:
    """A judge that needs no base; its name tells it from one that would judge otherwise. `model` is what a URL is asked
    for. A `UserError` if a function can't be imported."""
    if judge.kind == "url":
        return UrlJudge(f"{model} at {judge.word}", judge.word, model)
    if judge.kind != "function":
        return None
    return FunctionJudge(f"{judge.word} {lineage.function_hash(judge.word) or ''}".strip(), judge.word)


def judge_on(base: "Base", judge: Named) -> Judge:
    """A judge on a base, named likewise."""
    if judge.run is None:
        return LabellerJudge(f"{base.spec.base}, asked by principles", base)
    weights = lineage.adapter_hash(judge.run.adapter) or ""
    return RewardJudge(f"{judge.word} {weights}".strip(), base, judge.run.adapter)


def voted(judge: Named, sides: tuple[Side, Side]) -> tuple[list[Compared], list[float | None]]:
    """The page's votes as rows and preferences; a `UserError` if there are none between these sides."""
    if not all(side.is_model for side in sides):
        raise UserError("--judge: votes are on models, but a side is a file of answers; name runs, or another judge")
    votes, others = votes_between(expanded(judge.word), [(side.name, side.weights) for side in sides])
    if not votes:
        names = f"{sides[0].name} and {sides[1].name}"
        raise UserError(f"--judge: {judge.word} has no votes between {names} as they are now ({others} others)")
    rows = [
        Compared(Prompt(vote["turns"], f"{judge.word}:{n}", {}), vote["a"], vote["b"]) for n, vote in enumerate(votes)
    ]
    return rows, [vote["preference"] for vote in votes]


def main(words: Sequence[str] | None = None) -> None:
    parser = Parser(prog=program("compare"), description=compare.__doc__)
    for name in ("a", "b"):
        parser.add_argument(name, metavar=name.upper(), help="a run, an adapter folder, base, or a file of answers")
    kinds = "base, a reward run, FILE.py:NAME, a URL, or votes.jsonl (default: base)"
    parser.add_argument("--judge", default=BASE, metavar="JUDGE", help=kinds)
    parser.add_argument("--judge-model", default="default", metavar="NAME", help="the model that a URL is asked for")
    parser.add_argument("--prompts", metavar="FILE", help="prompts to answer (default: held-out ones of the runs)")
    parser.add_argument("--limit", type=_count, metavar="N", help=f"most prompts (default: {LIMIT}; of files, all)")
    parser.add_argument("--max-tokens", type=_count, default=MAX_NEW_TOKENS, metavar="N", help="longest answer")
    parser.add_argument("--temperature", type=_temperature, default=0.0, metavar="T", help="of sampling (default: 0)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of sampling")
    how_far = f"judge A mixed with B at these λ instead, such as {dial.DIALS} (the default)"
    parser.add_argument("--dial", nargs="?", const=dial.DIALS, metavar="λ,λ…", help=how_far)
    parser.add_argument("--recipe", metavar="RECIPE", help="recipe whose base to load, if no run says it")
    parser.add_argument("--to", metavar="FOLDER", help="where to write (default: runs/compare/A_vs_B)")
    run_parsed(parser, compare, words)


def _count(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) <= 1_000_000:
        raise argparse.ArgumentTypeError(f"{short(text)} is no number from 1 to 1,000,000")
    return int(text)


def _temperature(text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = -1.0
    if not 0 <= found <= 2:
        raise argparse.ArgumentTypeError(f"{short(text)} is no number from 0 to 2")
    return found


if __name__ == "__main__":
    main()
