"""How long does a step of decoding take on a GPU: captured as a CUDA graph against kernel by kernel?

    python benchmarks/decode.py [--shape mistral7b] [--answers 1 16 64] [--families llama gemma4 …]
    python benchmarks/decode.py --shape tiny --answers 1 4     # the same code on a CPU; its figures say nothing

First small random models of several families, in float32: captured steps must sample the very tokens that a growing
cache samples, greedily and not. Then a model of the shape with random weights in NF4, with and without an adapter: the
time of a step is that of `--tokens` answers' tokens less that of 8, so prompts don't count. Prints a traceback of
whatever kept steps from being captured.
"""

import argparse
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path

import torch
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.random_models import as_base, config_of, fixture_tokenizer, random_lm
from qalign.config.recipe import Lora, Model
from qalign.model.base import Base, Role
from qalign.model.decoding import decoder
from qalign.model.generation import Sampling, TransformersEngine
from qalign.model.kernels import fuse
from qalign.model.loading import compute_dtype, device
from tests.families import family

FAMILIES = ("llama", "mistral", "gemma2", "gemma4", "gpt-oss", "qwen3_5_text", "qwen3_5_moe_text", "lfm2")
WAYS = {"captured": ("cuda", "cpu"), "kernel by kernel": ()}  # devices with static caches
SHORT = 8  # tokens
ON_CUDA = torch.cuda.is_available()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", choices=["mistral7b", "llama31_8b", "qwen3_4b", "tiny"], default="mistral7b")
    parser.add_argument("--answers", nargs="+", type=int, default=[1, 16, 64], help="decoded at once")
    parser.add_argument("--prompt", type=int, default=256, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=40, help="of an answer")
    parser.add_argument("--families", nargs="*", default=FAMILIES, help="compared in float32 first")
    return parser.parse_args()


def give_weights(base: Base, scale: float) -> None:
    """Gives the policy weights that do something: LoRA begins as a no-op."""
    for parameter in base.trained_weights(Role.POLICY).values():
        torch.nn.init.normal_(parameter, std=scale)


def sampled(base: Base, role: str, answers: int, tokens: int, prompt: int, temperature: float = 1.0) -> list:
    """Answers of exactly `tokens` tokens to prompts of `prompt` made-up ids."""
    words = base.lm.config.get_text_config().vocab_size - 8
    prompts = [[5 + (number * 7 + place * 3) % words for place in range(prompt)] for number in range(answers)]
    how = Sampling(tokens, temperature, ())
    return TransformersEngine().generate(base, role, prompts, how, num_samples=1, seed=0)


def timed(work) -> tuple[float, list]:
    if ON_CUDA:
        torch.cuda.synchronize()
    start = time.perf_counter()
    found = work()
    if ON_CUDA:
        torch.cuda.synchronize()
    return time.perf_counter() - start, found


def said(base: Base) -> str:
    """Whether steps of a base were captured; a traceback if something was raised."""
    used = decoder.decoder_of(base)
    if used.traceback:
        print(used.traceback)
    return used.reason or f"{used.graphs} graphs"


def compare_family(name: str) -> None:
    """The tokens of a small model in float32, in both ways."""
    tokenizer = fixture_tokenizer()
    lm = family(name, len(tokenizer) + 10, spread=0.1, dtype=torch.float32).to(device())
    with suppress(ValueError):  # of families that have no other attention than their own
        lm.set_attn_implementation("sdpa")
    base = as_base(lm, tokenizer)
    base.add_adapter(Role.POLICY, Lora(r=4))
    give_weights(base, 0.1)
    found = []
    for devices in WAYS.values():
        decoder.DEVICES = devices
        found.append([sampled(base, Role.POLICY, 5, 60, prompt, heat) for prompt, heat in ((7, 1.0), (250, 0.0))])
    same = [sum(one == other for one, other in zip(*each, strict=True)) for each in zip(*found, strict=True)]
    print(f"{name}: of 5 answers {same[0]} sampled and {same[1]} greedy ones are the same ({said(base)})", flush=True)


