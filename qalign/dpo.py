"""Direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290) and its family.

    python -m qalign.dpo RECIPE [key=value …] [--resume | --overwrite]

Where this departs from the paper: the policy is a LoRA adapter on a frozen 4-bit base, and the reference is the same
base with that adapter off (or a frozen copy of the adapter that the policy started from), so one copy of the weights
serves both; no SFT on the chosen answers comes first unless the recipe starts from an adapter that did it.
"""

from qalign.recipe import REFERENCE_FREE, Recipe, Source
from qalign.run import RunFolder, print_table, stage_command


def train(recipe: Recipe, run: RunFolder) -> None:
    """Align a base model to preference pairs and save the adapter."""
    # Imported here, not above: torch takes seconds, and a bad recipe must not wait for it.
    from transformers import set_seed

    from qalign.base import load
    from qalign.journal import Journal
    from qalign.trainer import PreferenceTrainer, planned_steps, train_to_the_end, training_config

    settings = recipe.dpo
    base = load(recipe.model)
    pairs, refused = read_pairs(recipe, base.tokenizer, settings.data, settings.limit)
    run.check_refused("dpo.data", refused, len(pairs))
    eval_pairs, refused_held_out = read_pairs(recipe, base.tokenizer, settings.eval_data or ())
    if settings.eval_data:
        run.check_refused("dpo.eval_data", refused_held_out, len(eval_pairs))
    refused += refused_held_out

    set_seed(recipe.seed)
    if settings.start_from:
        base.load_policy(settings.start_from, trainable=True)
        base.load_reference(settings.start_from)
    else:
        base.add_policy(recipe.lora)
    reference = "none: this loss needs no reference" if settings.loss in REFERENCE_FREE else base.reference

    args = training_config(recipe, run, base, pairs)
    run.begin(refused)
    checkpoint, tokens_seen = run.rewind()
    callbacks = (Journal(run, tokens_seen),)
    trainer = PreferenceTrainer(base, settings, args, pairs, eval_pairs or None, tokens_seen, callbacks)

    trainable, size = base.count_parameters()
    rows = {
        "used": len(pairs),
        "held_out": len(eval_pairs),
        "refused": len(refused),
        "shortened": sum(pair.dropped_turns > 0 for pair in pairs),
    }
    print_table(
        f"qalign dpo → {run.path}",
        [
            ("model", f"{recipe.model.base} ({size / 1e6:,.0f} M parameters)"),
            ("held in", f"{recipe.model.quantization}, computing in {base.precision}"),
            ("chat template", base.template),
            ("trainable", f"{trainable:,} adapter parameters ({trainable / size:.2%} of the base), in float32"
             + (f", a copy of {settings.start_from}" if settings.start_from else "")),
            ("reference", reference),
            ("loss", f"{settings.loss}, beta {settings.beta:g}"),
            ("rows", ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in rows.items())),
            ("steps", f"{planned_steps(settings, len(pairs)):,}, each of {settings.batch_size} pairs"
             f", {args.per_device_train_batch_size} at a time"),
            *([("resuming", checkpoint or "from the beginning: no checkpoint was written")] if run.resume else []),
        ],
    )  # fmt: skip
    speed = train_to_the_end(trainer, run, checkpoint)
    base.save_policy(run.adapter)
    run.finish(f"python -m qalign.evaluate {run.command_line}", base.source, reference=reference, rows=rows, **speed)


def read_pairs(recipe: Recipe, tokenizer, sources: tuple[Source, ...], limit: int | None = None):
    """Preference rows as ids: (pairs, refused rows)."""
    from qalign.rows import preferences
    from qalign.tokens import encode_pairs

    rows, unread = preferences(sources, recipe.dpo.split, limit, recipe.seed)
    pairs, unfit = encode_pairs(tokenizer, rows, recipe.model.max_length, recipe.model.chat_template_kwargs)
    return pairs, unread + unfit


if __name__ == "__main__":
    stage_command("dpo", train)
