"""The beginning and the end that all stages share: adapter, plan, run folder, header, loop, saved adapter."""

import math
import time
from collections.abc import Callable, Sized
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any, Literal, cast

from transformers import Trainer, TrainerCallback, TrainerState, set_seed
from transformers.trainer import TRAINER_STATE_NAME

from qalign.config.atomic import replacing_folder
from qalign.config.manifest import damage
from qalign.config.recipe import flat
from qalign.config.stages import PPO, RL_STAGES, SFT, Reward, Stage
from qalign.data.collate import MicroBatchLimit
from qalign.data.store.tokens import outlines
from qalign.errors import UserError, out_of_memory, program
from qalign.losses.ensemble import member_seed
from qalign.model import lineage
from qalign.model.adapters.members import member_roles, places
from qalign.model.base import Base, Role, load
from qalign.model.experts.weights import experts_in_words
from qalign.model.loading import compute_dtype, device, load_config, reach_of, readable
from qalign.model.memory.first_step import is_out_of_memory
from qalign.model.memory.forecast import Forecast, Plan, tokens_of_most_steps, usable_by_offload, usable_memory
from qalign.model.memory.offload import offload
from qalign.model.memory.shard import shards_of
from qalign.model.memory.stream import stream_of
from qalign.train.callbacks import Monitor, RunCallback, peak_bytes
from qalign.train.dataset import StageRows, record, rendered_at
from qalign.train.model_card import loading, versions
from qalign.train.processes.world import current
from qalign.train.run_folder import RunFolder, print_table
from qalign.train.trainers.adapter import CONFIGS, built, config_values, naming_trainer, try_out

FEW_STEPS = 10  # of the optimiser: with Adam and a warm-up, fewer hardly move an adapter


def load_base(run: RunFolder) -> Base:
    """The recipe's base model, loaded after the values under `trainer:` were tried out. Waits for the other processes
    of the run."""
    try_out(run)
    world, model = current(), run.recipe.model
    world.connect(facts_of(run), f"{run.command} --resume")
    if model.shard:
        return load(model, now=rendered_at(run) if run.resume else None, in_turn=world.in_turn)
    return world.in_turn(lambda: placed_base(run))


def placed_base(run: RunFolder) -> Base:
    """The recipe's base model, its layers streamed where the stage's forecast says that they don't fit."""
    model = run.recipe.model
    if device().type == "cuda" and model.stream == "auto":
        config, memory = load_config(model), usable_memory("cuda")
        with readable(model.base, "model.base", "can't be trained"):
            forecast = Forecast(run.recipe, run.stage, config, "cuda", compute_dtype(model))
            model = forecast.decided(memory).recipe.model
    return load(model, now=rendered_at(run) if run.resume else None)


def facts_of(run: RunFolder) -> dict[str, Any]:
    """What must be the same in all processes of a run, by name."""
    facts = {f"version of {name}": version for name, version in versions().items()}
    recipe = run.recipe.model_dump(mode="json", include={"seed", "model", "lora", run.stage})
    apart = tuple(f"{run.stage}.{key}" for key in ("data", "eval_data", "agree_with"))  # rows are compared
    facts |= {key: value for key, value in flat(recipe) if not key.startswith(apart)}
    return facts | {"device": device().type}


