"""Constitutional AI: data to train on from principles in words, instead of people's labels.

    python -m qalign.constitution RECIPE [key=value …] [--resume | --overwrite]

It reads the recipe's `constitution` section. The model's answers are criticised and rewritten by principles
(`revisions.jsonl`, rows for SFT: Bai et al. 2022, arXiv:2212.08073, SL-CAI), and pairs of its answers are judged by all
principles in both orders (`pairs.jsonl`, rows for DPO, KTO and reward models: RL-CAI; Lee et al. 2023,
arXiv:2309.00267). First the labeller is measured on pairs that people judged. If it agrees with them no better than a
coin does, no pairs are written, unless `constitution.force` is set. `judgements.jsonl` has every judgement,
`summary.json` the figures, `report.png` the picture of the measurement. Several processes (`torchrun`) make a part of
the rows each at a time, to the same rows as one.

A later stage names these files with `data: constitution`, and `python -m qalign RECIPE` runs all of them in order.
"""

import argparse
import hashlib
import json
import shlex
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from qalign.cli import program, run_parsed, stage_parser, work_in
from qalign.config.atomic import write_rows, write_whole
from qalign.config.load import load
from qalign.config.paths import function_of
from qalign.config.recipe import Recipe
from qalign.config.stages import CONSTITUTION, OWN_DATA, SFT_RUN, Constitution
from qalign.data.formats import Preference, Prompt, Refused, preferences, prompts
from qalign.data.rows import rows_hash
from qalign.errors import UserError
from qalign.judge.principles import OURS, Principle, read_principles
from qalign.model import lineage
from qalign.train.checkpoints import read_metrics
from qalign.train.dataset import StageRows, check_same_rows, rendered_at
from qalign.train.processes.world import current, dealt
from qalign.train.run_folder import RunFolder, print_table

if TYPE_CHECKING:  # its import takes seconds
    from qalign.judge.ai_feedback.feedback import Asked, Feedback
    from qalign.model.base import Base

REVISIONS, PAIRS, JUDGEMENTS, REPORT = OWN_DATA["sft"], OWN_DATA["dpo"], "judgements.jsonl", "report.png"
ANSWERS_PER_PART, PAIRS_PER_PART = 32, 16
CHECKPOINTS = 20  # of a run
LABELLER = "labeller"  # the role, where it is an adapter


class Part(NamedTuple):
    """Some rows that are made together. Any process can do both; but a labeller that is a function judges in the first
    one."""

    step: int
    kind: str
    answer: Callable[[], Any]  # what the model that answers does
    judge: Callable[[Any], dict[str, Any]]  # what the labeller does with it; returns what is logged


class ConstitutionRun(RunFolder):
    """`<output>/constitution/`, whose `metrics.jsonl` has all rows that were made."""

    def __init__(self, recipe: Recipe, command_line: str = "RECIPE"):
        super().__init__(recipe, CONSTITUTION, command_line)

    @property
    def constitution(self) -> Constitution:
        return cast(Constitution, self.settings)

    @property
    def complete(self) -> bool:
        """A run that wrote no pairs because its labeller can't judge is not complete for a recipe that forces them."""
        if not super().complete or not (self.constitution.force and self.constitution.candidates):
            return super().complete
        return (self.path / PAIRS).is_file()

    @property
    def further(self) -> str:
        return "for other rows, choose another `output`"

    def differences(self) -> dict[str, tuple[object, object]]:
        found = super().differences()
        return {key: values for key, values in found.items() if key != "constitution.force"}

    @property
    def labeller(self) -> str | None:
        """The adapter folder of the labeller; None for the base, or a function."""
        key, source = "constitution.labeller", self.constitution.labeller
        if source == "base" or function_of(source):
            return None
        folder = str(self.own_adapter(key, SFT_RUN)) if source == SFT_RUN else source
        lineage.check_base(key, folder, self.recipe.model.base, self.recipe.model.revision)
        return folder


