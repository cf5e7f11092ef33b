"""Did the training help? Each stage's own held-out measure before and after it, and what it cost elsewhere.

    python -m qalign.evaluate RECIPE [key=value …] [--stage STAGE] [--dialogues FILE] [--tasks arc_easy,…]

Of DPO and KTO it measures preference figures (of KTO's single answers loss and rewards), of SFT loss and perplexity
of the answers, of a reward model whether to trust it, of PPO and GRPO reward and KL on held-out prompts; of best_of
with rounds the policy that it trained. Then reference and aligned adapter answer some of the prompts: such figures
don't show an answer that never ends.

`--dialogues` and `--tasks` show the alignment tax: whether the bare base predicts dialogues, and does tasks of lm-eval,
better than the adapter on it (Askell et al. 2021, arXiv:2112.00861; Ouyang et al. 2022, arXiv:2203.02155). Nothing is
trained. Everything runs on the one base in memory. Several processes share the held-out rows, and the first one prints.
"""

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

from qalign.cli import program, recipe_parser, run_parsed
from qalign.config.atomic import write_whole
from qalign.config.load import load
from qalign.config.paths import adapters_in
from qalign.config.recipe import Recipe
from qalign.config.stages import DPO, KTO, PPO, RL_STAGES, STAGES, Source
from qalign.data.formats import (
    Dialogue,
    Labelled,
    Message,
    PlainText,
    Preference,
    Prompt,
    Refused,
    dialogues,
    labelled_answers,
    preferences,
    prompts,
)
from qalign.data.rows import rows_hash
from qalign.errors import UserError, one_line
from qalign.model import lineage, origin
from qalign.reports.answers import evaluation_lines, print_answers, task_lines, verdict
from qalign.train.dataset import Intake, check_same_rows, rendered_at, rows_under
from qalign.train.processes.world import current
from qalign.train.run_folder import RunFolder, print_table

if TYPE_CHECKING:
    from qalign.judge.measures.held_out import Answered
    from qalign.model.base import Base

SHOWN_REFUSALS = 5
BEST_OF = "best_of"
ORDER = ("dpo", "kto", "ppo", "grpo", "sft", "reward")  # which of a recipe's stages is measured if none is named
READ = {"sft": dialogues, "reward": preferences, "dpo": preferences, "kto": labelled_answers} | dict.fromkeys(
    RL_STAGES, prompts
)
ROWS = dict.fromkeys(("reward", "dpo", "kto"), "pairs") | dict.fromkeys(RL_STAGES, "prompts") | {"sft": "dialogues"}

Figures = dict[str, Any]
Measured = tuple[Figures, "Answered | None", list[Refused]]


def report(
    recipe: Recipe,
    stage: str = "dpo",
    dialogues: str | None = None,
    tasks: Sequence[str] = (),
    limit: int | None = None,
) -> None:
    """Measure a run on its held-out rows before and after training, and say in words whether it helped."""
    run = RunFolder(recipe, "ppo" if stage == BEST_OF else stage, name=stage)
    _check_run(run, taxed=bool(dialogues or tasks))
    if stage == BEST_OF and not adapters_in(run.adapter):
        return _print_sampling(run)
    rows, refused = _held_out(run)
    others, world = _others(run, dialogues), current()
    origin.check(recipe.model)

    # Imported here, not above: torch takes seconds, and a bad recipe must not wait for it.
    from qalign.model.base import Role, load
    from qalign.rl.rewards import open_scorers
    from qalign.train.loop import facts_of

    named = None
    if tasks:
        from qalign.judge.measures.harness import Tasks

        named = Tasks(tasks)
    scorers = open_scorers(recipe, run) if run.stage in RL_STAGES else None
    hashes = {"held-out rows": rows_hash(rows), "--dialogues": rows_hash(others[1] if others else [])}
    hashes |= {str(f): lineage.adapter_hash(f) for f in (*adapters_in(run.adapter), *filter(None, [run.parent]))}
    world.connect(facts_of(run) | hashes | (scorers.identities if scorers else {}), "")
    base = world.in_turn(lambda: load(recipe.model, now=rendered_at(run)))
    if stage != "reward":
        _load_adapters(base, run)
    kind = "labelled" if isinstance(rows[0], Labelled) else run.stage if scorers is None else "ppo"
    known = {"sft": _sft, "reward": _reward, "ppo": _policy, "labelled": _labelled}
    measured: Callable[..., Measured] = known.get(kind, _pairs)
    figures, answered, unfit = measured(base, run, rows, scorers)
    figures = {"stage": stage, **figures}
    if others:
        from qalign.judge.measures.held_out import of_dialogues

        figures["tax"] = {"rows_of": others[0], **of_dialogues(base, _encoded(base, *others), Role.BASE)}
    _tell(run, figures, len(refused) + len(unfit), answered)
    if named:  # last, as a task may fail in many ways
        from qalign.judge.measures.harness import measure_tasks

        measured_by = measure_tasks(base, {"base": Role.BASE, "aligned": Role.POLICY}, named, limit)
        _keep(run, {**figures, "tasks": measured_by})
        print_table(f"{run.adapter} on tasks of lm-eval", [*task_lines(measured_by).items()])


