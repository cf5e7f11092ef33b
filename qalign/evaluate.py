"""Did the training help? Preference figures on held-out pairs before and after it, and answers side by side.

    python -m qalign.evaluate RECIPE [key=value …] [--stage kto]

One pass measures the bare base, the run's reference (if the run started from an SFT adapter, that adapter) and the
aligned adapter on the same batches. Then reference and aligned adapter answer some of the prompts: preference figures
don't show an answer that never ends. Nothing is trained.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from textwrap import indent, wrap
from typing import TYPE_CHECKING, Any, cast

from qalign.cli import recipe_parser, run_parsed
from qalign.config.atomic import write_whole
from qalign.config.load import load
from qalign.config.recipe import Recipe
from qalign.config.stages import DPO, KTO
from qalign.data.formats import Labelled, Message, Preference, Prompt, Refused, labelled_answers, preferences
from qalign.errors import UserError, one_line
from qalign.model import origin
from qalign.reports.answers import Answer, answers_of, measure_answers, spread, verdict
from qalign.train.dataset import Intake, check_same_rows, rendered_at, rows_under
from qalign.train.run_folder import RunFolder, print_table

if TYPE_CHECKING:
    from qalign.data.tokenize import TokenPair
    from qalign.model.base import Base

SIDE_BY_SIDE = 3
ANSWERED = 16  # held-out prompts that are answered before and after
SHOWN_LINES = 8  # of an answer
SHOWN_REFUSALS = 5
MAX_NEW_TOKENS = 128
STAGES = ("dpo", "kto")
BATCH_TOKENS = 2048


def report(recipe: Recipe, stage: str = "dpo") -> None:
    """Compare the base and the aligned model on a recipe's held-out pairs, and say in words whether it helped."""
    run, settings = RunFolder(recipe, stage), cast(DPO | KTO, getattr(recipe, stage))
    if not ((run.adapter / "adapter_config.json").is_file() and (run.path / "recipe.yaml").is_file()):
        raise UserError(f"{run.adapter}: there is no adapter yet; train it with python -m qalign.{stage}")
    if not settings.has_held_out:
        raise UserError(
            f"{stage}.eval_data: there are no held-out pairs to measure on; add them to the recipe, or `holdout`"
        )
    _check_settings(run, settings)
    run.check_parent()
    origin.check(recipe.model)
    rows, refused = _held_out_pairs(run, settings)

    # Imported here, not above: torch takes seconds, and a bad recipe must not wait for it.
    from qalign.data.tokenize import encode_pairs
    from qalign.model import lineage
    from qalign.model.base import Role, load

    base = load(recipe.model, now=rendered_at(run))
    pairs, unfit = encode_pairs(base.template, rows, base.max_length)
    refused += unfit
    check_usable(f"{stage}.eval_data", len(pairs), refused)
    for key, folder in (("the run", str(run.adapter)), (f"{stage}.start_from", run.parent)):
        if folder:
            lineage.check(key, folder, base.lineage(stage))
    base.load_adapter(Role.POLICY, str(run.adapter), trainable=False)
    if run.parent:
        base.load_reference(run.parent)
    figures: dict[str, Any] = {**measure(base, pairs, settings), "stage": stage, "loss": settings.loss}
    usable = {pair.where for pair in pairs}
    answered = answer(base, [row for row in rows if row.where in usable])
    if answered.prompts:
        figures["answers"] = answered.figures
    _print_figures(figures, run, settings, len(refused))
    write_whole(run.path / "evaluation.json", json.dumps(figures, indent=1) + "\n")
    _print_answers(answered)


def _check_settings(run: RunFolder, settings: DPO | KTO) -> None:
    """Raises a `UserError` if the recipe isn't the one that the run was trained with, where that counts."""
    stage = run.stage
    same = [f"{stage}.{key}" for key in ("start_from", "loss", "beta")]
    if settings.holdout:  # with other rows or another seed, what was trained on would count as held out
        same += ["seed", *(f"{stage}.{key}" for key in ("holdout", "eval_data", "limit", "split"))]
    for key in run.differences():  # with another base or reference than the run's, the figures would be wrong
        rewarded = key.startswith(("model.", f"{stage}.loss.", f"{stage}.divergence"))
        if rewarded or key in same or (settings.holdout and key.startswith(f"{stage}.data.")):
            raise UserError(f"{key}: {run.path} was trained with another; give the recipe that it was trained with")


