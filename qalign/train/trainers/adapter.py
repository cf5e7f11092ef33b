"""What the trainers of all stages share: TRL's config, tried out before anything is loaded; a schedule that counts from
1; the check for NaN; adapters as checkpoints."""

import hashlib
import math
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar, cast, get_type_hints

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments, get_scheduler
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.kto_config import KTOConfig
from trl.trainer.reward_config import RewardConfig
from trl.trainer.sft_config import SFTConfig

from qalign.config.stages import RL_STAGES
from qalign.data.collate import MicroBatchLimit
from qalign.errors import UserError, not_finite, short
from qalign.model.base import Base, Role
from qalign.model.memory.first_step import FirstStep
from qalign.model.memory.shard import shards_of
from qalign.train.processes.world import current
from qalign.train.run_folder import RunFolder

CONFIGS: dict[str, Any] = {"sft": SFTConfig, "reward": RewardConfig, "dpo": DPOConfig, "kto": KTOConfig}
CONFIGS |= dict.fromkeys(RL_STAGES, TrainingArguments)

Built = TypeVar("Built")
Found = TypeVar("Found")


class AdapterTrainer(Trainer):
    """A `Trainer` of one adapter, in the role `trained`, on a base that never changes. It takes the rows of a whole
    optimiser step (the batch size in its config, with gradient accumulation 1) and runs them in micro-batches.

    Attributes:
        micro: what one forward pass takes; changes no number.
        world: the processes that share the micro-batches of a step.
        counters: names of the attributes that a micro-batch changes.
    """

    base: Base
    trained: Role = Role.POLICY
    counters: tuple[str, ...] = ()
    _unread: list[Any]  # figures of micro-batches
    # Losses are divided by what the whole optimiser step has (`num_items_in_batch`), so 8 × 1 and 1 × 8 give the same
    # curve, also in the epoch's last, shorter step.
    loss_is_scaled_for_ga = True

    def take(self, micro: MicroBatchLimit) -> None:
        """Sets what one forward pass takes."""
        self.micro, self._first_step, self.world = micro, FirstStep(micro), current()
        self._first_step.done = shards_of(self.base.lm) is not None  # the others wait in a layer, and can't repeat it

    def micro_batches(self, rows: Sequence[Any]) -> list[Any]:
        """The rows of a step in groups, one for each forward pass."""
        return self.base.micro_batches(rows, self.limit_for(rows))

    def look_ahead(self, rows: Sequence[Any], groups: Sequence[Any]) -> None:
        """Called with the rows of an optimiser step and its micro-batches before the first of these, for losses that
        depend on other rows of the step."""

    def inputs_of(self, rows: Sequence[Any]) -> Any:
        """What `compute_loss` takes for a micro-batch."""
        return rows

    def training_step(self, model, inputs: Any, num_items_in_batch=None) -> Tensor:
        """One optimiser step's loss and gradients, over all processes."""
        total = self.run_step(model, inputs, num_items_in_batch)
        return self.world.summed(total, self._learning, self.accelerator.scaler)

    def _learning(self) -> list[nn.Parameter]:
        return [weight for group in cast(Optimizer, self.optimizer).param_groups for weight in group["params"]]

    def run_step(self, model, inputs: Any, num_items_in_batch=None) -> Tensor:
        """Forward and backward of the step's micro-batches that this process runs, one at a time."""
        one: Any = super().training_step

        def step() -> Tensor:
            total, groups = torch.zeros((), device=self.args.device), self.micro_batches(inputs)
            with self.compute_loss_context_manager():
                self.look_ahead(inputs, groups)
            self.current_gradient_accumulation_steps = len(groups)

            def own() -> Tensor:
                nonlocal total
                for number, rows in self.mine(groups):
                    self.world.check()
                    with own_draws(self.args.seed, self.state.global_step, number):
                        total = total + one(model, self.inputs_of(rows), num_items_in_batch)
                for rows in self.idle(groups):
                    with self.uncounted(), own_draws(self.args.seed, self.state.global_step, len(groups)):
                        one(model, self.inputs_of(rows), math.inf)  # by which the loss is divided
                return total

            return self.agreed(own)

        sizes = [self.base.tokens_taken(row) for row in inputs]
        return self._first_step.run(step, sizes, model.zero_grad, self, self.counters)

    def mine(self, groups: Sequence[Any]) -> list[tuple[int, Any]]:
        """Of the micro-batches of a step those that this process runs, with their numbers."""
        return self.world.mine(groups, self._sizes(groups))

    def idle(self, groups: Sequence[Any]) -> list[list[Any]]:
        """What this process runs once its micro-batches are done, where the base is dealt out and others have more: all
        must enter the layers equally often. It is the smallest row of the step, and counts nothing."""
        if shards_of(self.base.lm) is None:
            return []
        return [[min(chain(*groups), key=self.base.tokens_taken)]] * self.world.idle(self._sizes(groups))

    def _sizes(self, groups: Sequence[Any]) -> list[int]:
        return [sum(map(self.base.tokens_taken, rows)) for rows in groups]

    @contextmanager
    def uncounted(self) -> Generator[None]:
        """Forgets the figures of what runs inside."""
        before = len(self._unread)
        yield
        del self._unread[before:]

    def agreed(self, work: Callable[[], Found]) -> Found:
        """`World.agreed`. Where the base is dealt out, the others wait in a layer and can't be asked: an error ends all
        processes."""
        return work() if shards_of(self.base.lm) else self.world.agreed(work)

    def over_all(self, groups: Sequence[Any], work: Callable[[Any], Found]) -> list[Found]:
        """What `work` gives for each micro-batch, in their order, whichever process runs it."""

        def own() -> list[tuple[int, Found]]:
            found = [(number, work(rows)) for number, rows in self.mine(groups)]
            for rows in self.idle(groups):
                work(rows)
            return found

        return self.world.merged(self.agreed(own))

    def limit_for(self, rows: Sequence[Any]) -> MicroBatchLimit:
        """What one forward pass takes of a step."""
        return self.micro.among(self.world.size, [self.base.tokens_taken(row) for row in rows])

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LRScheduler:
        """The recipe's schedule, counted from 1."""
        if self.lr_scheduler is None:
            used, kind = cast(Optimizer, optimizer or self.optimizer), cast(str, self.args.lr_scheduler_type)
            warmup = self.args.get_warmup_steps(num_training_steps)
            self.lr_scheduler = schedule_from_one(kind, used, warmup, num_training_steps, self.args)
        return self.lr_scheduler

    def compute_loss_context_manager(self) -> ExitStack:
        """Undoes `Trainer`'s `model.train()`, which comes right before it."""
        self.base.train()
        return super().compute_loss_context_manager()

    def check_finite(self, losses: Sequence[float], rows: Sequence[str]) -> None:
        """Raises a `UserError` that names the rows whose loss is not finite; one loss blames all rows."""
        wrong = [not math.isfinite(loss) for loss in losses]
        if any(wrong):
            blamed = rows if len(wrong) == 1 else [row for row, bad in zip(rows, wrong, strict=True) if bad]
            step, what = self.state.global_step, "the held-out loss is"
            if torch.is_grad_enabled():
                step, what = step + 1, "the loss is"
            raise not_finite(f"step {step}", what, blamed)

    def evaluated(self, logs: dict[str, float]) -> dict[str, float]:
        """Logs the figures of the held-out rows, and tells the callbacks; returns the figures."""
        self.log(dict(logs))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, logs)
        return logs

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Checkpoints hold the trained adapter alone, as a plain adapter folder: the base never changes."""
        self.base.save_adapter(self.trained, Path(output_dir or self.args.output_dir or ""))


@contextmanager
def own_draws(seed: int, step: int, number: int) -> Generator[None]:
    """Random numbers of a micro-batch's own, such as its dropout's, whichever process runs it and whatever was drawn
    before. Afterwards the generators are as they were."""
    digest = hashlib.blake2b(f"{seed} {step} {number}".encode(), digest_size=8).digest()
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(int.from_bytes(digest))
        yield


def schedule_from_one(kind: str, optimizer: Optimizer, warmup: int, steps: int, args: TrainingArguments) -> LRScheduler:
    """A schedule of transformers in which the first step is number 1, and not number 0.

    transformers counts from 0, so a warm-up begins with a learning rate of 0: the rows of that step teach nothing, and
    a run of one step leaves the adapter as it was. Here the rate of step k of N is transformers' rate at step k of
    N + 1: no step has the rate 0, the last one included.

    Args:
        warmup: number of the step that has the peak learning rate; 0 for the first.
        args: with `lr_scheduler_kwargs`, further arguments of the schedule; TypeError or ValueError if it takes none
            such.
    """
    options: Any = args.lr_scheduler_kwargs
    schedule = get_scheduler(kind, optimizer, warmup, steps + 1, scheduler_specific_kwargs=options)
    if not isinstance(schedule, LambdaLR):  # it follows the held-out loss, from the peak learning rate
        return schedule
    shares = [lambda step, share=share: share(step + 1) for share in schedule.lr_lambdas]
    return LambdaLR(schedule.optimizer, shares)


def config_values(
    run: RunFolder, *, on_gpu: bool, dtype: torch.dtype = torch.float32, checkpointing: bool = False
) -> dict[str, Any]:
    """The recipe's values for TRL's config of a stage."""
    settings = run.settings
    return {
        "output_dir": str(run.checkpoints.absolute()),  # the state keeps the path of the best checkpoint
        "per_device_train_batch_size": settings.batch_size,  # of which the trainer makes micro-batches
        "per_device_eval_batch_size": settings.batch_size,
        "gradient_accumulation_steps": 1,
        "num_train_epochs": settings.epochs,
        "max_steps": settings.max_steps or -1,
        "train_sampling_strategy": "random",  # TRL's KTO would take the rows in their order
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": settings.scheduler,
        "warmup_steps": settings.warmup_ratio,
        "logging_steps": 1,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,
        "eval_strategy": "steps" if settings.has_held_out and settings.eval_every else "no",
        "eval_steps": settings.eval_every,
        "prediction_loss_only": True,
        "save_strategy": "steps",
        "save_steps": settings.save_every or 0.1,
        "seed": run.recipe.seed,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "use_cpu": not on_gpu,
        "activation_checkpointing": checkpointing,
        "activation_checkpointing_kwargs": {"use_reentrant": False},
        "dataloader_pin_memory": on_gpu,
        "remove_unused_columns": False,
        "disable_tqdm": True,  # RunCallback has its own bar
        "report_to": "none",
        "max_length": run.recipe.model.max_length,
    }


def built(stage: str, trainer: dict[str, Any], build: Callable[[dict[str, Any]], Built]) -> Built:
    """`build(trainer)`, where `trainer` are the values under a stage's `trainer:`. Whatever a library raises about one
    of them, such as a package that is not installed, is a `UserError` that names the key."""
    try:
        return build(trainer)
    except Exception as error:
        if not trainer or not _works(build, {}):
            raise  # not the user's values
        rest = {key: {name: trainer[name] for name in trainer if name != key} for key in trainer}
        keys = [key for key in trainer if _works(build, rest[key])] or list(trainer)
        raise _trainer_error(f"{stage}.trainer: {', '.join(keys)}", error) from None


def _works(build: Callable[[dict[str, Any]], object], trainer: dict[str, Any]) -> bool:
    try:
        build(trainer)
    except Exception:
        return False
    return True


def _trainer_error(where: str, error: Exception) -> UserError:
    kind = "" if isinstance(error, (ValueError, TypeError, ImportError, RuntimeError)) else f"{type(error).__name__}: "
    return UserError(f"{where}: {kind}{' '.join(str(error).split())}")


@contextmanager
def naming_trainer(stage: str, trainer: dict[str, Any]) -> Generator[None]:
    """Names `trainer:` in an error of a `Trainer` that is built, if the recipe has any such values."""
    try:
        yield
    except (ValueError, TypeError, ImportError, KeyError, AttributeError) as error:
        if not trainer:
            raise
        raise _trainer_error(f"{stage}.trainer: {', '.join(trainer)}", error) from None


def try_out(run: RunFolder) -> None:
    """Builds what transformers builds from the values under `trainer:` (config, optimiser, schedule), and steps
    once on one small weight, before a base is loaded and a run replaced. Raises a `UserError` that names the key.
    """
    stage, settings, on_gpu = run.stage, run.settings, torch.cuda.is_available()
    optimiser_only = {"output_dir": "unused", "report_to": "none", "use_cpu": not on_gpu}
    values = optimiser_only if stage in RL_STAGES else config_values(run, on_gpu=on_gpu)

    def build(trainer: dict[str, Any]) -> None:
        args = CONFIGS[stage](**values | trainer)
        args.get_process_log_level()
        keys = ("num_workers", "prefetch_factor", "persistent_workers", "multiprocessing_context")
        loading = {key: getattr(args, f"dataloader_{key}") for key in keys}
        DataLoader(cast(Any, [0]), **loading)  # starts no worker yet
        if args.torch_compile:
            torch.compile(nn.Identity(), backend=args.torch_compile_backend, mode=args.torch_compile_mode)
        weight = nn.Parameter(torch.zeros(8, 8, device="cuda" if on_gpu else "cpu"))
        make, options = Trainer.get_optimizer_cls_and_kwargs(args)
        optimizer = make([weight], **options | {"weight_decay": args.weight_decay})
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
        schedule_from_one(settings.scheduler, optimizer, 0, 2, args)

    hints = get_type_hints(CONFIGS[stage]) if settings.trainer else {}
    for key, value in settings.trainer.items():
        try:
            TypeAdapter(hints[key], config=ConfigDict(arbitrary_types_allowed=True)).validate_python(value, strict=True)
        except ValidationError as error:
            expected = error.errors()[0]["msg"].removeprefix("Input should be ").replace("a valid ", "a ")
            raise UserError(f"{stage}.trainer: {key} is {short(value)}; expected {expected}") from None
    built(stage, settings.trainer, build)
