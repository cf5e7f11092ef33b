"""Callbacks of `Trainer`: progress bar, metrics, whole checkpoints, clean stops, and checkpointing of some layers."""

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import TrainerCallback
from transformers.modeling_layers import GradientCheckpointingLayer

from qalign.errors import UserError, did_you_mean, gradients_not_finite
from qalign.train.processes.world import current
from qalign.train.run_folder import RunFolder

# What the bar shows of a step, by the names under which TRL's trainers log.
SHOWN = {
    "loss": "loss {:.4f}",
    "rewards/margins": "margin {:+.3f}",
    "rewards/accuracies": "accuracy {:.0%}",
    "margin": "margin {:+.3f}",
    "accuracy": "accuracy {:.0%}",
    "mean_token_accuracy": "tokens right {:.0%}",
}


class RunCallback(TrainerCallback):
    """The progress bar, `metrics.jsonl`, whole checkpoints, a clean stop, and checkpointing of the planned layers.
    `tokens_seen` counts those of the whole run; trainers count from zero when they resume."""

    def __init__(self, run: RunFolder, tokens_before: int = 0, checkpointed_layers: int = 0):
        self.run, self.world, self.tokens_seen, self._before = run, current(), tokens_before, tokens_before
        self._checkpointed_layers = checkpointed_layers
        self._bar = tqdm(disable=True)
        self._mark = (time.monotonic(), tokens_before)

    def on_train_begin(self, args, state, control, **kwargs):
        checkpoint_layers(kwargs["model"], self._checkpointed_layers)
        self._bar = tqdm(total=state.max_steps, initial=state.global_step, desc=self.run.stage, unit="step")
        self._mark = (time.monotonic(), self._mark[1])
        self.run.stop.patient = True

    def on_step_end(self, args, state, control, **_):
        self._bar.update(state.global_step - self._bar.n)
        if state.global_step >= state.max_steps or control.should_save:  # a checkpoint keeps no half-filled window
            control.should_log = True
        if asked_to_stop(self.run):
            control.should_log = control.should_save = control.should_training_stop = True
        control.should_save = control.should_save and self.world.is_first
        return control

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        """A finite loss can have gradients that are not finite. (float16's scaler skips such steps itself.)"""
        model: nn.Module = kwargs["model"]
        grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        if not args.fp16 and not torch.isfinite(torch.nn.utils.get_total_norm(grads)):
            raise gradients_not_finite(f"step {state.global_step + 1}")

    def on_log(self, args, state, control, **kwargs):
        logs: dict[str, float] = kwargs["logs"]
        if "loss" not in logs and not any(name.startswith("eval_") for name in logs):
            return  # the Trainer's closing statistics, which summary.json has
        # The first steps of float16's scaler overflow by design, and JSON has no infinity.
        finite = {name: value if math.isfinite(value) else None for name, value in logs.items()}
        line: dict[str, Any] = {"step": state.global_step, **finite}
        if "loss" in logs:
            now, self.tokens_seen = time.monotonic(), self._before + int(logs["num_tokens"])
            line["num_tokens"] = self.tokens_seen
            line["tokens_per_second"] = round((self.tokens_seen - self._mark[1]) / max(1e-9, now - self._mark[0]), 1)
            self._mark = (now, self.tokens_seen)
            self._bar.set_postfix_str(f"{_shown(logs)}, {line['tokens_per_second']:,.0f} tokens/s")
        elif "eval_num_tokens" in logs:  # TRL's SFTTrainer counts from the beginning of the session
            line["eval_num_tokens"] = self._before + int(logs["eval_num_tokens"])
        if "loss" not in logs:  # what was measured took time that is no training
            self._mark = (time.monotonic(), self._mark[1])
        if self.world.is_first:
            self.run.log(line)

    def on_evaluate(self, args, state, control, **kwargs):
        metrics, best = kwargs["metrics"], (args.metric_for_best_model or "").removeprefix("eval_")
        if best and best not in (known := {name.removeprefix("eval_") for name in metrics}):
            raise UserError(
                f"{self.run.stage}.trainer.metric_for_best_model: there is no '{best}' among the figures of held-out "
                f"rows{did_you_mean(best, known)}; they have {', '.join(sorted(known))}"
            )
        tqdm.write(f"step {state.global_step}: held-out {_shown(metrics, 'eval_')}")

    def on_save(self, args, state, control, **_):
        best = state.best_model_checkpoint  # for `load_best_model_at_end`
        self.run.mark_whole(state.global_step, self.tokens_seen, keep=best and Path(best).name)

    def on_train_end(self, args, state, control, **_):
        self.run.stop.patient = False
        self._bar.close()


