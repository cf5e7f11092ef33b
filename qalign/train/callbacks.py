"""What a person sees and keeps of a training loop."""

import json
import math
import os
import sys
import time
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import TrainerCallback

from qalign.errors import UserError
from qalign.train.run_folder import TOKENS_SEEN, WALL_SECONDS, RunFolder

# What the bar shows of a step, by the names under which TRL's trainers log.
SHOWN = {
    "rewards/margins": "margin {:+.3f}",
    "rewards/accuracies": "accuracy {:.0%}",
    "margin": "margin {:+.3f}",
    "accuracy": "accuracy {:.0%}",
    "mean_token_accuracy": "tokens right {:.0%}",
}


class RunCallback(TrainerCallback):
    """What a person sees and keeps of the loop: `metrics.jsonl`, the progress bar, whole checkpoints, clean stops.

    Attributes:
        tokens_seen: by the whole run so far; trainers count from zero when they resume.
    """

    def __init__(self, run: RunFolder, tokens_before: int = 0):
        self.run, self.tokens_seen, self._before = run, tokens_before, tokens_before
        self._bar = None
        self._mark = (time.monotonic(), tokens_before)

    def on_train_begin(self, args, state, control, **_):
        self._bar = tqdm(total=state.max_steps, initial=state.global_step, desc=self.run.stage, unit="step")
        self._mark = (time.monotonic(), self._mark[1])
        self.run.stop.patient = True

    def on_step_end(self, args, state, control, **_):
        self._bar.update(state.global_step - self._bar.n)
        if state.global_step >= state.max_steps or control.should_save:  # a checkpoint keeps no half-filled window
            control.should_log = True
        if self.run.stop.number is not None:
            control.should_log = control.should_save = control.should_training_stop = True
        return control

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        """A finite loss can have gradients that are not; float16's scaler skips such steps itself."""
        grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        if not args.fp16 and not torch.isfinite(torch.nn.utils.get_total_norm(grads)):
            raise UserError(
                f"step {state.global_step + 1}: the gradients are not finite; nothing was updated, and the last "
                "checkpoint, if there is one, is kept. Try a lower learning_rate, or compute_dtype: float32"
            )

    def on_log(self, args, state, control, logs=None, **_):
        if "loss" not in logs and not any(name.startswith("eval_") for name in logs):
            return  # the Trainer's closing statistics: summary.json has them
        # The scaler's first steps overflow by design; JSON has no word for infinity.
        finite = {name: value if math.isfinite(value) else None for name, value in logs.items()}
        line = {"step": state.global_step, **finite}
        if "loss" in logs:
            now, self.tokens_seen = time.monotonic(), self._before + int(logs["num_tokens"])
            line["num_tokens"] = self.tokens_seen
            line["tokens_per_second"] = round((self.tokens_seen - self._mark[1]) / max(1e-9, now - self._mark[0]), 1)
            self._mark = (now, self.tokens_seen)
            self._bar.set_postfix_str(f"{_shown(logs)}, {line['tokens_per_second']:,.0f} tokens/s")
        with self.run.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def on_evaluate(self, args, state, control, metrics=None, **_):
        tqdm.write(f"step {state.global_step}: held-out {_shown(metrics, 'eval_')}")
        self._mark = (time.monotonic(), self._mark[1])

    def on_save(self, args, state, control, **_):
        mark_whole(Path(args.output_dir) / f"checkpoint-{state.global_step}", self.run, self.tokens_seen)

    def on_train_end(self, args, state, control, **_):
        self.run.stop.patient = False
        self._bar.close()


def mark_whole(folder: Path, run: RunFolder, tokens_seen: int) -> None:
    """Marks a checkpoint as whole, once all of it is on the disk: `--resume` trusts only marked ones."""
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb+") as opened:
                os.fsync(opened.fileno())
    (folder / TOKENS_SEEN).write_text(str(tokens_seen))
    (folder / WALL_SECONDS).write_text(str(run.wall_seconds))
    (folder / "whole").touch()


def _shown(logs: dict, prefix: str = "") -> str:
    """The figures that a person wants to see of a log."""
    found = {"loss": "loss {:.4f}"} | SHOWN
    return ", ".join(text.format(logs[prefix + name]) for name, text in found.items() if prefix + name in logs)


def peak_bytes() -> int:
    """The most memory held so far: the GPU's by its allocator, else the process's resident set."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
