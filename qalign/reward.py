"""A reward model: learn to score answers from pairs (Bradley and Terry 1952; Ouyang et al. 2022, arXiv:2203.02155).

    python -m qalign.reward RECIPE [key=value …] [--resume | --overwrite | --check]

The model is a LoRA adapter on the 4-bit base and a linear head in float32; the score is read at the last token of the
answer's turn. It ends with a report on held-out pairs, `reward_report.png`: whether to trust the model.
"""

import shlex
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from qalign.cli import program, stage_command
from qalign.config.recipe import Recipe
from qalign.config.stages import Reward
from qalign.data.formats import preferences, scored_preferences
from qalign.errors import scores_not_finite
from qalign.train.dataset import ReadRows, encode_rows, read_rows
from qalign.train.run_folder import RunFolder, print_table

if TYPE_CHECKING:
    from torch import Tensor


def raw_rows(run: RunFolder) -> ReadRows:
    """What the stage reads."""
    return read_rows(run, scored_preferences if cast(Reward, run.settings).margin else preferences)


def train(recipe: Recipe, run: RunFolder) -> None:
    """Train a reward model on preference pairs, save it, and report whether to trust it."""
    settings = cast(Reward, run.settings)
    read = raw_rows(run)

    # Imported here, not above: torch takes seconds, and a bad recipe or bad data must not wait for it.
    from qalign.data.store.tokens import outlines
    from qalign.data.tokenize import encode_pairs, pad_for_scores
    from qalign.model.adapters.members import answer_scores
    from qalign.model.base import Role
    from qalign.model.memory.shard import shards_of
    from qalign.train.loop import Session, load_base
    from qalign.train.trainers.reward import EnsembleTrainer, RewardModelTrainer

    base = load_base(run)
    base.lm.set_output_embeddings(None)  # a head of its own takes its place
    pairs = encode_rows(run, base.template, read, encode_pairs)
    session = Session(run, base, pairs, Role.REWARD)
    session.add_adapter()
    session.plan(max(map(base.tokens_taken, outlines(pairs.train))))
    kind = EnsembleTrainer if settings.members > 1 else RewardModelTrainer
    trainer = session.trainer(lambda args, *data: kind(base, settings, args, session.micro, *data))

    hidden = base.lm.config.get_text_config().hidden_size
    head = f"{hidden:,} weights, unquantised, in float32, read at the end of the answer's turn"
    loss = "Bradley-Terry" + (", with the raters' margins" if settings.margin else "")
    loss += f", centred with {settings.centering:g}" if settings.centering else ""
    more: dict[str, str] = (
        {"members": _members_in_words(settings, trainer.ensemble.reason)} if settings.members > 1 else {}
    )
    more |= {"head": head, "loss": loss, "prompts": base.layout_in_words}
    facts = session.train(trainer, None, **more)
    if pairs.held_out and (session.world.is_first or shards_of(base.lm)):
        of = trainer.ensemble if settings.members > 1 else Role.REWARD
        scores = answer_scores(base, of, pairs.held_out, session.micro, progress=True)
        if not scores.isfinite().all():
            raise scores_not_finite(base.precision)
        if session.world.is_first:
            facts |= trust(pairs.held_out, scores.view(len(scores), 2, -1), run.path / "reward_report.png")
    session.finish(
        f"{program('score')} {shlex.quote(str(run.path))} FILE.jsonl",
        pooling=f"the last token that is not {pad_for_scores(base.template)}: the end of the answer's turn",
        **facts,
    )


def _members_in_words(settings: Reward, reason: str | None) -> str:
    way = f"a forward pass each: {reason}" if reason else "one forward pass"
    return f"{settings.members}, each on a resample of the pairs and the last {settings.share:.0%} of the layers, {way}"


def trust(pairs: Sequence[Any], scores: "Tensor", picture: Path) -> dict:
    """Measures, draws and prints how good the scores `(pairs, 2, members)` of held-out pairs are; returns figures for
    the summary, `trust` and `warning`."""
    from qalign.reports import reward_report

    scored = [
        reward_report.ScoredPair(one, other, len(p.chosen_ids), len(p.rejected_ids), p.margin, p.chosen_probability)
        for p, (one, other) in zip(pairs, scores.mean(dim=-1).tolist(), strict=True)
    ]
    gaps = scores[:, 0] - scores[:, 1]
    figures = reward_report.measure(scored)
    if gaps.shape[1] > 1:
        figures["members"] = reward_report.members(gaps.tolist(), [p.where for p in pairs], scored)
    reward_report.draw(scored, figures, picture)
    warning = reward_report.warning(figures)
    low, high = figures["accuracy_interval"]
    longer, shorter = figures["length_accuracy"], figures["short_accuracy"]
    correlation = figures["length_correlation"]
    lines = {
        "accuracy": f"{figures['accuracy']:.1%} (95%: {low:.1%} to {high:.1%}); a coin has 50%",
        "length judge": f"{longer:.1%} for a judge that picks the longer answer, {shorter:.1%} for the shorter",
        "length": "no correlation" if correlation is None else f"correlation with the score {correlation:+.2f}",
        "calibration": f"claimed and observed win rates are {figures['calibration_error']:.1%} apart on average",
        **(reward_report.members_in_words(figures["members"]) if "members" in figures else {}),
        "picture": picture,
    }
    print_table(f"whether to trust it, on {len(scored)} held-out pairs", lines.items())
    if warning:
        print(f"warning: {warning}\n", flush=True)
    return {"trust": figures, "warning": warning}


main = partial(stage_command, "reward", train, raw_rows)

if __name__ == "__main__":
    main()
