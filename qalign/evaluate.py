"""Did the training help? Preference figures on held-out pairs before and after it, and answers side by side.

    python -m qalign.evaluate RECIPE [key=value …]

One pass measures the bare base, the run's reference (if the run started from an SFT adapter, that adapter) and the
aligned adapter on the same batches. Nothing is trained.
"""

import json
import sys
from collections.abc import Sequence
from math import sqrt
from textwrap import indent, wrap
from typing import TYPE_CHECKING

from qalign.cli import report_command
from qalign.config.atomic import write_whole
from qalign.config.recipe import Recipe
from qalign.config.stages import DPO
from qalign.data.formats import Preference, Refused, preferences
from qalign.errors import UserError, one_line
from qalign.train.run_folder import RunFolder, print_table

if TYPE_CHECKING:
    from qalign.data.tokenize import TokenPair
    from qalign.model.base import Base

SIDE_BY_SIDE = 3
SHOWN_REFUSALS = 5
MAX_NEW_TOKENS = 80
BATCH_TOKENS = 2048
CHUNK = 32  # pairs that are packed together


def report(recipe: Recipe) -> None:
    """Compare the base and the aligned model on a recipe's held-out pairs."""
    run, settings = RunFolder(recipe, "dpo"), recipe.dpo
    if not ((run.adapter / "adapter_config.json").is_file() and (run.path / "recipe.yaml").is_file()):
        raise UserError(f"{run.adapter}: there is no adapter yet; train it with python -m qalign.dpo")
    if not (settings and settings.eval_data):
        raise UserError("dpo.eval_data: there are no held-out pairs to measure on; add them to the recipe")
    for key in run.differences():  # with another base or reference than the run's, the figures would be wrong
        if key.startswith("model.") or key in ("dpo.start_from", "dpo.beta"):
            raise UserError(f"{key}: {run.path} was trained with another; give the recipe that it was trained with")
    run.check_parent()
    rows, refused = preferences(settings.eval_data, settings.split, None, recipe.seed)

    # Imported here, not above: torch takes seconds, and a bad recipe must not wait for it.
    from qalign.data.tokenize import encode_pairs
    from qalign.model import lineage
    from qalign.model.base import Role, load

    base = load(recipe.model)
    pairs, unfit = encode_pairs(base.template, rows, recipe.model.max_length)
    refused += unfit
    check_usable("dpo.eval_data", len(pairs), refused)
    for key, folder in (("the run", str(run.adapter)), ("dpo.start_from", run.parent)):
        if folder:
            lineage.check(key, folder, base.lineage("dpo"))
    base.load_adapter(Role.POLICY, str(run.adapter), trainable=False)
    if run.parent:
        base.load_reference(run.parent)
    figures = measure(base, pairs, settings.beta)
    _print_figures(figures, run, settings, len(refused))
    write_whole(run.path / "evaluation.json", json.dumps(figures, indent=1) + "\n")
    measured = {pair.where for pair in pairs}
    _print_answers(base, [row for row in rows if row.where in measured])


def check_usable(source: str, used: int, refused: Sequence[Refused]) -> None:
    """Prints the first refused rows with their reasons on stderr. Raises a `UserError` if no row is usable."""
    for row in refused[:SHOWN_REFUSALS]:
        print(one_line(f"refused: {row.where}: {row.reason}"), file=sys.stderr)
    if not used:
        raise UserError(f"{source}: holds no usable rows ({len(refused)} were refused)")


def measure(base: "Base", pairs: list["TokenPair"], beta: float) -> dict[str, float]:
    """Preference figures of reference and policy on held-out pairs; `beta` scales DPO's implicit reward.

    Returns:
        `accuracy_base`, `accuracy_before` and `accuracy_after`: of the bare base, the reference and the policy, the
        share of pairs whose chosen answer has the higher mean log-prob per token. `accuracy_error`: standard error of
        the last one. `reward_accuracy` and `reward_margin`: share of positive margins, and mean margin, of the implicit
        reward (Rafailov et al. 2023, arXiv:2305.18290). `pairs`: their number.
    """
    import torch
    from tqdm.auto import tqdm

    from qalign.data.collate import MicroBatchLimit
    from qalign.losses import margin, rewards
    from qalign.model.base import Role
    from qalign.model.logps import pair_logps

    roles = [Role.REFERENCE, Role.POLICY]
    if Role.REFERENCE in base.adapters:  # otherwise the reference is the bare base
        roles.insert(0, Role.BASE)
    margins = {name: [] for name in (*roles, "reward")}
    order, limit = sorted(pairs, key=len), MicroBatchLimit(tokens=BATCH_TOKENS)  # similar lengths share a batch
    chunks = [order[start : start + CHUNK] for start in range(0, len(order), CHUNK)]
    batches = [some for chunk in chunks for some in base.micro_batches(chunk, limit)]
    base.model.eval()
    with torch.no_grad(), base.packed_attention():
        for some in tqdm(batches, desc="measuring", unit="batch"):
            batch, logps = base.batch(some), {}
            for role in roles:
                with base.acting_as(role) as lm:
                    logps[role] = pair_logps(lm, batch)
                margins[role].append(margin(logps[role] / batch.lengths))
            reward = rewards(logps[Role.POLICY], logps[Role.REFERENCE], batch.lengths, beta)
            margins["reward"].append(margin(reward))
    found = {name: torch.cat(parts) for name, parts in margins.items()}
    shares = {name: (values > 0).double().mean().item() for name, values in found.items()}
    return {
        "pairs": len(pairs),
        "accuracy_base": shares[roles[0]],
        "accuracy_before": shares[Role.REFERENCE],
        "accuracy_after": shares[Role.POLICY],
        "accuracy_error": sqrt(shares[Role.POLICY] * (1 - shares[Role.POLICY]) / len(pairs)),
        "reward_accuracy": shares["reward"],
        "reward_margin": found["reward"].mean().item(),
    }


def _print_figures(figures: dict[str, float], run: RunFolder, settings: DPO, num_refused: int) -> None:
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
    print_table(f"{run.adapter} on {figures['pairs']} held-out pairs{refused}", lines.items())


def _print_answers(base: "Base", rows: list[Preference]) -> None:
    """Greedy answers of the base and the aligned model to a few prompts, spread evenly over the rows."""
    from qalign.model.base import Role
    from qalign.model.generation import complete

    shown = rows[:: max(1, len(rows) // SIDE_BY_SIDE)][:SIDE_BY_SIDE]
    prompts = [list(row.prompt) for row in shown]
    before, after = (complete(base, role, prompts, max_new_tokens=MAX_NEW_TOKENS) for role in (Role.BASE, Role.POLICY))
    for row, *answers in zip(shown, before, after, strict=True):
        print("─" * 100)
        for name, text in zip(("prompt", "base", "aligned"), (row.prompt[-1]["content"], *answers), strict=True):
            lines = [part for line in text.splitlines() or [""] for part in wrap(line, 88) or [""]]
            print(f"{name:<9} " + indent("\n".join(lines), " " * 10).strip(), flush=True)


def main(words: Sequence[str] | None = None) -> None:
    report_command("evaluate", "dpo", report, words)


if __name__ == "__main__":
    main()
