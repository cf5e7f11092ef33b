"""DPO steps on one GPU at a real model's shape: qalign beside TRL and Unsloth, with the memory of smaller cards.

    python benchmarks/gpu.py [--shape mistral7b] [--memory 8 12 16 24] [--sides qalign trl unsloth] [--minutes 9] …
    python benchmarks/gpu.py --longest --shape llama31_8b --minutes 3    # the longest SFT row and pair of each card
    python benchmarks/gpu.py --check        # the CUDA paths against plain ones, at small scale
    python benchmarks/gpu.py --shape tiny   # the same code on a CPU, in a minute; its figures say nothing

The weights are random (nothing is downloaded), held in NF4; so are the ids, their lengths are a file's or drawn.
Each side runs in a process of its own, which may take as much of the card as a smaller one has; the sides take turns,
and the ratio to TRL is the median over the rounds. A step is tensors from ids, forward of the reference where it is not
kept, forward and backward of the policy with gradient checkpointing of all layers, and AdamW. Running out of memory is
a result: the micro-batch is halved until it fits.

Sides:
    qalign-in_step, qalign-cached   packed, prompts shared; the reference in the step, or kept from an earlier epoch
    qalign-auto                     as a run does it: cached, and as few layers checkpointed as the planner finds
    trl-defaults                    DPOTrainer as it comes, but for the optimiser and truncation
    trl-best                        batches of like lengths, the reference precomputed
    unsloth                         if it is installed: its model and patched DPOTrainer
"""