class Session:
    """What one process does of a stage: its methods are called in this order."""

    planned: Plan
    micro: MicroBatchLimit  # how much goes through the model at once
    checkpoint: Path | None  # where this session continues; None at the beginning of a run

    def __init__(self, run: RunFolder, base: Base, rows: StageRows, role: Role = Role.POLICY):
        self.run, self.base, self.rows, self.roles = run, base, rows, member_roles(run.settings) or (role,)
        if run.stage not in RL_STAGES:  # whose rows are prompts; it checks `max_length` itself
            check_reach(base, rows)
        self.origin, self.world = base.lineage(run.stage, run.parent), current()  # of the adapter that is trained
        self.world.same({f"rows of {run.stage}.{key}": value for key, value in rows.hashes.items()})
        self.world.same(asdict(self.origin))

    def add_adapter(self, *, reference: bool = False) -> None:
        """Adds the adapter to train: new, or a copy of the one that `start_from` names, which must have been trained
        with the same base, tokenizer and chat template. `reference` keeps a frozen copy of that one as the reference.
        (A new adapter needs none: its reference is the base with adapters off.) An ensemble has one for each member,
        with the initial weights of the member's own seed. Several processes begin with the weights of the first one."""
        recipe, settings = self.run.recipe, self.run.settings
        set_seed(recipe.seed)
        if isinstance(settings, Reward) and settings.members > 1:
            for number, role in enumerate(self.roles, start=1):
                set_seed(member_seed(recipe.seed, number))
                self.base.add_adapter(role, recipe.lora, settings.share)
        elif parent := self.run.parent:
            lineage.check(f"{self.run.stage}.start_from", parent, self.origin)
            self.base.load_adapter(self.roles[0], parent, trainable=True)
            if reference:
                self.base.load_reference(parent)
        else:
            self.base.add_adapter(self.roles[0], recipe.lora)
        self._copy_weights()

    def _copy_weights(self) -> None:
        self.world.copied([w for role in self.roles for w in self.base.trained_weights(role).values()])

    def plan(self, longest: int, other_bytes: int = 0) -> None:
        """Resolves the `auto` settings of the stage for this base and this device, or raises a `UserError` if not even
        the longest row fits: of `longest` tokens, of a pair both answers with the prompt once. `other_bytes` is the
        memory of models next to the base. Several processes take the plan of the one that has room for the least."""
        plans = self.world.gathered(self.world.agreed(lambda: self._plan(longest, other_bytes)))
        self.planned = min(plans, key=lambda plan: (plan.tokens, -plan.checkpointed_layers, -plan.offloaded))
        self.micro = micro_batch(self.run.settings, self.planned, longest)
        if self.planned.offloaded:
            with self.base.acting_as(self.base.role) as lm:
                offload(lm)

    def _plan(self, longest: int, other_bytes: int) -> Plan:
        run, settings, device = self.run, self.run.settings, self.base.lm.device.type
        size, layers = rows_at_once(settings), settings.checkpointed_layers
        if size != "auto" and (device == "cpu" or layers != "auto"):  # nothing to find out
            return Plan(size * longest, 0 if layers == "auto" else layers)
        streams = "always" if stream_of(self.base.lm) else "never"
        recipe = run.recipe.model_copy(update={"model": self.base.spec.model_copy(update={"stream": streams})})
        forecast = Forecast(recipe, run.stage, self.base.lm.config, device, self.base.dtype, self.world.size)
        if run.stage in ("reward", "dpo", "kto"):
            taken = [*map(self.base.tokens_taken, outlines(self.rows.train))]
            forecast.most_steps = tokens_of_most_steps(taken, settings.batch_size)
        memory = usable_memory(device, self.base.held_bytes)
        # A CPU's leaves other models out already, but is shared by the processes.
        memory = memory - other_bytes if device == "cuda" else memory // self.world.local_size
        host = usable_by_offload() // self.world.local_size
        found = forecast.plan(memory, longest if size == "auto" else size * longest, host)
        if found is None and size != "auto":  # the user's choice: it may fit in spite of the forecast
            found = Plan(size * longest, forecast.layers)
        if found is None:
            total = forecast.total(longest, forecast.layers, offloaded=forecast.can_offload)
            needed = f"{total / 2**30:.1f} GiB of the {memory / 2**30:.1f} GiB"
            row, fit = f"the longest row ({longest:,} tokens)", f"{program('fit')} {run.command_line}"
            raise UserError(f"{run.stage}: {row} would take {needed} there are; {fit} says what would fit")
        return found

    def trainer(self, build: Callable[..., Any], **special: Any) -> Any:
        """Begins the run and builds the stage's trainer: `build(args, rows, held_out_rows, callbacks)`, where `args` is
        TRL's config from the recipe; values under `trainer:` override all others."""
        run, base, checkpointing = self.run, self.base, self.planned.checkpointed_layers > 0
        on_gpu = base.lm.device.type == "cuda"
        values = config_values(run, on_gpu=on_gpu, dtype=base.dtype, checkpointing=checkpointing)
        args = built(run.stage, run.settings.trainer, lambda given: CONFIGS[run.stage](**values | special | given))
        callbacks = self.begin()
        with naming_trainer(run.stage, run.settings.trainer):
            return build(args, self.rows.train, self.rows.held_out or None, callbacks)

    def begin(self) -> tuple[TrainerCallback, ...]:
        """Prepares the run folder and goes back to the last checkpoint. Returns the callbacks for `Trainer`."""

        def prepared() -> tuple[Path | None, int]:
            self.run.begin(self.rows.refused)
            record(self.run, self.rows, self.base.template)
            return self.run.rewind()

        self.checkpoint, self.tokens_before = self.world.first(prepared)
        self.world.agreed(self._check_place)
        self.callback = RunCallback(self.run, self.tokens_before, self.planned.checkpointed_layers)
        return (self.callback,)

    def _check_place(self) -> None:
        if self.checkpoint and not self.checkpoint.is_dir():
            fix = "put `output` into a folder that all hosts share"
            raise UserError(f"{self.world.me}: {self.checkpoint} isn't there; {fix}")

    def print_header(self, steps: str, **more: str) -> None:
        """Prints what is about to be trained, on what, and against what. `steps` is their number and the size of each
        in words, `more` the stage's own lines, which may replace others."""
        run, base, model = self.run, self.base, self.run.recipe.model
        weights, size = base.count_parameters()
        experts = "" if model.quantization == "none" else experts_in_words(base.lm)
        lines = {
            "model": f"{model.base} ({size / 1e6:,.0f} M parameters)",
            **({"processes": words} if (words := self.world.in_words) else {}),
            "held in": f"{model.quantization}{experts}, computing in {base.precision}",
            **({"fused kernels": base.kernels} if base.kernels else {}),
            **({"left out": f"{', '.join(base.left_out)}: no text reaches it"} if base.left_out else {}),
            "chat template": base.template,
            "trainable": f"{weights:,} adapter parameters ({weights / size:.2%} of the base), in float32",
            **({"": f"starting from {run.parent}"} if run.parent else {}),
            **more,
            "rows": ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in self.rows.counts.items()),
            "steps": f"{steps}, {self.micro}{self.planned}",
            **self.planned.lines,
            **({"streamed": str(stream)} if (stream := stream_of(base.lm)) else {}),
            **({"sharded": str(shards)} if (shards := shards_of(base.lm)) else {}),
        }
        if run.resume:
            lines["resuming"] = str(self.checkpoint or "from the beginning: no checkpoint was written")
        print_table(f"qalign {run.name} → {run.path}", [*lines.items(), *self.rows.notes])

    def train(self, trainer: Trainer, monitor: Monitor | None = None, **more: str) -> dict[str, Any]:
        """Prints the header, with `more` lines of the stage, and runs `Trainer` as `to_the_end` says, looked at by a
        `monitor`."""

        def loop() -> tuple[int, int, int]:
            if self.checkpoint is None:
                trainer.train()
            else:
                self._resume(trainer, self.checkpoint)
            if trainer.args.load_best_model_at_end:  # the first process knows which checkpoint that was
                self._copy_weights()
            if monitor and self.world.is_first and trainer.state.global_step >= trainer.state.max_steps:
                monitor.look(trainer.state.global_step)
            return trainer.state.global_step, trainer.state.max_steps, self.callback.tokens_seen

        settings, unit = self.run.settings, {"sft": "rows", "kto": "answers"}.get(self.run.stage, "pairs")
        steps = planned_steps(settings, len(cast(Sized, trainer.train_dataset)))
        if hint := few_steps(settings, steps):
            more["hint"] = hint
        if monitor:
            if self.world.is_first:
                trainer.add_callback(monitor)
            more |= monitor.header
        self.print_header(f"{steps:,}, each of {settings.batch_size} {unit}", **more)
        return self.to_the_end(loop)

    def _resume(self, trainer: Trainer, checkpoint: Path) -> None:
        """Trains on from a checkpoint. From one of the last step, which was killed before its summary, nothing but the
        weights is loaded: `Trainer` would train one step too many, unless an epoch ends there."""
        args, state = trainer.args, TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        final = checkpoint
        if args.load_best_model_at_end and state.best_model_checkpoint:
            final = self.run.checkpoints / Path(state.best_model_checkpoint).name
            moved = "" if Path(state.best_model_checkpoint).is_dir() else "it was moved"
            if problem := damage(final) or moved:
                fix = "--overwrite starts again"
                raise UserError(f"{final}: the best checkpoint can't be used: {problem}; {fix}")
        if state.global_step < state.max_steps:
            args.eval_on_start = False  # it is no start
            trainer.train(resume_from_checkpoint=str(checkpoint))
            return
        trainer.state = state
        for role, folder in places(self.roles, final).items():
            self.base.restore_adapter(role, folder)

    def to_the_end(self, loop: Callable[[], tuple[int, int, int]]) -> dict[str, Any]:
        """Runs a training loop, which returns steps done, steps planned and tokens seen of the whole run, and saves the
        adapter. Returns facts for the summary: `steps` and `tokens` of the whole run, the others of this session.
        Raises `Stopped` if the user or the system asked to stop; a checkpoint was written."""
        run, began, stream = self.run, time.monotonic(), stream_of(self.base.lm)
        copied = stream.copied_bytes if stream else 0
        try:
            done, planned, tokens = loop()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise out_of_memory(error, _smaller(run), f" with {self.micro}{self.planned}") from None
        if run.stop.number is not None and done < planned:
            self.world.gathered(None)  # the others go once the first process has written its checkpoint
            run.end_early(done)
        seconds, peaks = time.monotonic() - began, self.world.gathered(peak_bytes())
        self.world.first(self._save)
        several = {"processes": len(peaks), "peak_bytes_each": peaks} if len(peaks) > 1 else {}
        if shards_of(self.base.lm):
            several["base_bytes_each"] = self.world.gathered(self.base.held_bytes)
        return several | {
            "steps": done,
            "resumed_from": str(self.checkpoint) if self.checkpoint else None,
            "train_seconds": round(seconds, 1),
            "tokens": tokens,
            "tokens_per_second": round((tokens - self.tokens_before) / max(1e-9, seconds), 1),
            "peak_bytes": max(peaks),
            **({"streamed_bytes": stream.copied_bytes - copied} if stream else {}),
        }

    def _save(self) -> None:
        with replacing_folder(self.run.adapter) as aside:
            for role, folder in places(self.roles, aside).items():
                self.base.save_adapter(role, folder)
                lineage.write(folder, self.origin)

    def finish(self, next_command: str, **facts: Any) -> None:
        """Completes the run folder, as `RunFolder.finish` says."""
        if not (self.world.is_first or shards_of(self.base.lm)):
            return
        codes = {folder: loading(self.base, folder) for folder in places(self.roles, self.run.adapter).values()}
        if self.world.is_first:  # the others only run the layers with it, as `loading` looks which ones a text calls
            self.run.finish(next_command, self.base.origin.source, codes, rows=self.rows.counts, **facts)