# --- what is measured, and whether it can be --------------------------------------------------------------------------


def _check_run(run: RunFolder, *, taxed: bool) -> None:
    """Raises a `UserError` if there is no run, nothing held out, or the recipe isn't the one that the run was trained
    with, where that counts."""
    name, stage, settings = run.name, run.stage, run.settings
    is_sampled = name == BEST_OF and run.complete
    if not ((adapters_in(run.adapter) or is_sampled) and (run.path / "recipe.yaml").is_file()):
        raise UserError(f"{run.adapter}: there is no adapter yet; train it with {program(name)}")
    if not settings.has_held_out:
        none = f"there are no held-out {ROWS[stage]} to measure on"
        raise UserError(f"{stage}.eval_data: {none}; add them to the recipe, or `holdout`")
    if taxed and (stage == "reward" or not adapters_in(run.adapter)):
        raise UserError(f"--dialogues, --tasks: a run of {name} trains no policy, so it has no alignment tax")
    same = [f"{stage}.{key}" for key in ("start_from", "loss", "beta")]
    if settings.holdout:  # with other rows or another seed, what was trained on would count as held out
        same += ["seed", *(f"{stage}.{key}" for key in ("holdout", "eval_data", "limit", "split"))]
    for key in run.differences():  # with another base or reference than the run's, the figures would be wrong
        rewarded = key.startswith(("model.", f"{stage}.loss.", f"{stage}.divergence"))
        if rewarded or key in same or (settings.holdout and key.startswith(f"{stage}.data.")):
            raise UserError(f"{key}: {run.path} was trained with another; give the recipe that it was trained with")
    run.check_parent()


def _held_out(run: RunFolder) -> tuple[Sequence[Any], list[Refused]]:
    """The held-out rows, and the refused ones; rows that were trained on too are counted. KTO's answers as pairs where
    a prompt has a good and a bad one."""
    intake, read, settings = Intake(), READ[run.stage], run.settings
    rows, refused = rows_under("eval_data", settings, run.recipe.seed, read, intake)
    check_usable(f"{run.stage}.eval_data", len(rows), refused)
    if settings.holdout:
        check_same_rows(run, "eval_data", rows)
    else:
        rows_under("data", settings, run.recipe.seed, read, intake)
        print("".join(one_line(f"{name}: {text}") + "\n" for name, text in intake.notes() if name == "overlap"), end="")
    if isinstance(settings, KTO):
        rows = paired(rows) or rows
    return rows, refused


def _others(run: RunFolder, file: str | None) -> tuple[str, Sequence[Dialogue | PlainText]] | None:
    """(Where they are from, dialogues that show what the training cost elsewhere): those of `--dialogues`, else for
    what followed SFT the held-out ones of the recipe's SFT section; None if there are none."""
    settings, read = run.recipe.sft, READ["sft"]
    if file:
        rows, refused = read((Source(path=file),), "train", None, 0)
        check_usable(f"--dialogues {file}", len(rows), refused)
        return file, rows
    if settings and settings.has_held_out and run.stage not in ("sft", "reward"):
        return "sft.eval_data", rows_under("eval_data", settings, run.recipe.seed, read)[0]
    return None


def paired(rows: Sequence[Labelled]) -> list[Preference]:
    """Good and bad answers to the same prompt as pairs: the first good one with the first bad one, and so on."""
    answers: dict[str, dict[bool, list[tuple[Labelled, Message]]]] = {}
    for row in rows:
        sides = answers.setdefault(json.dumps([row.prompt, row.tools]), {True: [], False: []})
        for turn, good in zip(row.answers, row.desirable, strict=True):
            sides[good].append((row, turn))
    return [
        Preference(row.prompt, chosen, rejected, row.where, None, row.tools)
        for sides in answers.values()
        for (row, chosen), (_, rejected) in zip(sides[True], sides[False], strict=False)
    ]


