"""Several processes: how much faster are two on two cores, and what may be expected of eight GPUs?

    python benchmarks/scaling.py --steps 24 --rounds 3     # measures; nothing else should run meanwhile
    python benchmarks/scaling.py --model                   # the model of a step on 1 to 8 GPUs

Measured is the demo's DPO on SmolLM2, one thread a process: runs of one process and of two take turns. A run's figure
is the median over its steps but the first two. It ends with 1 if the losses of the two differ.

The model is arithmetic and no measurement; its assumptions are printed above its table.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from qalign.data.collate import MicroBatchLimit, micro_batches, packed_tokens  # noqa: E402
from qalign.train.processes.world import deal  # noqa: E402

RECIPE = ROOT / "recipes" / "smollm2_demo.yaml"
WARM_UP = 2
FIRST, LATER = 1e-6, 1e-3  # how far losses may be apart: in the first step, and once Adam has made more of rounding

WEIGHTS, ADAPTER_BYTES = 7.0e9, 4 * 42e6  # of a 7B's linear layers; rank 16 on all of them, float32
PASSES = 4  # reference, policy, recomputation of checkpointed layers, backward to the activations
LARGEST, STEPS = 8192, 200  # tokens of a micro-batch; steps over which the model takes the mean
ALONE = 0.05  # seconds


class Cards(NamedTuple):
    """GPUs of one kind and the slowest link between them."""

    name: str
    flop_per_second: float  # that a step reaches on one of them
    bytes_per_second: float  # of the sum of gradients, each way
    launch_seconds: float  # the least time that a micro-batch takes, to launch its kernels


CARDS = (
    Cards("H200, NVLink at 300 GB/s", 0.4 * 790e12, 300e9, 0.3),
    Cards("RTX 4090, PCIe at 10 GB/s", 0.4 * 165e12, 10e9, 0.3),
    Cards("RTX 4090, a host each, 10 Gbit/s", 0.4 * 165e12, 1.25e9, 0.3),
    Cards("RTX 4090, a host each, 1 Gbit/s", 0.4 * 165e12, 0.125e9, 0.3),
)


def step_seconds(
    shares: Sequence[int], flop_per_token: float, gradient_bytes: float, cards: Cards, alone_seconds: float
) -> float:
    """A model of an optimiser step's time: the process with the most tokens computes, gradients are summed, and each
    process does the rest by itself. A ring moves 2 (n − 1) / n of the gradients in and out of each of n processes
    (Patarasuk and Yuan 2009, doi:10.1016/j.jpdc.2008.09.002).

    Args:
        shares: tokens that each process runs.
        alone_seconds: what is not shared, such as the optimiser's update.
    """
    count = len(shares)
    computing = max(max(shares) * flop_per_token / cards.flop_per_second, cards.launch_seconds)
    return computing + 2 * (count - 1) / count * gradient_bytes / cards.bytes_per_second + alone_seconds


def shares_of(rows: Sequence[Any], count: int) -> list[int]:
    """Tokens that each of `count` processes runs of a step's rows, with `micro_batch_size: auto`."""
    limit = MicroBatchLimit(tokens=LARGEST).among(count, [*map(packed_tokens, rows)])
    sizes = [sum(map(packed_tokens, group)) for group in micro_batches(rows, limit, layout="packed")]
    return [sum(sizes[number] for number in numbers) for numbers in deal(sizes, count)]


def print_model(batch: int) -> None:
    """The table for one to eight cards, with pairs of UltraFeedback-like lengths, `batch` a step."""
    from benchmarks.gpu_sides import pairs_like  # it imports TRL

    pairs = pairs_like("ultrafeedback", batch * STEPS, 100, argparse.Namespace(max_length=2048))
    steps = [pairs[start : start + batch] for start in range(0, len(pairs), batch)]
    mean = statistics.fmean(map(packed_tokens, pairs))
    print(
        f"A model, not measured: a step of QLoRA DPO on a 7B with {batch} pairs of {mean:,.0f} tokens on average,\n"
        "each prompt once. Lengths are drawn like UltraFeedback's and dealt out as a run deals them; the time is the\n"
        f"mean of {STEPS} steps. Assumed: 2 FLOP a weight and token in each of {PASSES} passes, at 40% of a card's\n"
        f"16-bit peak and at least {CARDS[0].launch_seconds} s; {ADAPTER_BYTES / 1e6:.0f} MB of gradients; "
        f"{ALONE} s that each process does by itself.\n"
    )
    counts = (1, 2, 4, 8)
    print(f"| seconds a step (efficiency) | {' | '.join(f'{count} GPU' + 's' * (count > 1) for count in counts)} |")
    print("|---" * (1 + len(counts)) + "|")
    for cards in CARDS:
        taken = [
            statistics.fmean(
                step_seconds(shares_of(rows, count), 2 * PASSES * WEIGHTS, ADAPTER_BYTES, cards, ALONE)
                for rows in steps
            )
            for count in counts
        ]
        cells = [f"{each:.2f} ({taken[0] / each / count:.0%})" for count, each in zip(counts, taken, strict=True)]
        print(f"| {cards.name} | {' | '.join(cells)} |")


def run(count: int, folder: Path, steps: int) -> tuple[float, list[float]]:
    """(Seconds a step, losses) of the demo's DPO with this number of processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)] if count > 1 else []
    words = [str(RECIPE), f"output={folder}", f"dpo.max_steps={steps}", "dpo.start_from=", "dpo.eval_data="]
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "qalign.dpo", *words, "dpo.epochs=1000", "--overwrite"],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    lines = [json.loads(line) for line in (folder / "dpo" / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "tokens_per_second" in line and "loss" in line]
    tokens = [0, *(line["num_tokens"] for line in lines)]
    taken = [after - before for before, after in pairwise(tokens)]
    seconds = [size / line["tokens_per_second"] for size, line in zip(taken, lines, strict=True)]
    return statistics.median(seconds[WARM_UP:]), [line["loss"] for line in lines]


def measure(steps: int, rounds: int) -> int:
    """Prints a line for each round, and the ratio. Returns 1 if losses differ."""
    print(f"load average before: {Path('/proc/loadavg').read_text().split()[0]}\n")
    print("| round | 1 process, s/step | 2 processes | ratio | largest difference of losses |\n|---|---|---|---|---|")
    ratios, apart = list[float](), False
    for number in range(1, rounds + 1):
        with tempfile.TemporaryDirectory() as folder:
            (one, losses), (two, others) = (run(count, Path(folder) / str(count), steps) for count in (1, 2))
        gaps = [abs(loss - other) for loss, other in zip(losses, others, strict=True)]
        apart |= gaps[0] > FIRST or max(gaps) > LATER
        ratios.append(one / two)
        print(f"| {number} | {one:.3f} | {two:.3f} | {one / two:.2f} | {max(gaps):.1e} |", flush=True)
    middle, spread = statistics.median(ratios), f"{min(ratios):.2f} to {max(ratios):.2f}"
    print(f"\nTwo processes are {middle:.2f} times as fast as one ({spread}): {middle / 2:.0%} efficient.")
    if apart:
        print("The losses differ.", file=sys.stderr)
    return int(apart)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="store_true", help="print the model, and measure nothing")
    parser.add_argument("--batch", type=int, default=16, help="pairs a step, for the model")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    if args.model:
        print_model(args.batch)
    else:
        sys.exit(measure(args.steps, args.rounds))


if __name__ == "__main__":
    main()
