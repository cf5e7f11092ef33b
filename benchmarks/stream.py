"""Layers that are streamed (`model.stream`): are the gradients those of a base in memory, how often is a layer visited,
and what does the device hold?

    python benchmarks/stream.py                  # on a CPU: a small base, in a process with and one without streaming
    python benchmarks/stream.py --minutes 8      # on a GPU: DPO at the shapes of a 14B and a 32B on 8 and 12 GiB
    python benchmarks/stream.py --shapes tiny --memory 0.02 --max-length 64     # the same on a CPU, to try the script

On a GPU nothing is downloaded: weights are random, in NF4. A step with all layers on the real card stands beside the
same step on a card that looks small, so the quotient says how much of the copying is hidden behind the computing.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.cards import ON_CUDA, Stage, card, emptied
from benchmarks.random_models import fixture_tokenizer, random_pair
from qalign.config.recipe import Lora, Model
from qalign.model.base import Role, load
from qalign.model.memory.stream import stream_of
from qalign.model.reference import ReferenceLogps

LAYERS, STEPS = 16, 2
GIB = 2**30


def small_base(folder: str) -> None:
    """A Llama of 16 layers with 100 million weights in them, as a folder that a recipe can name."""
    tokenizer = fixture_tokenizer()
    sizes = {"hidden_size": 768, "intermediate_size": 2048, "num_attention_heads": 12, "num_key_value_heads": 4}
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), num_hidden_layers=LAYERS, tie_word_embeddings=True, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def one_side(folder: str, when: str) -> dict:
    """Steps on pairs with the base as it is loaded, and what they took."""
    base = load(Model(base=folder, compute_dtype="float32", stream=when))
    base.add_adapter(Role.POLICY, Lora())
    generator = torch.Generator().manual_seed(1)
    weights = base.trained_weights(Role.POLICY)
    for weight in weights.values():
        weight.data = torch.randn(weight.shape, generator=generator) * 0.02
    base.lm.activation_checkpointing_enable({"use_reentrant": False})
    base.train()
    pairs = [random_pair((24, 16, 16), 2000, str(number)) for number in range(2)]
    stream = stream_of(base.lm)
    digest, seconds, copies, before = hashlib.sha256(), [], [], stream.copies if stream else 0
    with base.packed_attention():
        for _ in range(STEPS):
            began = time.perf_counter()
            policy, reference = ReferenceLogps().beside_policy(base, pairs, base.batch(pairs))
            gradients = torch.autograd.grad(policy[:, 0].sum(), list(weights.values()))
            seconds.append(time.perf_counter() - began)
            for tensor in (policy.detach(), reference, *gradients):
                digest.update(tensor.numpy().tobytes())
            copies.append((stream.copies if stream else 0) - before)
            before += copies[-1]
    return {
        "numbers": digest.hexdigest()[:16],
        "layers copied a step": copies[-1],
        "bytes of the base that the device holds": base.held_bytes,
        "seconds a step": min(seconds),
    }


def on_cpu() -> int:
    """Prints a table of both sides. Returns 1 if a number differs."""
    with tempfile.TemporaryDirectory() as folder:
        small_base(folder)
        found = {}
        for when in ("never", "never", "always"):  # the first quantises
            words = [sys.executable, __file__, "--side", when, "--folder", folder]
            ended = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
            found[when] = json.loads(ended.stdout.splitlines()[-1])
    print("| | all in memory | streamed |\n|---|---|---|")
    for name, value in found["never"].items():
        print(f"| {name} | {_shown(value)} | {_shown(found['always'][name])} |")
    return int(found["never"]["numbers"] != found["always"]["numbers"])


def _shown(value) -> str:
    return f"{value:,.3f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else value


def on_cards(args) -> int:
    """Prints a line for each shape and card until the time is up. Returns 1 if a planned step didn't fit."""
    deadline, failed = time.monotonic() + 60 * args.minutes, False
    print(
        "| shape | card, GiB | tokens a step | s/step, all in memory | streamed | copied, GiB | layers copied | peak |"
    )
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for shape in args.shapes:
        stage, plans = Stage("dpo", shape, args.max_length, streamed=True), {}
        for gib in sorted(args.memory):
            with card(gib) as usable:
                plans[gib] = stage.forecast.plan(usable, stage.longest)
                if plans[gib] is None:
                    print(f"| {shape} | {gib:g} | doesn't fit | | | | | |", flush=True)
                    continue
                rows = [stage.row(stage.longest) for _ in range(max(1, plans[gib].tokens // stage.longest))]
                peak = stage.peaks(plans[gib], rows, steps=1)
                failed |= peak is None
                before = stage.stream.copies, stage.stream.copied_bytes
                took = _seconds(stage, rows) if peak else float("nan")
                copies, copied = stage.stream.copies - before[0], stage.stream.copied_bytes - before[1]
            plans[gib] = plans[gib], rows, f"{took:.2f} | {copied / GIB:.2f} | {copies} | {(peak or [0])[0] / GIB:.2f}"
            if time.monotonic() > deadline:
                break
        del stage
        emptied()
        resident = Stage("dpo", shape, args.max_length)
        for gib, planned in plans.items():
            if planned and time.monotonic() < deadline:
                plan, rows, figures = planned
                resident.take(plan)
                resident.step(rows)
                print(
                    f"| {shape} | {gib:g} | {plan.tokens:,} | {_seconds(resident, rows):.2f} | {figures} |", flush=True
                )
        del resident
        emptied()
    return int(failed)


def _seconds(stage: Stage, rows: list) -> float:
    """Of one step."""
    if ON_CUDA:
        torch.cuda.synchronize()
    began = time.perf_counter()
    stage.step(rows)
    if ON_CUDA:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["qwen14b", "qwen32b"])
    parser.add_argument("--memory", nargs="+", type=float, default=[8.0, 12.0], help="of the card, in GiB")
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(one_side(args.folder, args.side)))
        return
    sys.exit(on_cards(args) if ON_CUDA or args.shapes == ["tiny"] else on_cpu())


if __name__ == "__main__":
    main()
