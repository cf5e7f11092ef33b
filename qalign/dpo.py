"""Direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290) and its family.

    python -m qalign.dpo RECIPE [key=value …] [--resume | --overwrite | --check]

Departure from the paper: the policy is a LoRA adapter on a frozen 4-bit base. The reference is the same base with that
adapter off, or with a frozen copy of the adapter that the policy started from (`start_from: sft`), so one copy of the
weights serves both.
"""

import shlex
from functools import partial
from typing import cast

from qalign.cli import program, stage_command
from qalign.config.recipe import Recipe
from qalign.config.stages import DPO
from qalign.data.formats import preferences
from qalign.train.dataset import ReadRows, encode_rows, read_rows
from qalign.train.run_folder import RunFolder


def raw_rows(run: RunFolder) -> ReadRows:
    """What the stage reads."""
    return read_rows(run, preferences)


def train(recipe: Recipe, run: RunFolder) -> None:
    """Align a base model to preference pairs and save the adapter."""
    read = raw_rows(run)

    # Imported here, not above: torch takes seconds, and a bad recipe or bad data must not wait for it.
    from qalign.data.store.tokens import outlines
    from qalign.data.tokenize import encode_pairs
    from qalign.model.reference import CachedReferenceLogps, ReferenceLogps
    from qalign.reports.preference_monitor import PreferenceMonitor
    from qalign.train.loop import Session, load_base
    from qalign.train.trainers.policy import PreferenceTrainer

    settings, base = cast(DPO, run.settings), load_base(run)
    pairs = encode_rows(run, base.template, read, encode_pairs)
    session = Session(run, base, pairs)
    session.add_adapter(reference=settings.needs_reference)
    cached = settings.needs_reference and settings.reference == "cached"
    references = CachedReferenceLogps(base, run.parent) if cached else ReferenceLogps()
    reference = base.reference if settings.needs_reference else "none: this loss needs no reference"

    session.plan(max(map(base.tokens_taken, outlines(pairs.train))))
    trainer = session.trainer(
        lambda args, *data: PreferenceTrainer(base, settings, references, args, session.micro, *data)
    )
    monitor = PreferenceMonitor(session, trainer, read.rows["eval_data"][0])
    said = {"reference": reference, "loss": settings.loss_in_words, "prompts": base.layout_in_words}
    facts = session.train(trainer, monitor, **said)
    facts |= monitor.report()
    trainer.save_references()
    measure = f"{program('evaluate')} {run.command_line}" if settings.has_held_out else None
    session.finish(measure or f"{program('page')} {shlex.quote(str(run.path))}", reference=reference, **facts)


main = partial(stage_command, "dpo", train, raw_rows)

if __name__ == "__main__":
    main()