def check_usable(source: str, used: int, refused: Sequence[Refused], expected: str = "") -> None:
    """Prints the first refused rows with their reasons on stderr. Raises a `UserError` if no row is usable, which ends
    with what was `expected`."""
    for row in refused[:SHOWN_REFUSALS]:
        print(one_line(f"refused: {row.where}: {row.reason}"), file=sys.stderr)
    if not used:
        raise UserError(f"{source}: holds no usable rows ({len(refused)} were refused){expected}")


def _load_adapters(base: "Base", run: RunFolder) -> None:
    """Puts the policy on the base, and beside it the adapter that it started from."""
    from qalign.model.base import Role

    for key, folder in (("the run", str(run.adapter)), (f"{run.stage}.start_from", run.parent)):
        if folder:
            lineage.check(key, folder, base.lineage(run.stage))
    base.load_adapter(Role.POLICY, str(run.adapter), trainable=False)
    if run.parent:
        base.load_reference(run.parent)


# --- the measures of the stages: figures, answers to show, and rows that don't fit ------------------------------------


def _pairs(base: "Base", run: RunFolder, rows: Sequence[Preference], _: Any) -> Measured:
    from qalign.data.tokenize import encode_pairs
    from qalign.judge.measures.held_out import greedy_answers, of_pairs

    settings = cast(DPO | KTO, run.settings)
    pairs, unfit = encode_pairs(base.template, rows, base.max_length)
    check_usable(f"{run.stage}.eval_data", len(pairs), unfit)
    usable = {pair.where for pair in pairs}
    figures: Figures = {**of_pairs(base, pairs, settings), "loss": settings.loss}
    asked = [Prompt(row.prompt, row.where, {}, row.tools) for row in rows if row.where in usable]
    return _with_answers(figures, greedy_answers(base, asked), unfit)


def _labelled(base: "Base", run: RunFolder, rows: Sequence[Labelled], _: Any) -> Measured:
    from qalign.data.tokenize import encode_labelled
    from qalign.judge.measures.held_out import greedy_answers, of_labelled

    settings = cast(KTO, run.settings)
    answers, unfit = encode_labelled(base.template, rows, base.max_length)
    check_usable(f"{run.stage}.eval_data", len(answers), unfit)
    asked = [Prompt(row.prompt, row.where, {}, row.tools) for row in rows]
    return _with_answers(of_labelled(base, answers, settings), greedy_answers(base, asked), unfit)


def _sft(base: "Base", run: RunFolder, rows: Sequence[Dialogue | PlainText], _: Any) -> Measured:
    from qalign.judge.measures.held_out import greedy_answers, of_dialogues
    from qalign.model.base import Role

    figures = of_dialogues(base, _encoded(base, f"{run.stage}.eval_data", rows), Role.REFERENCE)
    asked = [Prompt(row.turns[:-1], row.where, {}, row.tools) for row in rows if isinstance(row, Dialogue)]
    return _with_answers(figures, greedy_answers(base, [row for row in asked if row.turns]), [])


def _encoded(base: "Base", source: str, rows: Sequence[Dialogue | PlainText]) -> Sequence[Any]:
    from qalign.data.tokenize import encode_dialogues

    found, unfit = encode_dialogues(base.template, rows, base.max_length)
    check_usable(source, len(found), unfit)
    return found


def _reward(base: "Base", run: RunFolder, rows: Sequence[Preference], _: Any) -> Measured:
    from qalign import reward
    from qalign.data.tokenize import encode_pairs
    from qalign.judge.measures.held_out import of_scores
    from qalign.model.adapters.members import load_rewards
    from qalign.model.base import Role

    pairs, unfit = encode_pairs(base.template, rows, base.max_length)
    check_usable(f"{run.stage}.eval_data", len(pairs), unfit)
    model = load_rewards(base, "the run", Role.REWARD, adapters_in(run.adapter))
    figures, scores = of_scores(base, model, pairs)
    trust = current().first(lambda: reward.trust(pairs, scores, run.path / "evaluation.png"))
    return {**figures, **trust}, None, unfit