def _held_out_pairs(run: RunFolder, settings: DPO | KTO) -> tuple[list[Preference], list[Refused]]:
    """The held-out rows as pairs, and the refused ones; rows that were trained on too are counted."""
    intake, read = Intake(), preferences if isinstance(settings, DPO) else labelled_answers
    rows, refused = rows_under("eval_data", settings, run.recipe.seed, read, intake)
    if not rows:
        check_usable(f"{run.stage}.eval_data", 0, refused)
    if settings.holdout:
        check_same_rows(run, "eval_data", rows)
    else:
        rows_under("data", settings, run.recipe.seed, read, intake)
        print("".join(one_line(f"{name}: {text}") + "\n" for name, text in intake.notes() if name == "overlap"), end="")
    if isinstance(settings, KTO):
        rows = paired(rows)
        if not rows:
            why = "no prompt has a good and a bad answer to compare; summary.json has the held-out loss and rewards"
            raise UserError(f"{run.stage}.eval_data: {why}")
    return rows, refused


def paired(rows: list[Labelled]) -> list[Preference]:
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


def measure(base: "Base", pairs: list["TokenPair"], settings: DPO | KTO) -> dict[str, float]:
    """Preference figures of reference and policy on held-out pairs, by the recipe's `settings`.

    Returns:
        `accuracy_base`, `accuracy_before` and `accuracy_after`: of the bare base, the reference and the policy, the
        share of pairs whose chosen answer has the higher mean log-prob per token; a tie counts a half, the raters' too.
        `accuracy_error`: standard error of the last one. `pairs_gained`, `pairs_lost`: number of pairs that the policy
        gets right and the reference doesn't, and the reverse. `reward_accuracy` and `reward_margin`: share of positive
        margins, and mean margin, of the reward that the loss trains (`PreferenceLoss.rewards`). `pairs`: their number.
    """
    import torch
    from tqdm.auto import tqdm

    from qalign.data.collate import MicroBatchLimit, in_groups
    from qalign.losses.preference import PreferenceLoss, margin, shares
    from qalign.model.base import Role
    from qalign.model.logps import pair_logps

    roles = [Role.REFERENCE, Role.POLICY]
    if Role.REFERENCE in base.adapters:  # otherwise the reference is the bare base
        roles.insert(0, Role.BASE)
    loss, margins = PreferenceLoss(**settings.loss_options), {name: [] for name in (*roles, "reward")}
    base.model.eval()
    batches = [m for group in in_groups(pairs) for m in base.micro_batches(group, MicroBatchLimit(tokens=BATCH_TOKENS))]
    with torch.no_grad(), base.packed_attention():
        for some in tqdm(batches, desc="measuring", unit="batch"):
            batch, logps = base.batch(some), {}
            for role in roles:
                with base.acting_as(role) as lm:
                    logps[role] = pair_logps(lm, batch)
                margins[role].append(margin(logps[role] / batch.lengths))
            reference = logps[Role.REFERENCE] if settings.needs_reference else None
            margins["reward"].append(margin(loss.rewards(logps[Role.POLICY], reference, batch.lengths)))
    labels = torch.tensor([pair.chosen_probability for some in batches for pair in cast(list["TokenPair"], some)]).to(
        margins["reward"][0]
    )
    found = {name: torch.cat(parts) for name, parts in margins.items()}
    accuracy = {name: shares(values.double(), labels).mean().item() for name, values in found.items()}
    gains = shares(found[Role.POLICY], labels) - shares(found[Role.REFERENCE], labels)
    return {
        "pairs": len(pairs),
        "accuracy_base": accuracy[roles[0]],
        "accuracy_before": accuracy[Role.REFERENCE],
        "accuracy_after": accuracy[Role.POLICY],
        "accuracy_error": sqrt(accuracy[Role.POLICY] * (1 - accuracy[Role.POLICY]) / len(pairs)),
        "pairs_gained": int((gains > 0).sum()),
        "pairs_lost": int((gains < 0).sum()),
        "reward_accuracy": accuracy["reward"],
        "reward_margin": found["reward"].mean().item(),
    }


@dataclass(frozen=True)
class Answered:
    """Greedy answers of the models to the same held-out prompts, spread evenly over the rows."""

    prompts: list[Prompt]
    answers: dict[str, list[Answer]]
    """By model: `base`, `SFT` if the run started from one, and `aligned`; fewer of a base that is not the reference."""
    max_new_tokens: int

    @property
    def figures(self) -> dict[str, Any]:
        """`before` and `after` training as `measure_answers` has them, the number of texts that are `unchanged`, and
        `max_new_tokens`."""
        *_, before, after = self.answers.values()
        same = sum(one.text == other.text for one, other in zip(before, after, strict=True))
        both = {"before": measure_answers(before), "after": measure_answers(after)}
        return {**both, "unchanged": same, "max_new_tokens": self.max_new_tokens}


