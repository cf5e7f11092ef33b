"""A reward model: learn from pairs to score answers (Bradley and Terry 1952; Ouyang et al. 2022, arXiv:2203.02155).

    python -m qalign.reward RECIPE [key=value …] [--resume | --overwrite]

The model is a LoRA adapter on the 4-bit base and a linear head in float32, read at the
end of the answer's turn. It ends with a report on held-out pairs, `reward_report.png`: whether to trust it.
"""

from qalign.cli import stage_command
from qalign.config.recipe import Recipe
from qalign.train.run_folder import RunFolder, print_table

LOADING = """\
from peft import AutoPeftModelForSequenceClassification

# pad_token_id: the score is read at the last token that is no padding, which must be the end of the answer's turn.
model = AutoPeftModelForSequenceClassification.from_pretrained("{{folder}}", num_labels=1, pad_token_id={pad})"""


def train(recipe: Recipe, run: RunFolder) -> None:
    """Train a reward model on preference pairs, save it, and report whether to trust it."""
    # Imported here, not above: torch takes seconds, and a bad recipe must not wait for it.
    from transformers import set_seed

    from qalign.data.formats import preferences, scored_preferences
    from qalign.data.tokenize import encode_pairs
    from qalign.model import lineage
    from qalign.model.base import Role, load_classifier
    from qalign.reports import reward_report
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
    from qalign.train.pair_trainers import RewardModelTrainer

    settings, parent = recipe.reward, run.parent
    set_seed(recipe.seed)  # the head is drawn while loading
    base = load_classifier(recipe.model)
    origin = base.lineage(run.stage, parent)
    read = scored_preferences if settings.margin else preferences
    pairs, eval_pairs, refused, rows = read_rows(run, base.tokenizer, read, encode_pairs)

    set_seed(recipe.seed)
    if parent:
        lineage.check("reward.start_from", parent, origin)
        base.load_adapter(Role.REWARD, parent, trainable=True)
    else:
        base.add_adapter(Role.REWARD, recipe.lora)

    planned = plan(run, base, max(map(base.tokens_taken, pairs)))
    micro = micro_batch(settings, planned)
    at_once = f"{micro}{planned}"
    args = training_config(run, base, settings.batch_size, planned.checkpointed_layers)
    run.begin(refused)
    checkpoint, tokens_before = run.rewind()
    journal = RunCallback(run, tokens_before)
    trainer = RewardModelTrainer(
        base, settings, args, micro, pairs, eval_pairs or None, callbacks=(journal, PartialCheckpointing(planned))
    )
    loss = "Bradley-Terry" + (", with the raters' margins" if settings.margin else "")
    loss += f", centred with {settings.centering:g}" if settings.centering else ""
    head = f"{base.lm.config.hidden_size:,} weights, unquantised, in float32, read at the end of the answer's turn"
    print_header(run, base, trainer, at_once, checkpoint, rows, head=head, loss=loss, prompts=base.layout_in_words)
    facts = train_to_the_end(trainer, run, journal, checkpoint, at_once)
    base.save_adapter(Role.REWARD, run.adapter)
    lineage.write(run.adapter, origin)

    if eval_pairs:
        scored = score_pairs(base, eval_pairs, micro)
        figures = reward_report.measure(scored)
        reward_report.draw(scored, figures, run.path / "reward_report.png")
        facts |= {"trust": figures, "warning": reward_report.warning(figures)}
        print_table(f"whether to trust it, on {len(scored)} held-out pairs", _lines(figures, run))
        if facts["warning"]:
            print(f"warning: {facts['warning']}\n", flush=True)
    run.finish(
        f"python -m qalign.score {run.path} FILE.jsonl",
        base.origin.source,
        LOADING.format(pad=base.tokenizer.pad_token_id),
        rows=rows,
        pooling=f"the last token that is not {base.tokenizer.pad_token}: the end of the answer's turn",
        **facts,
    )


def score_pairs(base, pairs: list, limit) -> list:
    """The reward model's scores of `list[TokenPair]`, as `list[ScoredPair]` in the same order."""
    from qalign.model.base import Role
    from qalign.reports.reward_report import ScoredPair

    scores = base.answer_scores(Role.REWARD, pairs, limit).tolist()
    return [
        ScoredPair(chosen, rejected, len(pair.chosen_ids), len(pair.rejected_ids), pair.margin)
        for pair, (chosen, rejected) in zip(pairs, scores, strict=True)
    ]


def _lines(figures: dict, run: RunFolder) -> list[tuple[str, str]]:
    low, high = figures["accuracy_interval"]
    longer, shorter = figures["length_accuracy"], figures["short_accuracy"]
    correlation = figures["length_correlation"]
    return [
        ("accuracy", f"{figures['accuracy']:.1%} (95%: {low:.1%} to {high:.1%}); a coin has 50%"),
        ("length judge", f"{longer:.1%} for a judge that picks the longer answer, {shorter:.1%} for the shorter"),
        ("length", "no correlation" if correlation is None else f"correlation with the score {correlation:+.2f}"),
        ("calibration", f"claimed and observed win rates are {figures['calibration_error']:.1%} apart on average"),
        ("picture", str(run.path / "reward_report.png")),
    ]


if __name__ == "__main__":
    stage_command("reward", train)