def check_reach(base: Base, rows: StageRows) -> None:
    """Raises a `UserError` if a row is longer than the base can read: beyond it, learned positions end in an error of
    the library, and rotary ones go on, to positions that the base has never seen."""
    reach, count = reach_of(base.lm.config), len(rows.train) + len(rows.held_out)
    all_rows = chain(outlines(rows.train), outlines(rows.held_out))
    if beyond := [row for row in all_rows if reach is not None and len(row) > reach]:
        longest = max(beyond, key=len)
        raise UserError(
            f"model.max_length: {longest.where} has {len(longest):,} tokens, but '{base.spec.base}' can read {reach:,} "
            f"({len(beyond):,} of {count:,} rows are longer); set it to {reach}, which shortens or refuses "
            "such rows"
        )


def _smaller(run: RunFolder) -> str:
    """Settings that take less memory."""
    settings = run.settings
    if isinstance(settings, PPO):
        micro, new_tokens = settings.samples_per_prompt, settings.max_new_tokens // 2
        trunk = f", {run.stage}.value=trunk" if settings.value == "adapter" else ""
        return f"{run.stage}.micro_batch_size={micro}{trunk}, or {run.stage}.max_new_tokens={new_tokens}"
    one = "" if settings.micro_batch_size == 1 else f"{run.stage}.micro_batch_size=1, or else "
    return f"{one}model.max_length={run.recipe.model.max_length // 2}"