def answer(base: "Base", rows: list[Preference]) -> Answered:
    """Answers of the reference and the policy to `ANSWERED` prompts; of a bare base beside them, what will be shown."""
    from qalign.data.tokenize import encode_questions
    from qalign.model.base import Role
    from qalign.model.generation import Sampling, TransformersEngine, stop_ids_of

    new = min(MAX_NEW_TOKENS, base.max_length // 2)
    asked = [Prompt(row.prompt, row.where, {}, row.tools) for row in spread(rows, ANSWERED)]
    prompts, _ = encode_questions(base.template, asked, base.max_length - new)
    sampling, with_sft = Sampling(new, 0.0, stop_ids_of(base.template)), Role.REFERENCE in base.adapters
    roles = {"base": Role.BASE, "SFT": Role.REFERENCE} if with_sft else {"base": Role.REFERENCE}
    answers = {}
    for name, role in (roles | {"aligned": Role.POLICY}).items():
        ids = [ids for _, ids in (spread(prompts, SIDE_BY_SIDE) if role is Role.BASE else prompts)]
        found = TransformersEngine().generate(base, role, ids, sampling, num_samples=1, seed=0) if ids else []
        answers[name] = answers_of(base.tokenizer, [tokens for (tokens,) in found], sampling.stop_ids)
    return Answered([prompt for prompt, _ in prompts], answers, new)


def _print_figures(figures: dict[str, Any], run: RunFolder, settings: DPO | KTO, num_refused: int) -> None:
    stops = {"accuracy_base": "base", "accuracy_before": "SFT", "accuracy_after": "aligned"}
    if not settings.start_from:
        stops = {"accuracy_before": "base", "accuracy_after": "aligned"}
    preferred, models = " → ".join(f"{figures[name]:.1%}" for name in stops), " → ".join(stops.values())
    reward, margin = f"{figures['reward_accuracy']:.1%}", f"{figures['reward_margin']:+.2f}"
    refused = f", {num_refused} more were refused" if num_refused else ""
    lines = {
        "preferred": f"{preferred:<24} pairs whose chosen answer has the higher mean log-prob per token: {models}",
        "reward": f"{reward:<24} pairs whose chosen answer has the higher implicit reward",
        "margin": f"{margin:<24} mean implicit reward, chosen minus rejected",
    }
    if answers := figures.get("answers"):
        before, after, count = answers["before"], answers["after"], answers["after"]["answers"]
        ended, loops = (f"{before[key]:.0%} → {after[key]:.0%}" for key in ("ended", "looping"))
        length, limit = f"{before['length']:.0f} → {after['length']:.0f}", answers["max_new_tokens"]
        lines |= {
            "ended": f"{ended:<24} of {count} greedy answers ended by themselves within {limit} tokens",
            "length": f"{length:<24} their mean length in tokens",
            "loops": f"{loops:<24} of them repeat themselves",
        }
    said = [("verdict" if number == 0 else "", sentence) for number, sentence in enumerate(verdict(figures))]
    print_table(f"{run.adapter} on {figures['pairs']} held-out pairs{refused}", [*lines.items(), *said])


def _print_answers(answered: Answered) -> None:
    """A few prompts with the answers of each model."""
    shown = {name: spread(answers, SIDE_BY_SIDE) for name, answers in answered.answers.items()}
    for prompt, *answers in zip(spread(answered.prompts, SIDE_BY_SIDE), *shown.values(), strict=True):
        print("─" * 100)
        texts = (prompt.turns[-1]["content"], *(answer.text for answer in answers))
        for name, text in zip(("prompt", *shown), texts, strict=True):
            lines = [part for line in text.splitlines() or [""] for part in wrap(line, 88) or [""]]
            lines = lines if len(lines) <= SHOWN_LINES else [*lines[:SHOWN_LINES], "…"]
            print(f"{name:<9} " + indent("\n".join(lines), " " * 10).strip(), flush=True)


def main(words: Sequence[str] | None = None) -> None:
    parser = recipe_parser("evaluate", report.__doc__)
    parser.add_argument("--stage", choices=STAGES, help="the run to measure (default: dpo if the recipe has it)")

    def work(args: argparse.Namespace) -> None:
        has = load(args.recipe, args.overrides, files_of=("model",))
        stage = args.stage or ("kto" if has.kto and not has.dpo else "dpo")
        report(load(args.recipe, args.overrides, stage), stage)

    run_parsed(parser, work, words)


if __name__ == "__main__":
    main()