def asked_to_stop(run: RunFolder) -> bool:
    """Whether any process was asked to stop; all stop after the same step."""
    number = max(asked or 0 for asked in current().gathered(run.stop.number))
    if number:  # else a signal may have come since this process said that it had none
        run.stop.number = number
    return number > 0


def end_part(run: RunFolder, line: dict[str, Any], parts: int, checkpoints: int) -> None:
    """Ends a part of a run that samples in parts: logs its `line`, whose `step` is the number of parts done. About
    `checkpoints` times a run, after its last part, and where a stop was asked for, it writes a checkpoint; a stop then
    ends the command."""
    world, done = current(), line["step"]
    if world.is_first:
        run.log(line)
    stopped = asked_to_stop(run)
    if world.is_first and (stopped or done == parts or done % math.ceil(parts / checkpoints) == 0):
        run.mark_whole(done, 0)
    if stopped and done < parts:
        world.gathered(None)  # the others go once the first process has written its checkpoint
        run.end_early(done)


class ClipEach(TrainerCallback):
    """Clips the gradients of groups of weights, each by its own norm, as `Trainer` does for all together. (It has
    undone float16's scale by now.)"""

    def __init__(self, groups: list[list[nn.Parameter]], most: float):
        self.groups, self.most = groups, most

    def on_pre_optimizer_step(self, args, state, control, **_):
        for weights in self.groups if self.most > 0 else ():
            nn.utils.clip_grad_norm_(weights, self.most)


class Monitor(TrainerCallback):
    """Looks at what is trained before the first step, at some steps, and at the end. It must change nothing: neither
    weights nor modes, nor the state of a random generator."""

    header: dict[str, str]  # lines for the stage's header

    def on_step_begin(self, args, state, control, **_):
        self.look(state.global_step)

    def look(self, step: int) -> None:
        """Called with the number of steps done, before each step and when training has ended; once more, if a run is
        resumed there."""


def checkpoint_layers(
    model: Any, planned: int, again: Callable[[], AbstractContextManager[object]] = nullcontext
) -> None:
    """Gradient checkpointing of `planned` layers, from the first one with trained weights: those below it keep nothing
    for the backward pass. `Trainer` switches it on for all. The layers ask for training mode, and are put into
    evaluation mode while they run: in some families they have dropout. `again` is called before a layer runs, and gives
    the context in which it is computed again."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    trained = [any(parameter.requires_grad for parameter in layer.parameters()) for layer in layers]
    first = trained.index(True) if any(trained) else 0
    chosen = layers[first : first + planned]

    @contextmanager
    def evaluating(within: AbstractContextManager[object]) -> Iterator[None]:
        for layer in chosen:
            layer.training = False
        try:
            with within:
                yield
        finally:
            for layer in chosen:
                layer.training = True

    if planned:
        contexts = {"context_fn": lambda: (evaluating(nullcontext()), evaluating(again()))}  # forward, and again
        model.activation_checkpointing_enable({"use_reentrant": False, **contexts})
    for layer in layers:
        layer.gradient_checkpointing = layer in chosen


def _shown(logs: dict[str, float], prefix: str = "") -> str:
    """The most telling of the logged numbers, in words."""
    return ", ".join(text.format(logs[prefix + name]) for name, text in SHOWN.items() if prefix + name in logs)


def peak_bytes() -> int:
    """Peak memory so far: of the GPU as its allocator counts it, else the process's resident set."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
