"""Supervised fine-tuning: learn to give the answers of example dialogues.

    python -m qalign.sft RECIPE [key=value …] [--resume | --overwrite]

TRL's `SFTTrainer` runs it, on ids that qalign made: supervised are the assistant's turns alone, each with its end of
turn, whether or not the chat template marks them. Where this departs from TRL: adapters stay float32 on a 4-bit base.
"""

from qalign.cli import stage_command
from qalign.config.recipe import Recipe
from qalign.errors import UserError
from qalign.train.run_folder import RunFolder


def train(recipe: Recipe, run: RunFolder) -> None:
    """Teach a base model to answer as in example dialogues and save the adapter."""
    # Imported here, not above: torch takes seconds, and a bad recipe must not wait for it.
    from transformers import set_seed

    from qalign.data.formats import dialogues
    from qalign.data.tokenize import IGNORED, encode_dialogues
    from qalign.model import lineage
    from qalign.model.base import Role, load
    from qalign.train.callbacks import RunCallback
    from qalign.train.dataset import read_rows
    from qalign.train.loop import (
        PartialCheckpointing,
        micro_batch_size,
        plan,
        print_header,
        train_to_the_end,
        training_config,
    )
    from qalign.train.sft_trainer import SupervisedTrainer

    settings, parent = recipe.sft, run.parent
    base = load(recipe.model)
    if settings.packing:
        check_packing(base.lm)
    origin = base.lineage(run.stage, parent)
    sequences, held_out, refused, rows = read_rows(run, base.tokenizer, dialogues, encode_dialogues)

    set_seed(recipe.seed)
    if parent:
        lineage.check("sft.start_from", parent, origin)
        base.load_adapter(Role.POLICY, parent, trainable=True)
    else:
        base.add_adapter(Role.POLICY, recipe.lora)

    longest = recipe.model.max_length if settings.packing else max(map(len, sequences))
    planned = plan(run, base, longest)
    micro = micro_batch_size(settings, planned, longest)
    args = training_config(
        run,
        base,
        micro,
        planned.checkpointed_layers,
        packing=settings.packing,
        packing_strategy="bfd",
        eval_packing=False,
        neftune_noise_alpha=settings.neftune_alpha,
    )
    run.begin(refused)
    checkpoint, tokens_before = run.rewind()
    journal = RunCallback(run, tokens_before)
    trainer = SupervisedTrainer(
        base, args, sequences, held_out or None, callbacks=(journal, PartialCheckpointing(planned))
    )
    learned = sum(label != IGNORED for row in sequences for label in row.labels)
    loss = f"on {learned:,} of {sum(map(len, sequences)):,} tokens: the assistant's turns"
    packed = f"{len(sequences):,} sequences in {len(trainer.train_dataset):,} rows" if settings.packing else "none"
    at_once = f"{micro} at a time{planned}"
    print_header(run, base, trainer, at_once, checkpoint, rows, loss=loss, packing=packed)
    facts = train_to_the_end(trainer, run, journal, checkpoint, at_once)
    base.save_adapter(Role.POLICY, run.adapter)
    lineage.write(run.adapter, origin)
    if held_out and not settings.eval_every:  # else the loop has measured them after its last step
        trainer.evaluate()  # the journal prints and keeps it
    following = [f"python -m qalign.{stage} {run.command_line}" for stage in recipe.stages if stage != "sft"]
    next_command = (following or [f"python -m qalign.merge {run.path}"])[0]
    run.finish(next_command, base.origin.source, rows=rows, supervised_tokens=learned, **facts)


def check_packing(lm) -> None:
    """Makes sure that dialogues packed into one row don't see each other: what a model makes of the second must not
    change with the first. Some families take no notice of positions that begin anew (gpt-oss, Falcon, OPT), others
    carry a state along (Mamba).

    Raises:
        UserError: they see each other, or this family can't be given packed rows.
    """
    import torch
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    found, family = [], type(lm).__name__
    for first in (range(8), range(8, 16)):
        batch = collate([{"input_ids": [*first, *range(16, 24)], "seq_lengths": [8, 8]}])
        inputs = {key: value.to(lm.device) if torch.is_tensor(value) else value for key, value in batch.items()}
        del inputs["labels"]
        try:
            with torch.no_grad():
                found.append(lm(**inputs, use_cache=False).logits[0, 8:].float())
        except (TypeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"sft.packing: {family} can't be given packed rows; set it to false ({reason})") from None
    if (found[0] - found[1]).abs().max() > 0.01 * found[0].abs().max():  # exactly 0, but for experts and int8
        raise UserError(f"sft.packing: in {family} packed dialogues would see each other; set it to false")


if __name__ == "__main__":
    stage_command("sft", train)
