"""Kahneman-Tversky optimisation (Ethayarajh et al. 2024, arXiv:2402.01306): learns from single answers, good or bad.

    python -m qalign.kto RECIPE [key=value …] [--resume | --overwrite | --check]

Thumbs up and down are enough: no answer needs another one to the same prompt. Policy and reference are as in
`qalign.dpo`. The KL estimate is over the whole optimiser step, whatever its micro-batches.
"""

import shlex
from functools import partial
from typing import cast

from qalign.cli import program, stage_command
from qalign.config.recipe import Recipe
from qalign.config.stages import KTO
from qalign.data.formats import labelled_answers
from qalign.errors import UserError
from qalign.train.dataset import ReadRows, encode_rows, read_rows
from qalign.train.run_folder import RunFolder

BALANCED = (1.0, 4 / 3)  # λ_D n_D / (λ_U n_U), eq. 8 of the paper


def raw_rows(run: RunFolder) -> ReadRows:
    """What the stage reads."""
    return read_rows(run, labelled_answers)


def train(recipe: Recipe, run: RunFolder) -> None:
    """Align a base model to answers that are labelled good or bad, and save the adapter."""
    read = raw_rows(run)
    _check_labels([good for row in read.rows["data"][0] for good in row.desirable])

    # Imported here, not above: torch takes seconds, and a bad recipe or bad data must not wait for it.
    from qalign.data.store.tokens import outlines
    from qalign.data.tokenize import encode_labelled
    from qalign.model.reference import CachedReferenceLogps, ReferenceLogps
    from qalign.reports.preference_monitor import PreferenceMonitor
    from qalign.train.loop import Session, load_base
    from qalign.train.trainers.policy import LabelTrainer

    settings, base = cast(KTO, run.settings), load_base(run)
    answers = encode_rows(run, base.template, read, encode_labelled)
    session = Session(run, base, answers)
    session.add_adapter(reference=True)
    cached = settings.reference == "cached"
    references = CachedReferenceLogps(base, run.parent, answers=1) if cached else ReferenceLogps()

    session.plan(max(map(base.tokens_taken, outlines(answers.train))))
    trainer = session.trainer(lambda args, *data: LabelTrainer(base, settings, references, args, session.micro, *data))
    good = sum(row.desirable for row in outlines(answers.train))
    padded = base.padding_reason and f"padded: {type(base.lm).__name__} {base.padding_reason}"
    monitor = PreferenceMonitor(session, trainer, read.rows["eval_data"][0])
    facts = session.train(
        trainer,
        monitor,
        reference=base.reference,
        loss=f"{settings.loss}, beta {settings.beta:g}",
        answers=balance_in_words(settings, good, len(answers.train) - good),
        prompts=padded or "packed without padding",
    )
    if answers.held_out and not settings.eval_every:  # otherwise they were measured after the last step
        trainer.evaluate()
    facts |= monitor.report()
    trainer.save_references()
    measured = [line for line in trainer.state.log_history if "eval_loss" in line]
    figures = {name: value for line in measured[-1:] for name, value in line.items() if name.startswith("eval_")}
    flag = " --stage kto" if recipe.dpo else ""
    measure = f"{program('evaluate')} {run.command_line}{flag}" if answers.held_out else None
    session.finish(
        measure or f"{program('page')} {shlex.quote(str(run.path))}",
        reference=base.reference,
        desirable=good,
        undesirable=len(answers.train) - good,
        **({"measured": figures} if figures else {}),
        **facts,
    )


def _check_labels(labels: list[bool]) -> None:
    if len({*labels}) == 1:
        only, other = ("good", "bad") if labels[0] else ("bad", "good")
        raise UserError(f"kto.data: all {len(labels):,} answers are {only}; KTO needs {other} ones too")


def balance_in_words(settings: KTO, good: int, bad: int) -> str:
    """How many answers are good and bad, and the weights to set where their shares of the loss are not between 1:1 and
    4:3, as section 4.2 of the paper advises."""
    weights = settings.desirable_weight, settings.undesirable_weight
    words = f"{good:,} good, {bad:,} bad, with weights {weights[0]:g} and {weights[1]:g}"
    low, high = BALANCED
    share = good * weights[0] / (bad * weights[1]) if bad * weights[1] else 0
    if not share or low * 0.99 <= share <= high * 1.01:
        return words
    if good < bad:
        key, least, most = "desirable_weight", low * weights[1] * bad / good, high * weights[1] * bad / good
    else:
        key, least, most = "undesirable_weight", weights[0] * good / bad / high, weights[0] * good / bad / low
    return f"{words}: unbalanced; set kto.{key} between {least:.2f} and {most:.2f}"


main = partial(stage_command, "kto", train, raw_rows)

if __name__ == "__main__":
    main()
