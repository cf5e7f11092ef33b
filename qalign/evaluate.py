"""Did it help? Held-out preferences before and after, and answers side by side.

    python -m qalign.evaluate RECIPE [key=value …]

The bare base, the reference that the run was trained against (the SFT adapter, if it started from one) and the aligned
adapter are measured on the same batches in one pass; nothing is trained.
"""

import json
import sys
from math import sqrt
from textwrap import indent, wrap

from qalign.cli import report_command
from qalign.config.recipe import Recipe
from qalign.errors import UserError
from qalign.train.run_folder import RunFolder, print_table

SIDE_BY_SIDE = 3
SHOWN_REFUSALS = 5
MAX_NEW_TOKENS = 80
BATCH_TOKENS = 2048


def report(recipe: Recipe) -> None:
    """Compare the base and the aligned model on a recipe's held-out rows."""
    settings, model = recipe.dpo, recipe.model
    run = RunFolder(recipe, "dpo")
    if not ((run.adapter / "adapter_config.json").is_file() and (run.path / "recipe.yaml").is_file()):
        raise UserError(f"{run.adapter}: there is no adapter yet; train it with python -m qalign.dpo")
    if not settings.eval_data:
        raise UserError("dpo.eval_data: there are no held-out rows to measure on; add them to the recipe")

    _check_trained_so(run)

    # Imported here, not above: torch takes seconds, and a bad recipe must not wait for it.
    from qalign.data.formats import preferences
    from qalign.data.tokenize import encode_pairs
    from qalign.model import lineage
    from qalign.model.base import Role, load
    from qalign.model.generation import complete

    base = load(model)
    rows, unread = preferences(settings.eval_data, settings.split, None, recipe.seed)
    pairs, unfit = encode_pairs(base.tokenizer, rows, model.max_length, model.chat_template_kwargs)
    refused = unread + unfit
    for row in refused[:SHOWN_REFUSALS]:
        print(f"refused: {row.where}: {row.reason}", file=sys.stderr)
    if not pairs:
        raise UserError(f"dpo.eval_data: holds no usable rows ({len(refused)} were refused)")
    parent = run.parent
    for key, folder in (("the run", run.adapter), ("dpo.start_from", parent)):
        if folder:
            lineage.check(key, folder, base.lineage("dpo"))
    base.load_adapter(Role.POLICY, str(run.adapter), trainable=False)
    if parent:
        base.load_reference(parent)

    figures = measure(base, pairs, settings.beta)
    stops = ["accuracy_base", "accuracy_before", "accuracy_after"] if parent else ["accuracy_before", "accuracy_after"]
    preferred = " → ".join(f"{figures[name]:.1%}" for name in stops)
    ways = "base → SFT → aligned" if parent else "base → aligned"
    print_table(
        f"{run.adapter} on {len(pairs)} held-out pairs" + (f", {len(refused)} more were refused" if refused else ""),
        [(name, f"{value:<24} {meaning}") for name, value, meaning in (
            ("preferred", preferred, f"pairs whose chosen answer has the higher mean log-prob a token: {ways}"),
            ("reward", f"{figures['reward_accuracy']:.1%}", "pairs whose implicit reward is right"),
            ("margin", f"{figures['reward_margin']:+.2f}", "mean implicit reward, chosen minus rejected"),
        )],
    )  # fmt: skip
    (run.path / "evaluation.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")

    measured = {pair.where for pair in pairs}
    rows = [row for row in rows if row.where in measured]
    shown = rows[:: max(1, len(rows) // SIDE_BY_SIDE)][:SIDE_BY_SIDE]
    prompts = [list(row.prompt) for row in shown]
    options = {"max_new_tokens": MAX_NEW_TOKENS, "template_kwargs": model.chat_template_kwargs}
    answers = [complete(base, role, prompts, **options) for role in (Role.BASE, Role.POLICY)]
    for row, before, after in zip(shown, *answers, strict=True):
        print("─" * 100)
        print(_block("prompt", row.prompt[-1]["content"]))
        print(_block("base", before))
        print(_block("aligned", after), flush=True)


def _check_trained_so(run: RunFolder) -> None:
    """Figures of another base or reference than the run's would be wrong, not different."""
    for key in run.differences():
        if key.startswith("model.") or key in ("dpo.start_from", "dpo.beta"):
            raise UserError(f"{key}: {run.path} was trained with another; give the recipe that it was trained with")
    run.check_parent()


def measure(base, pairs: list, beta: float) -> dict[str, float]:
    """Preference figures of reference and policy.

    Args:
        base: with a policy.
        pairs: `list[TokenPair]`.
        beta: scale of the implicit reward.

    Returns:
        `accuracy_base`, `accuracy_before` and `accuracy_after`, of the bare base, the reference and the policy: the
        share of pairs whose chosen answer has the higher mean log-prob a token; `accuracy_error`: the standard error of
        the latter; `reward_accuracy` and `reward_margin`: of DPO's implicit reward; `pairs`.
    """
    import torch
    from tqdm.auto import tqdm

    from qalign.losses import margin, rewards
    from qalign.model.base import Role
    from qalign.model.logps import pair_logps

    roles = [Role.BASE, Role.REFERENCE, Role.POLICY]
    if Role.REFERENCE not in base.model.peft_config:  # the bare base is the reference
        roles.remove(Role.BASE)
    found: dict[Role, list] = {role: [] for role in roles}
    reward = []
    base.model.eval()
    with torch.no_grad(), base.reading_pairs():
        for some in tqdm(_batches(base, pairs), desc="measuring", unit="batch"):
            batch, logps = base.batch(some), {}
            for role in roles:
                with base.acting_as(role) as lm:
                    logps[role] = pair_logps(lm, batch)
                found[role].append(margin(logps[role] / batch.lengths))
            reward.append(margin(rewards(logps[Role.POLICY], logps[Role.REFERENCE], batch.lengths, beta)))
    bare, before, after = (torch.cat(found[role]) for role in (roles[0], Role.REFERENCE, Role.POLICY))
    reward = torch.cat(reward)
    share = lambda values: (values > 0).double().mean().item()  # noqa: E731
    return {
        "pairs": len(pairs),
        "accuracy_base": share(bare),
        "accuracy_before": share(before),
        "accuracy_after": share(after),
        "accuracy_error": sqrt(share(after) * (1 - share(after)) / len(pairs)),
        "reward_accuracy": share(reward),
        "reward_margin": reward.mean().item(),
    }


def _batches(base, pairs: list) -> list[list]:
    from qalign.data.collate import MicroBatchLimit

    order = sorted(pairs, key=len)  # neighbours of like length
    chunks = [order[start : start + 32] for start in range(0, len(order), 32)]
    return [some for chunk in chunks for some in base.micro_batches(chunk, MicroBatchLimit(tokens=BATCH_TOKENS))]


def _block(name: str, text: str) -> str:
    lines = [part for line in text.splitlines() or [""] for part in wrap(line, 88) or [""]]
    return f"{name:<9} " + indent("\n".join(lines), " " * 10).strip()


if __name__ == "__main__":
    report_command("evaluate", "dpo", report)