def _policy(base: "Base", run: RunFolder, rows: Sequence[Prompt], scorers: Any) -> Measured:
    from qalign.data.collate import MicroBatchLimit
    from qalign.data.tokenize import encode_questions
    from qalign.judge.measures.held_out import BATCH_TOKENS, of_policy
    from qalign.model.generation import Sampling, TransformersEngine, stop_ids_of
    from qalign.rl.ppo_setup import Setup
    from qalign.train.dataset import StageRows

    settings = cast(PPO, run.settings)
    # One position is left for the end of turn that a cut answer gets before a reward adapter scores it.
    asked, unfit = encode_questions(base.template, rows, base.max_length - 1 - settings.max_new_tokens)
    check_usable(f"{run.stage}.eval_data", len(asked), unfit)
    sampling = Sampling(settings.max_new_tokens, settings.temperature, stop_ids_of(base.template))
    held_out, limit = StageRows([], asked, [], {}), MicroBatchLimit(tokens=BATCH_TOKENS)
    setup = Setup(base, base.lineage(run.stage), scorers, TransformersEngine(), sampling, held_out)
    current().in_turn(lambda: scorers.load_models(base))
    scorers.attach(base, limit)
    return *of_policy(setup, limit), unfit


def _with_answers(figures: Figures, answered: "Answered", unfit: list[Refused]) -> Measured:
    return figures | ({"answers": answered.figures} if answered.prompts else {}), answered, unfit


# --- what is said -----------------------------------------------------------------------------------------------------


def _keep(run: RunFolder, figures: Figures) -> None:
    if current().is_first:
        write_whole(run.path / "evaluation.json", json.dumps(figures, indent=1) + "\n")


def _tell(run: RunFolder, figures: Figures, left_out: int, answered: "Answered | None") -> None:
    _keep(run, figures)
    rows = "answers" if "rewards" in figures else ROWS[run.stage]
    count, more = figures.get("rows") or figures[rows], f", {left_out} more were refused" if left_out else ""
    said = [("verdict" if number == 0 else "", sentence) for number, sentence in enumerate(verdict(figures))]
    lines = evaluation_lines(figures, has_parent=bool(run.parent))
    print_table(f"{run.adapter} on {count} held-out {rows}{more}", [*lines.items(), *said])
    if answered:
        print_answers(answered.prompts, answered.answers)


def _print_sampling(run: RunFolder) -> None:
    """What sampling alone gained: the curve of a best_of run without rounds, which trained nothing."""
    points = json.loads(run.summary.read_text(encoding="utf-8"))["held_out"]
    if not points:
        raise UserError(f"{run.path}: measured no held-out prompts; run it again with {run.stage}.eval_data")
    _keep(run, {"stage": BEST_OF, "held_out": points})
    first, last, judged = points[0], points[-1], ""
    if last["judge"] is not None:
        judged = f", judge {first['judge']:+.3f} → {last['judge']:+.3f}"
    said = f"{first['proxy']:+.3f} → {last['proxy']:+.3f}{judged}: the best of 1 → of {last['n']}"
    lines = [("reward", said), ("KL", f"at most {last['kl_nats']:.2f} nats from the policy that sampled")]
    nothing = "it trained nothing; measure the run that trains on its pairs, or train here with rounds=3"
    print_table(f"{run.path} on held-out prompts", [*lines, ("verdict", nothing)])


def _default_stage(recipe: Recipe) -> str:
    """The first stage that the recipe has and that has been run, else the first that it has."""
    has = [stage for stage in ORDER if getattr(recipe, stage)]
    return next((stage for stage in has if RunFolder(recipe, stage).complete), has[0] if has else ORDER[0])


def main(words: Sequence[str] | None = None) -> None:
    parser = recipe_parser("evaluate", report.__doc__)
    parser.add_argument("--stage", choices=(*STAGES, BEST_OF), help=f"the run to measure (default: {', '.join(ORDER)})")
    parser.add_argument("--dialogues", metavar="FILE", help="held-out dialogues that show the alignment tax")
    parser.add_argument("--tasks", metavar="NAME,…", help="tasks of lm-eval, or .yaml files of your own, for the tax")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N questions of each task only")

    def work(args: argparse.Namespace) -> None:
        stage = args.stage or _default_stage(load(args.recipe, args.overrides, files_of=("model",)))
        tasks = [name for name in (args.tasks or "").split(",") if name]
        if tasks and importlib.util.find_spec("lm_eval") is None:
            raise UserError("--tasks: lm-eval is not installed; pip install 'qalign[tasks]'")
        if args.limit is not None and args.limit < 1:
            raise UserError(f"--limit: {args.limit} is not a number of questions; expected at least 1")
        recipe = load(args.recipe, args.overrides, "ppo" if stage == BEST_OF else stage)
        report(recipe, stage, args.dialogues, tasks, args.limit)

    run_parsed(parser, work, words, shared=True)


if __name__ == "__main__":
    main()