def planned_steps(settings: Stage, rows: int) -> int:
    """Steps of the whole run: optimiser steps, counted as `Trainer` counts them; for PPO iterations."""
    if isinstance(settings, PPO):
        batches = rows * settings.epochs * settings.samples_per_prompt / settings.batch_size
    else:
        batches = math.ceil(rows / settings.batch_size) * settings.epochs
    return settings.max_steps or math.ceil(batches)


def few_steps(settings: Stage, steps: int) -> str | None:
    """What to set where so few optimiser steps would hardly teach anything; None where the number was chosen."""
    if settings.max_steps or steps >= FEW_STEPS:
        return None
    fixes = ["epochs=3"] if settings.epochs < 3 else []
    fixes += ["packing=false"] if isinstance(settings, SFT) and settings.packing else []
    micro = 1 if settings.micro_batch_size == "auto" else settings.micro_batch_size
    smaller = max(1, settings.batch_size * steps // FEW_STEPS // micro) * micro  # micro_batch_size must divide it
    if not fixes and smaller < settings.batch_size:
        fixes = [f"batch_size={smaller}"]
    are = "step is" if steps == 1 else "steps are"
    return f"{steps} {are} few: {', '.join(fixes)}" if fixes else None


def rows_at_once(settings: Stage) -> int | Literal["auto"]:
    """The recipe's `micro_batch_size` in rows; PPO counts answers there, and its rows are prompts."""
    size = settings.micro_batch_size
    return size // settings.samples_per_prompt if isinstance(settings, PPO) and size != "auto" else size


def micro_batch(settings: Stage, planned: Plan, longest: int) -> MicroBatchLimit:
    """How much one forward pass takes; `longest` are the tokens of the longest row."""
    size = rows_at_once(settings)
    of_plan = {"tokens": planned.tokens} if size == "auto" else {"pairs": size}
    return MicroBatchLimit(**of_plan, longest=longest)