import argparse
import gc
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
VARIANTS = {
    "qalign": ["qalign-in_step", "qalign-cached", "qalign-auto"],
    "trl": ["trl-defaults", "trl-best"],
    "unsloth": ["unsloth"],
}
SIDES = [name for names in VARIANTS.values() for name in names]
WARM_UP = 3  # steps: FlexAttention compiles for the first length, and for any length at the second
STRIDE = 128  # tokens: how finely the longest pair is looked for
CONTEXT = 2**29  # bytes of a card that CUDA takes outside PyTorch's allocator, about


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", choices=["mistral7b", "llama31_8b", "qwen3_4b", "tiny"], default="mistral7b")
    parser.add_argument("--memory", nargs="+", type=float, default=[8, 12, 16, 24], help="GiB of the cards to stand in")
    parser.add_argument("--sides", nargs="+", choices=[*VARIANTS, *SIDES], default=list(VARIANTS))
    parser.add_argument("--data", nargs="+", default=["hh", "ultrafeedback"], help="preference files, or drawn lengths")
    parser.add_argument("--tokenizer", help="a tokenizer's folder, for files; the demo's where it is left out")
    parser.add_argument("--max-length", type=int, default=2048, help="longer pairs are left out")
    parser.add_argument("--batch", type=int, default=8, help="pairs a step")
    parser.add_argument("--steps", type=int, default=8, help="timed steps of each data set, after the warm-up")
    parser.add_argument(
        "--longest-pair", type=int, default=16384, help="tokens: look no further for each side's; 0: don't"
    )
    parser.add_argument("--longest", action="store_true", help="qalign's longest SFT row and pair on each card instead")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each side")
    parser.add_argument("--minutes", type=float, default=60, help="stop after so long with what was found")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--profile", action="store_true", help="where the time of a step goes, by kind of kernel")
    parser.add_argument("--check", action="store_true", help="check the CUDA paths instead")
    for name in ("--only", "--folder", "--result"):  # of the processes that measure
        parser.add_argument(name, help=argparse.SUPPRESS)
    parser.add_argument("--cap", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--round", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args()


def fitting(work):
    """What `work` returns, or None if memory ran out."""
    import torch

    try:
        return work()
    except RuntimeError as error:  # cuBLAS and bitsandbytes have no OutOfMemoryError of their own
        if not isinstance(error, torch.OutOfMemoryError) and "out of memory" not in str(error).lower():
            raise
    gc.collect()  # out here the traceback, which holds the activations, is gone
    torch.cuda.empty_cache()
    return None


def measure(side, steps: list, deadline: float, found: dict) -> dict:
    """Seconds of the timed steps with the largest micro-batch that fits; the process's first loss goes to `found`."""
    import torch

    from benchmarks.gpu_sides import useful_tokens
    from qalign.train.callbacks import peak_bytes

    steps = steps[:WARM_UP] + side.arranged(steps[WARM_UP:])

    def run() -> dict:
        seconds = []
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        for pairs in steps:
            side.precompute(pairs)
        for pairs in steps:
            if time.monotonic() > deadline:
                break
            began = time.perf_counter()
            loss = side.step(pairs)
            seconds.append(time.perf_counter() - began)
            found.setdefault("first_loss", loss)
        timed = steps[WARM_UP : len(seconds)]
        tokens = sum(useful_tokens(pair) for pairs in timed for pair in pairs)
        return {"steps": len(timed), "tokens": tokens, "seconds": sum(seconds[WARM_UP:]), "peak_bytes": peak_bytes()}

    share = 1.0
    while share * side.batch >= 1:
        side.begin(share, steps)
        if result := fitting(run):
            return result | {"at_once": side.at_once}
        share /= 2
    return {"out_of_memory": True}


def longest_pair(side, limit: int, vocabulary: int, deadline: float) -> int:
    """Tokens of the longest pair that a step of one pair fits; half of them are the prompt, the rest each answer."""
    from benchmarks.random_models import random_pair

    def fits(length: int) -> bool:
        pair = random_pair([length // 2] * 3, vocabulary, f"of {length}")
        return fitting(lambda: (side.precompute([pair]), side.step([pair]))) is not None

    side.begin(1 / side.batch, [])
    low, high = 0, limit // STRIDE
    if fits(high * STRIDE):
        return high * STRIDE
    while high - low > 1 and time.monotonic() < deadline:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * STRIDE) else (low, middle)
    return low * STRIDE


def child(args: argparse.Namespace) -> None:
    """Measures one side and writes down what it finds as it goes: the parent may stop it."""
    deadline = time.monotonic() + args.seconds
    if args.only == "unsloth":
        import unsloth  # noqa: F401  # wants to be first
    import torch

    from benchmarks import gpu_sides
    from benchmarks.gpu_profile import profiled

    if args.only == "folder":
        return gpu_sides.save_folder(args.shape, args.folder)
    found = {"device": "CPU", "data": {}}
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        if args.cap * 2**30 > 1.05 * card.total_memory:
            sys.exit(f"{card.name} has less than {args.cap:g} GiB")
        found["device"] = f"{card.name}, {card.total_memory / 2**30:.0f} GiB"
        torch.cuda.set_per_process_memory_fraction(min(1.0, (args.cap * 2**30 - CONTEXT) / card.total_memory))
    make = gpu_sides.SIDES[args.only]
    side = fitting(lambda: make(args.only, args.shape, args.batch, args.folder))
    write = lambda: Path(args.result).write_text(json.dumps(found))  # noqa: E731
    if side is None:
        found["data"] = {source: {"out_of_memory": True} for source in args.data}
        return write()
    side.card = args.cap
    found["kernels"] = side.base.kernels if args.only.startswith("qalign") else None
    found["base_bytes"] = torch.cuda.memory_allocated() if torch.cuda.is_available() else None
    for source in args.data:
        count = (WARM_UP + args.steps) * args.batch
        pairs = gpu_sides.pairs_like(source, count, side.config.vocab_size, args)
        steps = [pairs[start : start + args.batch] for start in range(0, count, args.batch)]
        found["data"][source] = measure(side, steps, deadline, found)
        if args.profile and speed(found["data"][source]) and time.monotonic() < deadline:
            found.setdefault("profiles", {})[source] = fitting(partial(profiled, partial(side.step, steps[-1])))
        write()
    if args.longest_pair and args.round == 0 and time.monotonic() < deadline:
        limit = min(args.longest_pair, side.config.max_position_embeddings)
        found["longest"], found["looked_up_to"] = longest_pair(side, limit, side.config.vocab_size, deadline), limit
    return write()


def run_child(deadline: float, folder: str, **options) -> dict:
    """One process of this script; what it found, or why it found nothing."""
    result = Path(folder) / "result.json"
    result.unlink(missing_ok=True)
    left = deadline - time.monotonic()
    options |= {"result": result, "seconds": left, "folder": Path(folder) / "base"}
    # Every command of qalign asks for segments that grow; the others run as they come.
    more = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"} if options["only"].startswith("qalign") else {}
    command = [sys.executable, __file__, *sys.argv[1:]]
    command += [text for key, value in options.items() for text in (f"--{key}", str(value))]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=left + 15, env=os.environ | more)
        said = [line for line in done.stderr.splitlines() if line.strip()]
        if done.returncode:
            print(done.stderr, file=sys.stderr)
        failed = said[-1] if done.returncode and said else f"exit code {done.returncode}" if done.returncode else None
    except subprocess.TimeoutExpired:
        failed = "no time left"
    found = json.loads(result.read_text()) if result.is_file() else {"data": {}}
    return found | ({"failed": failed[:300]} if failed else {})


def rounds(args: argparse.Namespace, cards: list, report) -> None:
    """All sides in turns, a process each, until the time is up; `report` gets all that was found, each time."""
    deadline, runs = time.monotonic() + 60 * args.minutes, []
    sides = [name for side in args.sides for name in VARIANTS.get(side, [side])]
    if "unsloth" in sides and not importlib.util.find_spec("unsloth"):
        print("unsloth: not installed, left out")
        sides.remove("unsloth")
    with tempfile.TemporaryDirectory() as folder:
        if "unsloth" in sides:
            run_child(deadline, folder, only="folder")
        for number in range(args.rounds):
            for card in cards:
                for name in sides[:: -1 if number % 2 else 1]:
                    if time.monotonic() > deadline - 5:
                        print(f"stopped after {args.minutes:g} minutes")
                        return
                    found = run_child(deadline, folder, only=name, cap=card, round=number)
                    runs.append({"round": number, "memory": card, "side": name, **found})
                    said = [f"{source}: {in_words(figures)}" for source, figures in found["data"].items()]
                    what = "; ".join([*said, *([f"failed: {found['failed']}"] if "failed" in found else [])])
                    print(f"round {number}, {in_gib(card)}, {name}: {what}", flush=True)
                    report(runs)


def in_gib(card: float) -> str:
    return f"{card:g} GiB" if card else "CPU"


def in_words(figures: dict) -> str:
    if figures.get("out_of_memory"):
        return "out of memory"
    return f"{speed(figures):,.0f} tokens/s" if figures["steps"] else "no step in time"


def speed(figures: dict) -> float:
    return figures.get("tokens", 0) / figures["seconds"] if figures.get("seconds") else 0.0


def table(runs: list[dict], card: float, source: str) -> list[str]:
    """Markdown of one card and data set: medians over the rounds."""
    of_round: dict[str, dict[int, dict]] = {}
    for run in runs:
        if run["memory"] == card and source in run["data"]:
            of_round.setdefault(run["side"], {})[run["round"]] = run["data"][source]
    lines = [f"\n{source}, {in_gib(card)}\n", "| | tokens/s | s/step | pairs at once | peak GiB | / trl-defaults |"]
    lines[-1] += " / trl-best |\n|---|---|---|---|---|---|---|"
    for name, found in of_round.items():
        good = [figures for figures in found.values() if speed(figures)]
        if not good:
            lines.append(f"| {name} | {in_words(next(iter(found.values())))} | | | | | |")
            continue
        ratios = []
        for other in VARIANTS["trl"]:
            both = [n for n in found if speed(found[n]) and speed(of_round.get(other, {}).get(n, {}))]
            each = [speed(found[n]) / speed(of_round[other][n]) for n in both]
            ratios.append(f"{statistics.median(each):.2f} ({min(each):.2f} to {max(each):.2f})" if each else "")
        pace = statistics.median(figures["seconds"] / figures["steps"] for figures in good)
        peak = max(figures["peak_bytes"] for figures in good) / 2**30
        fast, at_once = statistics.median(map(speed, good)), good[0]["at_once"]
        lines.append(f"| {name} | {fast:,.0f} | {pace:.2f} | {at_once} | {peak:.2f} | {' | '.join(ratios)} |")
    return lines


def document(args: argparse.Namespace, runs: list[dict]) -> str:
    """All of it as Markdown."""
    from benchmarks.gpu_profile import table as profile_table
    from qalign.train.run_folder import versions

    device = next((run["device"] for run in runs if "device" in run), "nothing ran")
    made_with = ", ".join(f"{name} {version}" for name, version in versions().items())
    lines = [f"`python {' '.join(sys.argv)}`", f"\n{args.shape}, NF4, random weights. {device}; {made_with}"]
    lines += sorted({f"\nqalign's fused kernels: {run['kernels']}" for run in runs if run.get("kernels")})
    for card in dict.fromkeys(run["memory"] for run in runs):
        for source in args.data:
            lines += table(runs, card, source)
        lines += [
            f"\nlongest pair, first loss (ln 2 is 0.693147), {in_gib(card)}\n",
            "| | tokens | first loss | base GiB |",
        ]
        lines += ["|---|---|---|---|"]
        for run in runs:
            if run["memory"] == card and run["round"] == 0:
                longest, base = run.get("longest", "not looked for"), run.get("base_bytes")
                more = " or more" if longest == run.get("looked_up_to") else ""
                loss = f"{run['first_loss']:.6f}" if "first_loss" in run else run.get("failed", "out of memory")
                held = f"{base / 2**30:.2f}" if base else ""
                lines.append(f"| {run['side']} | {longest}{more} | {loss} | {held} |")
    for run in runs:
        for source, profile in filter(lambda item: item[1], run.get("profiles", {}).items()):
            lines += [f"\na step of {run['side']}, {source}, {in_gib(run['memory'])}", *profile_table(profile)]
    return "\n".join(lines) + "\n"


def main() -> int:
    args = arguments()
    if args.only:
        child(args)
        return 0
    if args.longest:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # as the commands have it
    import torch

    if args.check:
        from benchmarks.gpu_checks import check

        return check()
    cuda = torch.cuda.is_available()
    if not cuda and args.shape != "tiny":
        print(f"no CUDA device: {args.shape} needs one; on a CPU there are --shape tiny and --check", file=sys.stderr)
        return 2
    if args.longest:
        from benchmarks.longest import longest

        return longest(args)
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / f"gpu_{args.shape}.md"

    def report(runs: list[dict]) -> None:  # after each process: what was measured is never lost
        file.with_suffix(".json").write_text(json.dumps({"command": sys.argv, "runs": runs}, indent=1))
        file.write_text(document(args, runs))

    rounds(args, args.memory if cuda else [0], report)
    if not file.is_file():
        return 1
    print(f"\n{file.read_text()}\n{file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