def measure(base: Base, role: str, answers: int, args: argparse.Namespace) -> None:
    """Prints milliseconds a step in both ways, and whether they sample the same tokens."""
    found = {}
    for way, devices in WAYS.items():
        decoder.DEVICES = devices
        if ON_CUDA:
            torch.cuda.reset_peak_memory_stats()
        with decoder.decoder_of(base).session(base, ()):  # what was captured is kept for the second run
            run = lambda tokens: timed(lambda: sampled(base, role, answers, tokens, args.prompt))  # noqa: E731
            first, _ = run(args.tokens)
            short, _ = run(SHORT)
            whole, found[way] = run(args.tokens)
        step = (whole - short) / (args.tokens - SHORT)
        peak = (
            [f(0) / 2**30 for f in (torch.cuda.max_memory_allocated, torch.cuda.max_memory_reserved)] if ON_CUDA else []
        )
        print(
            f"{role}, {answers} at once, {way}: {step * 1e3:.1f} ms a step, {answers / step:,.0f} tokens/s; the first "
            f"run took {first - whole:+.2f} s; peak {' / '.join(f'{each:.2f}' for each in peak)} GiB; {said(base)}",
            flush=True,
        )
    pairs = [pair for (one,), (other,) in zip(*found.values(), strict=True) for pair in zip(one, other, strict=True)]
    print(f"  {sum(one == other for one, other in pairs) / len(pairs):.0%} of the tokens are the same", flush=True)


def profile(base: Base, role: str, answers: int, args: argparse.Namespace) -> None:
    """Prints the kernels of a captured step, the longest ones first."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    decoder.DEVICES = WAYS["captured"]
    with decoder.decoder_of(base).session(base, ()):
        sampled(base, role, answers, args.tokens, args.prompt)
        with profiler(activities=[ProfilerActivity.CUDA]) as watched:
            sampled(base, role, answers, args.tokens, args.prompt)
    rows = [row for row in watched.key_averages() if row.self_device_time_total > 0]
    busy, steps = sum(row.self_device_time_total for row in rows), args.tokens
    print(
        f"profile of {role}, {answers} at once, prompt included: {sum(row.count for row in rows) / steps:,.0f} kernels "
        f"and {busy / steps / 1e3:.1f} ms of the GPU a step"
    )
    for row in sorted(rows, key=lambda row: -row.self_device_time_total)[:14]:
        print(f"  {row.self_device_time_total / busy:5.1%} {row.count / steps:7.1f} a step {row.key[:100]}", flush=True)


def attempt(what: str, work, *args) -> None:
    """Goes on after a failure, whose traceback is printed."""
    try:
        work(*args)
    except Exception:
        print(f"{what} failed:")
        traceback.print_exc(file=sys.stdout)
        sys.stdout.flush()


def main() -> None:
    args, start = arguments(), time.perf_counter()
    logging.set_verbosity_error()
    print(f"torch {torch.__version__} on {torch.cuda.get_device_name() if ON_CUDA else 'a CPU'}", flush=True)
    for name in args.families:
        attempt(name, compare_family, name)
    base = as_base(random_lm(config_of(args.shape), compute_dtype(Model(base=args.shape))), fixture_tokenizer())
    fused = fuse(base.lm)
    base.add_adapter(Role.POLICY, Lora())
    give_weights(base, 0.01)
    print(f"{args.shape} in NF4 and {base.dtype} after {time.perf_counter() - start:.0f} s; fused: {fused}", flush=True)
    for role in (Role.POLICY, Role.BASE):
        for answers in args.answers:
            attempt(f"{role}, {answers}", measure, base, role, answers, args)
    if ON_CUDA:
        for answers in args.answers:
            attempt("profile", profile, base, Role.POLICY, answers, args)
    print(f"{time.perf_counter() - start:.0f} s in all")


if __name__ == "__main__":
    main()