def constitute(recipe: Recipe, run: ConstitutionRun) -> None:
    """Make training data from principles: revised answers, and pairs that a model labels, once it is shown to judge."""
    settings = run.constitution
    principles = read_principles(Path(settings.principles) if settings.principles else OURS)
    labeller, (rows, human, refused) = run.labeller, _read(run)

    # Imported here, not above: torch takes seconds, and a bad recipe must not wait for it.
    from qalign.model.base import Role
    from qalign.model.base import load as load_base
    from qalign.model.memory.forecast import Plan
    from qalign.train.loop import Session, facts_of

    world = current()
    world.connect(facts_of(run), f"{run.command} --resume")
    base = world.in_turn(lambda: load_base(recipe.model, now=rendered_at(run) if run.resume else None))
    asked, unfit = _encoded(run, base, rows, refused)
    hashes = {"data": rows_hash(rows), "agree_with": rows_hash(human)}
    counts = {"prompts": len(asked), "human_pairs": len(human), "refused": len(refused) + len(unfit)}
    session = Session(run, base, StageRows([], [], refused + unfit, counts, hashes=hashes))
    for key, role, folder in (("start_from", Role.POLICY, run.parent), ("labeller", LABELLER, labeller)):
        if folder:
            lineage.check(f"{CONSTITUTION}.{key}", folder, session.origin)
            base.load_adapter(role, folder, trainable=False)
    feedback = _feedback(run, base, principles)
    session.planned, session.micro = Plan(feedback.limit.tokens, 0), feedback.limit
    labels = lineage.adapter_hash(labeller) if labeller else lineage.function_hash(settings.labeller)
    began = {"labeller": labels, "principles": _digest(principles)}
    world.same(began)
    session.begin()
    world.first(lambda: _check_beginning(run, began))
    agree, revise, label = _parts(run, feedback, asked, human)
    session.print_header(
        f"{len(agree) + len(revise) + len(label):,} parts: {len(agree)} to measure the labeller, {len(revise)} of "
        f"revisions, {len(label)} of pairs",
        trainable="nothing: the model answers, criticises, revises and judges",
        principles=f"{len(principles)} of {settings.principles or 'our own'}",
        labeller=f"{settings.labeller}, {2 * len(principles)} judgements a pair: each principle in both orders",
    )
    _make(run, agree, revise, label)


def _read(run: ConstitutionRun) -> tuple[Sequence[Prompt], Sequence[Preference], list[Refused]]:
    """(prompts, human pairs, refused rows); a `UserError` if too many are refused, or the rows are no longer those that
    a resumed run began with."""
    settings, seed = run.constitution, run.recipe.seed
    rows, refused = prompts(settings.data, settings.split, settings.limit, seed)
    human, unread = preferences(settings.agree_with or (), settings.split, None, seed)
    run.check_refused(f"{CONSTITUTION}.data", refused, len(rows))
    if settings.agree_with:
        run.check_refused(f"{CONSTITUTION}.agree_with", unread, len(human))
    if run.resume:
        check_same_rows(run, "data", rows)
        check_same_rows(run, "agree_with", human)
    return rows, human, refused + unread


def _encoded(
    run: ConstitutionRun, base: "Base", rows: Sequence[Prompt], refused: list[Refused]
) -> "tuple[list[Asked], list[Refused]]":
    """The prompts with their ids, and the prompts that are too long for an answer to fit behind them."""
    from qalign.data.tokenize import encode_questions
    from qalign.judge.ai_feedback.feedback import Asked

    found, unfit = encode_questions(base.template, rows, base.max_length - run.constitution.max_new_tokens)
    run.check_refused(f"{CONSTITUTION}.data", refused + unfit, len(found))
    return [Asked(number, prompt, ids) for number, (prompt, ids) in enumerate(found)], unfit


def _feedback(run: ConstitutionRun, base: "Base", principles: tuple[Principle, ...]) -> "Feedback":
    from qalign.data.collate import MicroBatchLimit
    from qalign.judge.ai_feedback.feedback import Feedback
    from qalign.judge.labeller import FunctionLabeller, Labeller
    from qalign.model.base import Role
    from qalign.model.generation import Sampling, stop_ids_of

    settings = run.constitution
    labeller = (
        FunctionLabeller(f"{CONSTITUTION}.labeller", settings.labeller, principles)
        if function_of(settings.labeller)
        else Labeller(base, LABELLER if LABELLER in base.adapters else Role.BASE, principles)
    )
    role = Role.POLICY if Role.POLICY in base.adapters else Role.BASE
    sampling = Sampling(settings.max_new_tokens, settings.temperature, stop_ids_of(base.template))
    limit = MicroBatchLimit(tokens=4 * base.max_length)
    return Feedback(base, role, labeller, principles, sampling, run.recipe.seed, limit)


