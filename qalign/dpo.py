"""Direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290) and its family.

    python -m qalign.dpo RECIPE [key=value …] [--resume | --overwrite]

Where this departs from the paper: the policy is a LoRA adapter on a frozen 4-bit base, and the reference is the same
base with that adapter off, or with a frozen copy of the adapter that the policy started from (`start_from: sft`), so
one copy of the weights serves both.
"""

from qalign.cli import stage_command
from qalign.config.recipe import Recipe
from qalign.config.stages import REFERENCE_FREE
from qalign.train.run_folder import RunFolder


def train(recipe: Recipe, run: RunFolder) -> None:
    """Align a base model to preference pairs and save the adapter."""
    # Imported here, not above: torch takes seconds, and a bad recipe must not wait for it.
    from transformers import set_seed

    from qalign.data.formats import preferences
    from qalign.data.tokenize import encode_pairs
    from qalign.model import lineage
    from qalign.model.base import Role, load
    from qalign.model.reference import CachedReferenceLogps, ReferenceLogps
    from qalign.train.callbacks import RunCallback
    from qalign.train.dataset import read_rows
    from qalign.train.loop import (
        PartialCheckpointing,
        micro_batch,
        plan,
        print_header,
        train_to_the_end,
        training_config,
    )
    from qalign.train.pair_trainers import PreferenceTrainer

    settings, parent = recipe.dpo, run.parent
    base = load(recipe.model)
    origin = base.lineage(run.stage, parent)
    pairs, eval_pairs, refused, rows = read_rows(run, base.tokenizer, preferences, encode_pairs)

    set_seed(recipe.seed)
    if parent:
        lineage.check("dpo.start_from", parent, origin)
        base.load_adapter(Role.POLICY, parent, trainable=True)
        base.load_reference(parent)
    else:
        base.add_adapter(Role.POLICY, recipe.lora)
    if settings.loss in REFERENCE_FREE:
        references, reference = ReferenceLogps(), "none: this loss needs no reference"
    else:
        references = CachedReferenceLogps(base, parent) if settings.reference == "cached" else ReferenceLogps()
        reference = base.reference

    planned = plan(run, base, max(map(base.tokens_taken, pairs)))
    micro = micro_batch(settings, planned)
    at_once = f"{micro}{planned}"
    args = training_config(run, base, settings.batch_size, planned.checkpointed_layers)
    run.begin(refused)
    checkpoint, tokens_before = run.rewind()
    journal = RunCallback(run, tokens_before)
    trainer = PreferenceTrainer(
        base,
        settings,
        references,
        args,
        micro,
        pairs,
        eval_pairs or None,
        callbacks=(journal, PartialCheckpointing(planned)),
    )
    loss = f"{settings.loss}, beta {settings.beta:g}"
    print_header(
        run, base, trainer, at_once, checkpoint, rows, reference=reference, loss=loss, prompts=base.layout_in_words
    )
    facts = train_to_the_end(trainer, run, journal, checkpoint, at_once)
    references.save()
    base.save_adapter(Role.POLICY, run.adapter)
    lineage.write(run.adapter, origin)
    run.finish(
        f"python -m qalign.evaluate {run.command_line}", base.origin.source, reference=reference, rows=rows, **facts
    )


if __name__ == "__main__":
    stage_command("dpo", train)
