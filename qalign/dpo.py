"""Direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290) and its family.

    python -m qalign.dpo RECIPE [key=value …] [--resume | --overwrite]

Where this departs from the paper: the policy is a LoRA adapter on a frozen 4-bit base, and the reference is the same
base with that adapter off (or a frozen copy of the adapter that the policy started from), so one copy of the weights
serves both; no SFT on the chosen answers comes first unless the recipe starts from an adapter that did it.
"""

import time

from qalign.recipe import REFERENCE_FREE, Recipe, Source
from qalign.run import RunFolder, Stopped, print_table, stage_command


def train(recipe: Recipe, run: RunFolder) -> None:
    """Align a base model to preference pairs and save the adapter."""
    # Imported here, not above: torch takes seconds, and a bad recipe must not wait for it.
    import torch
    from transformers import set_seed

    from qalign.base import load
    from qalign.errors import UserError
    from qalign.trainer import Journal, PreferenceTrainer, peak_bytes, planned_steps, training_config

    settings = recipe.dpo
    base = load(recipe.model)
    pairs, refused = read_pairs(recipe, base.tokenizer, settings.data, settings.limit)
    eval_pairs, refused_held_out = read_pairs(recipe, base.tokenizer, settings.eval_data or ())
    refused += refused_held_out
    run.check_refused(refused, len(pairs) + len(eval_pairs))

    set_seed(recipe.seed)
    if settings.start_from:
        base.load_policy(settings.start_from, trainable=True)
        base.load_reference(settings.start_from)
    else:
        base.add_policy(recipe.lora)
    reference = "none: this loss needs no reference" if settings.loss in REFERENCE_FREE else base.reference

    run.begin(refused)
    checkpoint = run.last_checkpoint() if run.resume else None
    tokens_seen = run.rewind(int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0)
    args = training_config(recipe, run, base, pairs)
    trainer = PreferenceTrainer(base, settings, args, pairs, eval_pairs, tokens_seen, (Journal(run, tokens_seen),))

    trainable, size = base.count_parameters()
    shortened = sum(pair.dropped_turns > 0 for pair in pairs)
    print_table(
        f"qalign dpo → {run.path}",
        [
            ("model", f"{recipe.model.base} ({size / 1e6:,.0f} M parameters)"),
            ("held in", f"{recipe.model.quantization}, computing in {str(base.dtype).removeprefix('torch.')} "
             f"on {base.lm.device.type}"),
            ("template", base.template),
            ("trainable", f"{trainable:,} adapter parameters ({trainable / size:.2%}), in float32"),
            ("reference", reference),
            ("loss", f"{settings.loss}, beta {settings.beta:g}"),
            ("rows", f"{len(pairs):,} pairs ({shortened:,} with old turns dropped), {len(eval_pairs):,} held out, "
             f"{len(refused):,} refused" + (f" (see {run.path / 'rejected_rows.jsonl'})" if refused else "")),
            ("steps", f"{planned_steps(settings, len(pairs))} of {settings.batch_size} pairs, "
             f"{args.per_device_train_batch_size} at a time"),
            *([("resuming", checkpoint or "from the beginning: no checkpoint was written")] if run.resume else []),
        ],
    )  # fmt: skip

    began = time.monotonic()
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except torch.OutOfMemoryError as error:
        micro = args.per_device_train_batch_size
        fix = f"dpo.micro_batch_size={micro // 2}" if micro > 1 else f"model.max_length={recipe.model.max_length // 2}"
        raise UserError(
            f"out of GPU memory with {micro} pairs of up to {max(map(len, pairs))} tokens at a time: "
            f"{str(error).partition('. ')[0]}. Try {fix}"
        ) from None
    seconds = time.monotonic() - began
    if run.stop.number is not None:
        print(f"stopped at step {trainer.state.global_step}; the checkpoint is {run.last_checkpoint()}")
        print(f"go on with: python -m qalign.dpo {run.command_line} --resume", flush=True)
        raise Stopped(run.stop.number)

    base.save_policy(run.adapter)
    facts = run.finish(
        steps=trainer.state.global_step,
        train_seconds=round(seconds, 1),
        tokens=trainer.tokens_seen,
        tokens_per_second=round((trainer.tokens_seen - tokens_seen) / seconds, 1),
        peak_bytes=peak_bytes(),
        rows={"used": len(pairs), "held_out": len(eval_pairs), "refused": len(refused), "shortened": shortened},
        reference=reference,
    )
    run.write_model_card(base.source, reference, [(key, facts[key]) for key in ("steps", "tokens", "rows")])
    print_table(
        "done",
        [
            ("adapter", run.adapter),
            ("speed", f"{facts['tokens_per_second']:,.0f} tokens/s, {facts['peak_bytes'] / 2**30:.1f} GiB at most"),
            ("next", f"python -m qalign.evaluate {run.command_line}"),
        ],
    )


def read_pairs(recipe: Recipe, tokenizer, sources: tuple[Source, ...], limit: int | None = None):
    """Preference rows as ids: (pairs, refused rows)."""
    from qalign.rows import preferences
    from qalign.tokens import encode_pairs

    rows, unread = preferences(sources, recipe.dpo.split, limit, recipe.seed)
    pairs, unfit = encode_pairs(tokenizer, rows, recipe.model.max_length, recipe.model.chat_template_kwargs)
    return pairs, unread + unfit


if __name__ == "__main__":
    stage_command("dpo", train)