def _digest(principles: Sequence[Principle]) -> str:
    return hashlib.blake2b(repr(principles).encode(), digest_size=8).hexdigest()


def _check_beginning(run: ConstitutionRun, now: dict[str, str | None]) -> None:
    """Logs what the run began with; a `UserError` if a resumed one has other principles or another labeller."""
    logged = read_metrics(run.metrics)
    if not logged:
        run.log({"step": 0, **now})
        return
    for key, value in now.items():
        if logged[0].get(key) != value:
            was = f"was {logged[0].get(key)} when this run began and is {value} now"
            raise UserError(f"{CONSTITUTION}.{key}: {was}; put it back, or start again with {run.command} --overwrite")


def _parts(
    run: ConstitutionRun, feedback: "Feedback", asked: "list[Asked]", human: Sequence[Preference]
) -> tuple[list[Part], list[Part], list[Part]]:
    """What there is to do: to measure the labeller, to revise, to label. The place of a part seeds what it samples."""
    settings = run.constitution

    def split(rows: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
        yield from (rows[start : start + size] for start in range(0, len(rows), size))

    steps = count(1)
    agree = [
        Part(next(steps), "agree", lambda: None, lambda _, some=some: feedback.agree(some))
        for some in split(human, PAIRS_PER_PART)
    ]
    revise = [
        Part(next(steps), "revise", partial(feedback.revise, some, settings.revisions, 2 * number), lambda made: made)
        for number, some in enumerate(split(asked if settings.revisions else [], ANSWERS_PER_PART))
    ]
    size = max(1, ANSWERS_PER_PART // max(1, settings.candidates))
    label = [
        Part(
            next(steps),
            "label",
            partial(feedback.answered, some, settings.candidates, 2 * number + 1),
            partial(feedback.label, some),
        )
        for number, some in enumerate(split(asked if settings.candidates else [], size))
    ]
    return agree, revise, label


def _make(run: ConstitutionRun, agree: list[Part], revise: list[Part], label: list[Part]) -> None:
    """Makes the parts that are left, logs the rows of each, and writes the files. Pairs come last, if at all."""
    from tqdm.auto import tqdm

    from qalign.train.callbacks import end_part

    world, by_function = current(), function_of(run.constitution.labeller) is not None
    done, total = world.first(lambda: read_metrics(run.metrics)[-1]["step"]), len(agree) + len(revise) + len(label)

    def work(part: Part) -> Any:
        return part.answer() if by_function else part.judge(part.answer())

    def make(parts: list[Part]) -> None:
        left = [part for part in parts if part.step > done]
        for part, found in zip(left, dealt(left, work), strict=True):
            made = world.first(lambda part=part, found=found: part.judge(found)) if by_function else found
            bar.update()
            end_part(run, {"step": part.step, "kind": part.kind, **made}, total, CHECKPOINTS)

    run.stop.patient = True
    with tqdm(total=total, initial=done, desc="constitution", unit="part") as bar:
        make(agree)
        figures = world.first(lambda: _measured(run))
        make(revise)
        if _may_label(run, figures):
            make(label)
    run.stop.patient = False
    world.first(lambda: _finish(run, figures))


def _may_label(run: ConstitutionRun, figures: dict[str, Any] | None) -> bool:
    from qalign.judge.ai_feedback.agreement import can_judge

    return run.constitution.force or (figures is not None and can_judge(figures))


def _measured(run: ConstitutionRun) -> dict[str, Any] | None:
    """The labeller's figures on the human pairs, said and drawn; None without such pairs."""
    judged = [row for part in read_metrics(run.metrics) if part.get("kind") == "agree" for row in part["judgements"]]
    if not judged:
        if run.constitution.agree_with:
            raise UserError(f"{CONSTITUTION}.agree_with: no pair fits the labeller's question; raise model.max_length")
        return None
    import numpy as np

    from qalign.judge.ai_feedback import agreement

    names = list(judged[0]["by_principle"])
    probabilities = np.array([[row["by_principle"][name] for name in names] for row in judged])
    figures = agreement.measure(probabilities, [(*row["tokens"], row["people"]) for row in judged], names)
    agreement.draw(figures, run.path / REPORT)
    said = agreement.verdict(figures)
    lines = [("verdict", said[0]), *(("", text) for text in said[1:]), ("report", str(run.path / REPORT))]
    print_table(f"labeller {run.constitution.labeller}", lines)
    return figures


def _finish(run: ConstitutionRun, figures: dict[str, Any] | None) -> None:
    """Writes the rows and the summary; a `UserError` if pairs were wanted and the labeller can't judge."""
    from qalign.judge.ai_feedback import agreement

    parts, labelled = read_metrics(run.metrics), bool(run.constitution.candidates and _may_label(run, figures))
    names = ("revisions", "pairs", "judgements")
    rows = {name: [row for part in parts for row in part.get(name) or ()] for name in names}
    files = {REVISIONS: "revisions"} if run.constitution.revisions else {}
    files |= {JUDGEMENTS: "judgements", PAIRS: "pairs"} if labelled else {JUDGEMENTS: "judgements"}
    for file, name in files.items():
        write_rows(run.path / file, rows[name])
    facts: dict[str, Any] = {name: len(found) for name, found in rows.items()}
    for name in ("without", "unpaired", "tokens", "tokens_single"):
        facts[name] = sum(part.get(name, 0) for part in parts)
    facts |= {"pairs": len(rows["pairs"]) if labelled else None, "labeller": run.constitution.labeller}
    facts |= {"can_judge": agreement.can_judge(figures) if figures else None, "forced": run.constitution.force}
    said = agreement.verdict(figures) if figures else ["the labeller was not measured"]
    kept = {name: value for name, value in (figures or {}).items() if name != "means"}
    facts |= {"agreement": kept or None, "verdict": said, "wall_seconds": run.wall_seconds}
    write_whole(run.summary, json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
    print_table("done", _lines(run, facts, labelled))
    if run.constitution.candidates and not labelled:
        fix = "take a larger model.base or another constitution.labeller, or force them with constitution.force=true"
        raise UserError(f"{CONSTITUTION}: no pairs were written: {said[0]}; {fix} --resume")


def _lines(run: ConstitutionRun, facts: dict[str, Any], labelled: bool) -> list[tuple[str, str]]:
    """What was made, and what to do next."""
    lines: list[tuple[str, str]] = []
    if run.constitution.revisions:
        lost = f"; {facts['without']} answers were empty, didn't fit or were cut" if facts["without"] else ""
        lines.append(("revisions", f"{facts['revisions']:,} in {run.path / REVISIONS}{lost}"))
    if labelled:
        lost = f"; {facts['unpaired']} prompts have no two answers that ended and differ" if facts["unpaired"] else ""
        lines.append(("pairs", f"{facts['pairs']:,} in {run.path / PAIRS}{lost}"))
    if facts["tokens"]:
        share = facts["tokens"] / facts["tokens_single"]
        lines.append(("judgements", f"{facts['judgements']:,} in {run.path / JUDGEMENTS}"))
        lines.append(("", f"packed, they took {share:.1%} of the tokens that single prompts would have taken"))
    if labelled and not facts["can_judge"]:
        lines.append(("warning", f"pairs were forced: {facts['verdict'][0]}"))
    if labelled and not facts["pairs"]:
        lines.append(("next", "no pair to prefer: raise constitution.max_new_tokens if answers are cut, or candidates"))
    elif run.recipe.stages and (labelled or not run.constitution.candidates):
        lines.append(("next", f"{program()} {run.command_line}"))
    return lines


def main(words: Sequence[str] | None = None) -> None:

    def work(args: argparse.Namespace) -> None:
        recipe = load(args.recipe, args.overrides, CONSTITUTION)
        work_in(ConstitutionRun(recipe, shlex.join([args.recipe, *args.overrides])), args, constitute)

    run_parsed(stage_parser("constitution", constitute.__doc__), work, words, shared=True)


if __name__ == "__main__":
    main()
