"""A base that is dealt out over cards (`model.shard`): are log-probs and gradients those of a base that each card holds
whole, what does each card hold, and what does a step cost?

    python benchmarks/shard.py                              # on two GPUs or more: a 7B in NF4, 2 processes
    python benchmarks/shard.py --shape qwen32b --only dealt # a base that no card may hold whole: bytes and time alone
    python benchmarks/shard.py --shape tiny                 # the same on a CPU, to try the script

Nothing is downloaded: weights are random, in NF4. Each process reads a pair of its own, by policy and reference, with
all layers checkpointed. It ends with 1 if a number differs by more than rounding.
"""

import argparse
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.random_models import MADE, SHAPES, as_base, config_of, fixture_tokenizer, random_lm, random_pair
from qalign.config.recipe import Lora, Model
from qalign.model.base import Role
from qalign.model.loading import compute_dtype, device
from qalign.model.memory.shard import Shards
from qalign.model.reference import ReferenceLogps

GIB, STEPS = 2**30, 3
SIDES = ("whole", "dealt")
ON_CUDA = torch.cuda.is_available()


def one_side(side: str, shape: str, tokens: int) -> dict:
    """What a process finds: the numbers of a step, bytes, and the shortest time of a step."""
    dtype = compute_dtype(Model(base="random"))
    lm = random_lm(config_of(shape), dtype, where=torch.device("cpu") if side == "dealt" else None)
    shards = Shards(lm, device()) if side == "dealt" else None
    base = as_base(lm, fixture_tokenizer())
    base.add_adapter(Role.POLICY, Lora())
    weights, generator = base.trained_weights(Role.POLICY), torch.Generator().manual_seed(1)
    for weight in weights.values():
        weight.data = (torch.randn(weight.shape, generator=generator) * 0.02).to(weight.device)
    base.lm.activation_checkpointing_enable({"use_reentrant": False})
    base.train()
    third = tokens // 3
    pairs = [random_pair((third,) * 3, base.lm.config.vocab_size, f"{dist.get_rank()}")]
    seconds = []
    with base.packed_attention():
        for _ in range(STEPS):
            dist.barrier()
            began = time.perf_counter()
            policy, reference = ReferenceLogps().beside_policy(base, pairs, base.batch(pairs))
            gradients = torch.autograd.grad(policy[:, 0].sum(), list(weights.values()))
            numbers = [tensor.detach().float().cpu() for tensor in (policy, reference, *gradients)]  # waits for the GPU
            seconds.append(time.perf_counter() - began)
    return {
        "numbers": numbers,
        "base": base.held_bytes,
        "peak": torch.cuda.max_memory_allocated() if ON_CUDA else 0,
        "received": 2 * shards.layer_bytes * (shards.processes - 1) // shards.processes if shards else 0,
        "seconds": min(seconds),
    }


def run(side: str, args: argparse.Namespace, folder: Path) -> list[dict]:
    """What each process of a side finds."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    place = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": args.cards, "OMP_NUM_THREADS": 1}
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    cards = given.split(",") if given else [str(number) for number in range(args.cards)]
    words = [sys.executable, __file__, "--shape", args.shape, "--tokens", str(args.tokens), "--side", side]
    processes = [
        subprocess.Popen(
            [*words, "--folder", str(folder)],
            env=os.environ
            | {name: str(value) for name, value in (place | {"RANK": rank}).items()}
            | ({"CUDA_VISIBLE_DEVICES": cards[rank]} if ON_CUDA else {}),
        )
        for rank in range(args.cards)
    ]
    try:
        while any(process.poll() is None for process in processes) and not any(p.poll() for p in processes):
            time.sleep(0.1)
    finally:
        for process in processes:  # one that waits for another, which failed
            if process.poll() is None:
                process.kill()
            process.wait()
    if any(process.returncode for process in processes):
        raise SystemExit(f"{side}: a process failed")
    return [torch.load(folder / f"{side}-{rank}.pt") for rank in range(args.cards)]


def worker(args: argparse.Namespace) -> None:
    dist.init_process_group("cpu:gloo,cuda:nccl" if ON_CUDA else "gloo")
    torch.save(one_side(args.side, args.shape, args.tokens), args.folder / f"{args.side}-{dist.get_rank()}.pt")
    dist.destroy_process_group()


def measure(args: argparse.Namespace) -> int:
    """Prints a line for each process of each side. Returns 1 if the sides differ."""
    with tempfile.TemporaryDirectory() as folder:
        found = {side: run(side, args, Path(folder)) for side in args.only}
    print(f"\n{args.shape}, {args.cards} processes, {args.tokens:,} tokens each, {torch.__version__}\n")
    print("| base | process | base, GiB | peak, GiB | received a step, GiB | s/step |\n|---|---|---|---|---|---|")
    for side, parts in found.items():
        for rank, part in enumerate(parts):
            sizes = " | ".join(f"{part[name] / GIB:.4g}" for name in ("base", "peak", "received"))
            print(f"| {side} | {rank} | {sizes} | {part['seconds']:.3f} |")
    if len(found) < len(SIDES):
        return 0
    apart = [
        (one - other).norm().item() / max(other.norm().item(), 1e-12)
        for here, there in zip(found["dealt"], found["whole"], strict=True)
        for one, other in zip(here["numbers"], there["numbers"], strict=True)
    ]
    print(f"\nLog-probs and gradients differ by {max(apart):.1e} of their norm at most.")
    return int(not max(apart) < 1e-5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=[*SHAPES, *MADE], default="mistral7b")
    parser.add_argument("--cards", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=2048, help="of the pair that each process reads")
    parser.add_argument("--only", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        worker(args)
        return
    there = torch.cuda.device_count()
    if args.shape != "tiny" and there < args.cards:
        print(f"this needs {args.cards} GPUs, and there are {there}; --shape tiny tries the script on a CPU")
        sys.exit(2)
    sys.exit(measure(args))


if __name__ == "__main__":
    main()
