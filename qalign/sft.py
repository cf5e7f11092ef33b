"""Supervised fine-tuning: learn to give the answers of example dialogues.

    python -m qalign.sft RECIPE [key=value …] [--resume | --overwrite | --check]

TRL's `SFTTrainer` runs it on token ids made by qalign: only the assistant's turns are supervised, each with its end of
turn, whether or not the chat template marks them. Departures from TRL: adapters stay float32 on a 4-bit base, nothing
is computed on padding, micro-batches are alike in tokens, and the output layer runs at supervised positions alone.
"""

import shlex
from functools import partial
from typing import cast

from qalign.cli import program, stage_command
from qalign.config.recipe import Recipe
from qalign.config.stages import SFT
from qalign.data.formats import dialogues
from qalign.errors import UserError
from qalign.train.dataset import ReadRows, encode_rows, read_rows
from qalign.train.run_folder import RunFolder


def raw_rows(run: RunFolder) -> ReadRows:
    """What the stage reads."""
    return read_rows(run, dialogues)


def train(recipe: Recipe, run: RunFolder) -> None:
    """Teach a base model to answer as in example dialogues and save the adapter."""
    read = raw_rows(run)

    # Imported here, not above: torch takes seconds, and a bad recipe or bad data must not wait for it.
    from qalign.data.store.tokens import outlines, supervised_tokens
    from qalign.data.tokenize import encode_dialogues
    from qalign.train.loop import Session, load_base
    from qalign.train.trainers.sft import SupervisedTrainer

    settings, base = cast(SFT, run.settings), load_base(run)
    if settings.packing and base.padding_reason:
        raise UserError(f"sft.packing: {type(base.lm).__name__} {base.padding_reason}; set it to false")
    rows = encode_rows(run, base.template, read, encode_dialogues)
    session = Session(run, base, rows)
    session.add_adapter()
    session.plan(recipe.model.max_length if settings.packing else max(map(len, outlines(rows.train))))
    trainer = session.trainer(
        lambda args, *data: SupervisedTrainer(base, args, session.micro, *data),
        packing=settings.packing,
        packing_strategy="bfd",
        eval_packing=False,
        neftune_noise_alpha=settings.neftune_alpha,
        router_aux_loss_coef=0.0,  # TRL would add the router loss of the base's config to what is logged as the loss
    )

    supervised, tokens = supervised_tokens(rows.train), sum(map(len, outlines(rows.train)))
    packed = f"{len(rows.train):,} sequences in {len(trainer.train_dataset):,} rows" if settings.packing else "none"
    loss = f"on {supervised:,} of {tokens:,} tokens: the assistant's turns"
    facts = session.train(trainer, loss=loss, packing=packed)
    if rows.held_out and not settings.eval_every:  # otherwise they were measured after the last step
        trainer.evaluate()
    following = [f"{program(stage)} {run.command_line}" for stage in recipe.stages if stage != "sft"]
    session.finish(
        [*following, f"{program('export')} {shlex.quote(str(run.path))} --to merged"][0],
        supervised_tokens=supervised,
        **facts,
    )


main = partial(stage_command, "sft", train, raw_rows)

if __name__ == "__main__":
    main()
