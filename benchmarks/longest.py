"""The longest SFT row and the longest pair that a card takes, as the planner says and as a step confirms."""

import time

from benchmarks.cards import ON_CUDA, Stage, card, emptied

# Tokens of the longest SFT row of an 8B by card, in Unsloth's documentation (rank 32, all linear layers, batch size 1).
UNSLOTH = {8: 2_972, 12: 21_848, 16: 40_724, 24: 78_475}
TINY_CARDS = [0.006, 0.008]  # GiB


def longest(args) -> int:
    """Prints a line for each stage and card until the time is up. Returns 1 if a planned row didn't fit."""
    deadline, failed = time.monotonic() + 60 * args.minutes, False
    cards = args.memory if ON_CUDA else TINY_CARDS
    print("| | card, GiB | tokens | Unsloth | forecast, GiB | allocated | reserved | offloaded, GiB | s/step |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    for name in ("sft", "dpo"):
        stage = Stage(name, args.shape, 2048, fused=True)
        for gib in sorted(cards):
            if time.monotonic() > deadline:
                print(f"stopped after {args.minutes:g} minutes")
                return int(failed)
            with card(gib) as usable:
                tokens = min(stage.forecast.furthest(usable), stage.forecast.reach * (1 if name == "sft" else 2))
                tokens = tokens if ON_CUDA else min(tokens, 600)
                plan = stage.forecast.plan(usable, tokens) if tokens >= 64 else None
                began = time.perf_counter()
                found = plan and stage.peaks(plan, [stage.row(tokens)], steps=1)
                took = time.perf_counter() - began
            failed |= found is None
            other = f"{UNSLOTH[gib]:,}" if name == "sft" and gib in UNSLOTH and args.shape == "llama31_8b" else ""
            what = "SFT row" if name == "sft" else "pair"
            print(
                f"| {what} | {gib:g} | {tokens:,} | {other} | {_figures(stage, plan, found)} | {took:.1f} |", flush=True
            )
        del stage
        emptied()
    return int(failed)


def _figures(stage: Stage, plan, found) -> str:
    if plan is None:
        return "doesn't fit | | | "
    total = stage.forecast.total(plan.tokens, plan.checkpointed_layers, offloaded=bool(plan.offloaded))
    measured = "out of memory | " if found is None else " | ".join(f"{peak / 2**30:.2f}" for peak in found)
    return f"{total / 2**30:.2f} | {measured} | {plan.offloaded / 2**30:.2f}"
